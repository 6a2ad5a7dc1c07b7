"""Rollouts: what is derived; group advantages by hand and against a loop."""

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
