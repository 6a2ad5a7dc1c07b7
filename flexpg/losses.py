"""GRPO losses on [N, C] log-probabilities.

Option names, formulas and defaults are those of TRL 1.16. Departures:

- A loss is a sum over rollouts divided by a total. Micro-batches that are given the totals of the whole step have
  losses that sum to the step's loss, so gradient accumulation is exact however the step is cut.
- "bnpo" and "dapo" are therefore the same formula, a mean over all loss tokens. TRL counts them per micro-batch for
  "bnpo" and averages over micro-batches, and per step and rank for "dapo". Without `total_tokens` the tokens of this
  call are counted, which is TRL's "bnpo" before that average.
- "grpo" and "dr_grpo" are averages over micro-batches in TRL, which is the same where all have equally many rollouts.
- A log-probability of the sampler that is NaN is an error, where TRL does not correct for it.
- Metrics are means over loss tokens; with sequence-level ratios TRL takes means over rollouts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
BY_TOKENS = ("dapo", "bnpo", "cispo")  # losses that are divided by loss tokens
BY_MEANS = ("grpo", "sapo")  # losses that are averaged over the tokens of each rollout first
FLAT = 80.0  # a sigmoid's argument from which on it is 1 in float64, and its gradient 0


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    total_tokens: Tensor | int | None = None,
    total_rollouts: int | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: LossType = "dapo",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    importance_sampling_mode: ImportanceSamplingMode = "sequence_mask",
    importance_sampling_clip_min: float | None = None,
    importance_sampling_clip_max: float | None = 3.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    max_completion_length: int | None = None,
    metrics: dict[str, Tensor] | None = None,
) -> Tensor:
    """Compute the clipped policy-gradient loss of GRPO and its variants.

    Per token, with r = exp(logprobs - old_logprobs) and the rollout's advantage A:

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1),    d = ref_logprobs - logprobs

    "dapo" and "bnpo" sum over loss tokens and divide by their number; "grpo" averages over the loss tokens of each
    rollout and then over rollouts; "dr_grpo" sums and divides by rollouts times `max_completion_length`. With
    importance_sampling_level="sequence", r is the exponential of the rollout's mean log-ratio. Two others replace the
    clipped term; "cispo" is summed as "dapo", "sapo" averaged as "grpo":

        "cispo"    -min(r, epsilon_high) A logprobs, with no gradient through r
        "sapo"     -sigmoid(t (r - 1)) 4 / t A, with t = sapo_temperature_pos if A > 0, else sapo_temperature_neg

    Where completions were sampled by other weights or another engine, `sampler_logprobs` corrects for it: the term of
    a token, without that of the KL, is multiplied by w = exp(old_logprobs - sampler_logprobs), for "sequence_*" modes
    the product over the rollout's loss tokens. "*_truncate" clamps w to the clip bounds, "*_mask" sets it to 0 outside.

    Sources: clipping, KL term and "grpo": GRPO, arXiv 2402.03300, eq. 3 and 4; "dr_grpo": arXiv 2503.20783; "dapo" and
    `epsilon_high`: DAPO, arXiv 2503.14476; "sequence": GSPO, arXiv 2507.18071, eq. 7; `delta`: INTELLECT-2, arXiv
    2505.07291; "cispo": MiniMax-M1, arXiv 2506.13585; "sapo": arXiv 2511.20347; the corrections are TRL's for vLLM; the
    KL estimate is k3 of Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.

    >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss = grpo_loss(logprobs, torch.tensor([3.0]), torch.tensor([[True, True]]))
    >>> loss.backward()
    >>> loss.item(), logprobs.grad.tolist()
    (-3.0, [[-1.5, -1.5]])

    Args:
        logprobs: [N, C] float, under the policy that is trained; the only input with a gradient. Like every other
            [N, C] input, it is not read where `loss_mask` is False and may be NaN there.
        advantages: [N] float.
        loss_mask: [N, C] bool, True where a token counts in the loss.
        total_tokens: Loss tokens of the whole step, where this call is one of its micro-batches ("dapo", "bnpo",
            "cispo"); None for those of this call.
        total_rollouts: Rollouts of the whole step, likewise ("grpo", "dr_grpo", "sapo"). With data parallelism that
            averages gradients, pass the totals over all ranks and multiply the loss by the world size.
        old_logprobs: [N, C] float, under the policy at the start of the update; None if it is the current one (r = 1).
        ref_logprobs: [N, C] float, under the reference policy; needed if `beta` > 0.
        sampler_logprobs: [N, C] float, what the sampler reported for its tokens; None if it computes as the policy.
        beta: Weight of the KL term.
        epsilon: How far r may fall below 1, between 0 and 1.
        epsilon_high: How far r may rise above 1; None for `epsilon`. For "cispo" the largest r itself, at least 1.
        delta: The largest r where A < 0, above 1 + `epsilon_high` (two-sided clipping); None for no limit.
        loss_type: What is averaged over, and the term of a token.
        importance_sampling_level: One r per "token" or per "sequence".
        importance_sampling_mode: How `sampler_logprobs` correct.
        importance_sampling_clip_min: The smallest w; None for no limit.
        importance_sampling_clip_max: The largest w; None for no limit.
        sapo_temperature_pos: Temperature of "sapo" where A > 0.
        sapo_temperature_neg: Temperature of "sapo" elsewhere.
        max_completion_length: The sampler's limit in tokens, a constant of the run; needed by "dr_grpo".
        metrics: A dict that is filled with means over the loss tokens of this call, 0-d and detached: "ratio" (r),
            "clip_low" (r < 1 - epsilon and A < 0), "clip_high" (r above its limit and A > 0); with `ref_logprobs`
            "kl"; with `sampler_logprobs` "sampler_ratio" (w, corrected) and "sampler_kl" (from the sampler to the old
            policy, k3).

    Returns:
        The loss, 0-d float32 (float64 for float64 `logprobs`).

    Raises:
        ValueError: If an option is unknown or out of range, shapes differ, `loss_mask` is not bool, the total that
            `loss_type` needs is missing, or there is no loss token and no total.
    """
    for name, value, choices in (
        ("loss_type", loss_type, get_args(LossType)),
        ("importance_sampling_level", importance_sampling_level, get_args(ImportanceSamplingLevel)),
        ("importance_sampling_mode", importance_sampling_mode, get_args(ImportanceSamplingMode)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    _check_shapes(logprobs, advantages, loss_mask, old_logprobs, ref_logprobs, sampler_logprobs)
    if not 0 <= epsilon <= 1 or not 0 <= (high_margin := epsilon if epsilon_high is None else epsilon_high):
        raise ValueError(
            f"epsilon must be between 0 and 1 and epsilon_high at least 0, got {epsilon} and {epsilon_high}"
        )
    if loss_type == "cispo" and not (epsilon_high or 0) >= 1:
        raise ValueError(f"loss_type 'cispo' needs epsilon_high of at least 1, the largest ratio, got {epsilon_high}")
    if delta is not None and (loss_type in ("cispo", "sapo") or not delta > 1 + high_margin):
        raise ValueError(f"delta must be above 1 + epsilon_high = {1 + high_margin}, for a clipped loss, got {delta}")
    smallest, largest = importance_sampling_clip_min or 0.0, importance_sampling_clip_max
    if smallest < 0 or (largest is not None and not largest > smallest):
        raise ValueError(
            f"importance_sampling_clip_max must be above importance_sampling_clip_min, and that at least 0, got "
            f"{largest} and {importance_sampling_clip_min}"
        )
    if not min(sapo_temperature_pos, sapo_temperature_neg) > 0:
        raise ValueError(f"temperatures must be positive, got {sapo_temperature_pos} and {sapo_temperature_neg}")
    if beta < 0 or (beta > 0 and ref_logprobs is None):
        raise ValueError(f"beta must be 0 or, with ref_logprobs, positive, got {beta}")
    total = _total(loss_mask, loss_type, total_tokens, total_rollouts, max_completion_length)

    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    lengths = loss_mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    advantages = advantages.detach().to(dtype)[:, None]  # [N, 1]

    def masked(values: Tensor) -> Tensor:
        """Zero what does not count, before any arithmetic, so that no NaN reaches the gradient."""
        return torch.where(loss_mask, values, 0.0).to(dtype)  # [N, C]

    policy = masked(logprobs)
    old = (policy if old_logprobs is None else masked(old_logprobs)).detach()
    log_ratio = policy - old
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(loss_mask)
    ratio = log_ratio.detach().exp()
    low, high = 1 - epsilon, 1 + high_margin
    clip_low = (ratio < low) & (advantages < 0)
    clip_high = (ratio > high) & (advantages > 0)
    if loss_type == "cispo":
        clip_low, clip_high = torch.zeros_like(loss_mask), (ratio > high_margin) & (advantages > 0)
        losses = -ratio.clamp(max=high_margin) * advantages * policy  # [N, C]
    elif loss_type == "sapo":
        clip_low = clip_high = torch.zeros_like(loss_mask)
        # As tensors: of two numbers, torch.where makes float32.
        good, bad = (advantages.new_tensor(value) for value in (sapo_temperature_pos, sapo_temperature_neg))
        temperature = torch.where(advantages > 0, good, bad)  # [N, 1]
        losses = -_soft_gate(log_ratio, temperature) * advantages
    else:
        is_clipped, bound = clip_low | clip_high | (advantages == 0), ratio.clamp(low, high)
        if delta is not None:
            is_above = (ratio > delta) & (advantages < 0)
            is_clipped, bound = is_clipped | is_above, bound.masked_fill(is_above, delta)
        # min(r A, clip(r) A) without ties: where r equals a bound, torch versions differ in the gradient of clamp.
        # A clipped log-ratio is zeroed before exp, because the gradient of one that overflows would be 0 * inf.
        losses = -torch.where(is_clipped, bound, log_ratio.masked_fill(is_clipped, 0.0).exp()) * advantages
    per_token = {"ratio": ratio, "clip_low": clip_low, "clip_high": clip_high}
    if sampler_logprobs is not None:
        gap = old - masked(sampler_logprobs).detach()
        per_token["sampler_kl"] = gap.expm1() - gap
        limits = importance_sampling_clip_min, importance_sampling_clip_max
        per_token["sampler_ratio"] = _sampler_ratio(gap, importance_sampling_mode, *limits).expand_as(loss_mask)
        losses = losses * per_token["sampler_ratio"]
    if ref_logprobs is not None:
        distance = masked(ref_logprobs).detach() - policy
        per_token["kl"] = distance.expm1() - distance
        if beta > 0:
            losses = losses + beta * per_token["kl"]
    losses = masked(losses)
    if loss_type in BY_MEANS:
        losses = losses / lengths
    if metrics is not None:
        tokens = loss_mask.sum().clamp(min=1)
        metrics |= {name: masked(values.detach()).sum() / tokens for name, values in per_token.items()}
    return (losses.sum() / total).to(dtype)


def _soft_gate(log_ratio: Tensor, temperature: Tensor) -> Tensor:
    """Return sigmoid(t (r - 1)) 4 / t, with a gradient of 0 where it is flat and r may overflow."""
    is_flat = temperature * log_ratio.detach().expm1() > FLAT
    ratio = log_ratio.masked_fill(is_flat, 0.0).exp()
    return torch.where(is_flat, 1.0, torch.sigmoid(temperature * (ratio - 1))) * 4 / temperature


def _sampler_ratio(gap: Tensor, mode: ImportanceSamplingMode, lowest: float | None, highest: float | None) -> Tensor:
    """Return the weight of each token, [N, C], or of each rollout, [N, 1].

    Args:
        gap: [N, C], log-probability under the old policy minus that of the sampler, 0 where nothing counts.
        mode: Per token or rollout, and what happens outside of the limits.
        lowest: The smallest weight, or None.
        highest: The largest weight, or None.
    """
    level, _, action = mode.partition("_")
    ratio = (gap if level == "token" else gap.sum(1, keepdim=True)).exp()
    smallest, largest = 0.0 if lowest is None else lowest, float("inf") if highest is None else highest
    if action == "truncate":
        return ratio.clamp(smallest, largest)
    return ratio.masked_fill((ratio < smallest) | (ratio > largest), 0.0)


def _check_shapes(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, *tables: Tensor | None) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, True where a token counts, got {loss_mask.dtype}")
    shapes = [list(table.shape) for table in (logprobs, loss_mask, *tables) if table is not None]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 2:
        raise ValueError(f"log-probabilities and loss_mask must all be [N, C], got {shapes}")
    if list(advantages.shape) != shapes[0][:1]:
        raise ValueError(f"advantages must be [{shapes[0][0]}], one per rollout, got {list(advantages.shape)}")


def _total(
    loss_mask: Tensor,
    loss_type: LossType,
    total_tokens: Tensor | int | None,
    total_rollouts: int | None,
    max_completion_length: int | None,
) -> Tensor | int:
    """Return what the summed losses are divided by."""
    if loss_type in BY_TOKENS:
        if total_tokens is None and total_rollouts is not None:
            raise ValueError(f"loss_type {loss_type!r} is normalized by loss tokens: pass total_tokens")
        total: Tensor | int = loss_mask.sum() if total_tokens is None else total_tokens
    else:
        if total_rollouts is None and total_tokens is not None:
            raise ValueError(f"loss_type {loss_type!r} is normalized by rollouts: pass total_rollouts")
        total = len(loss_mask) if total_rollouts is None else total_rollouts
        if loss_type == "dr_grpo":
            if max_completion_length is None or max_completion_length < 1:
                raise ValueError(
                    f"loss_type 'dr_grpo' needs max_completion_length, the sampler's limit, got {max_completion_length}"
                )
            total = total * max_completion_length
    if not total > 0:
        raise ValueError("there must be a loss token in the step; skip steps without any")
    return total
