"""Rollouts: what is derived, what is refused; group advantages by hand and against a loop."""

import math
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
import torch

from flexpg.rollouts import Rollouts, ScaleRewards, group_advantages

NAN = math.nan


def tokens(*ids):
    return torch.tensor(ids, dtype=torch.int64)


def fields(**changed):
    """Two prompts and four rollouts of 2, 1, 3 and 1 tokens, the groups interleaved; 0 stands for a would-be pad id."""
    return {
        "prompts": [tokens(0, 5), tokens(7, 0, 0)],
        "completions": [tokens(1, 0), tokens(2), tokens(0, 3, 4), tokens(2)],
        "group_ids": torch.tensor([1, 0, 1, 1]),
        "rewards": torch.tensor([1.0, 0.5, 0.0, 2.0]),
    } | changed


COMPLETION_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
# Rollout 2 holds a tool token; rollout 3 trains nothing.
LOSS_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()


def logprobs():
    """[N, C], poisoned wherever nothing is trained."""
    return torch.arange(-12.0, 0.0).view(4, 3).masked_fill(~LOSS_MASK, NAN)


# ---- what is derived -----------------------------------------------------------------------------------------------


def test_lengths_and_masks_follow_from_the_lists():
    rollouts = Rollouts(**fields())
    assert len(rollouts) == rollouts.num_rollouts == 4 and rollouts.num_groups == 2
    assert torch.equal(rollouts.prompt_lens, torch.tensor([3, 2, 3, 3]))
    assert torch.equal(rollouts.completion_lens, torch.tensor([2, 1, 3, 1]))
    assert torch.equal(rollouts.completion_mask, COMPLETION_MASK)


def test_a_pad_id_inside_a_prompt_or_completion_is_a_token():
    sequences = Rollouts(**fields()).sequences
    assert [s.tolist() for s in sequences] == [[7, 0, 0, 1, 0], [0, 5, 2], [7, 0, 0, 0, 3, 4], [7, 0, 0, 2]]
    assert all(s.dtype == torch.int64 for s in sequences)


def test_every_completion_token_is_trained_unless_a_loss_mask_says_otherwise():
    assert torch.equal(Rollouts(**fields()).trained, COMPLETION_MASK)
    assert torch.equal(Rollouts(**fields(loss_mask=LOSS_MASK)).trained, LOSS_MASK)


def test_logprobs_may_hold_anything_where_nothing_is_trained():
    rollouts = Rollouts(**fields(loss_mask=LOSS_MASK, old_logprobs=logprobs(), ref_logprobs=logprobs().double()))
    assert rollouts.old_logprobs[2, 1].isnan()


def test_one_rollout_of_one_token_is_ordinary():
    rollouts = Rollouts([tokens(3)], [tokens(4)], tokens(0), torch.tensor([1.0]))
    assert rollouts.completion_mask.tolist() == [[True]]
    assert [s.tolist() for s in rollouts.sequences] == [[3, 4]]


def test_rollouts_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Rollouts(**fields()).rewards = torch.zeros(4)


# ---- select --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[3, 1, 0], torch.tensor([3, 1, 0]), (3, 1, 0)])
def test_select_renumbers_groups_and_cuts_to_the_longest_that_remains(indices):
    full = Rollouts(**fields(loss_mask=LOSS_MASK, old_logprobs=logprobs(), ref_logprobs=logprobs() * 2))
    part = full.select(indices)
    assert part.group_ids.tolist() == [0, 1, 0]  # group 1 appears first
    assert [p.tolist() for p in part.prompts] == [[7, 0, 0], [0, 5]]
    assert [s.tolist() for s in part.sequences] == [full.sequences[i].tolist() for i in (3, 1, 0)]
    assert part.rewards.tolist() == [2.0, 0.5, 1.0]
    rows = torch.tensor([3, 1, 0])
    assert torch.equal(part.loss_mask, LOSS_MASK[rows, :2])
    assert torch.equal(part.old_logprobs.nan_to_num(), logprobs()[rows, :2].nan_to_num())
    assert torch.equal(part.ref_logprobs.nan_to_num(), 2 * logprobs()[rows, :2].nan_to_num())


def test_select_drops_groups_that_nothing_is_left_of():
    part = Rollouts(**fields()).select([1])
    assert part.num_groups == 1 and part.prompts[0].tolist() == [0, 5]
    assert part.loss_mask is None and part.completion_mask.shape == (1, 1)


def test_selecting_everything_changes_nothing():
    full = Rollouts(**fields(group_ids=torch.tensor([0, 1, 0, 0])))
    again = full.select(range(4))
    assert again.group_ids.tolist() == [0, 1, 0, 0]
    assert all(torch.equal(*pair) for pair in zip(full.sequences, again.sequences, strict=True))


