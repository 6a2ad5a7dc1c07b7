"""GRPO losses on [N, C] log-probabilities; `flexpg.loss_terms` has the term of a token in each of them.

Option names, formulas and defaults are those of TRL 1.16. Departures:

- A loss is a sum over rollouts divided by a total. Micro-batches that are given the totals of the whole step have
  losses that sum to the step's loss, so gradient accumulation is exact however the step is cut.
- "bnpo" and "dapo" are therefore the same formula, a mean over all loss tokens. TRL counts them per micro-batch for
  "bnpo" and averages over micro-batches, and per step and rank for "dapo". Without `total_tokens` the tokens of this
  call are counted, which is TRL's "bnpo" before that average.
- "grpo" and "dr_grpo" are averages over micro-batches in TRL, which is the same where all have equally many rollouts.
- The entropy of the bonus is a mean over the step's loss tokens; TRL averages the means of micro-batches.
- A log-probability of the sampler that is NaN is an error, where TRL does not correct for it.
- Metrics are means over loss tokens; with sequence-level ratios TRL takes means over rollouts.
"""

from __future__ import annotations

from typing import Literal, assert_never, get_args

import torch
from torch import Tensor

from flexpg.loss_terms import (
    Gamma,
    ImportanceSamplingMode,
    cispo_term,
    clipped_term,
    sampler_ratio,
    sapo_term,
    vespo_term,
)

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
BY_TOKENS = ("dapo", "bnpo", "cispo", "vespo")  # losses that are divided by loss tokens
BY_MEANS = ("grpo", "sapo")  # losses that are averaged over the tokens of each rollout first
UNCLIPPED = ("cispo", "sapo", "vespo")  # losses with another term than the clipped one


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
    entropies: Tensor | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
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
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    max_completion_length: int | None = None,
    metrics: dict[str, Tensor] | None = None,
) -> Tensor:
    """Compute the clipped policy-gradient loss of GRPO and its variants.

    Per token, with r = exp(logprobs - old_logprobs) and the rollout's advantage A:

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1),    d = ref_logprobs - logprobs

    "dapo" and "bnpo" sum over loss tokens and divide by their number; "grpo" averages over the loss tokens of each
    rollout and then over rollouts; "dr_grpo" sums and divides by rollouts times `max_completion_length`. With
    importance_sampling_level="sequence", r is the exponential of the rollout's mean log-ratio. Three others replace
    the clipped term; "cispo" and "vespo" are summed as "dapo", "sapo" averaged as "grpo":

        "cispo"    -min(r, epsilon_high) A logprobs, with no gradient through r
        "sapo"     -sigmoid(t (r - 1)) 4 / t A, with t = sapo_temperature_pos if A > 0, else sapo_temperature_neg
        "vespo"    -exp(lambda) w^k exp(-lambda w) A logprobs, with no gradient through w, the product of the rollout's
                   r, with k, lambda = vespo_k_pos, vespo_lambda_pos if A >= 0, else vespo_k_neg, vespo_lambda_neg

    Where completions were sampled by other weights or another engine, `sampler_logprobs` corrects for it: the term of
    a token, without that of the KL, is multiplied by w = exp(old_logprobs - sampler_logprobs), for `"sequence_*"` modes
    the product over the rollout's loss tokens. `"*_truncate"` clamps w to the clip bounds, `"*_mask"` sets it to 0
    outside. "vespo" multiplies these w into its own instead, which needs a `"token_*"` mode.

    For any `loss_type`, `entropy_coef` times the mean of `entropies` over loss tokens is subtracted.

    Sources: clipping, KL term and "grpo": GRPO, arXiv 2402.03300, eq. 3 and 4; "dr_grpo": arXiv 2503.20783; "dapo" and
    `epsilon_high`: DAPO, arXiv 2503.14476; "sequence": GSPO, arXiv 2507.18071, eq. 7; `delta`: INTELLECT-2, arXiv
    2505.07291; "cispo": MiniMax-M1, arXiv 2506.13585; "sapo": arXiv 2511.20347; "vespo": arXiv 2602.10693, with TRL's
    limits of 1e-8 and exp(20) for w; the corrections are TRL's for vLLM; the KL estimate is k3 of Schulman,
    "Approximating KL Divergence", joschu.net/blog/kl-approx.html.

    >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss = grpo_loss(logprobs, torch.tensor([3.0]), torch.tensor([[True, True]]))
    >>> loss.backward()
    >>> loss.item(), logprobs.grad.tolist()
    (-3.0, [[-1.5, -1.5]])

    Args:
        logprobs: [N, C] float, under the policy that is trained; with `entropies` the only input with a gradient. Like
            every other [N, C] input, it is not read where `loss_mask` is False and may be NaN there.
        advantages: [N] float.
        loss_mask: [N, C] bool, True where a token counts in the loss.
        total_tokens: Loss tokens of the whole step, where this call is one of its micro-batches ("dapo", "bnpo",
            "cispo", "vespo", and all with `entropy_coef`); None for those of this call.
        total_rollouts: Rollouts of the whole step, likewise ("grpo", "dr_grpo", "sapo"). With data parallelism that
            averages gradients, pass the totals over all ranks and multiply the loss by the world size.
        old_logprobs: [N, C] float, under the policy at the start of the update; None if it is the current one (r = 1).
        ref_logprobs: [N, C] float, under the reference policy; needed if `beta` > 0.
        sampler_logprobs: [N, C] float, what the sampler reported for its tokens; None if it computes as the policy.
        entropies: [N, C] float, of the distributions of `logprobs`; needed, with a gradient, if `entropy_coef` is not
            0: `packed_logprobs(..., return_entropy=True, entropy_grad=True)`.
        beta: Weight of the KL term.
        entropy_coef: Weight of the entropy bonus, which is left out at 0.0.
        epsilon: How far r may fall below 1, between 0 and 1.
        epsilon_high: How far r may rise above 1; None for `epsilon`. For "cispo" the largest r itself, at least 1.
        delta: The largest r where A < 0, above 1 + `epsilon_high` (two-sided clipping); None for no limit.
        loss_type: What is averaged over, and the term of a token.
        importance_sampling_level: One r per "token" or per "sequence"; "token" for "vespo", which has w besides.
        importance_sampling_mode: How `sampler_logprobs` correct.
        importance_sampling_clip_min: The smallest w; None for no limit.
        importance_sampling_clip_max: The largest w; None for no limit.
        sapo_temperature_pos: Temperature of "sapo" where A > 0.
        sapo_temperature_neg: Temperature of "sapo" elsewhere.
        vespo_k_pos: Exponent of "vespo" where A >= 0, at least 0; the larger, the less rollouts with w < 1 count.
        vespo_lambda_pos: Decay of "vespo" where A >= 0, at least 1e-4; the larger, the less rollouts with w > 1 count.
        vespo_k_neg: Exponent of "vespo" where A < 0.
        vespo_lambda_neg: Decay of "vespo" where A < 0.
        max_completion_length: The sampler's limit in tokens, a constant of the run; needed by "dr_grpo".
        metrics: A dict that is filled with means over the loss tokens of this call, 0-d and detached: "ratio" (r); for
            clipped losses "clip_low" (r < 1 - epsilon and A < 0); for these and "cispo" "clip_high" (r above its limit
            and A > 0); for "vespo" "vespo_weight" (what A logprobs is multiplied by); with `ref_logprobs` "kl"; with
            `entropies` "entropy"; with `sampler_logprobs` "sampler_ratio" (w, corrected) and "sampler_kl" (from the
            sampler to the old policy, k3). "sampler_ratio_max" is not a mean but the largest w before it was corrected,
            0 without a loss token: over micro-batches, take the maximum of it.

    Returns:
        The loss, 0-d float32 (float64 for float64 `logprobs`).

    Raises:
        ValueError: If an option is unknown or out of range, shapes differ, `loss_mask` is not bool, a total that is
            needed is missing, or there is no loss token and no total.
    """
    for name, value, choices in (
        ("loss_type", loss_type, get_args(LossType)),
        ("importance_sampling_level", importance_sampling_level, get_args(ImportanceSamplingLevel)),
        ("importance_sampling_mode", importance_sampling_mode, get_args(ImportanceSamplingMode)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    _check_shapes(logprobs, advantages, loss_mask, old_logprobs, ref_logprobs, sampler_logprobs, entropies)
    high_margin = _upper_margin(loss_type, epsilon, epsilon_high, delta)
    limits = importance_sampling_clip_min, importance_sampling_clip_max
    if (smallest := limits[0] or 0.0) < 0 or (limits[1] is not None and not limits[1] > smallest):
        raise ValueError(
            f"importance_sampling_clip_max must be above importance_sampling_clip_min, and that at least 0, got "
            f"{limits[1]} and {limits[0]}"
        )
    if not min(sapo_temperature_pos, sapo_temperature_neg) > 0:
        raise ValueError(f"temperatures must be positive, got {sapo_temperature_pos} and {sapo_temperature_neg}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs, got None")
    if entropy_coef != 0:
        _check_entropies(entropies, logprobs.requires_grad, total_tokens, total_rollouts)
    gammas = Gamma(vespo_k_pos, vespo_lambda_pos), Gamma(vespo_k_neg, vespo_lambda_neg)
    if loss_type == "vespo":
        mode = None if sampler_logprobs is None else importance_sampling_mode
        _check_vespo(importance_sampling_level, mode, *gammas)
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
    per_token = {"ratio": log_ratio.detach().exp()}
    weight = uncorrected = None
    if sampler_logprobs is not None:
        gap = old - masked(sampler_logprobs).detach()
        weight, uncorrected = sampler_ratio(gap, importance_sampling_mode, *limits)  # [N, C] each
        per_token |= {"sampler_ratio": weight, "sampler_kl": gap.expm1() - gap}
    extra: dict[str, Tensor] = {}
    match loss_type:
        case "cispo":
            losses, extra = cispo_term(policy, log_ratio, advantages, high_margin)  # [N, C]
        case "sapo":
            losses = sapo_term(log_ratio, advantages, sapo_temperature_pos, sapo_temperature_neg)
        case "vespo":
            log_weight = None if weight is None else masked(weight.log())
            losses, extra = vespo_term(policy, log_ratio, advantages, log_weight, *gammas)
        case "grpo" | "bnpo" | "dr_grpo" | "dapo":
            losses, extra = clipped_term(log_ratio, advantages, 1 - epsilon, 1 + high_margin, delta)
        case _:
            assert_never(loss_type)
    per_token |= extra
    if weight is not None and loss_type != "vespo":
        losses = losses * weight
    if ref_logprobs is not None:
        distance = masked(ref_logprobs).detach() - policy
        per_token["kl"] = distance.expm1() - distance
        if beta > 0:
            losses = losses + beta * per_token["kl"]
    losses = masked(losses)
    if loss_type in BY_MEANS:
        losses = losses / lengths
    loss = losses.sum() / total
    if entropies is not None:
        per_token["entropy"] = entropies
        if entropy_coef != 0:
            tokens = loss_mask.sum().clamp(min=1) if total_tokens is None else total_tokens
            loss = loss - entropy_coef * masked(entropies).sum() / tokens
    if metrics is not None:
        count = loss_mask.sum().clamp(min=1)
        metrics |= {name: masked(values.detach()).sum() / count for name, values in per_token.items()}
        if uncorrected is not None:
            metrics["sampler_ratio_max"] = masked(uncorrected).amax()
    return loss.to(dtype)


def _check_shapes(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, *tables: Tensor | None) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, True where a token counts, got {loss_mask.dtype}")
    shapes = [list(table.shape) for table in (logprobs, loss_mask, *tables) if table is not None]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 2:
        raise ValueError(f"log-probabilities, entropies and loss_mask must all be [N, C], got {shapes}")
    if list(advantages.shape) != shapes[0][:1]:
        raise ValueError(f"advantages must be [{shapes[0][0]}], one per rollout, got {list(advantages.shape)}")


def _upper_margin(loss_type: LossType, epsilon: float, epsilon_high: float | None, delta: float | None) -> float:
    """Check the limits of the ratio and return how far it may rise above 1; for "cispo" the largest ratio."""
    margin = epsilon if epsilon_high is None else epsilon_high
    if not 0 <= epsilon <= 1 or not 0 <= margin:
        raise ValueError(
            f"epsilon must be between 0 and 1 and epsilon_high at least 0, got {epsilon} and {epsilon_high}"
        )
    if loss_type == "cispo" and not (epsilon_high or 0) >= 1:
        raise ValueError(f"loss_type 'cispo' needs epsilon_high of at least 1, the largest ratio, got {epsilon_high}")
    if delta is not None and loss_type in UNCLIPPED:
        raise ValueError(f"delta must be None for loss_type {loss_type!r}, which does not clip with it, got {delta}")
    if delta is not None and not delta > 1 + margin:
        raise ValueError(f"delta must be above 1 + epsilon_high = {1 + margin}, got {delta}")
    return margin


def _check_vespo(
    level: ImportanceSamplingLevel, mode: ImportanceSamplingMode | None, positive: Gamma, negative: Gamma
) -> None:
    if not (min(positive.k, negative.k) >= 0 and min(positive.decay, negative.decay) >= 1e-4):
        raise ValueError(
            f"vespo_k_* must be at least 0 and vespo_lambda_* at least 1e-4, got k {positive.k} and {negative.k}, "
            f"lambda {positive.decay} and {negative.decay}"
        )
    if level != "token":
        raise ValueError(f"importance_sampling_level must be 'token' for loss_type 'vespo', got {level!r}")
    if mode is not None and not mode.startswith("token"):
        raise ValueError(
            f"importance_sampling_mode must be 'token_truncate' or 'token_mask' for loss_type 'vespo', got {mode!r}"
        )


def _check_entropies(
    entropies: Tensor | None, is_trained: bool, total_tokens: Tensor | int | None, total_rollouts: int | None
) -> None:
    if entropies is None or (is_trained and not entropies.requires_grad):
        raise ValueError(
            "entropy_coef needs entropies with a gradient, as packed_logprobs(..., return_entropy=True, "
            f"entropy_grad=True) yields them, got {'None' if entropies is None else 'a tensor without'}"
        )
    if total_tokens is None and total_rollouts is not None:
        raise ValueError("the entropy bonus is a mean over loss tokens: pass total_tokens besides total_rollouts")


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
