"""Before the first update: whether a model, as it stands, shares prefixes exactly on these very rollouts.

Three questions, answered in seconds on micro-batches as they will be trained:

1. Isolation: replace a completion, and every token outside of it keeps its hidden state to the bit. A model that
   ignores the mask fails here, and so does one that draws random numbers, as two forwards of one row differ.
2. Log-probabilities: a few rollouts have those that each has alone, through the model's own attention. Positions by
   packed index and windows by packed index fail here.
3. Gradients of every trained parameter, of the same few rollouts.

What rounding may do is measured on the spot: the rollouts run alone once more, with all that a layer and its parts put
out moved by one unit in the last place of the dtype that is computed in. Up to `ALLOWANCE` times what that changes is
taken for rounding, as the shared way rounds elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flexpg.layer_hooks import layer_outputs, layers_moved, uncompiled
from flexpg.packing import MicroBatch, pack, runs
from flexpg.rollouts import Rollouts, checked_rollouts
from flexpg.training.failures import gradient_norms
from flexpg.tree import PrefixTree

ALLOWANCE = 2.0  # of right models of 20 kinds on a CPU, none strays further than 1.4 times, in bfloat16 0.8
EXPERTS_ALLOWANCE = 8.0  # where rounding may send a token to another expert
STEPS = 64  # in the last place of a log-probability, of 1 or its own size, that pass: logits are some tens
COMPARED = 3  # rollouts of a micro-batch: the first, the middle and the last of its row
MAX_TOKENS = 8192
ADVICE = "train this model without sharing, or mend it"

Autocast = Callable[[], AbstractContextManager[Any]]


class SelfCheckError(ValueError):
    """The model does not share prefixes exactly; the message names layer, token and rollout."""


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, and how near it was.

    Attributes:
        rollouts: that were run alone, too.
        tokens: of the packed rows, pads left out.
        logprob_error: nats, the largest difference between shared and alone.
        logprob_budget: nats that rounding explains.
        gradient_error: of the parameter that comes nearest to its budget, relative to its gradient's norm.
        gradient_budget: of that parameter.
        seconds: that all of it took.
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
            f"self-check: completions do not see each other; {self.rollouts} rollouts in {self.tokens} packed tokens "
            f"are as alone: log-probabilities within {self.logprob_error:.0e} (rounding explains "
            f"{self.logprob_budget:.0e}), gradients within {self.gradient_error:.0e} ({self.gradient_budget:.0e}); "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class _Subject:
    """A model, and how it is called."""

    model: nn.Module
    way: ModuleType  # its integration
    temperature: float
    autocast: Autocast
    any_failed: Callable[[bool], bool]

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed to some of a layer's parts."""
        return any("expert" in name for name, _ in self.model.named_modules())

    @property
    def allowance(self) -> float:
        """How many times the measured rounding passes for rounding."""
        return EXPERTS_ALLOWANCE if self.has_experts else ALLOWANCE

    @property
    def unit(self) -> float:
        """One unit in the last place, relative, of what is computed in; models in float64 often round to float32."""
        parameter = next(self.model.parameters())
        kind, dtype = parameter.device.type, parameter.dtype
        with self.autocast():
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
        if kind == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return 2.0**-10  # TF32's
        return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)

    def rounded_once_more(self) -> AbstractContextManager[None]:
        """Inside, every layer's output is moved by one unit."""
        return layers_moved(self.way.layers(self.model), self.unit)

    @torch.no_grad()
    def hidden(self, tree: PrefixTree) -> Tensor:
        """[S', E] hidden states of a packed row, pads left out."""
        with self.autocast(), uncompiled(self.model):
            return self.way.forward(self.model, tree)[0, : tree.num_tokens]

    def alone(self, batch: MicroBatch, n: int) -> Tensor:
        """[C] log-probabilities of one rollout, through the model's own attention."""
        with self.autocast(), uncompiled(self.model):
            return self.way.logprobs_alone(self.model, batch.rollouts.select([n]), self.temperature)[0]

    def settle(self, failed: bool, explain: Callable[[], str]) -> None:
        """Ends the check where it failed on any process; all of them explain: it may take forwards of the model."""
        if self.any_failed(failed):
            why = explain()
            raise SelfCheckError(f"self-check: {why}" if failed else "self-check: it failed on another process")


