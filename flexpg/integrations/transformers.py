"""Shared prefixes in unmodified transformers models, through an attention implementation called "flexpg".

transformers looks its attention up by name, and hands a four-dimensional mask on to it as it is. So a packed row with a
TreeBlockMask reaches this package's attention, and everything else (generation, padded batches, evaluation) goes to the
attention that transformers would have used: sdpa, or eager where a model has a softcap, which sdpa has not.

Not every model that takes the mask obeys it. What would not be exact is refused: attention sinks, dropout and noise in
training, attention that is not causal, layers that carry a state past the mask or keep their window to themselves, and
rotary positions that depend on what else is in the row.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexpg.attention import attention
from flexpg.masks import TreeBlockMask, mask_of
from flexpg.tree import PrefixTree

NAME = "flexpg"
EXACT_LAYERS = {"full_attention", "sliding_attention"}  # of transformers' `layer_types`


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


def forward(model: nn.Module, tree: PrefixTree, mask: TreeBlockMask | None = None) -> Tensor:
    """Hidden states of the packed row, each token's equal to those of its own sequence run alone.

    Args:
        model: a decoder of transformers with `attn_implementation="flexpg"`, bare or in PEFT's wrapper, with or without
            gradient checkpointing. Not in a wrapper that shares work between processes.
        tree: the packed row, with tokens, on the model's device.
        mask: `block_mask(tree)`, where one is at hand; None makes it.

    Returns:
        [1, S, E] hidden states after the final norm; `output(model)` makes logits of them.

    Raises:
        ValueError: another attention implementation, tokens beyond the vocabulary, dropout or noise in training, rotary
            positions that depend on the longest sequence, a tree without tokens or on another device, another tree's
            mask.
        TypeError: a model in which a prefix cannot be shared exactly.
    """
    decoder = causal_lm(model).base_model
    row = {"input_ids": tree.token_row(), "position_ids": tree.position_ids[None]}
    with packed_forward(model, tree, mask) as mask:
        return decoder(**row, attention_mask=mask, use_cache=False).last_hidden_state


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


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model, out of PEFT's wrapper where it is in one.

    Raises:
        ValueError: an adapter that adds virtual tokens to the prompt.
        TypeError: a model of another kind, or in a wrapper of another kind.
    """
    peft = sys.modules.get("peft")  # not imported, no adapter
    if peft is not None and isinstance(model, peft.PeftModel):
        if model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise ValueError(f"the adapter ({kind}) adds virtual tokens, which a packed row has no place for; use LoRA")
        return model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; give the transformers model itself (or PEFT's around it)")
    return model


def check(model: nn.Module) -> None:
    """Refuses a model in which a prefix cannot be shared exactly, as far as that shows before a forward.

    Raises:
        ValueError: another attention implementation, or dropout in training.
        TypeError: an architecture with layers that see past the mask, or that reads more than text.
    """
    _check_architecture(causal_lm(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise ValueError(
                f"{name} has dropout {module.p}, which would differ per copy of a prefix; set it to 0 "
                "(lora_dropout=0; in TRL's config disable_dropout=True)"
            )


@contextmanager
def packed_forward(model: nn.Module, tree: PrefixTree, mask: TreeBlockMask | None = None) -> Iterator[TreeBlockMask]:
    """The mask for one forward of the packed row, inside; before and after, what would not be exact is refused.

    Args:
        model: as in `forward`.
        tree: as in `forward`.
        mask: as in `forward`.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    whole = causal_lm(model)
    check(model)
    _check_tree(whole, tree)
    mask = mask_of(tree, mask)
    windows = vars(mask)["windows"] = {}  # of each attention module that has seen the mask
    random_state = _random_state(tree.end.device)
    yield mask
    _check_layers(whole, tree, windows)
    if not all(map(torch.equal, random_state, _random_state(tree.end.device))):
        raise ValueError(
            f"{type(whole).__name__} drew random numbers in its forward (dropout or noise of the router), which would "
            "differ per copy of a prefix; set them to 0 in its config"
        )


def softcap_of(config: PretrainedConfig) -> float | None:
    """The softcap of a model's attention, for which transformers takes its eager attention; None for none."""
    return getattr(config, "attn_logit_softcapping", None)


def _check_architecture(model: PreTrainedModel) -> None:
    config, name = model.config, type(model).__name__
    if config._attn_implementation != NAME:
        raise ValueError(
            f'{name} has attn_implementation="{config._attn_implementation}"; call register() of '
            f'flexpg.integrations.transformers and model.set_attn_implementation("{NAME}")'
        )
    if not model.is_backend_compatible():
        raise TypeError(f"{name} does not use transformers' attention interface; it would not see the mask")
    if config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; a prefix can be shared in decoders only")
    if config.get_text_config() is not config:
        raise TypeError(f"{name} reads more than text; a prefix can be shared in its language model only")
    other = set(getattr(config, "layer_types", None) or ()) - EXACT_LAYERS
    if other:
        raise TypeError(
            f"{name} has layers of {', '.join(sorted(other))}, which carry what they saw past the mask; "
            "a prefix can be shared in layers of full or sliding attention only"
        )
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise TypeError(f"{name} has convolutions over the row (a state-space layer), which would mix completions")


def _check_tree(model: PreTrainedModel, tree: PrefixTree) -> None:
    embedding: Any = model.get_input_embeddings()  # asked for its count: a sharded weight may be empty
    if tree.end.device != (device := embedding.weight.device):
        raise ValueError(f"the tree is on {tree.end.device} and the model on {device}; move the tree with .to()")
    if tree.max_token >= (vocab := embedding.num_embeddings):
        raise ValueError(f"token id {tree.max_token} is beyond the model's vocabulary of {vocab}; check the tokenizer")
    rope = getattr(model.config, "rope_parameters", None) or {}
    for scaling in [rope] if "rope_type" in rope else rope.values():  # or one per kind of layer
        kind, original = scaling["rope_type"], scaling.get("original_max_position_embeddings")
        original = original or model.config.max_position_embeddings
        depends_on_longest = "dynamic" in kind or (kind == "longrope" and int(tree.lengths.min()) <= original)
        if depends_on_longest and tree.max_length > original:
            raise ValueError(
                f"rotary scaling {kind!r} turns all tokens of a row by its longest sequence, {tree.max_length} tokens, "
                f"once it is beyond {original}; give such sequences a tree of their own"
            )


def _check_layers(model: PreTrainedModel, tree: PrefixTree, windows: dict[nn.Module, int | None]) -> None:
    name, config = type(model).__name__, model.config
    if len(windows) != config.num_hidden_layers:
        raise TypeError(
            f"{len(windows)} of the {config.num_hidden_layers} layers of {name} attend through transformers' attention "
            "interface; the others would not see the mask, and prefixes cannot be shared"
        )
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    needed = 1 if kinds is None else kinds.count("sliding_attention")
    if isinstance(window, int) and window < tree.max_length:
        handed_on = sum(own is not None for own in windows.values())
        if handed_on < needed:
            raise TypeError(
                f"{name} has sliding_window={window} and {handed_on} of its layers hand it on to the attention, where "
                f"{needed} or more should; only trees of sequences up to {window} tokens are exact"
            )


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


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
    if not isinstance(attention_mask, TreeBlockMask):
        call = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **call)
        eager = vars(inspect.getmodule(type(module)))["eager_attention_forward"]
        return eager(module, query, key, value, attention_mask, softcap=softcap, **call)
    if dropout > 0:
        raise ValueError(f"{name} has attention_dropout={dropout}; sharing is exact without: set it to 0 in the config")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise TypeError(f"{name} is not causal; a prefix can be shared in causal models only")
    if kwargs.get("position_bias") is not None:
        raise TypeError(f"{name} adds a position bias to its scores; a prefix can be shared with rotary positions")
    if torch.is_autocast_enabled(query.device.type):  # as sdpa does; rotary positions leave q and k in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    vars(attention_mask)["windows"][module] = sliding_window
    out = attention(query, key, value, attention_mask, scale=scaling, window=sliding_window, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def _ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of an ordinary batch: sdpa's, or eager's where the config has a softcap."""
    make = sdpa_mask if softcap_of(config) is None else eager_mask
    return make(*args, config=config, **kwargs)
