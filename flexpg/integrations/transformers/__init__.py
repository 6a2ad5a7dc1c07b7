"""Shared prefixes in unmodified transformers models, through an attention implementation called "flexpg".

transformers looks its attention up by name, and hands a four-dimensional mask on to it as it is. So a packed row with a
TreeBlockMask reaches this package's attention, and everything else (generation, padded batches, evaluation) goes to the
attention that transformers would have used: sdpa, or eager where a model has a softcap, which sdpa has not.

Not every model that takes the mask obeys it: transformers_checks.py refuses what would not be exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexpg.backends.dispatch import attention
from flexpg.integrations.transformers.checks import NAME, causal_lm, packed_forward, reached
from flexpg.logprobs import logprobs_alone as each_alone
from flexpg.logprobs import token_logprobs_and_entropies
from flexpg.masks import TreeBlockMask
from flexpg.packing import MicroBatch
from flexpg.prefix_cache import EncodedPrefix, encoded, encoded_row, encoded_run, row_mask, whole_row
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree, Tokens


class _Hidden(BaseModelOutputWithPast):
    """A decoder's output of hidden states alone: None for whatever else a model around it asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def register() -> None:
    """Makes "flexpg" an attention implementation of transformers; call it once, before a model is loaded with it.

    >>> register()
    >>> from transformers import AutoModelForCausalLM, Qwen2Config
    >>> config = Qwen2Config(
    ...     hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=100
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="flexpg")
    >>> forward(model, PrefixTree.from_groups([[1, 2, 3]], [[[4], [5, 6]]])).shape
    torch.Size([1, 256, 64])
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _ordinary_mask)


def forward(
    model: nn.Module, tree: PrefixTree, mask: TreeBlockMask | None = None, *, prefix: EncodedPrefix | None = None
) -> Tensor:
    """Hidden states of the packed row, each token's equal to those of its own sequence run alone.

    Args:
        model: a decoder of transformers with `attn_implementation="flexpg"`, bare or in PEFT's wrapper, with or without
            gradient checkpointing. Not in a wrapper that shares work between processes.
        tree: the packed row, with tokens, on the model's device.
        mask: `block_mask(tree)`, where one is at hand; None makes it.
        prefix: what all sequences begin with, from `encode_prefix(model, ...)`: it is not encoded again.

    Returns:
        [1, S, E] hidden states after the final norm; `output(model)` makes logits of them.

    Raises:
        ValueError: another attention implementation, tokens beyond the vocabulary, dropout or noise in training, rotary
            positions that depend on the longest sequence, a tree without tokens or on another device, another tree's
            mask or prefix.
        TypeError: a model in which a prefix cannot be shared exactly.
    """
    decoder = causal_lm(model).base_model
    mask = row_mask(tree, mask, prefix)
    own = encoded_row(mask, model)
    with packed_forward(model, mask.tree, mask):
        row = {"input_ids": mask.tree.token_row()[:, own], "position_ids": mask.tree.position_ids[None, own]}
        hidden = decoder(**row, attention_mask=mask, use_cache=False).last_hidden_state
    return whole_row(hidden, tree, prefix)


def encode_prefix(model: nn.Module, tokens: Tokens) -> EncodedPrefix:
    """Encodes what a group has in common, once for all micro-batches of its completions: see `EncodedPrefix`.

    Args:
        model: as in `forward`; gradient checkpointing must not be reentrant.
        tokens: [P] int64, the prompt, on the model's device.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    return encoded(tokens, partial(forward, model))


def encode_run(model: nn.Module, run: Sequence[MicroBatch]) -> AbstractContextManager[EncodedPrefix | None]:
    """The prompt that several micro-batches have in common, encoded: see `flexpg.prefix_cache.encoded_run`.

    Args:
        model: as in `encode_prefix`.
        run: micro-batches of one run, as `flexpg.packing.runs` gives them.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    return encoded_run(run, partial(encode_prefix, model))


def logprobs(
    model: nn.Module, batch: MicroBatch, temperature: float = 1.0, prefix: EncodedPrefix | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a micro-batch's trained tokens.

    Args:
        model: as in `forward`, with an output layer.
        batch: rollouts and their packed row, on the model's device.
        temperature: divides the logits.
        prefix: of the micro-batch's run; not used where the micro-batch does not begin with it.

    Returns:
        [n, C] and [n, C], as `flexpg.token_logprobs_and_entropies`.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward` and `output`.
    """
    tree, rollouts = batch.tree, batch.rollouts
    return token_logprobs_and_entropies(
        forward(model, tree, prefix=prefix if batch.prefix_tokens else None),
        output(model),
        tree,
        prompt_lens=rollouts.prompt_lens,
        mask=rollouts.trained,
        temperature=temperature,
    )