def self_check(
    model: nn.Module, rollouts: Rollouts, *, max_tokens: int | None = None, temperature: float = 1.0
) -> SelfCheck:
    """Checks a torchtune or transformers model on a step's rollouts, as it is before its first update.

    The model is left as it was: weights, gradients and mode; and, where it passes, the state of random numbers.

    Args:
        model: in training mode, or dropout would not show; see `forward` of the integrations.
        rollouts: on the model's device; the largest micro-batch of them is checked.
        max_tokens: of a micro-batch, as for `flexpg.pack`; None for 8,192, or the longest rollout.
        temperature: divides the logits.

    Raises:
        SelfCheckError: the model does not share prefixes exactly.
        ValueError: a model in evaluation mode, or what its integration refuses.
        TypeError: a model that is neither torchtune's nor transformers'.
    """
    checked_rollouts(rollouts)
    if max_tokens is None:
        max_tokens = max(MAX_TOKENS, *map(len, rollouts.sequences))
    packed = runs(pack(rollouts, max_tokens))
    largest = max(packed, key=lambda run: sum(batch.tree.num_tokens for batch in run))
    return check_run(model, largest, temperature=temperature)


def check_run(
    model: nn.Module,
    run: Sequence[MicroBatch],
    *,
    temperature: float = 1.0,
    autocast: Autocast = nullcontext,
    any_failed: Callable[[bool], bool] = bool,
) -> SelfCheck:
    """The same, on micro-batches that are packed already; all processes of a sharded model call it.

    Args:
        model: as in `self_check`.
        run: one of `flexpg.runs`, on the model's device; its first two micro-batches are checked.
        temperature: divides the logits.
        autocast: what every forward runs in.
        any_failed: whether a check failed on any process, given whether it did on this one.

    Raises:
        SelfCheckError: as `self_check`; on the other processes too.
        ValueError: as `self_check`.
        TypeError: as `self_check`.
    """
    if not model.training:
        raise ValueError("the model is in evaluation mode, in which dropout would not show; call model.train() first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the model is trained; set requires_grad of those that are")
    started = perf_counter()
    run = [replace(batch, rollouts=replace(batch.rollouts, loss_mask=None)) for batch in run[:2]]  # all is compared
    subject = _Subject(model, _integration(model), temperature, autocast, any_failed)
    for batch in run:
        _check_isolation(subject, batch)
    compared = [(batch, n) for batch in run for n in _picked(batch)]
    with _gradients_of_its_own(model):
        shared = _shared_backward(subject, run)
        norms = gradient_norms(model)
        alone = _alone_backward(subject, compared, sign=-1)
        errors = gradient_norms(model)
    with _gradients_of_its_own(model):
        _alone_backward(subject, compared, sign=1)
        with subject.rounded_once_more():
            moved = _alone_backward(subject, compared, sign=-1)
        noises = gradient_norms(model)
    error, budget = _check_logprobs(subject, compared, shared, alone, moved)
    gradient_error, gradient_budget = _check_gradients(subject, compared, norms, errors, noises)
    tokens, seconds = sum(batch.tree.num_tokens for batch in run), perf_counter() - started
    rollouts = len({batch.indices[n] for batch, n in compared})
    return SelfCheck(rollouts, tokens, error, budget, gradient_error, gradient_budget, seconds)


def _integration(model: nn.Module) -> ModuleType:
    """The file that knows the model's kind; imported here, as `import flexpg` needs neither package."""
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package, name in (("torchtune", "torchtune"), ("transformers", "transformers"), ("peft", "transformers")):
        if package in packages:
            return importlib.import_module(f"flexpg.integrations.{name}")
    raise TypeError(
        f"model is of type {type(model).__name__}; self_check knows models of torchtune and transformers, "
        "out of a wrapper that compiles them or shares them between processes"
    )


# ---- isolation -----------------------------------------------------------------------------------------------------


