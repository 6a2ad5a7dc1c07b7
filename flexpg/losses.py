"""The GRPO family of losses on [N, C] log-probabilities, whatever forward they came from.

Names, formulas and defaults are TRL's (1.16). What departs from it:

- A loss is a sum over rollouts divided by one normalizer. Micro-batches that are given the whole step's normalizer have
  losses that sum to the step's loss, so gradient accumulation is exact however the step is cut.
- "bnpo" and "dapo" are therefore one formula, trained tokens being the normalizer of both. TRL counts them per
  micro-batch for "bnpo" and takes the mean over micro-batches, and per step and process for "dapo". Without a
  `normalizer` this call's own tokens are counted: TRL's "bnpo" before that mean.
- "grpo" and "dr_grpo" are in TRL a mean over micro-batches, which is ours where all have equally many rollouts.
- Metrics are means over trained tokens; with sequence-level ratios TRL takes means over rollouts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flexpg.scalars import is_number, is_whole

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]


def loss_normalizer(mask: Tensor, loss_type: LossType = "dapo", max_completion_length: int | None = None) -> Tensor:
    """What the losses of a step are divided by; the normalizers of its micro-batches sum to it.

    With data parallelism, sum it over the ranks, and divide by the number of ranks where gradients are averaged.

    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> [loss_normalizer(mask, loss_type, max_completion_length=8).item() for loss_type in ("grpo", "dapo", "dr_grpo")]
    [2.0, 4.0, 16.0]

    Args:
        mask: [N, C] bool, True where a token is trained.
        loss_type: "grpo" counts rollouts (those without a trained token too, as TRL), "bnpo" and "dapo" trained tokens,
            "dr_grpo" rollouts times `max_completion_length`.
        max_completion_length: the sampler's limit in tokens, a constant of the run; needed by "dr_grpo" alone.

    Returns:
        0-d float32.

    Raises:
        ValueError: `loss_type` is unknown, `mask` is not [N, C] bool, or "dr_grpo" has no `max_completion_length`, or
            one below 1.
        TypeError: `mask` is no tensor.
    """
    _check_allowed("loss_type", loss_type, get_args(LossType))
    _check_mask(mask)
    if loss_type in ("bnpo", "dapo"):
        return mask.sum().float()
    if loss_type == "grpo":
        return torch.tensor(float(len(mask)), device=mask.device)
    if max_completion_length is None:
        raise ValueError("loss_type 'dr_grpo' divides by max_completion_length; give the sampler's limit in tokens")
    if not is_whole(max_completion_length):
        raise ValueError(f"max_completion_length is {max_completion_length!r}; give a number of tokens, 1 or more")
    return torch.tensor(float(len(mask) * max_completion_length), device=mask.device)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: LossType = "dapo",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    normalizer: Tensor | float | None = None,
    max_completion_length: int | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss of GRPO and its kin, and what to watch about it.

    Per token, with r = exp(logprobs - old_logprobs) and the rollout's advantage A:

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1),    d = ref_logprobs - logprobs

    summed over trained tokens ("grpo": averaged over each rollout's, then summed) and divided by the normalizer. With
    importance_sampling_level "sequence", r is the exponential of the rollout's mean log-ratio.

    Sources: clipping, KL term and "grpo": GRPO, arXiv 2402.03300, eq. 3 and 4; "dr_grpo": arXiv 2503.20783; "dapo" and
    `epsilon_high`: DAPO, arXiv 2503.14476; "sequence": GSPO, arXiv 2507.18071, eq. 7; the KL estimate is k3 of
    Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.

    >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss, metrics = grpo_loss(logprobs, None, torch.tensor([3.0]), torch.tensor([[True, True]]))
    >>> loss.backward()
    >>> loss.item(), logprobs.grad.tolist()
    (-3.0, [[-1.5, -1.5]])

    Args:
        logprobs: [N, C] float, under the policy in training; the only input that a gradient flows to. As with every
            other [N, C] input, what stands where `mask` is False is not read and may be NaN.
        old_logprobs: [N, C] float, under the policy that sampled. None: it is the policy in training (r = 1).
        advantages: [N] float.
        mask: [N, C] bool, True where a token is trained.
        ref_logprobs: [N, C] float, under the reference policy; needed where `beta` > 0.
        beta: the weight of the KL term.
        epsilon: how far r may fall below 1.
        epsilon_high: how far r may rise above 1; None means `epsilon`.
        loss_type: what is averaged over, see `loss_normalizer`.
        importance_sampling_level: one r per "token" or per "sequence".
        normalizer: the whole step's `loss_normalizer` where this call is one of its micro-batches. None: this call's.
        max_completion_length: in tokens; needed by "dr_grpo" without a `normalizer`.
        entropies: [N, C] float, only to be watched.

    Returns:
        The loss, 0-d float32 (float64 for float64 `logprobs`), and metrics, 0-d and detached in the same dtype: means
        over trained tokens of "ratio" (r), "clip_low" (r < 1 - epsilon and A < 0), "clip_high" (r > 1 + epsilon_high
        and A > 0), "kl" where `ref_logprobs` is given and "entropy" where `entropies` is; "tokens", the number of
        trained tokens, weights them over micro-batches.

    Raises:
        ValueError: an unknown option; shapes that differ; a mask that is not bool; `beta` > 0 without `ref_logprobs`;
            "dr_grpo" without a length; no trained token at all and no `normalizer` (with one, the loss is 0).
        TypeError: an input that is no tensor.
    """
    _check_allowed("loss_type", loss_type, get_args(LossType))
    _check_allowed("importance_sampling_level", importance_sampling_level, get_args(ImportanceSamplingLevel))
    tables = {"old_logprobs": old_logprobs, "mask": mask, "ref_logprobs": ref_logprobs, "entropies": entropies}
    _check_shapes(logprobs, advantages, tables)
    _check_mask(mask)
    for name, value in (("beta", beta), ("epsilon", epsilon), ("epsilon_high", epsilon_high)):
        is_left_out = name == "epsilon_high" and value is None
        if not is_left_out and (not is_number(value) or not value >= 0):
            raise ValueError(f"{name} is {value!r}; give a number, 0 or more")
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"beta is {beta}, but the KL term needs ref_logprobs; give them or set beta to 0")
    if normalizer is None:
        if not mask.any():
            raise ValueError(
                f"none of the {len(mask)} rollouts has a trained token; skip the step or give a normalizer"
            )
        normalizer = loss_normalizer(mask, loss_type, max_completion_length)
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer is {list(normalizer.shape)}; give the step's one number, as loss_normalizer does")
    if not normalizer > 0:
        raise ValueError(f"normalizer is {float(normalizer)}; a step without a trained token must be skipped")

    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    advantages = advantages.detach().to(dtype)[:, None]  # [N, 1]

    def trained(values: Tensor) -> Tensor:
        """Zeros where nothing is trained, before any arithmetic, so that no NaN gets into the gradient."""
        return torch.where(mask, values, 0.0).to(dtype)  # [N, C]

    policy = trained(logprobs)
    log_ratio = policy - (policy if old_logprobs is None else trained(old_logprobs)).detach()
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio = log_ratio.exp()
    low, high = 1 - float(epsilon), 1 + float(epsilon if epsilon_high is None else epsilon_high)
    losses = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)  # [N, C]
    watched = {
        "ratio": ratio,
        "clip_low": (ratio < low) & (advantages < 0),
        "clip_high": (ratio > high) & (advantages > 0),
    }
    if ref_logprobs is not None:
        distance = trained(ref_logprobs).detach() - policy
        watched["kl"] = distance.expm1() - distance
        if beta != 0.0:
            losses = losses + float(beta) * watched["kl"]
    if entropies is not None:
        watched["entropy"] = entropies

    losses = trained(losses)
    if loss_type == "grpo":
        losses = losses / lengths
    tokens = mask.sum().to(dtype)
    metrics = {name: trained(values.detach()).sum() / tokens.clamp(min=1) for name, values in watched.items()}
    return (losses.sum() / normalizer).to(dtype), metrics | {"tokens": tokens}


def _check_allowed(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def _check_mask(mask: Tensor) -> None:
    _check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; it must be torch.bool [N, C], True where trained")


def _check_tensor(name: str, table: object) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} is a {type(table).__name__}; give a tensor")


def _check_shapes(logprobs: Tensor, advantages: Tensor, tables: dict[str, Tensor | None]) -> None:
    for name, needed in (("logprobs", logprobs), ("advantages", advantages), ("mask", tables["mask"])):
        _check_tensor(name, needed)
    if logprobs.dim() != 2 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs is {logprobs.dtype} {list(logprobs.shape)}; give floats [N, C]")
    given = {name: table for name, table in tables.items() if table is not None}
    for name, table in given.items():
        _check_tensor(name, table)
        if table.shape != logprobs.shape:
            raise ValueError(f"{name} is {list(table.shape)}, logprobs {list(logprobs.shape)}; both must be [N, C]")
    for name, table in (given | {"advantages": advantages}).items():
        if table.device != logprobs.device:
            raise ValueError(f"{name} is on {table.device}, logprobs on {logprobs.device}; move all to one device")
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages is {list(advantages.shape)}, logprobs {list(logprobs.shape)}; give one advantage per rollout"
        )
