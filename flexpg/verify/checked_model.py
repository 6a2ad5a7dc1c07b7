"""The model that is checked, how it is called, and how much of a difference counts as rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexpg.integrations import Integration, autocast
from flexpg.integrations.fsdp import run_as_forward, sharded_modules
from flexpg.layer_hooks import perturb_layer_outputs, record_layer_outputs, uncompiled
from flexpg.micro_batches import MicroBatch
from flexpg.tree import PrefixTree
from flexpg.verify.baseline import baseline_logprobs

ALLOWANCE = 2.0  # over 20 kinds of correct models on a CPU, the largest ratio was 1.4, in bfloat16 0.8
EXPERTS_ALLOWANCE = 8.0  # rounding may route a token to another expert
ULPS = 64  # of a log-probability of its own size or 1: logits are some tens
ORDINARY_TOKENS = 512  # of an ordinary call, which computes the logits of all of its tokens
ADVICE = "train this model without sharing, or fix the layer"


class SelfCheckError(ValueError):
    """The model does not share prefixes exactly; the message names layer, token and rollout."""


@dataclass(frozen=True)
class CheckedModel:
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
        """Whether the model has a mixture of experts."""
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
        """Return the log-probabilities [C] of one rollout on its own."""
        rollouts = batch.rollouts.select([n])
        with uncompiled(self.model):
            return baseline_logprobs(
                self.model, rollouts, temperature=self.temperature, autocast_dtype=self.autocast_dtype
            )[0][0]

    @torch.no_grad()
    def own_logprobs(self, batch: MicroBatch, n: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [T - 1] by an ordinary call of the model, and by its output layer only.

        T are the first tokens of one rollout, as all logits are computed; all of its tokens if it has images.
        """
        rollouts = batch.rollouts.select([n])
        (tokens,), inputs = rollouts.sequences, rollouts.sequence_inputs
        tokens = tokens[:ORDINARY_TOKENS] if rollouts.prompt_inputs is None else tokens

        def from_hidden_states() -> Tensor:
            hidden = self.integration.baseline_forward(self.model, tokens[None], inputs)
            return self.integration.output(self.model)(hidden[0, :-1])

        def logprobs(logits: Tensor) -> Tensor:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return (logits / self.temperature).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]

        with autocast(self.model, self.autocast_dtype), uncompiled(self.model):
            expected = logprobs(self.integration.logits(self.model, tokens[None], inputs)[0, :-1])
            return expected, logprobs(run_as_forward(self.model, from_hidden_states))

    def layer_outputs(self, call: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Call the model once and return the output [T, E] of every layer."""
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


def packed_order(batch: MicroBatch) -> list[int]:
    """Return the rollouts in the order in which they end in the packed sequence."""
    return batch.tree.node.amax(1).argsort(stable=True).tolist()


def token_name(batch: MicroBatch, n: int, t: int) -> str:
    """Return what errors call token t of the micro-batch's rollout n."""
    prompt_len = int(batch.rollouts.prompt_lens[n])
    part, number = ("prompt", t) if t < prompt_len else ("completion", t - prompt_len)
    return f"token {number} of the {part} of rollout {int(batch.indices[n])}"