def _check_isolation(subject: _Subject, batch: MicroBatch) -> None:
    """Two forwards of the row are the same, and a replaced completion moves nothing outside of itself."""
    tree, found = batch.tree, None
    base = subject.hidden(tree)
    bound = _isolated(subject, tree, base)
    for other, own, change in [(tree, slice(0, 0), ""), *_perturbed(batch)]:
        moved = ~((subject.hidden(other) - base).abs() <= bound).all(1)  # [S'], True for NaN
        moved[own] = False
        if found is None and moved.any():
            found = other, moved, change
    other, moved, change = found or (tree, torch.zeros(len(base), dtype=torch.bool, device=base.device), "")

    def explain() -> str:
        before, after = (_layer_outputs(subject, partial(subject.hidden, row)) for row in (tree, other))
        hits = {
            name: (moved.cpu() & (out[: len(base)] != after[name][: len(base)]).any(1)).nonzero()
            for name, out in before.items()
        }
        layer = next((name for name, hit in hits.items() if len(hit)), "the final norm")
        packed = int(hits[layer][0] if layer in hits else moved.nonzero()[0]) if found else 0
        n, t = (int(i) for i in (tree.node == packed).nonzero()[0])
        token = _words(batch, n, t)
        if not base[moved].isfinite().all():
            return f"the hidden state of {token} is not finite; look into the weights"
        if not change:
            return (
                f"two forwards of one row differ from {layer} on, at {token}: the model draws random numbers (dropout, "
                "noise), which would differ per copy of a prefix; switch them off"
            )
        return (
            f"{token} moved in {layer} when {change} was replaced: the layer looks past its mask, so completions see "
            f"each other; {ADVICE}"
        )

    subject.settle(found is not None, explain)


def _isolated(subject: _Subject, tree: PrefixTree, hidden: Tensor) -> float:
    """What may move: nothing, but for rounding where experts take the tokens that are routed to them all at once."""
    if not subject.has_experts:
        return 0.0
    with subject.rounded_once_more():
        return subject.allowance * float((subject.hidden(tree) - hidden).abs().max())


def _perturbed(batch: MicroBatch) -> Iterator[tuple[PrefixTree, slice, str]]:
    """The row with the first completion replaced, of what is its own, then with the last; and where that stands."""
    tree = batch.tree
    tokens, nodes = tree.token_row()[0], tree.node.clamp(min=0)
    counts = torch.bincount(tree.node[tree.node >= 0], minlength=len(tree))
    steps = torch.arange(nodes.shape[1], device=tokens.device)
    is_own = (tree.node >= 0) & (steps >= batch.rollouts.prompt_lens[:, None]) & (counts[nodes] == 1)  # [N, T]
    owners = [n for n in _in_packed_order(batch) if is_own[n].any()]
    for n in (owners[0], owners[-1]) if owners else (0, 0):
        own = tree.node[n][is_own[n]]
        start, stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
        changed = tokens.clone()
        changed[start:stop] = (changed[start:stop] + 1) % (tree.max_token + 1)
        yield replace(tree, tokens=changed), slice(start, stop), f"the completion of rollout {batch.indices[n]}"


def _in_packed_order(batch: MicroBatch) -> list[int]:
    return batch.tree.node.amax(1).argsort(stable=True).tolist()


def _words(batch: MicroBatch, n: int, t: int) -> str:
    """Token t of sequence n."""
    prompt = int(batch.rollouts.prompt_lens[n])
    part, number = ("prompt", t) if t < prompt else ("completion", t - prompt)
    return f"token {number} of the {part} of rollout {batch.indices[n]}"


# ---- log-probabilities and gradients ---------------------------------------------------------------------------------


