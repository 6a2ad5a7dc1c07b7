"""The term of a token in each type of `grpo_loss`, and the correction for a sampler that is not the trainer.

Tensors are [N, C] and 0 where no loss token is; advantages are [N, 1]. A term is returned with per-token values for
the metrics, if it has any.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
FLAT = 80.0  # from here on, sigmoid(x) is 1 in float64, and its gradient 0
LOG_WEIGHTS = (math.log(1e-8), 20.0)  # where "vespo" clamps the logarithm of a rollout's weight


class Gamma(NamedTuple):
    """The exponent k and the decay lambda of "vespo"."""

    k: float
    decay: float


def clipped_term(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -min(r A, clip(r, low, high) A), where r is at most `delta` for A < 0."""
    ratio = log_ratio.detach().exp()
    clip_low = (ratio < low) & (advantages < 0)
    clip_high = (ratio > high) & (advantages > 0)
    is_clipped, bound = clip_low | clip_high | (advantages == 0), ratio.clamp(low, high)
    if delta is not None:
        is_above = (ratio > delta) & (advantages < 0)
        is_clipped, bound = is_clipped | is_above, bound.masked_fill(is_above, delta)
    # min(r A, clip(r) A) without ties: where r equals a bound, torch versions differ in the gradient of clamp.
    # A clipped log-ratio is zeroed before exp, because the gradient of one that overflows would be 0 * inf.
    losses = -torch.where(is_clipped, bound, log_ratio.masked_fill(is_clipped, 0.0).exp()) * advantages
    return losses, {"clip_low": clip_low, "clip_high": clip_high}


def cispo_term(
    policy: Tensor, log_ratio: Tensor, advantages: Tensor, largest: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -min(r, largest) A logprobs, with no gradient through r."""
    ratio = log_ratio.detach().exp()
    losses = -ratio.clamp(max=largest) * advantages * policy
    return losses, {"clip_high": (ratio > largest) & (advantages > 0)}


def sapo_term(log_ratio: Tensor, advantages: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """Return -sigmoid(t (r - 1)) 4 / t A, with a gradient of 0 where it is flat and r may overflow."""
    # As tensors: of two numbers, torch.where makes float32.
    good, bad = (advantages.new_tensor(value) for value in (temperature_pos, temperature_neg))
    temperature = torch.where(advantages > 0, good, bad)  # [N, 1]
    is_flat = temperature * log_ratio.detach().expm1() > FLAT
    ratio = log_ratio.masked_fill(is_flat, 0.0).exp()
    gate = torch.where(is_flat, 1.0, torch.sigmoid(temperature * (ratio - 1))) * 4 / temperature
    return -gate * advantages


def vespo_term(
    policy: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    log_sampler_ratio: Tensor | None,
    positive: Gamma,
    negative: Gamma,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -phi A logprobs, with no gradient through phi = e^lambda w^k e^(-lambda w).

    Args:
        policy: [N, C], log-probabilities with a gradient.
        log_ratio: [N, C], of the policy to the old policy, token by token.
        advantages: [N, 1].
        log_sampler_ratio: [N, C], of the old policy to the sampler, corrected; None if they are the same.
        positive: k and lambda where A >= 0.
        negative: k and lambda where A < 0.
    """
    lowest, highest = LOG_WEIGHTS
    log_w = log_ratio.detach().clamp(-highest, highest).sum(1, keepdim=True)  # [N, 1]
    if log_sampler_ratio is not None:
        log_w = log_w + log_sampler_ratio.clamp(lowest, highest).sum(1, keepdim=True)
    log_w = log_w.clamp(lowest, highest)
    good, bad = ((side.decay + side.k * log_w - side.decay * log_w.exp()).exp() for side in (positive, negative))
    phi = torch.where(advantages >= 0, good, bad)  # [N, 1]
    return -phi * advantages * policy, {"vespo_weight": phi.expand_as(policy)}


def sampler_ratio(
    gap: Tensor, mode: ImportanceSamplingMode, lowest: float | None, highest: float | None
) -> tuple[Tensor, Tensor]:
    """Return the weight of each token, [N, C], and what it was before it was truncated or masked.

    Args:
        gap: [N, C], log-probability under the old policy minus that of the sampler, 0 where nothing counts.
        mode: Per token or rollout, and what happens outside of the limits.
        lowest: The smallest weight, or None.
        highest: The largest weight, or None.
    """
    level, _, action = mode.partition("_")
    ratio = (gap if level == "token" else gap.sum(1, keepdim=True).expand_as(gap)).exp()
    smallest, largest = 0.0 if lowest is None else lowest, float("inf") if highest is None else highest
    if action == "truncate":
        return ratio.clamp(smallest, largest), ratio
    return ratio.masked_fill((ratio < smallest) | (ratio > largest), 0.0), ratio
