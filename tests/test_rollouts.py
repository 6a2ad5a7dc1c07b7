"""Rollouts: constructors, derived fields and selection."""

import math

import numpy as np
import pytest
import torch

from flexpg.advantages import group_advantages
from flexpg.rollouts import Rollouts

NAN = math.nan


def tokens(*ids):
    return torch.tensor(ids, dtype=torch.int64)


def fields(**changed):
    """Return two prompts and four rollouts of 2, 1, 3 and 1 tokens, groups interleaved; 0 is a usual padding id."""
    return {
        "prompts": [tokens(0, 5), tokens(7, 0, 0)],
        "completions": [tokens(1, 0), tokens(2), tokens(0, 3, 4), tokens(2)],
        "group_ids": torch.tensor([1, 0, 1, 1]),
        "rewards": torch.tensor([1.0, 0.5, 0.0, 2.0]),
    } | changed


COMPLETION_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
# Rollout 2 has a tool token; rollout 3 has no loss token.
LOSS_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()


def logprobs():
    """Return [N, C], NaN wherever the loss mask is False."""
    return torch.arange(-12.0, 0.0).view(4, 3).masked_fill(~LOSS_MASK, NAN)


# Derived fields


def test_rollouts_lengths_and_masks_follow_from_the_lists():
    rollouts = Rollouts(**fields())
    assert len(rollouts) == 4 and rollouts.num_groups == 2
    assert rollouts.prompt_lens.tolist() == [3, 2, 3, 3]
    assert rollouts.completion_lens.tolist() == [2, 1, 3, 1]
    assert torch.equal(rollouts.completion_mask, COMPLETION_MASK)
    assert torch.equal(rollouts.loss_mask, COMPLETION_MASK) and rollouts.num_loss_tokens == 7
    masked = Rollouts(**fields(loss_mask=LOSS_MASK))
    assert torch.equal(masked.loss_mask, LOSS_MASK) and masked.num_loss_tokens == 5


def test_rollouts_padding_id_inside_a_prompt_or_completion_is_a_token():
    rollouts = Rollouts(**fields())
    sequences = [s.tolist() for s in rollouts.sequences]
    assert sequences == [[7, 0, 0, 1, 0], [0, 5, 2], [7, 0, 0, 0, 3, 4], [7, 0, 0, 2]]
    assert [rollouts.tree.tokens[nodes[nodes >= 0]].tolist() for nodes in rollouts.tree.node] == sequences


def test_rollouts_logprobs_may_be_nan_outside_the_loss_mask():
    rollouts = Rollouts(**fields(loss_mask=LOSS_MASK, old_logprobs=logprobs(), ref_logprobs=logprobs().double()))
    assert rollouts.old_logprobs[2, 1].isnan()