def test_select_refuses_nothing_and_masks():
    rollouts = Rollouts(**fields())
    with pytest.raises(ValueError, match="needs the index of at least one rollout"):
        rollouts.select([])
    with pytest.raises(ValueError, match=r"indices are torch\.bool \[4\]; give 1-D int64"):
        rollouts.select(rollouts.rewards > 0)
    with pytest.raises(IndexError):
        rollouts.select([4])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"prompts": torch.ones(2, 3).long()},
            "prompts is a Tensor; give a list of 1-D int64 tensors, without padding",
        ),
        ({"completions": [[1, 0], [2], [0, 3, 4], [2]]}, "rollout 0 of 4 is a list; give a 1-D int64 tensor"),
        ({"prompts": [tokens(1), 7]}, "prompt 1 of 2 is a int; give a 1-D int64 tensor"),
        ({"rewards": [1.0, 0.5, 0.0, 2.0]}, "rewards is a list; give a tensor"),
        ({"group_ids": None}, "group_ids is a NoneType; give a tensor"),
    ],
)
def test_only_tensors_come_in(changed, message):
    with pytest.raises(TypeError, match=message):
        Rollouts(**fields(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "prompts is empty; give at least one prompt"),
        ({"completions": []}, "completions is empty; give at least one rollout"),
        (
            {"prompts": [tokens(1), tokens()]},
            "prompt 1 of 2 has no token; its last token predicts the completions' first",
        ),
        (
            {"completions": [tokens(1), tokens(1), tokens(1), tokens()]},
            "rollout 3 of 4 has no completion token; drop it before packing",
        ),
        ({"prompts": [tokens(1), torch.tensor([1.0])]}, r"prompt 1 of 2 is torch\.float32 \[1\]; token ids are 1-D"),
        (
            {"prompts": [tokens(1), torch.ones(1, 2).long()]},
            r"prompt 1 of 2 is torch\.int64 \[1, 2\]; token ids are 1-D",
        ),
        ({"prompts": [tokens(1), tokens(4, -100)]}, "prompt 1 of 2 has token id -100; ids start at 0"),
        (
            {"completions": [tokens(1, 2), tokens(-1), tokens(1, 2, 3), tokens(1)]},
            "rollout 1 of 4 has token id -1; ids start at 0",
        ),
        ({"group_ids": torch.tensor([1, 0, 2, 1])}, "rollout 2 of 4 names group 2; with 2 prompts, groups are 0 to 1"),
        ({"group_ids": torch.tensor([1, 0, 1, -1])}, "rollout 3 of 4 names group -1; with 2 prompts"),
        ({"group_ids": torch.ones(4).long()}, "prompt 0 of 2 has no rollout; drop it and renumber group_ids"),
        ({"rewards": torch.tensor([1.0, NAN, 0, 0])}, "rollout 1 of 4 has reward nan; drop it or give a finite one"),
        ({"rewards": torch.tensor([1.0, 0, -math.inf, 0])}, "rollout 2 of 4 has reward -inf; drop it or give a finite"),
    ],
)
def test_what_is_wrong_is_named_with_its_number(changed, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(**fields(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_ids": tokens(1, 0, 1)}, r"group_ids is torch\.int64 \[3\]; .* need torch\.int64 \[4\]"),
        ({"group_ids": torch.tensor([1.0, 0, 1, 1])}, r"group_ids is torch\.float32 \[4\]; .* need torch\.int64 \[4\]"),
        ({"rewards": torch.zeros(4, 1)}, r"rewards is torch\.float32 \[4, 1\]; .* need torch\.float32 \[4\]"),
        ({"rewards": tokens(1, 0, 0, 1)}, r"rewards is torch\.int64 \[4\]; .* need torch\.float32 \[4\]"),
        ({"loss_mask": LOSS_MASK.int()}, r"loss_mask is torch\.int32 \[4, 3\]; .* need torch\.bool \[4, 3\]"),
        (
            {"loss_mask": LOSS_MASK[:, :2]},
            r"loss_mask is torch\.bool \[4, 2\]; 4 rollouts, the longest of 3 tokens, need torch\.bool \[4, 3\]",
        ),
        ({"old_logprobs": torch.zeros(3, 3)}, r"old_logprobs is torch\.float32 \[3, 3\]; .* \[4, 3\]"),
        (
            {"ref_logprobs": torch.zeros(4, 3).long()},
            r"ref_logprobs is torch\.int64 \[4, 3\]; .* torch\.float32 \[4, 3\]",
        ),
        (
            {"loss_mask": LOSS_MASK | torch.tensor([False, True, False])},
            "loss_mask of rollout 1 of 4 is True at 1; its completion ends after 1 tokens",
        ),
        ({"old_logprobs": logprobs()}, "old_logprobs of rollout 2 of 4 is nan at trained token 1"),
        ({"loss_mask": LOSS_MASK, "ref_logprobs": logprobs() / 0}, "ref_logprobs of rollout 0 of 4 is -inf at trained"),
    ],
)
def test_tables_fit_the_rollouts(changed, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(**fields(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"completions": [tokens(1, 0), tokens(2).to("meta"), tokens(0, 3, 4), tokens(2)]},
            "rollout 1 of 4 is on meta, rollout 0 on cpu; move all to one device",
        ),
        (
            {"completions": [c.to("meta") for c in fields()["completions"]]},
            "completions are on meta, prompts on cpu; move all to one",
        ),
        ({"rewards": torch.zeros(4, device="meta")}, "rewards is on meta, prompts on cpu; move all to one device"),
        ({"loss_mask": LOSS_MASK.to("meta")}, "loss_mask is on meta, prompts on cpu"),
    ],
)
def test_everything_stands_on_one_device(changed, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(**fields(**changed))


# ---- group advantages ----------------------------------------------------------------------------------------------


def test_advantages_are_what_a_hand_gets():
    # Group 0 has 1, 0, 0, 1: mean 0.5, unbiased variance 4 * 0.25 / 3, std 0.57735. Group 1 is 5 alone: std 0.
    # The batch 1, 5, 0, 0, 1: mean 1.4, variance (0.16 + 12.96 + 1.96 + 1.96 + 0.16) / 4 = 4.3, std 2.07364.
    rewards, group_ids = torch.tensor([1.0, 5, 0, 0, 1]), torch.tensor([0, 1, 0, 0, 0])
    centred = torch.tensor([0.5, 0, -0.5, -0.5, 0.5])
    assert torch.equal(group_advantages(rewards, group_ids, "none"), centred)
    assert torch.allclose(group_advantages(rewards, group_ids), centred / (math.sqrt(1 / 3) + 1e-4))
    assert torch.allclose(group_advantages(rewards, group_ids, "batch"), centred / (math.sqrt(4.3) + 1e-4))


def loop_advantages(rewards, group_ids, scale_rewards):
    """TRL's formula, a group at a time."""
    advantages = torch.empty_like(rewards)
    for group in group_ids.unique():
        members = rewards[group_ids == group]
        scaled_by = {"group": members, "batch": rewards}.get(scale_rewards)
        std = 0.0 if scaled_by is None or len(scaled_by) == 1 else scaled_by.std()
        advantages[group_ids == group] = (members - members.mean()) / (1 if scaled_by is None else std + 1e-4)
    return advantages


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))
def test_advantages_agree_with_a_loop_and_with_nothing_else(scale_rewards, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(20, generator=generator, dtype=torch.float64)
    group_ids = 3 * torch.randint(6, (20,), generator=generator)  # uneven, interleaved, with gaps in the numbering
    advantages = group_advantages(rewards, group_ids, scale_rewards)
    assert torch.allclose(advantages, loop_advantages(rewards, group_ids, scale_rewards), rtol=1e-12, atol=1e-13)
    for other in (
        -advantages,
        *(group_advantages(rewards, group_ids, o) for o in {"group", "batch"} - {scale_rewards}),
    ):
        assert not torch.allclose(advantages, other, rtol=1e-3)
    over_all = group_advantages(rewards, torch.zeros_like(group_ids), scale_rewards)
    assert not torch.allclose(advantages, over_all, rtol=1e-3)
    shuffle = torch.randperm(20, generator=generator)
    shuffled = group_advantages(rewards[shuffle], group_ids[shuffle], scale_rewards)
    assert torch.allclose(shuffled, advantages[shuffle], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))
