"""Shared prefixes in unmodified transformers models, through an attention implementation called "flexpg".

A model that accepts the mask need not obey it: checks.py refuses what would not be exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexpg.integrations.fsdp import run_as_forward
from flexpg.integrations.transformers.attention import NAME, register
from flexpg.integrations.transformers.checks import (
    check_architecture,
    check_no_dropout,
    exact_forward,
    inner_model,
    unwrap,
)
from flexpg.logprobs import OutputLayer
from flexpg.prefix_cache import PrefixCache, packed_input, whole_sequence
from flexpg.sampling import Decoder
from flexpg.tree import PrefixTree

__all__ = ["baseline_forward", "decoder", "enable", "forward", "layers", "output", "register"]


def enable(model: nn.Module) -> None:
    """Switch a transformers model, plain or with PEFT adapters, to the attention implementation "flexpg".

    >>> from transformers import AutoModelForCausalLM, Qwen2Config
    >>> config = Qwen2Config(
    ...     hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=100
    ... )
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> enable(model)
    >>> forward(model, PrefixTree.from_groups([[1, 2, 3]], [[[4], [5, 6]]])).shape
    torch.Size([1, 256, 64])

    Raises:
        ValueError: If the model has dropout and is in training mode, or an unsupported adapter.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    base = unwrap(model)
    check_architecture(base)
    check_no_dropout(model)
    register()
    if base.config._attn_implementation != NAME:
        base.set_attn_implementation(NAME)


def forward(model: nn.Module, tree: PrefixTree, *, prefix: PrefixCache | None = None) -> Tensor:
    """Compute the hidden states of a packed sequence, equal to those of the baseline.

    Args:
        model: An enabled transformers decoder, plain or with PEFT adapters, with or without gradient checkpointing,
            sharded by FSDP2 or not.
        tree: The packed sequence, with tokens, on the model's device.
        prefix: A cached prompt with which all sequences begin, from `flexpg.integrations.encode_prefix`.

    Returns:
        [1, S, E] hidden states after the final norm.

    Raises:
        ValueError: If the model is not enabled, has dropout or noise in training, or the tree does not fit it.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    packed = packed_input(model, tree, prefix)

    def hidden_states() -> Tensor:
        base_model = inner_model(unwrap(model))
        with exact_forward(model, packed.mask.tree, None if prefix is None else prefix.tree):
            hidden = base_model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                attention_mask=packed.mask,
                use_cache=False,
            ).last_hidden_state
        return whole_sequence(hidden, tree, prefix)

    return run_as_forward(model, hidden_states)


def output(model: nn.Module) -> OutputLayer:
    """Return the model's output layer: [M, E] -> logits [M, V], tied or not, with its scale and softcap.

    It is the model's own forward around its decoder, so nothing that an architecture does to its logits is missed.

    Raises:
        TypeError: If the model has no output layer or, when called, its forward does not call its decoder.
    """
    base = unwrap(model)
    base_model = inner_model(base)
    if base_model is base or base.get_output_embeddings() is None:
        raise TypeError(f"{type(base).__name__} has no output layer; load it with AutoModelForCausalLM")

    def logits(rows: Tensor) -> Tensor:
        own, calls = vars(base_model).get("forward"), []

        def decoder_forward(*args: Any, **kwargs: Any) -> _HiddenStates:
            calls.append(True)
            return _HiddenStates(last_hidden_state=rows[None])

        base_model.forward = decoder_forward
        input_ids = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
        try:
            out = base.forward(input_ids=input_ids, use_cache=False)  # not base(...): no hooks, such as those of FSDP
        finally:
            del base_model.forward
            if own is not None:
                base_model.forward = own
        if not calls:
            raise TypeError(
                f"the forward of {type(base).__name__} does not call its {type(base_model).__name__}; pass an output "
                "layer of your own to token_logprobs"
            )
        return out.logits[0]

    return logits


def baseline_forward(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Compute the hidden states [n, T, E] of right-padded sequences [n, T], by transformers' own attention."""
    base_model = inner_model(unwrap(model))
    return run_as_forward(model, lambda: base_model(input_ids=input_ids, use_cache=False).last_hidden_state)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder layers by name, in order.

    Raises:
        TypeError: If the model does not keep them in one list.
    """
    base = unwrap(model)
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return {f"{name}.{n}": layer for n, layer in enumerate(module)}
    raise TypeError(f"{type(base).__name__} must have one list of {base.config.num_hidden_layers} layers")


def decoder(model: nn.Module) -> Decoder:
    """Raise: sampling from transformers models is not supported yet.

    Raises:
        TypeError: Always.
    """
    raise TypeError(
        f"flexpg.sample does not support transformers models yet, got {type(model).__name__}; use model.generate(...) "
        "and Rollouts.from_generate(...)"
    )


class _HiddenStates(BaseModelOutputWithPast):
    """A decoder's output of hidden states only: every other field that the model around it reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
