"""Rewards of a step's rollouts -> advantages.

Departures from TRL: the rollouts of a group need not be adjacent, groups may differ in size, and rewards that are all
equal give advantages of exactly 0, where TRL's mean leaves a rounding error that a division by 1e-4 amplifies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from flexpg.rollouts import Rollouts

ScaleRewards = Literal["group", "batch", "none"]


def group_advantages(
    rollouts: Rollouts, scale_rewards: ScaleRewards = "group", *, group_ids: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Compute each reward's distance from the mean of its group, divided by a standard deviation.

    The standard deviation is TRL's: unbiased, 0 in a group of one, and 1e-4 is added to it. If most rollouts are alone
    in their group, a warning says that their advantages are 0. Pass the rollouts of the whole step, not those of a
    micro-batch: a part of a group has another mean.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; "none" is Dr. GRPO, arXiv 2503.20783; "batch" is arXiv 2508.08221.

    >>> rollouts = Rollouts.from_groups([[1], [2]], [[[3], [4]], [[5]]], rewards=[[1.0, 0.0], [5.0]])
    >>> group_advantages(rollouts, scale_rewards="none")
    tensor([ 0.5000, -0.5000,  0.0000])

    Args:
        rollouts: The step's rollouts.
        scale_rewards: Divide by the standard deviation of the "group", of the "batch" (all N), or not ("none").
        group_ids: [N] int64, a tensor or a list, equal where rollouts are compared with each other; None for the
            rollouts' own groups. The trials of one task, for instance, whose prompts differ.

    Returns:
        [N] advantages in the dtype of the rewards.

    Raises:
        ValueError: If `scale_rewards` is unknown, `group_ids` has another shape, or the rollouts are of a micro-batch
            with a part of a group.
    """
    if rollouts.is_split:
        raise ValueError(
            "rollouts must be those of the step, got a micro-batch with a part of a group, whose mean differs from the "
            "group's; compute advantages before the loop, and use advantages[batch.indices] in it"
        )
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"scale_rewards must be one of {', '.join(get_args(ScaleRewards))}, got {scale_rewards!r}")
    rewards = rollouts.rewards.double()  # the square of a reward may overflow its own dtype
    group_ids = None if group_ids is None else torch.as_tensor(group_ids, device=rewards.device)
    if group_ids is not None and group_ids.shape != rewards.shape:
        raise ValueError(
            f"group_ids must have one entry per rollout, {list(rewards.shape)}, got {list(group_ids.shape)}; with "
            "conversation_rollouts, pass task[conversation]"
        )
    group = (rollouts.group_ids if group_ids is None else group_ids).unique(return_inverse=True)[1]  # [N]
    alone = int((group.bincount() == 1).sum())
    if len(group) > 1 and alone > len(group) / 2:
        warnings.warn(
            f"every group has one rollout, so all {len(group)} advantages are 0; rollouts of a prompt belong in one "
            "group, in Rollouts.from_generate next to one another"
            if alone == len(group)
            else f"{alone} of {len(group)} rollouts are alone in their group, so their advantages are 0; pass "
            "group_ids to compare rollouts whose prompts differ, such as the turns of conversations of one task",
            RuntimeWarning,
            stacklevel=2,
        )
    centered, std = _centered_and_std(rewards, group)
    if scale_rewards == "none":
        return centered.to(rollouts.rewards.dtype)
    if scale_rewards == "batch":
        std = _centered_and_std(rewards, torch.zeros_like(group))[1]
    return (centered / (std + 1e-4)).to(rollouts.rewards.dtype)


def rewards_minus_kl(rollouts: Rollouts, beta: float) -> Tensor:
    """Compute rewards from which the KL divergence from the reference policy is subtracted.

    They penalize the divergence in the rewards instead of in the loss:

        rollouts = replace(rollouts, rewards=rewards_minus_kl(rollouts, beta))

    The estimate of a rollout's divergence is k1, the sum of old_logprobs - ref_logprobs over its loss tokens, which may
    be negative. It is TRL's in RLOOTrainer, whose `beta` is this one; TRL sums over all completion tokens, which
    differs where a tool wrote some.

    Source: RLOO, arXiv 2402.14740.

    >>> from dataclasses import replace
    >>> rollouts = Rollouts.from_groups([[1]], [[[2, 3]]], rewards=[[1.0]])
    >>> logprobs = {"old_logprobs": torch.tensor([[-1.0, -2.0]]), "ref_logprobs": torch.tensor([[-2.0, -1.5]])}
    >>> rewards_minus_kl(replace(rollouts, **logprobs), beta=0.5)
    tensor([0.7500])

    Args:
        rollouts: The step's rollouts, with `old_logprobs` and `ref_logprobs`.
        beta: Weight of the KL divergence, at least 0.

    Returns:
        [N] in the dtype of the rewards.

    Raises:
        ValueError: If log-probabilities are missing or `beta` is negative.
    """
    old, ref = rollouts.old_logprobs, rollouts.ref_logprobs
    if old is None or ref is None:
        raise ValueError("rollouts must have old_logprobs and ref_logprobs for the KL divergence, got None")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    kl = torch.where(rollouts.loss_mask, old.double() - ref.double(), 0.0).sum(1)  # [N]
    return (rollouts.rewards.double() - beta * kl).to(rollouts.rewards.dtype)


def _centered_and_std(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return reward minus the mean of its group, and the group's unbiased standard deviation, both [N]."""
    size = torch.bincount(group)  # [groups]
    zeros = rewards.new_zeros(len(size))
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    above = rewards - lowest[group]  # equal rewards become exact zeros
    mean = zeros.index_add(0, group, above) / size
    centered = above - mean[group]
    variance = zeros.index_add(0, group, centered.square()) / (size - 1).clamp(min=1)
    return centered, variance.sqrt()[group]
