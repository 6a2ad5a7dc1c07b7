"""Numerical check, before the first update, that a model shares prefixes exactly on the user's own rollouts.

Three properties are tested in seconds, on micro-batches as they will be trained:

1. Isolation: when a completion is replaced, the hidden state of every token outside of it stays bitwise identical. A
   model that ignores the mask fails, and so does one that draws random numbers, because two equal forwards differ.
2. Log-probabilities of a few rollouts equal those of the baseline: each rollout alone, through the model's own
   attention. Positions or windows that are counted in packed indices fail.
3. Gradients of every trained parameter, for the same rollouts.

What rounding may change is measured on the spot: the baseline runs once more with every output of a layer and its
submodules perturbed by one unit in the last place of the computation's dtype. Up to `ALLOWANCE` times the change that
this causes counts as rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flexpg.integrations import Integration, autocast, integration_for, packed_logprobs
from flexpg.integrations.fsdp import run_as_forward, sharded_modules
from flexpg.layer_hooks import perturb_layer_outputs, record_layer_outputs, uncompiled
from flexpg.logprobs import chunked_logprobs
from flexpg.packing import MicroBatch, by_cache, pack
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

ALLOWANCE = 2.0  # over 20 kinds of correct models on a CPU, the largest ratio was 1.4, in bfloat16 0.8
EXPERTS_ALLOWANCE = 8.0  # rounding may route a token to another expert
ULPS = 64  # of a log-probability of its own size or 1: logits are some tens
COMPARED = 3  # rollouts per micro-batch: the first, the middle and the last in packed order
MAX_TOKENS = 8192
ADVICE = "train this model without sharing, or fix the layer"


class SelfCheckError(ValueError):
    """The model does not share prefixes exactly; the message names layer, token and rollout."""


@dataclass(frozen=True)
class SelfCheckResult:
    """What was compared, and the errors that were found.

    Attributes:
        rollouts: Rollouts that were compared with the baseline.
        tokens: Packed tokens, without padding.
        logprob_error: The largest difference to the baseline, in nats.
        logprob_budget: What rounding explains, in nats.
        gradient_error: Of the parameter that is closest to its budget, relative to the norm of its gradient.
        gradient_budget: The budget of that parameter.
        seconds: Duration of the check.
    """

    rollouts: int
    tokens: int
    logprob_error: float
    logprob_budget: float
    gradient_error: float
    gradient_budget: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"self-check passed: no leakage between completions; {self.rollouts} rollouts ({self.tokens} packed tokens)"
            f" match the baseline: log-probabilities within {self.logprob_error:.0e} (budget {self.logprob_budget:.0e})"
            f", gradients within {self.gradient_error:.0e} (budget {self.gradient_budget:.0e}), in {self.seconds:.1f} s"
        )


def self_check(
    model: nn.Module,
    rollouts: Rollouts | Sequence[MicroBatch],
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    autocast_dtype: torch.dtype | None = None,
) -> SelfCheckResult:
    """Check numerically that a model gives the same outputs and gradients with and without prefix sharing.

    The model's weights, gradients and mode do not change and, if it passes, neither do the random number generators.
    If the model is sharded, all ranks must call it.

    Args:
        model: An enabled torchtune or transformers model in training mode (dropout would not show otherwise).
        rollouts: A step's rollouts on the model's device, of which the largest micro-batches are checked; or
            micro-batches of this rank, as `pack` returned them, of which the first two are checked.
        max_tokens: Token budget of a micro-batch; None for 8,192, or the longest rollout.
        temperature: Divides the logits.
        autocast_dtype: Run the forwards under torch.autocast with this dtype.

    Raises:
        SelfCheckError: If the model does not share prefixes exactly, on any rank.
        ValueError: If the model is in evaluation mode, or its integration refuses it.
        TypeError: If the model is not supported.
    """
    if not model.training:
        raise ValueError("model must be in training mode, because dropout would not show otherwise; call model.train()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires grad")
    if isinstance(rollouts, Rollouts):
        max_tokens = max_tokens or max(MAX_TOKENS, *map(len, rollouts.sequences))
        packed = by_cache(pack(rollouts, max_tokens))
        rollouts = max(packed, key=lambda series: sum(batch.tree.num_tokens for batch in series))
    started = perf_counter()
    batches = [_with_full_loss_mask(batch) for batch in by_cache(rollouts)[0][:2]]
    check = _Check(model, integration_for(model), temperature, autocast_dtype)
    for batch in batches:
        _check_isolation(check, batch)
    compared = [(batch, n) for batch in batches for n in _picked(batch)]
    with _own_gradients(model):
        shared = _shared_backward(check, batches)
        norms = gradient_norms(model)
        baseline = _baseline_backward(check, compared, sign=-1)
        errors = gradient_norms(model)
    with _own_gradients(model):
        _baseline_backward(check, compared, sign=1)
        with check.perturbed():
            perturbed = _baseline_backward(check, compared, sign=-1)
        noises = gradient_norms(model)
    error, budget = _check_logprobs(check, compared, shared, baseline, perturbed)
    gradient_error, gradient_budget = _check_gradients(check, compared, norms, errors, noises)
    tokens = sum(batch.tree.num_tokens for batch in batches)
    num_rollouts = len({int(batch.indices[n]) for batch, n in compared})
    return SelfCheckResult(
        num_rollouts, tokens, error, budget, gradient_error, gradient_budget, perf_counter() - started
    )


def baseline_logprobs(
    model: nn.Module, rollouts: Rollouts, *, temperature: float = 1.0, return_entropy: bool = False
) -> tuple[Tensor, ...]:
    """Compute log-probabilities without sharing: every sequence in full, through the model's own attention.

    Sequences are padded on the right to one batch. Only rows that predict a loss token go through the output layer.

    Args:
        model: A torchtune or transformers model.
        rollouts: Rollouts on the model's device.
        temperature: Divides the logits.
        return_entropy: Also return entropies.

    Returns:
        [n, C] log-probabilities, 0 where the loss mask is False and, with `return_entropy`, [n, C] entropies in nats.
    """
    integration = integration_for(model)

    def score() -> tuple[Tensor, ...]:
        input_ids = pad_sequence(rollouts.sequences, batch_first=True)  # [n, T]
        hidden = integration.baseline_forward(model, input_ids)  # [n, T, E]
        row, step = rollouts.loss_mask.nonzero(as_tuple=True)  # [M] each
        parents = row * input_ids.shape[1] + rollouts.prompt_lens[row] + step - 1  # [M], in the flattened batch
        flat = chunked_logprobs(
            hidden.flatten(0, 1).index_select(0, parents),
            input_ids.flatten()[parents + 1],
            integration.output(model),
            temperature=temperature,
            return_entropy=return_entropy,
        )
        return tuple(x.new_zeros(rollouts.loss_mask.shape).index_put((row, step), x) for x in flat)

    return run_as_forward(model, score)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of every gradient by the name of its parameter, over all ranks, which must all call it."""
    from torch.distributed.tensor import DTensor  # here, because it takes a second

    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms


@dataclass(frozen=True)
class _Check:
    """A model, and how it is called."""

    model: nn.Module
    integration: Integration
    temperature: float
    autocast_dtype: torch.dtype | None

    @property
    def allowance(self) -> float:
        """How many times the measured rounding passes as rounding."""
        return EXPERTS_ALLOWANCE if self.has_experts else ALLOWANCE

    @property
    def has_experts(self) -> bool:
        return any("expert" in name for name, _ in self.model.named_modules())

    @property
    def unit(self) -> float:
        """One unit in the last place, relative; float64 models often round to float32 inside."""
        parameter = next(self.model.parameters())
        dtype = self.autocast_dtype or parameter.dtype
        if parameter.is_cuda and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return 2.0**-10  # TF32
        return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)

    def perturbed(self) -> AbstractContextManager[None]:
        """Perturb every layer's output by one unit."""
        return perturb_layer_outputs(self.integration.layers(self.model), self.unit)

    @torch.no_grad()
    def hidden(self, tree: PrefixTree) -> Tensor:
        """Return the hidden states [S', E] of a packed sequence, without padding."""
        with autocast(self.model, self.autocast_dtype), uncompiled(self.model):
            return self.integration.forward(self.model, tree)[0, : tree.num_tokens]

    def baseline(self, batch: MicroBatch, n: int) -> Tensor:
        """Return the log-probabilities [C] of one rollout alone."""
        with autocast(self.model, self.autocast_dtype), uncompiled(self.model):
            return baseline_logprobs(self.model, batch.rollouts.select([n]), temperature=self.temperature)[0][0]

    def layer_outputs(self, call: Callable[[], Tensor]) -> dict[str, Tensor]:
        return record_layer_outputs(self.integration.layers(self.model), call)

    def settle(self, failed: bool, explain: Callable[[], str]) -> None:
        """Raise if the check failed on any rank; all ranks explain, because that may take forwards of the model."""
        is_sharded = bool(sharded_modules(self.model))
        anywhere = torch.tensor(float(failed), device=next(self.model.parameters()).device)
        if is_sharded:
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        if anywhere > 0:
            reason = explain()
            raise SelfCheckError(f"self-check failed: {reason}" if failed else "self-check failed on another rank")