def logprobs_alone(model: nn.Module, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of trained tokens, each rollout alone, through transformers' own attention; for `self_check`.

    Args:
        model: as in `logprobs`.
        rollouts: on the model's device.
        temperature: divides the logits.

    Returns:
        [n, C], as `flexpg.logprobs.logprobs_alone`.
    """
    decoder = causal_lm(model).base_model

    def hidden(tokens: Tensor) -> Tensor:
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state

    return each_alone(hidden, output(model), rollouts, temperature)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by name, the first first.

    Raises:
        TypeError: a model that does not keep them in one list.
    """
    whole = causal_lm(model)
    for name, own in whole.named_modules():
        if isinstance(own, nn.ModuleList) and len(own) == whole.config.num_hidden_layers:
            return {f"{name}.{n}": layer for n, layer in enumerate(own)}
    raise TypeError(f"{type(whole).__name__} has no list of {whole.config.num_hidden_layers} layers to look at")


def output(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's output layer: rows [M, E] -> logits [M, V], tied or not, with its scale and softcap.

    It is the model's own forward around its decoder, so nothing that an architecture does to its logits is missed.

    Raises:
        TypeError: a model without an output layer, or, when called, one whose forward goes past its decoder.
    """
    whole = causal_lm(model)
    decoder = whole.base_model
    if decoder is whole or whole.get_output_embeddings() is None:
        raise TypeError(f"{type(whole).__name__} has no output layer; load it with AutoModelForCausalLM")

    def logits(rows: Tensor) -> Tensor:
        own, asked = vars(decoder).get("forward"), []

        def hidden(*args: Any, **kwargs: Any) -> _Hidden:
            asked.append(True)
            return _Hidden(last_hidden_state=rows[None])

        decoder.forward = hidden
        try:
            out = whole(input_ids=torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device), use_cache=False)
        finally:
            del decoder.forward
            if own is not None:
                decoder.forward = own
        if not asked:
            name = type(whole).__name__
            raise TypeError(
                f"the forward of {name} goes past its {type(decoder).__name__}; give its output layer yourself"
            )
        return out.logits[0]

    return logits


def softcap_of(config: PretrainedConfig) -> float | None:
    """The softcap of a model's attention, for which transformers takes its eager attention; None for none."""
    return getattr(config, "attn_logit_softcapping", None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function: query [B, Hq, T, D], key and value [B, Hkv, T, D] -> [B, T, Hq, D]."""
    name = type(module).__name__
    if s_aux is not None:
        raise TypeError(
            f'{name} has attention sinks, which "{NAME}" and sdpa have not; use attn_implementation="eager"'
        )
    if isinstance(attention_mask, BlockMask) and not isinstance(attention_mask, TreeBlockMask):
        raise TypeError(
            f"{name} got a BlockMask that is no TreeBlockMask; a layer cut it, or it was not made by flexpg"
        )
    if kwargs.get("indices") is not None:
        raise TypeError(f'{name} picks the keys it attends to, which "{NAME}" does not; use attn_implementation="sdpa"')
    if not isinstance(attention_mask, TreeBlockMask):
        call = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **call)
        eager = vars(inspect.getmodule(type(module)))["eager_attention_forward"]
        return eager(module, query, key, value, attention_mask, softcap=softcap, **call)
    if dropout > 0:
        raise ValueError(f"{name} has dropout {dropout}, which would differ per copy of a prefix; set it to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise TypeError(f"{name} is not causal; a prefix can be shared in causal models only")
    if kwargs.get("position_bias") is not None:
        raise TypeError(f"{name} adds a position bias to its scores; a prefix can be shared with rotary positions")
    if torch.is_autocast_enabled(query.device.type):  # as sdpa does; rotary positions leave q and k in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if (windows := reached.get()) is not None:  # it is None in the recomputation of checkpointing
        windows[module] = sliding_window
    width = value.shape[-1]
    if width < key.shape[-1]:  # in DeepSeek
        value = functional.pad(value, (0, key.shape[-1] - width))
    key, value = attention_mask.joined(module, key, value)
    out = attention(query, key, value, attention_mask, scale=scaling, window=sliding_window, softcap=softcap)
    return out[..., :width].transpose(1, 2).contiguous(), None


def _ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of an ordinary batch: sdpa's, or eager's where the config has a softcap."""
    make = sdpa_mask if softcap_of(config) is None else eager_mask
    return make(*args, config=config, **kwargs)
