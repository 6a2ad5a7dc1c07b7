"""Group advantages by hand (in test_fuzz.py by a loop), groups without spread, and the KL divergence in rewards."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from flexpg.advantages import ScaleRewards, group_advantages, rewards_minus_kl
from flexpg.packing import pack
from flexpg.rollouts import Rollouts

each_scale = pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))


def tokens(*ids):
    return torch.tensor(ids, dtype=torch.int64)


def advantages_of(rewards, group_ids, *options):
    """Compute advantages of rewards [N] in groups of any ids."""
    rollouts = Rollouts([tokens(1)], [tokens(1)] * len(rewards), torch.zeros_like(group_ids), rewards)
    return group_advantages(rollouts, *options, group_ids=group_ids)


def test_group_advantages_by_hand():
    # Group 0 has 1, 0, 0, 1: mean 0.5, unbiased variance 4 * 0.25 / 3, std 0.57735. Group 1 is a single 5: std 0.
    # The batch 1, 5, 0, 0, 1: mean 1.4, variance (0.16 + 12.96 + 1.96 + 1.96 + 0.16) / 4 = 4.3, std 2.07364.
    completions = [[[2], [2], [2], [2]], [[2]]]
    rollouts = Rollouts.from_groups([[1], [1]], completions, [[1.0, 0, 0, 1], [5.0]]).select([0, 4, 1, 2, 3])
    centered = torch.tensor([0.5, 0, -0.5, -0.5, 0.5])
    assert torch.equal(group_advantages(rollouts, "none"), centered)
    assert torch.allclose(group_advantages(rollouts), centered / (math.sqrt(1 / 3) + 1e-4))
    assert torch.allclose(group_advantages(rollouts, "batch"), centered / (math.sqrt(4.3) + 1e-4))
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none, got 'std'"):
        group_advantages(rollouts, "std")


def test_group_advantages_group_ids_compare_rollouts_of_different_prompts():
    rollouts = Rollouts.from_groups([[1], [1, 2], [3]], [[[4]], [[4]], [[4]]], [[1.0], [0.0], [7.0]])
    with pytest.warns(RuntimeWarning, match="every group has one rollout, so all 3 advantages are 0"):
        assert group_advantages(rollouts, "none").tolist() == [0.0, 0.0, 0.0]
    for group_ids in (tokens(5, 5, 9), [5, 5, 9]):
        assert group_advantages(rollouts, "none", group_ids=group_ids).tolist() == [0.5, -0.5, 0.0]
    with pytest.raises(ValueError, match=r"group_ids must have one entry per rollout, \[3\], got \[2\]"):
        group_advantages(rollouts, group_ids=tokens(5, 5))


def test_group_advantages_of_rollouts_that_are_mostly_alone_warn():
    rollouts = Rollouts.from_groups(
        [[1], [2], [3], [4]], [[[4], [5]], [[4]], [[4]], [[4]]], [[1.0, 0.0], [0], [0], [0]]
    )
    with pytest.warns(RuntimeWarning, match="3 of 5 rollouts are alone in their group, so their advantages are 0"):
        assert group_advantages(rollouts, "none").tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]


@each_scale
def test_group_advantages_equal_rewards_are_exactly_zero(scale_rewards):
    # The mean of seven times 0.7 is not 0.7 in float32: the departure from TRL that advantages.py names.
    assert not advantages_of(torch.full((7,), 0.7), torch.zeros(7, dtype=torch.int64), scale_rewards).any()
    groups = torch.tensor([1, 0, 2, 2])  # groups of one, and one of two
    assert advantages_of(torch.tensor([3.0, 1.0, 2.0, 2.0]), groups, scale_rewards).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages_keep_the_dtype_of_the_rewards(dtype):
    assert advantages_of(torch.ones(2, dtype=dtype), torch.tensor([0, 0])).dtype == dtype


# The KL divergence in rewards


def trl_rloo(rollouts, beta, mask_truncated):
    """Return what TRL's own RLOOTrainer._generate_and_score_completions makes of these rollouts, two per group.

    It is called on an object that has the attributes RLOOConfig would set; 9 is the end-of-sequence token.
    """
    from trl import RLOOTrainer

    prompts = [rollouts.prompts[group] for group in rollouts.group_ids]
    policy, reference = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2))
    tables = {id(policy): rollouts.old_logprobs, id(reference): rollouts.ref_logprobs}
    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(per_device_train_batch_size=len(rollouts), gradient_checkpointing_kwargs=None),
        beta=beta,
        mask_truncated_completions=mask_truncated,
        eos_token_ids=[9],
        pad_to_multiple_of=None,
        num_generations=2,
        reward_weights=torch.ones(1),
        reward_func_names=["one"],
        reward_clip_range=None,
        normalize_advantages=False,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda _: (
            *([list(map(int, row)) for row in rows] for rows in (prompts, rollouts.completions)),
            [""] * len(rollouts),
        ),
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (tables[id(model)], None, None),
        _calculate_rewards=lambda *_: rollouts.rewards[:, None],
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    inputs = [{"prompt": ""} for _ in range(len(rollouts))]
    return RLOOTrainer._generate_and_score_completions(trainer, inputs)


@pytest.mark.parametrize("sharing", [True, False])
def test_group_advantages_of_a_part_of_a_split_group_raise(sharing):
    rollouts = Rollouts.from_groups(
        [[1] * 8, [2]], [[[3] * 9, [4] * 9, [5] * 9], [[6], [7]]], rewards=[[1.0, 0.0, 0.0], [1.0, 0.0]]
    )
    split, whole = [], []
    for batch in pack(rollouts, max_tokens=20, sharing=sharing):
        (split if set(batch.indices.tolist()) & {0, 1, 2} else whole).append(batch.rollouts)
    assert len(split) > 1 and whole
    for part in (*split, *(part.select([0]) for part in split)):
        with pytest.raises(ValueError, match="rollouts must be those of the step, got a micro-batch with a part of a"):
            group_advantages(part)
    expected = group_advantages(rollouts)[3:]
    assert torch.equal(torch.cat([group_advantages(part) for part in whole]), expected)


def test_group_advantages_of_chosen_rollouts_count_as_whole_groups():
    rollouts = Rollouts.from_groups([[1]], [[[3], [4], [5]]], rewards=[[1.0, 0.0, 0.0]])
    (batch,) = pack(rollouts, max_tokens=20, indices=[0, 1])  # the third was truncated, say
    assert torch.equal(group_advantages(batch.rollouts), group_advantages(rollouts.select([0, 1])))


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_rewards_minus_kl_matches_trl_rloo(mask_truncated):
    completions = [[[3, 9], [4, 5, 6]], [[9], [7, 9]]]  # the second is truncated
    rollouts = Rollouts.from_groups([[1, 2], [1]], completions, [[1.0, 0.0], [0.5, 0.25]])
    generator = torch.Generator().manual_seed(0)
    old, ref = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    rollouts = replace(rollouts, rewards=rollouts.rewards.double(), old_logprobs=old, ref_logprobs=ref)
    theirs = trl_rloo(rollouts, 0.3, mask_truncated)
    if mask_truncated:
        is_finished = torch.tensor([completion[-1] == 9 for completion in rollouts.completions])
        rollouts = rollouts.keep_in_loss(is_finished)
    assert torch.equal(rollouts.loss_mask, theirs["completion_mask"].bool())
    advantages = group_advantages(replace(rollouts, rewards=rewards_minus_kl(rollouts, 0.3)), "none")
    # TRL's baseline is the mean of the other rollouts of the group: of two, the distance is twice that from the mean.
    assert torch.allclose(2 * advantages, theirs["advantages"], rtol=1e-12, atol=0)


def test_rewards_minus_kl_ignores_values_outside_the_loss_mask():
    rollouts = Rollouts.from_groups([[1]], [[[2, 3], [4]]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="must have old_logprobs and ref_logprobs"):
        rewards_minus_kl(rollouts, 0.1)
    old, ref = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]]), torch.tensor([[-2.0, -2.5], [-2.0, math.inf]])
    rollouts = replace(rollouts, old_logprobs=old, ref_logprobs=ref)
    assert rewards_minus_kl(rollouts, 0.5).tolist() == [1 - 0.5 * 1.5, 2 + 0.5 * 1.0]
    assert torch.equal(rewards_minus_kl(rollouts, 0.0), rollouts.rewards)
    with pytest.raises(ValueError, match=r"beta must be at least 0, got -0\.1"):
        rewards_minus_kl(rollouts, -0.1)
