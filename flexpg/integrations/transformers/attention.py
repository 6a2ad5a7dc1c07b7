"""The attention implementation "flexpg" of transformers.

transformers looks attention up by name and passes a four-dimensional mask on unchanged. So a packed sequence with a
TreeBlockMask reaches flexpg's attention, and everything else (generation, padded batches, evaluation) uses what
transformers would have used: sdpa, or eager attention for a model with a softcap or attention sinks, which sdpa does
not support.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask, PrefixShardMask
from flexpg.sample_cache import SampleBlockMask

NAME = "flexpg"  # of the attention implementation


class Attended(NamedTuple):
    """What an attention module passed to attention, or what its config says."""

    window: int | None
    chunk: int | None
    has_sinks: bool


# The attention modules that the current packed forward has called; None outside of one.
attended: ContextVar[dict[nn.Module, Attended] | None] = ContextVar("attended", default=None)


def register() -> None:
    """Register "flexpg" as an attention implementation of transformers.

    `flexpg.enable` does this; call it yourself to load a model with `attn_implementation="flexpg"`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ordinary_mask)


def uses_eager(config: PretrainedConfig | None) -> bool:
    """Return whether transformers uses eager attention for a model: one with a softcap, or a class without sdpa."""
    if config is None:
        return False
    return getattr(config, "attn_logit_softcapping", None) is not None or not _supports_sdpa(type(config))


@torch.compiler.assume_constant_result  # the lookup imports modules, which cannot be traced
def _supports_sdpa(config_class: type[PretrainedConfig]) -> bool:
    model_class = MODEL_MAPPING.get(config_class, None)  # None for a model that transformers does not know
    return getattr(model_class, "_supports_sdpa", True)


def chunk_of(module: nn.Module) -> int | None:
    """Return the chunk of an attention layer, which transformers tells it by the mask only; None for no chunks."""
    config = getattr(module, "config", None)
    chunk, kinds = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None)
    if chunk is None or kinds is None:  # without kinds, all layers are chunked
        return chunk
    return chunk if kinds[module.layer_idx] == "chunked_attention" else None


def attention_forward(
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
    """Compute attention as transformers calls it.

    Args:
        module: The attention layer.
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D'], D' <= D.
        attention_mask: A TreeBlockMask, or what transformers passes for ordinary batches.
        dropout: Must be 0 for packed sequences.
        scaling: Factor of the scores.
        sliding_window: Window in positions.
        softcap: The softcap of the scores.
        s_aux: [Hq] attention sinks.
        is_causal: Must not be False for packed sequences.
        kwargs: Passed on to sdpa or eager attention.

    Returns:
        [B, T, Hq, D'] and None.
    """
    name = type(module).__name__
    if isinstance(attention_mask, BlockMask) and not isinstance(attention_mask, TreeBlockMask):
        raise TypeError(
            f"{name} got a BlockMask that is not a TreeBlockMask; a layer sliced it or flexpg did not build it"
        )
    if kwargs.get("indices") is not None:
        raise TypeError(
            f'{name} selects keys by index, which "{NAME}" does not support; use attn_implementation="sdpa"'
        )
    if not isinstance(attention_mask, TreeBlockMask):
        if attention_mask is None and 1 < (length := query.shape[2]) < key.shape[2]:
            # Gemma 4 drops queries by `logits_to_keep` after its mask was made, and knows only sdpa not to like that.
            attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - length)
        call = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        if uses_eager(getattr(module, "config", None)):
            eager = vars(inspect.getmodule(type(module)))["eager_attention_forward"]
            return eager(module, query, key, value, attention_mask, softcap=softcap, s_aux=s_aux, **call)
        if s_aux is not None:
            raise TypeError(f'{name} has attention sinks, which sdpa does not support; use attn_implementation="eager"')
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **call)
    if dropout > 0:
        raise ValueError(
            f"{name} has dropout {dropout}, which would differ between the copies of a prefix; set it to 0"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise TypeError(f"{name} is not causal; a prefix can be shared in causal models only")
    if kwargs.get("position_bias") is not None:
        raise TypeError(f"{name} adds a position bias to its scores, which flexpg does not support")
    if torch.is_autocast_enabled(query.device.type):  # like sdpa; rotary embeddings leave q and k in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    chunk = chunk_of(module)
    if (calls := attended.get()) is not None:  # None in the recomputation of activation checkpointing
        if module in calls and isinstance(attention_mask, PrefixBlockMask | PrefixShardMask | SampleBlockMask):
            raise TypeError(
                f"{name} computes attention more than once per forward, so a prompt cannot be cached for it; raise "
                "max_tokens until every group fits, and sample with model.generate(...)"
            )
        calls[module] = Attended(sliding_window, chunk, s_aux is not None)
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
        query = _with_temperatures_by_position(module, query, attention_mask)
    width = value.shape[-1]
    if width < key.shape[-1]:  # DeepSeek
        value = functional.pad(value, (0, key.shape[-1] - width))
    key, value = attention_mask.keys_and_values(module, key, value)
    options: dict[str, Any] = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    if isinstance(attention_mask, SampleBlockMask):
        out = attention_mask.cache.attend(module, query, key, value, chunk=chunk, **options)
    else:
        mask = attention_mask if chunk is None else attention_mask.for_chunk(chunk)
        out = attention(query, key, value, mask, **options)
    return out[..., :width].transpose(1, 2).contiguous(), None


def ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Build the mask of an ordinary batch: sdpa's, or eager's where transformers uses eager attention."""
    make = eager_mask if uses_eager(config) else sdpa_mask
    return make(*args, config=config, **kwargs)


def _with_temperatures_by_position(module: Any, query: Tensor, mask: TreeBlockMask) -> Tensor:
    """Return queries [1, Hq, T, D] that are scaled by position; Llama 4 has scaled them by index, where it has no RoPE.

    Args:
        module: The attention layer, which has `floor_scale` and `attn_scale`.
        query: [1, Hq, T, D], from the mask's first query on; of a sampler's step [B, Hq, 1, D].
        mask: The mask of the packed sequence, or of a sampler.
    """

    def temperature(positions: Tensor) -> Tensor:  # as in Llama4TextAttention
        return torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    positions = mask.query_positions[: query.shape[2]][None]  # [1, T]
    if isinstance(mask, SampleBlockMask) and mask.cache.is_filled:
        positions = mask.cache.positions()[:, None]  # [B, 1]
    indices = torch.arange(query.shape[2], device=query.device)
    return (query * (temperature(positions) / temperature(indices))[:, None, :, None]).to(query.dtype)