def test_rollouts_repr_is_one_line_without_tensors():
    rollouts = Rollouts.from_groups([[1] * 3000], [[[2] * 500] * 4], [[1.0] * 4])
    assert repr(rollouts) == (
        "Rollouts(4 rollouts of 1 prompts, 3,000 prompt tokens, 2,000 completion tokens, 2,000 in the loss, device=cpu)"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [tokens(1), tokens()]}, r"prompts\[1\] must be"),
        (
            {"completions": [tokens(1, 0), tokens(-100), tokens(0), tokens(2)]},
            r"completions must hold token ids >= 0, got -100",
        ),
        ({"group_ids": torch.tensor([1, 0, 1])}, r"group_ids must be \[4\]"),
        ({"group_ids": torch.tensor([1, 0, 1, 2])}, "group_ids must name each of 2 prompts, and no other"),
        ({"group_ids": torch.tensor([1, 1, 1, 1])}, "group_ids must name each of 2 prompts"),
        ({"rewards": torch.ones(4, 1)}, r"rewards must be \[4\]"),
        ({"rewards": torch.tensor([1, NAN, 0, 0])}, "rewards must be finite, got nan at rollout 1"),
        ({"rewards": torch.tensor([1, 0, 0, 1])}, "rewards must be floating point, got torch.int64"),
        ({"loss_mask": COMPLETION_MASK.long()}, "loss_mask must be bool"),
        ({"loss_mask": torch.ones(4, 3).bool()}, "loss_mask must be False past .* token 2 of rollout 0"),
        ({"loss_mask": COMPLETION_MASK[:, :2]}, r"loss_mask must be \[4, 3\]"),
        ({"old_logprobs": logprobs()}, "old_logprobs must be finite, got nan at rollout 2, token 1"),
        ({"ref_logprobs": torch.zeros(4, 4)}, r"ref_logprobs must be \[4, 3\]"),
    ],
    ids=str,
)
def test_rollouts_inconsistent_fields_raise(changed, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(**fields(**changed))


# from_groups

PROMPTS, COMPLETIONS, REWARDS = [[1, 2], [3]], [[[4], [5, 6]], [[7, 8]]], [[1.0, 0.0], [0.5]]
MASKS = [[[True], [False, True]], [[True, True]]]


def assert_is_from_groups(rollouts):
    assert [s.tolist() for s in rollouts.sequences] == [[1, 2, 4], [1, 2, 5, 6], [3, 7, 8]]
    assert rollouts.prompt_lens.tolist() == [2, 2, 1] and rollouts.group_ids.tolist() == [0, 0, 1]
    assert rollouts.rewards.tolist() == [1.0, 0.0, 0.5]
    assert all(s.dtype == torch.int64 for s in rollouts.sequences)


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_from_groups_accepts_lists_tuples_arrays_and_tensors(convert):
    completions = [[convert(completion) for completion in group] for group in COMPLETIONS]
    rewards, masks = (
        [convert(group) for group in REWARDS],
        [[convert(completion) for completion in group] for group in MASKS],
    )
    rollouts = Rollouts.from_groups([convert(p) for p in PROMPTS], completions, rewards, loss_mask=masks)
    assert_is_from_groups(rollouts)
    assert rollouts.loss_mask.tolist() == [[True, False], [False, True], [True, True]]
    assert_is_from_groups(Rollouts.from_groups(tuple(map(convert, PROMPTS)), tuple(map(tuple, completions)), rewards))


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (list, torch.float32),
        (torch.tensor, torch.float32),
        (np.array, torch.float64),
        (lambda group: torch.tensor(group, dtype=torch.float64), torch.float64),
    ],
)
def test_from_groups_rewards_of_float64_keep_their_dtype(convert, dtype):
    rewards = [[1e8 + 1, 1e8], [0.5]]
    found = Rollouts.from_groups(PROMPTS, COMPLETIONS, [convert(group) for group in rewards]).rewards
    assert torch.equal(found, torch.tensor([*rewards[0], *rewards[1]], dtype=dtype))


@pytest.mark.parametrize("value", [0.25, NAN, -100, 2])
def test_from_groups_loss_mask_with_another_value_raises(value):
    masks = [[[1], [0, value]], [[True, True]]]
    with pytest.raises(ValueError, match=r"loss_mask must be True or False, or 1 or 0, for each token, got"):
        Rollouts.from_groups(PROMPTS, COMPLETIONS, REWARDS, loss_mask=masks)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int32"])
def test_from_groups_accepts_arrays_of_every_integer_dtype(dtype):
    completions = [[np.array(completion, dtype=dtype) for completion in group] for group in COMPLETIONS]
    prompts = [np.array(prompt, dtype=dtype) for prompt in PROMPTS]
    assert_is_from_groups(Rollouts.from_groups(prompts, completions, REWARDS))


def test_from_groups_copies_what_it_is_given():
    prompts, completions = np.array([[1, 2]]), torch.tensor([[[3], [4]]])
    rewards = np.array([[1.0, 0.0]])
    rollouts = Rollouts.from_groups(prompts, completions, rewards)
    for given in (prompts, completions, rewards):
        given[:] = 9
    assert [sequence.tolist() for sequence in rollouts.sequences] == [[1, 2, 3], [1, 2, 4]]
    assert rollouts.rewards.tolist() == [1.0, 0.0]


