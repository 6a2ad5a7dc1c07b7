"""What a framework has to provide, and the choice of a model's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flexpg.context_parallel import ContextShard
from flexpg.integrations.fsdp import sharded_modules
from flexpg.logprobs import OutputLayer
from flexpg.micro_batches import MicroBatch
from flexpg.prefix_cache import PrefixCache
from flexpg.prompt_inputs import PromptInputs
from flexpg.sampling import Decoder
from flexpg.tree import PrefixTree

M = TypeVar("M", bound=nn.Module)


class Integration(Protocol):
    """What flexpg needs of a framework's models. A module of functions is an implementation."""

    def enable(self, model: Any) -> None:
        """Prepare a model for packed sequences, or raise if prefixes could not be shared exactly in it."""

    def forward(
        self,
        model: Any,
        tree: PrefixTree,
        *,
        prefix: PrefixCache | None = None,
        shard: ContextShard | None = None,
        step_has_images: bool = False,
    ) -> Tensor:
        """Compute the hidden states [1, S, E] of a packed sequence, after the final norm.

        `prefix` is a cached prompt with which all sequences begin, or whose own forward this is. `shard` is the part
        that this rank computes, whose hidden states are returned; None for the whole sequence. With `step_has_images`,
        a vision encoder that is sharded with the model gets gradients, which are 0 without images.
        """

    def output(self, model: Any) -> OutputLayer:
        """Return the model's output layer: [M, E] -> logits [M, V]."""

    def check_rollouts(
        self,
        model: Any,
        tree: PrefixTree,
        *,
        rollout_ids: Sequence[int] | None = None,
        step_has_images: bool = False,
    ) -> None:
        """Raise if images do not fit the tokens of a packed sequence, or the model if a prompt of the step has images.

        `rollout_ids` are what errors call the sequences.
        """

    def baseline_forward(
        self, model: Any, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None
    ) -> Tensor:
        """Compute the hidden states [n, T, E] of right-padded sequences [n, T], by the model's own attention.

        `inputs` are the images of each sequence's prompt.
        """

    def logits(self, model: Any, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None) -> Tensor:
        """Compute the logits [n, T, V] of right-padded sequences [n, T] by an ordinary call of the model."""

    def layers(self, model: Any) -> dict[str, nn.Module]:
        """Return the decoder layers by name, in order."""

    def decoder(self, model: Any) -> Decoder:
        """Return what `sample_completions` calls for hidden states."""


def integration_for(model: nn.Module) -> Integration:
    """Return the integration of a model's framework, which is imported here.

    Raises:
        TypeError: If the model belongs to no framework that flexpg knows, or is wrapped.
    """
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "torchtune" in packages:
        from flexpg.integrations import torchtune

        return torchtune
    if packages & {"transformers", "peft"}:
        from flexpg.integrations import transformers

        return transformers
    raise TypeError(
        f"model must be a torchtune decoder, a transformers model or a PEFT model, got {type(model).__name__}; "
        "pass the model without torch.compile or DistributedDataParallel around it, and in the latter case average the "
        "gradients over ranks before optimizer.step(); a model of another kind can use flexpg.attention and "
        "flexpg.token_logprobs"
    )


def enable(model: M) -> M:
    """Prepare a torchtune or transformers model for shared prefixes, in place, and return it.

    Ordinary calls of the model (generation, evaluation, training without flexpg) do not change.

    Raises:
        TypeError: If prefixes cannot be shared exactly in this model, with the reason.
        ValueError: If an option of the model makes sharing inexact, such as dropout.
    """
    integration_for(model).enable(model)
    return model


def accelerator_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's first parameter; None for the CPU, which may hold offloaded weights, and meta."""
    device = next(model.parameters()).device
    return None if device.type in ("cpu", "meta") else device


def check_device(model: nn.Module, batches: Sequence[MicroBatch]) -> None:
    """Raise ValueError if micro-batches are on the CPU and the model is not."""
    device = accelerator_of(model)
    if device is not None and any(batch.indices.device.type == "cpu" for batch in batches):
        raise ValueError(f'rollouts must be on the model\'s device, got cpu; use rollouts.to("{device}")')


def autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Return a context of torch.autocast, without its weight cache under FSDP2, which frees what it would hold."""
    device = next(model.parameters()).device.type
    return nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=not sharded_modules(model))
