"""Numerical check, before the first update, that a model shares prefixes exactly on the user's own rollouts.

Three properties are tested in seconds, on micro-batches as they will be trained:

1. Isolation: when a completion is replaced, the hidden state of every token outside of it stays bitwise identical. A
   model that ignores the mask fails, and so does one that draws random numbers, because two equal forwards differ.
2. Log-probabilities of a few rollouts equal those of the baseline: each rollout on its own, through the model's
   own attention. Positions or windows that are counted in packed indices fail. Those of the first tokens of a
   rollout also equal those of an ordinary call of the model: logits that depend on more than hidden states fail.
3. Gradients of every trained parameter, for the same rollouts.

What rounding may change is measured on the spot: the baseline runs once more with every output of a layer and its
submodules perturbed by one unit in the last place of the computation's dtype. Up to `ALLOWANCE` times the change that
this causes counts as rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from flexpg.integrations import integration_for
from flexpg.integrations.framework import check_device
from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.packing import pack
from flexpg.rollouts import LOGPROBS, Rollouts
from flexpg.verify.baseline import baseline_logprobs, gradient_norms
from flexpg.verify.checked_model import CheckedModel, SelfCheckError
from flexpg.verify.comparison import (
    baseline_backward,
    check_gradients,
    check_logprobs,
    check_own_logprobs,
    own_gradients,
    picked_rollouts,
    shared_backward,
)
from flexpg.verify.isolation import check_isolation
from flexpg.verify.routes import count_rerouted_tokens

__all__ = ["SelfCheckError", "SelfCheckResult", "baseline_logprobs", "gradient_norms", "self_check"]

MAX_TOKENS = 8192


@dataclass(frozen=True)
class SelfCheckResult:
    """What was compared, and the errors that were found.

    Attributes:
        rollouts: Rollouts that were compared with the baseline.
        tokens: Packed tokens of the checked micro-batches, without padding.
        logprob_error: The largest difference to the baseline, in nats.
        logprob_budget: The largest difference that rounding explains, in nats.
        gradient_error: The error of the parameter that is closest to its budget, relative to the norm of its gradient.
        gradient_budget: The budget of that parameter.
        rerouted_tokens: Tokens of the compared rollouts, with their prompts, that a mixture of experts sends to other
            experts than in the baseline, because rounding decides a close choice; None without experts, or
            if these compute every token, as Llama 4's.
        seconds: Duration of the check.
    """

    rollouts: int
    tokens: int
    logprob_error: float
    logprob_budget: float
    gradient_error: float
    gradient_budget: float
    rerouted_tokens: int | None
    seconds: float

    def __str__(self) -> str:
        routes = f", rounding sends {self.rerouted_tokens} tokens to other experts" if self.rerouted_tokens else ""
        return (
            f"self-check passed: no leakage between completions ({self.tokens} packed tokens); {self.rollouts} of the"
            f" packed rollouts match the baseline: log-probabilities within {self.logprob_error:.0e}"
            f" (budget {self.logprob_budget:.0e})"
            f", gradients within {self.gradient_error:.0e} (budget {self.gradient_budget:.0e}){routes}"
            f", in {self.seconds:.1f} s"
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
        ValueError: If the model is in evaluation mode, its integration refuses it, or rollouts are on the CPU and the
            model is on a GPU.
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
    check_device(model, rollouts)
    started = perf_counter()
    batches = [_with_full_loss_mask(batch) for batch in by_cache(rollouts)[0][:2]]
    checked = CheckedModel(model, integration_for(model), temperature, autocast_dtype)
    for batch in batches:
        check_isolation(checked, batch)
    compared = [(batch, n) for batch in batches for n in picked_rollouts(batch)]
    own_logprobs, from_hidden_states = checked.own_logprobs(*compared[0])
    with own_gradients(model):
        shared = shared_backward(checked, batches)
        norms = gradient_norms(model)
        baseline = baseline_backward(checked, compared, sign=-1)
        errors = gradient_norms(model)
    with own_gradients(model):
        baseline_backward(checked, compared, sign=1)
        with checked.perturbed():
            perturbed = baseline_backward(checked, compared, sign=-1)
        noises = gradient_norms(model)
    error, budget = check_logprobs(checked, compared, shared, baseline, perturbed)
    check_own_logprobs(checked, *compared[0], own_logprobs, from_hidden_states, budget)
    gradient_error, gradient_budget = check_gradients(checked, compared, norms, errors, noises)
    tokens = sum(batch.tree.num_tokens for batch in batches)
    num_rollouts = len({int(batch.indices[n]) for batch, n in compared})
    rerouted = count_rerouted_tokens(checked, compared)
    seconds = perf_counter() - started
    return SelfCheckResult(num_rollouts, tokens, error, budget, gradient_error, gradient_budget, rerouted, seconds)


def _with_full_loss_mask(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with every completion token in the loss, so that all are compared."""
    without: dict[str, Any] = dict.fromkeys(LOGPROBS)
    full = replace(batch.rollouts, loss_mask=batch.rollouts.completion_mask, **without)
    return replace(batch, rollouts=full)