def test_from_groups_accepts_rectangular_arrays_and_tensors(device):
    for convert in (np.array, lambda x: torch.tensor(x, device=device)):
        rollouts = Rollouts.from_groups(convert([[1, 2], [3, 4]]), convert([[[5], [6]]] * 2), convert([[1, 0], [2, 3]]))
        assert [s.tolist() for s in rollouts.sequences] == [[1, 2, 5], [1, 2, 6], [3, 4, 5], [3, 4, 6]]
        assert rollouts.rewards.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert rollouts.rewards.device.type == rollouts.loss_mask.device.type == rollouts.tree.end.device.type == device


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": [1.0, 0.0, 0.5]}, ValueError, "rewards must have one list per prompt, got numbers"),
        ({"rewards": [[1.0], [0.0, 0.5]]}, ValueError, "completions and rewards must have one list per prompt"),
        ({"rewards": [[1.0, 0.0]]}, ValueError, "completions and rewards must have one list per prompt"),
        ({"completions": COMPLETIONS[:1]}, ValueError, "completions and rewards must have one list per prompt"),
        ({"completions": [[[4], [5, 6]], []], "rewards": [[1.0, 0.0], []]}, ValueError, "group_ids must name each"),
        ({"completions": [[[4], []], [[7, 8]]]}, ValueError, r"completions\[0\]\[1\] must be 1-D with at least one"),
        ({"prompts": [[1, 2], [-100]]}, ValueError, r"prompts\[1\] must hold token ids >= 0, got -100; leave padding"),
        ({"prompts": [[1.0, 2.0], [3]]}, TypeError, r"prompts\[0\] must hold integer token ids"),
        ({"prompts": ["What is 1 + 1?", "2?"]}, TypeError, r"prompts\[0\] must be token ids, got the string"),
        ({"prompts": [{1, 2}, [3]]}, TypeError, r"prompts\[0\] must be a list, an array or a tensor .* got a set"),
        ({"prompts": [["1", "2"], [3]]}, TypeError, r"prompts\[0\] must be token ids, got a list of strings; convert"),
        ({"prompts": [{"input_ids": [1, 2]}, [3]]}, TypeError, r"prompts\[0\] must be token ids, got a dict; pass its"),
        ({"loss_mask": [[[True], [True]], [[True, True]]]}, ValueError, "loss_mask must have one value per completion"),
        ({"loss_mask": [[[True], [True, True]]]}, ValueError, "loss_mask must have one value per completion"),
    ],
    ids=str,
)
def test_from_groups_lists_that_do_not_match_raise(changed, error, message):
    with pytest.raises(error, match=message):
        Rollouts.from_groups(**{"prompts": PROMPTS, "completions": COMPLETIONS, "rewards": REWARDS} | changed)


def test_num_loss_tokens_follows_the_loss_mask_and_not_the_completion_mask():
    rollouts = Rollouts(**fields())
    assert rollouts.num_loss_tokens == 7
    rollouts.loss_mask[0] = False
    assert rollouts.num_loss_tokens == int(rollouts.loss_mask.sum()) < 7 == int(rollouts.completion_mask.sum())


# from_generate

PAD, EOS, OTHER_EOS = 0, 2, 3
# Two prompts with padding on the left; both contain padding and end-of-sequence ids as ordinary tokens.
ATTENTION_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GENERATED = torch.tensor(
    [
        [PAD, PAD, EOS, 5, PAD, 7, EOS, PAD, PAD],
        [PAD, PAD, EOS, 5, PAD, 8, PAD, 9, 9],  # not finished; the padding id is sampled
        [PAD, EOS, 6, 6, 6, EOS, EOS, 4, PAD],
        [PAD, EOS, 6, 6, 6, 7, OTHER_EOS, EOS, PAD],
    ]
)


@pytest.mark.parametrize(
    ("eos_token_id", "completions"),
    [
        (EOS, [[7, EOS], [8, PAD, 9, 9], [EOS], [7, OTHER_EOS, EOS]]),
        ([EOS, OTHER_EOS], [[7, EOS], [8, PAD, 9, 9], [EOS], [7, OTHER_EOS]]),
        (torch.tensor(EOS), [[7, EOS], [8, PAD, 9, 9], [EOS], [7, OTHER_EOS, EOS]]),
        (None, [row[5:].tolist() for row in GENERATED]),
    ],
)
def test_from_generate_cuts_left_padding_and_keeps_the_first_stop_token(eos_token_id, completions):
    rollouts = Rollouts.from_generate(GENERATED, ATTENTION_MASK, [1.0, 0.0, 2.0, 3.0], eos_token_id=eos_token_id)
    assert [prompt.tolist() for prompt in rollouts.prompts] == [[EOS, 5, PAD], [PAD, EOS, 6, 6, 6]]
    assert [completion.tolist() for completion in rollouts.completions] == completions
    assert rollouts.group_ids.tolist() == [0, 0, 1, 1] and rollouts.rewards.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert rollouts.num_loss_tokens == sum(map(len, completions))