def _with_full_loss_mask(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with every completion token in the loss, so that all are compared."""
    full = replace(batch.rollouts, loss_mask=batch.rollouts.completion_mask, old_logprobs=None, ref_logprobs=None)
    return replace(batch, rollouts=full)


# Isolation.


def _check_isolation(check: _Check, batch: MicroBatch) -> None:
    """Check that two forwards are equal, and that a replaced completion changes nothing outside of itself."""
    tree, found = batch.tree, None
    base = check.hidden(tree)
    bound = _isolation_bound(check, tree, base)
    for other, own, what in [(tree, slice(0, 0), ""), *_perturbed_trees(batch)]:
        moved = ~((check.hidden(other) - base).abs() <= bound).all(1)  # [S'], True for NaN
        moved[own] = False
        if found is None and moved.any():
            found = other, moved, what
    other, moved, what = found or (tree, torch.zeros(len(base), dtype=torch.bool, device=base.device), "")

    def explain() -> str:
        before, after = (check.layer_outputs(partial(check.hidden, each)) for each in (tree, other))
        hits = {
            name: (moved.cpu() & (out[: len(base)] != after[name][: len(base)]).any(1)).nonzero()
            for name, out in before.items()
        }
        layer = next((name for name, hit in hits.items() if len(hit)), "the final norm")
        packed = int(hits[layer][0] if layer in hits else moved.nonzero()[0]) if found else 0
        n, t = (int(i) for i in (tree.node == packed).nonzero()[0])
        token = _token_name(batch, n, t)
        if not base[moved].isfinite().all():
            return f"the hidden state of {token} is NaN or Inf; check the weights"
        if not what:
            return (
                f"two equal forwards differ from {layer} on, at {token}: the model draws random numbers (dropout, "
                "noise), which would differ between the copies of a prefix; disable them"
            )
        return f"{token} changed in {layer} when {what} was replaced: the layer sees past its mask; {ADVICE}"

    check.settle(found is not None, explain)


def _isolation_bound(check: _Check, tree: PrefixTree, hidden: Tensor) -> float:
    """Return how much may change: nothing, except for rounding where experts process all their tokens at once."""
    if not check.has_experts:
        return 0.0
    with check.perturbed():
        return check.allowance * float((check.hidden(tree) - hidden).abs().max())


def _perturbed_trees(batch: MicroBatch) -> Iterator[tuple[PrefixTree, slice, str]]:
    """Yield the tree with the first and the last completion replaced, as far as it is not shared, and where that is."""
    tree = batch.tree
    tokens, nodes = tree.input_ids[0], tree.node.clamp(min=0)
    counts = torch.bincount(tree.node[tree.node >= 0], minlength=tree.padded_length)
    steps = torch.arange(nodes.shape[1], device=tokens.device)
    is_own = (tree.node >= 0) & (steps >= batch.rollouts.prompt_lens[:, None]) & (counts[nodes] == 1)  # [N, T]
    owners = [n for n in _packed_order(batch) if is_own[n].any()]
    for n in (owners[0], owners[-1]) if owners else (0, 0):
        own = tree.node[n][is_own[n]]
        start, stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
        changed = tokens.clone()
        changed[start:stop] = (changed[start:stop] + 1) % (tree.max_token + 1)
        yield replace(tree, tokens=changed), slice(start, stop), f"the completion of rollout {int(batch.indices[n])}"


def _packed_order(batch: MicroBatch) -> list[int]:
    return batch.tree.node.amax(1).argsort(stable=True).tolist()


def _token_name(batch: MicroBatch, n: int, t: int) -> str:
    prompt_len = int(batch.rollouts.prompt_lens[n])
    part, number = ("prompt", t) if t < prompt_len else ("completion", t - prompt_len)
    return f"token {number} of the {part} of rollout {int(batch.indices[n])}"


# Log-probabilities and gradients.


def _picked(batch: MicroBatch) -> list[int]:
    """Return the first, the middle and the last rollout; one several times where there are fewer, as FSDP needs."""
    order = _packed_order(batch)
    return [order[i * (len(order) - 1) // (COMPARED - 1)] for i in range(COMPARED)]


def _weights(length: int, number: int, like: Tensor) -> Tensor:
    """Return [length] weights of the loss, different for every token, so that swapped tokens show."""
    return torch.randn(length, generator=torch.Generator().manual_seed(number)).to(like)


def _shared_backward(check: _Check, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Run the packed forward and backward as in training; return the log-probabilities [C] of each picked rollout."""
    found: list[Tensor] = []
    options: dict[str, Any] = {"temperature": check.temperature, "autocast_dtype": check.autocast_dtype}
    for batch, logprobs in packed_logprobs(check.model, batches, **options):  # [n, C]
        loss = logprobs.sum() * 0
        for n in _picked(batch):
            own = logprobs[n, : int(batch.rollouts.completion_lens[n])]
            loss = loss + (_weights(len(own), len(found), own) * own).sum()
            found.append(own.detach())
        loss.backward()
    return found


def _baseline_backward(check: _Check, compared: Sequence[tuple[MicroBatch, int]], sign: int) -> list[Tensor]:
    """Run each rollout alone, forward and backward; return its log-probabilities [C]."""
    found: list[Tensor] = []
    with uncompiled(check.model):  # for the backward too: checkpointing calls the layers again in it
        for batch, n in compared:
            own = check.baseline(batch, n)
            (sign * (_weights(len(own), len(found), own) * own).sum()).backward()
            found.append(own.detach())
    return found


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients from zero inside; restore those from before on exit."""
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


def _check_logprobs(
    check: _Check,
    compared: Sequence[tuple[MicroBatch, int]],
    shared: Sequence[Tensor],
    baseline: Sequence[Tensor],
    perturbed: Sequence[Tensor],
) -> tuple[float, float]:
    """Return the largest difference to the baseline, and what rounding explains, in nats."""
    differences = [(a - b).abs().nan_to_num(torch.inf) for a, b in zip(shared, baseline, strict=True)]
    noise = max(float((a - b).abs().max()) for a, b in zip(baseline, perturbed, strict=True))
    unit = max(1.0, *(float(own.abs().max()) for own in baseline)) * torch.finfo(baseline[0].dtype).eps
    budget, error = max(check.allowance * noise, ULPS * unit), max(float(own.max()) for own in differences)

    def explain() -> str:
        worst = max(range(len(compared)), key=lambda i: float(differences[i].max()))
        (batch, n), c = compared[worst], int(differences[worst].argmax())
        return (
            f"{_token_name(batch, n, int(batch.rollouts.prompt_lens[n]) + c)} has log-probability "
            f"{float(shared[worst][c]):.4f} in the packed sequence and {float(baseline[worst][c]):.4f} in the baseline;"
            f" rounding explains {budget:.0e}. They differ from {_first_different_layer(check, batch, n)} on, which does"
            f" not use positions, window or mask as given (does it count packed tokens?); {ADVICE}"
        )

    check.settle(not error <= budget, explain)
    return error, budget


def _check_gradients(
    check: _Check,
    compared: Sequence[tuple[MicroBatch, int]],
    norms: dict[str, float],
    errors: dict[str, float],
    noises: dict[str, float],
) -> tuple[float, float]:
    """Return error and budget of the parameter that is closest to its budget, relative to its gradient's norm."""
    # With saturated attention, gradients are differences of nearly equal numbers and may be close to zero.
    relative = min(4096 * check.unit, 1e-3)
    least = 0.2 * check.unit * max(norms.values(), default=0.0)

    def budget_of(name: str) -> float:
        return max(2 * check.allowance * noises.get(name, 0.0), relative * norms.get(name, 0.0), least, 1e-300)

    def excess(name: str) -> float:
        return errors[name] / budget_of(name) if isfinite(errors[name]) else inf

    nearest = max(errors, key=excess)
    norm = norms.get(nearest) or errors[nearest] or 1.0
    error, budget = errors[nearest] / norm, budget_of(nearest) / norm
    rollouts = ", ".join(str(int(batch.indices[n])) for batch, n in compared)
    reason = (
        f"the gradient of {nearest} for rollouts {rollouts} differs from the baseline by {error:.0e} of its norm; "
        f"rounding explains {budget:.0e}; {ADVICE}"
    )
    check.settle(not error <= budget, lambda: reason)
    return error, budget


def _first_different_layer(check: _Check, batch: MicroBatch, n: int) -> str:
    """Return the first layer whose output for rollout n differs from the baseline's by more than rounding."""
    shared = check.layer_outputs(partial(check.hidden, batch.tree))
    baseline = check.layer_outputs(partial(check.baseline, batch, n))
    with check.perturbed():
        perturbed = check.layer_outputs(partial(check.baseline, batch, n))
    nodes = batch.tree.node[n][batch.tree.node[n] >= 0].cpu()
    for name, out in baseline.items():
        if (shared[name][nodes] - out).abs().max() > check.allowance * (perturbed[name] - out).abs().max():
            return name
    return "the final norm"
