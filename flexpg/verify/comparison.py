"""The comparison of log-probabilities and gradients with the baseline's, on a few rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from flexpg.integrations import packed_logprobs
from flexpg.integrations.fsdp import sharded_modules
from flexpg.layer_hooks import uncompiled
from flexpg.micro_batches import MicroBatch
from flexpg.verify.checked_model import ADVICE, ULPS, CheckedModel, packed_order, token_name

COMPARED = 3  # rollouts per micro-batch: the first, the middle and the last in packed order


def picked_rollouts(batch: MicroBatch) -> list[int]:
    """Return the first, the middle and the last rollout; one several times where there are fewer, as FSDP needs."""
    order = packed_order(batch)
    return [order[i * (len(order) - 1) // (COMPARED - 1)] for i in range(COMPARED)]


def _weights(length: int, number: int, like: Tensor) -> Tensor:
    """Return [length] weights of the loss, different for every token, so that swapped tokens show."""
    return torch.randn(length, generator=torch.Generator().manual_seed(number)).to(like)


def shared_backward(checked: CheckedModel, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Run the packed forward and backward as in training; return the log-probabilities [C] of each picked rollout."""
    found: list[Tensor] = []
    options: dict[str, Any] = {"temperature": checked.temperature, "autocast_dtype": checked.autocast_dtype}
    for batch, logprobs in packed_logprobs(checked.model, batches, **options):  # [n, C]
        loss = logprobs.sum() * 0
        for n in picked_rollouts(batch):
            values = logprobs[n, : int(batch.rollouts.completion_lens[n])]
            loss = loss + (_weights(len(values), len(found), values) * values).sum()
            found.append(values.detach())
        loss.backward()
    return found


def baseline_backward(checked: CheckedModel, compared: Sequence[tuple[MicroBatch, int]], sign: int) -> list[Tensor]:
    """Run each rollout on its own, forward and backward; return its log-probabilities [C]."""
    found: list[Tensor] = []
    with uncompiled(checked.model):  # for the backward too: checkpointing calls the layers again in it
        for batch, n in compared:
            values = checked.baseline(batch, n)
            (sign * (_weights(len(values), len(found), values) * values).sum()).backward()
            found.append(values.detach())
    return found


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients from zero inside; restore those from before on exit."""
    for shard in sharded_modules(model):
        shard.reshard()  # after a forward without backward the root is still gathered, with other parameters
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


def check_logprobs(
    checked: CheckedModel,
    compared: Sequence[tuple[MicroBatch, int]],
    shared: Sequence[Tensor],
    baseline: Sequence[Tensor],
    perturbed: Sequence[Tensor],
) -> tuple[float, float]:
    """Return the largest difference to the baseline, and what rounding explains, in nats."""
    differences = [(a - b).abs().nan_to_num(torch.inf) for a, b in zip(shared, baseline, strict=True)]
    noise = max(float((a - b).abs().max()) for a, b in zip(baseline, perturbed, strict=True))
    unit = max(1.0, *(float(tensor.abs().max()) for tensor in baseline)) * torch.finfo(baseline[0].dtype).eps
    budget, error = max(checked.allowance * noise, ULPS * unit), max(float(value.max()) for value in differences)

    def explain() -> str:
        worst = max(range(len(compared)), key=lambda i: float(differences[i].max()))
        (batch, n), c = compared[worst], int(differences[worst].argmax())
        return (
            f"{token_name(batch, n, int(batch.rollouts.prompt_lens[n]) + c)} has log-probability "
            f"{float(shared[worst][c]):.4f} in the packed sequence, {float(baseline[worst][c]):.4f} in the baseline; "
            f"rounding explains {budget:.0e}. They differ from {_first_different_layer(checked, batch, n)} on, which "
            f"does not use positions, window or mask as given (does it count packed tokens?); {ADVICE}"
        )

    checked.settle(not error <= budget, explain)
    return error, budget


def check_own_logprobs(
    checked: CheckedModel, batch: MicroBatch, n: int, found: Tensor, baseline: Tensor, budget: float
) -> None:
    """Check that an ordinary call of the model gives rollout n's first tokens the baseline's log-probabilities.

    The baseline and the packed sequence both compute logits from hidden states only, so nothing else shows a forward
    that adds something to its logits, such as a term that depends on the tokens.
    """
    differences = (found - baseline).abs().nan_to_num(torch.inf)
    unit = max(1.0, float(baseline.abs().max())) * torch.finfo(torch.float32).eps  # torchtune returns float32
    budget, c = max(budget, ULPS * unit), int(differences.argmax())

    def explain() -> str:
        return (
            f"{token_name(batch, n, 1 + c)} has log-probability {float(found[c]):.4f} "
            f"in an ordinary call of the model, {float(baseline[c]):.4f} if its output layer gets the hidden states "
            f"only; rounding explains {budget:.0e}. Logits must depend on nothing else; {ADVICE}. If the model enters "
            "autocast by itself, as after accelerate's prepare, pass autocast_dtype"
        )

    checked.settle(not float(differences.max()) <= budget, explain)


def check_gradients(
    checked: CheckedModel,
    compared: Sequence[tuple[MicroBatch, int]],
    norms: dict[str, float],
    errors: dict[str, float],
    noises: dict[str, float],
) -> tuple[float, float]:
    """Return error and budget of the parameter that is closest to its budget, relative to its gradient's norm."""
    # With saturated attention, gradients are differences of nearly equal numbers and may be close to zero.
    relative = min(4096 * checked.unit, 1e-3)
    least = 0.2 * checked.unit * max(norms.values(), default=0.0)

    def budget_of(name: str) -> float:
        return max(2 * checked.allowance * noises.get(name, 0.0), relative * norms.get(name, 0.0), least, 1e-300)

    non_finite = [name for name, error in errors.items() if not isfinite(error)]  # the last is nearest to the cause
    nearest = non_finite[-1] if non_finite else max(errors, key=lambda name: errors[name] / budget_of(name))
    norm = norms.get(nearest) or errors[nearest] or 1.0
    error, budget = errors[nearest] / norm, budget_of(nearest) / norm
    difference = f"differs from the baseline by {error:.0e} of its norm; rounding explains {budget:.0e}; {ADVICE}"
    if non_finite:
        difference = "is NaN or Inf, shared or in the baseline"
    rollouts = ", ".join(str(int(batch.indices[n])) for batch, n in compared)
    reason = f"the gradient of {nearest} for rollouts {rollouts} {difference}"
    checked.settle(not error <= budget, lambda: reason)
    return error, budget


def _first_different_layer(checked: CheckedModel, batch: MicroBatch, n: int) -> str:
    """Return the first layer whose output for rollout n differs from the baseline's by more than rounding."""
    shared = checked.layer_outputs(partial(checked.hidden, batch.tree))
    baseline = checked.layer_outputs(partial(checked.baseline, batch, n))
    with checked.perturbed():
        perturbed = checked.layer_outputs(partial(checked.baseline, batch, n))
    nodes = batch.tree.node[n][batch.tree.node[n] >= 0].cpu()
    for name, out in baseline.items():
        if (shared[name][nodes] - out).abs().max() > checked.allowance * (perturbed[name] - out).abs().max():
            return name
    return "the final norm"
