"""Which transformers models share prefixes exactly: what is not exact is refused, before a forward or after it.

Before: architectures whose layers see past the mask, or whose positions do not start at 0; adapters that read whole
rows; rotary scaling by the longest sequence. After: layers that the mask never reached, sliding windows that were not
handed on, and random numbers that the forward drew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpg.masks import TreeBlockMask, mask_of
from flexpg.tree import PrefixTree

NAME = "flexpg"  # of the attention implementation
EXACT_LAYERS = {"full_attention", "sliding_attention"}  # of transformers' `layer_types`

# The attention modules that the current packed forward has reached, each with its window; None outside of one.
reached: ContextVar[dict[nn.Module, int | None] | None] = ContextVar("reached", default=None)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model, out of PEFT's wrapper where it is in one.

    Raises:
        ValueError: an adapter that adds virtual tokens to the prompt, or looks at whole rows.
        TypeError: a model of another kind, or in a wrapper of another kind.
    """
    peft = sys.modules.get("peft")  # not imported, no adapter
    if peft is not None and isinstance(model, peft.PeftModel):
        for config in model.peft_config.values():
            kind = config.peft_type.value
            if config.is_prompt_learning:
                raise ValueError(f"the adapter ({kind}) adds virtual tokens, which a packed row has no place for")
            if kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(f"the adapter ({kind}) depends on the whole row; take one that does not, as LoRA")
        return model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is of type {type(model).__name__}; give a transformers model, or PEFT's around one")
    return model


def check_architecture(model: PreTrainedModel) -> None:
    """Refuses an architecture in which a prefix cannot be shared exactly.

    Raises:
        TypeError: layers that see past the mask, positions that are not counted from 0, or inputs other than text.
    """
    config, name = model.config, type(model).__name__
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
    if any(path.endswith(".sinks") for path, _ in model.named_parameters()):
        raise TypeError(f"{name} has attention sinks, which flexpg's attention has not; train it without flexpg")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            raise TypeError(f"{name} has convolutions over the row (a state-space layer), which would mix completions")
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            raise TypeError(f"{name} counts positions from its padding id on, as RoBERTa does; they must start at 0")


def check_no_dropout(model: nn.Module, will_train: bool = False) -> None:
    """Refuses dropout in training, of layers or of attention.

    Args:
        model: of any kind.
        will_train: whether layers in evaluation mode count as well.

    Raises:
        ValueError: a layer with dropout above 0.
    """
    for path, module in model.named_modules():
        if not (will_train or module.training):
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{path} has dropout {module.p}, which would differ per copy of a prefix; set it to 0 "
                "(lora_dropout=0; in TRL's config disable_dropout=True)"
            )
        if (rate := vars(module).get("attention_dropout") or 0) > 0:
            raise ValueError(
                f"{path} has attention_dropout={rate}, which would differ per copy of a prefix; load the model with "
                'attention_dropout=0 (in TRL\'s config model_init_kwargs={"attention_dropout": 0})'
            )


@contextmanager
def packed_forward(model: nn.Module, tree: PrefixTree, mask: TreeBlockMask | None = None) -> Iterator[TreeBlockMask]:
    """The mask for one forward of the packed row, inside; before and after, what would not be exact is refused.

    Args:
        model: as in `flexpg.integrations.transformers.forward`.
        tree: likewise.
        mask: likewise.

    Raises:
        ValueError: likewise.
        TypeError: likewise.
    """
    whole = causal_lm(model)
    check_architecture(whole)
    if whole.config._attn_implementation != NAME:
        raise ValueError(
            f'{type(whole).__name__} has attn_implementation="{whole.config._attn_implementation}"; call register() of '
            f'flexpg.integrations.transformers and model.set_attn_implementation("{NAME}")'
        )
    check_no_dropout(model)
    mask = mask_of(tree, mask)
    _check_tree(whole, tree, tree if mask.prefix is None else mask.prefix.tree)
    windows: dict[nn.Module, int | None] = {}
    random_state = _random_state(tree.end.device)
    outer = reached.set(windows)
    try:
        yield mask
    finally:
        reached.reset(outer)
    _check_layers(whole, tree, windows)
    if not all(map(torch.equal, random_state, _random_state(tree.end.device))):
        raise ValueError(
            f"the forward of {type(whole).__name__} drew random numbers (dropout, noise of a router, NEFTune); they "
            "would differ per copy of a prefix, so set them to 0"
        )


def _check_tree(model: PreTrainedModel, tree: PrefixTree, prefix: PrefixTree) -> None:
    if tree.end.device != (device := next(model.parameters()).device):
        raise ValueError(f"the tree is on {tree.end.device} and the model on {device}; move the tree with .to()")
    if tree.max_token >= (vocab := model.config.vocab_size):
        raise ValueError(f"token id {tree.max_token} is beyond the model's vocabulary of {vocab}; check the tokenizer")
    shortest = min(int(tree.lengths.min()), prefix.max_length)  # a prefix on its own is turned by its own length
    rope = getattr(model.config, "rope_parameters", None) or {}
    for scaling in [rope] if "rope_type" in rope else rope.values():  # or one per kind of layer
        kind, original = scaling["rope_type"], scaling.get("original_max_position_embeddings")
        original = original or model.config.max_position_embeddings
        depends_on_longest = "dynamic" in kind or (kind == "longrope" and shortest <= original)
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
    module: Any = torch.get_device_module(device)
    return states if device.type == "cpu" else [*states, module.get_rng_state(device)]
