"""The attention implementation "flexpg" of transformers.

transformers looks attention up by name and passes a four-dimensional mask on unchanged. So a packed sequence with a
TreeBlockMask reaches flexpg's attention, and everything else (generation, padded batches, evaluation) uses what
transformers would have used: sdpa, or eager attention for a model with a softcap, which sdpa does not support.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask

NAME = "flexpg"  # of the attention implementation

# The attention modules that the current packed forward has called, each with its window; None outside of one.
attended: ContextVar[dict[nn.Module, int | None] | None] = ContextVar("attended", default=None)


def register() -> None:
    """Register "flexpg" as an attention implementation of transformers.

    `flexpg.enable` does this; call it yourself to load a model with `attn_implementation="flexpg"`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ordinary_mask)


def softcap_of(config: PretrainedConfig) -> float | None:
    """Return the softcap of a model's attention, for which transformers uses eager attention; None for no softcap."""
    return getattr(config, "attn_logit_softcapping", None)


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
        softcap: Of the scores.
        s_aux: Attention sinks, which are refused.
        is_causal: Must not be False for packed sequences.
        kwargs: Passed on to sdpa or eager attention.

    Returns:
        [B, T, Hq, D'] and None.
    """
    name = type(module).__name__
    if s_aux is not None:
        raise TypeError(f'{name} has attention sinks, which "{NAME}" does not support; use attn_implementation="eager"')
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
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **call)
        eager = vars(inspect.getmodule(type(module)))["eager_attention_forward"]
        return eager(module, query, key, value, attention_mask, softcap=softcap, **call)
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
    if (windows := attended.get()) is not None:  # None in the recomputation of activation checkpointing
        if module in windows and isinstance(attention_mask, PrefixBlockMask):
            raise TypeError(
                f"{name} computes attention more than once per forward, so a prompt cannot be cached for it; raise "
                "max_tokens until every group fits"
            )
        windows[module] = sliding_window
    width = value.shape[-1]
    if width < key.shape[-1]:  # DeepSeek
        value = functional.pad(value, (0, key.shape[-1] - width))
    if isinstance(attention_mask, PrefixBlockMask):
        key, value = attention_mask.cache.extend(attention_mask, module, key, value)
    out = attention(query, key, value, attention_mask, scale=scaling, window=sliding_window, softcap=softcap)
    return out[..., :width].transpose(1, 2).contiguous(), None


def ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Build the mask of an ordinary batch: sdpa's, or eager's where the config has a softcap."""
    make = sdpa_mask if softcap_of(config) is None else eager_mask
    return make(*args, config=config, **kwargs)