def test_from_generate_copies_what_it_is_given():
    sequences, rewards = torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.tensor([1.0, 0.0])
    rollouts = Rollouts.from_generate(sequences, torch.ones(1, 2), rewards, eos_token_id=None)
    sequences[:], rewards[:] = 9, 9
    assert [sequence.tolist() for sequence in rollouts.sequences] == [[1, 2, 3], [1, 2, 4]]
    assert rollouts.rewards.tolist() == [1.0, 0.0]


def test_from_generate_completion_lens_end_completions():
    for lengths in (torch.tensor([1, 2, 3, 1]), [1, 2, 3, 1]):
        rollouts = Rollouts.from_generate(
            GENERATED, ATTENTION_MASK, torch.ones(4), eos_token_id=EOS, completion_lens=lengths
        )
        assert rollouts.completion_lens.tolist() == [1, 2, 3, 1]


def test_from_generate_one_completion_per_prompt():
    rollouts = Rollouts.from_generate(GENERATED[::2], ATTENTION_MASK, torch.tensor([1.0, 2.0]), eos_token_id=EOS)
    assert [s.tolist() for s in rollouts.sequences] == [[EOS, 5, PAD, 7, EOS], [PAD, EOS, 6, 6, 6, EOS]]


def test_from_generate_repeated_attention_mask_gives_the_same_groups():
    repeated = Rollouts.from_generate(
        GENERATED, ATTENTION_MASK.repeat_interleave(2, 0), torch.ones(4), eos_token_id=EOS
    )
    once = Rollouts.from_generate(GENERATED, ATTENTION_MASK, torch.ones(4), eos_token_id=EOS)
    assert repeated.group_ids.tolist() == once.group_ids.tolist() == [0, 0, 1, 1]
    assert [p.tolist() for p in repeated.prompts] == [p.tolist() for p in once.prompts]


def test_from_generate_rows_that_are_no_multiple_of_the_prompts_raise():
    for sequences, rewards in ((GENERATED[:3], [1.0] * 3), (GENERATED, [1.0] * 2), (GENERATED, torch.ones(2, 2))):
        with pytest.raises(ValueError, match="sequences and rewards must have G rows for each of 2 prompts"):
            Rollouts.from_generate(sequences, ATTENTION_MASK, rewards, eos_token_id=None)


@pytest.mark.parametrize(
    ("sequences", "attention_mask", "error", "message"),
    [
        (GENERATED[:, 5:], ATTENTION_MASK, ValueError, "longer than the prompts .*, got 4 columns for 5"),
        (GENERATED, GENERATED != PAD, ValueError, "longer than the prompts .*, got 9 columns for 9"),
        ({"sequences": GENERATED}, ATTENTION_MASK, TypeError, "must be a tensor, got a dict; if generate"),
    ],
    ids=["completions_only", "mask_of_sequences", "return_dict_in_generate"],
)
def test_from_generate_not_whole_rows_raise(sequences, attention_mask, error, message):
    with pytest.raises(error, match=message):
        Rollouts.from_generate(sequences, attention_mask, torch.ones(4), eos_token_id=EOS)


@pytest.mark.parametrize(
    ("sequences", "row", "first"),
    [
        (GENERATED[[0, 2, 1, 3]], 1, 0),  # prompts alternate, as after input_ids.repeat(G, 1)
        (GENERATED[:, 5:].repeat(1, 2), 1, 0),  # completions without their prompts
        (torch.cat([GENERATED[:3], GENERATED[3:] + 1]), 3, 2),
    ],
)
def test_from_generate_rows_of_a_prompt_that_differ_raise(sequences, row, first):
    with pytest.raises(ValueError, match=f"the same prompt in .* got another in row {row} than in row {first}"):
        Rollouts.from_generate(sequences, ATTENTION_MASK, torch.ones(4), eos_token_id=None)