def _picked(batch: MicroBatch) -> list[int]:
    """The first, the middle and the last rollout of a row; one of them twice where there are fewer, for FSDP."""
    order = _in_packed_order(batch)
    return [order[i * (len(order) - 1) // (COMPARED - 1)] for i in range(COMPARED)]


def _weights(length: int, number: int, like: Tensor) -> Tensor:
    """[length] of the loss, one for every token, so that a token in another's place shows."""
    return torch.randn(length, generator=torch.Generator().manual_seed(number)).to(like)


def _shared_backward(subject: _Subject, run: Sequence[MicroBatch]) -> list[Tensor]:
    """The packed forward and backward, as in training; the log-probabilities [C] of each picked rollout."""
    found: list[Tensor] = []
    with subject.autocast():
        encoded = subject.way.encode_run(subject.model, run)
    with encoded as prefix:
        for batch in run:
            with subject.autocast():
                logprobs, _ = subject.way.logprobs(subject.model, batch, subject.temperature, prefix)  # [n, C]
            loss = logprobs.sum() * 0
            for n in _picked(batch):
                own = logprobs[n, : int(batch.rollouts.completion_lens[n])]
                loss = loss + (_weights(len(own), len(found), own) * own).sum()
                found.append(own.detach())
            loss.backward()
    return found


def _alone_backward(subject: _Subject, compared: Sequence[tuple[MicroBatch, int]], sign: int) -> list[Tensor]:
    """Each rollout alone, forward and backward; its log-probabilities [C]."""
    found: list[Tensor] = []
    with uncompiled(subject.model):  # for the backward too: checkpointing calls the layers again in it
        for batch, n in compared:
            own = subject.alone(batch, n)
            (sign * (_weights(len(own), len(found), own) * own).sum()).backward()
            found.append(own.detach())
    return found


@contextmanager
def _gradients_of_its_own(model: nn.Module) -> Iterator[None]:
    """Inside, gradients are summed from nothing; afterwards those from before are there again."""
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad


def _check_logprobs(
    subject: _Subject,
    compared: Sequence[tuple[MicroBatch, int]],
    shared: Sequence[Tensor],
    alone: Sequence[Tensor],
    moved: Sequence[Tensor],
) -> tuple[float, float]:
    """The largest difference between shared and alone, and what rounding explains, in nats."""
    differences = [(a - b).abs().nan_to_num(torch.inf) for a, b in zip(shared, alone, strict=True)]
    noise = max(float((a - b).abs().max()) for a, b in zip(alone, moved, strict=True))
    unit = max(1.0, *(float(own.abs().max()) for own in alone)) * torch.finfo(alone[0].dtype).eps
    budget, error = max(subject.allowance * noise, STEPS * unit), max(float(own.max()) for own in differences)

    def explain() -> str:
        worst = max(range(len(compared)), key=lambda i: float(differences[i].max()))
        (batch, n), c = compared[worst], int(differences[worst].argmax())
        layer = _first_layer_apart(subject, batch, n)
        return (
            f"{_words(batch, n, int(batch.rollouts.prompt_lens[n]) + c)} has the log-probability "
            f"{float(shared[worst][c]):.4f} in the packed row and {float(alone[worst][c]):.4f} alone, where rounding "
            f"explains {budget:.0e}; they part in {layer}, which does not take positions, window or mask as they are "
            f"given (does it count packed tokens?); {ADVICE}"
        )

    subject.settle(not error <= budget, explain)
    return error, budget


def _check_gradients(
    subject: _Subject,
    compared: Sequence[tuple[MicroBatch, int]],
    norms: dict[str, float],
    errors: dict[str, float],
    noises: dict[str, float],
) -> tuple[float, float]:
    """Error and budget of the parameter that comes nearest to its budget, relative to its gradient's norm."""
    # Where attention is all on one token, gradients are what is left of equal numbers, and may be next to nothing.
    left = min(4096 * subject.unit, 1e-3)
    least = 0.2 * subject.unit * max(norms.values(), default=0.0)

    def budget_of(name: str) -> float:
        return max(2 * subject.allowance * noises.get(name, 0.0), left * norms.get(name, 0.0), least, 1e-300)

    def excess(name: str) -> float:
        return errors[name] / budget_of(name) if isfinite(errors[name]) else inf

    nearest = max(errors, key=excess)
    norm = norms.get(nearest) or errors[nearest] or 1.0
    error, budget = errors[nearest] / norm, budget_of(nearest) / norm
    rollouts = ", ".join(str(batch.indices[n]) for batch, n in compared)
    why = (
        f"the gradient of {nearest}, over rollouts {rollouts}, is {error:.0e} of its norm away from the unshared one, "
        f"where rounding explains {budget:.0e}; {ADVICE}"
    )
    subject.settle(not error <= budget, lambda: why)
    return error, budget


def _layer_outputs(subject: _Subject, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    return layer_outputs(subject.way.layers(subject.model), call)


def _first_layer_apart(subject: _Subject, batch: MicroBatch, n: int) -> str:
    """The first layer whose output, of rollout n, differs by more than rounding from that of the rollout alone."""
    shared = _layer_outputs(subject, partial(subject.hidden, batch.tree))
    alone = _layer_outputs(subject, partial(subject.alone, batch, n))
    with subject.rounded_once_more():
        moved = _layer_outputs(subject, partial(subject.alone, batch, n))
    nodes = batch.tree.node[n][batch.tree.node[n] >= 0].cpu()
    for name, out in alone.items():
        if (shared[name][nodes] - out).abs().max() > subject.allowance * (moved[name] - out).abs().max():
            return name
    return "what follows the layers"