def test_a_group_of_one_has_advantage_zero(scale_rewards):
    assert group_advantages(torch.tensor([3.0]), torch.tensor([0]), scale_rewards).tolist() == [0.0]
    assert group_advantages(torch.tensor([3.0, 1.0]), torch.tensor([1, 0]), scale_rewards).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))
def test_equal_rewards_give_exact_zeros(scale_rewards):
    rewards, group_ids = torch.full((7,), 0.7), torch.zeros(7, dtype=torch.long)
    assert torch.equal(group_advantages(rewards, group_ids, scale_rewards), torch.zeros(7))
    # The plain mean does not: this is the departure from TRL that the head of rollouts.py names.
    assert loop_advantages(rewards, group_ids, scale_rewards).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_keep_the_dtype_of_the_rewards(dtype):
    assert group_advantages(torch.ones(2, dtype=dtype), torch.tensor([0, 0])).dtype == dtype


def test_unknown_scaling_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="scale_rewards is 'std'; allowed are group, batch, none"):
        group_advantages(torch.ones(2), torch.zeros(2).long(), "std")
    with pytest.raises(ValueError, match=r"rewards are \[2, 1\], group_ids \[2\]; both must be \[N\]"):
        group_advantages(torch.ones(2, 1), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"rewards are torch\.int64; give floats"):
        group_advantages(torch.tensor([1, 0]), torch.zeros(2).long())