def test_from_generate_padding_of_a_prompt_may_differ_between_its_rows():
    sequences = GENERATED.clone()
    sequences[1, 0] = 9
    rollouts = Rollouts.from_generate(sequences, ATTENTION_MASK, torch.ones(4), eos_token_id=EOS)
    assert [prompt.tolist() for prompt in rollouts.prompts] == [[EOS, 5, PAD], [PAD, EOS, 6, 6, 6]]


# select


@pytest.mark.parametrize("indices", [[3, 1, 0], torch.tensor([3, 1, 0]), (3, 1, 0)], ids=["list", "tensor", "tuple"])
def test_select_renumbers_groups_and_cuts_to_the_longest(indices):
    tables = {"old_logprobs": logprobs(), "ref_logprobs": logprobs() * 2, "sampler_logprobs": logprobs() * 3}
    full = Rollouts(**fields(loss_mask=LOSS_MASK, **tables))
    part = full.select(indices)
    assert part.group_ids.tolist() == [0, 1, 0]  # group 1 appears first
    assert [p.tolist() for p in part.prompts] == [[7, 0, 0], [0, 5]]
    assert [s.tolist() for s in part.sequences] == [full.sequences[i].tolist() for i in (3, 1, 0)]
    assert part.rewards.tolist() == [2.0, 0.5, 1.0]
    rows = torch.tensor([3, 1, 0])
    assert torch.equal(part.loss_mask, LOSS_MASK[rows, :2])
    for name, table in tables.items():
        assert torch.equal(getattr(part, name).nan_to_num(), table[rows, :2].nan_to_num())


def test_select_drops_prompts_without_rollouts():
    part = Rollouts(**fields()).select([1])
    assert part.num_groups == 1 and part.prompts[0].tolist() == [0, 5] and part.loss_mask.tolist() == [[True]]
    with pytest.raises(ValueError, match="indices must be 1-D int64"):
        Rollouts(**fields()).select(torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match=r"not empty, got torch.int64 \[0\]"):
        Rollouts(**fields()).select(torch.tensor([], dtype=torch.int64))


def test_keep_in_loss_empties_the_loss_masks_of_other_rollouts():
    full = Rollouts(**fields(loss_mask=LOSS_MASK, old_logprobs=logprobs()))
    kept = full.keep_in_loss(torch.tensor([False, True, True, True]))
    assert torch.equal(kept.loss_mask, LOSS_MASK & torch.tensor([[False], [True], [True], [True]]))
    assert torch.equal(kept.rewards, full.rewards) and kept.completions == full.completions
    assert torch.equal(group_advantages(kept), group_advantages(full))  # its reward still counts
    for counts in (torch.tensor([0, 2]), torch.ones(3, dtype=torch.bool), torch.ones_like(LOSS_MASK)):
        with pytest.raises(ValueError, match=r"counts must be bool \[4\], got"):
            full.keep_in_loss(counts)


@pytest.mark.parametrize("lens", [[4], [0], [-1], [1, 1]], ids=str)
def test_from_generate_completion_lens_out_of_range_raise(lens):
    with pytest.raises(ValueError, match="completion_lens must be 1 numbers from 1 to 3, without prompts, got"):
        Rollouts.from_generate(
            torch.tensor([[5, 6, 7, 2, 0]]), torch.tensor([[1, 1]]), [0.0], eos_token_id=2, completion_lens=lens
        )


def test_from_generate_padding_on_the_right_raises():
    with pytest.raises(ValueError, match="attention_mask must end with 1 in every row, got padding on the right"):
        Rollouts.from_generate(torch.tensor([[5, 6, 0, 7, 2]]), torch.tensor([[1, 1, 0]]), [0.0], eos_token_id=2)


@pytest.mark.parametrize("reward", [None, "1"], ids=str)
def test_rewards_of_another_type_raise(reward):
    with pytest.raises(TypeError, match=r"rewards must be numbers, got .* at rollout 1; leave the rollout out"):
        Rollouts.from_groups([[1]], [[[2], [3]]], [[0.0, reward]])
