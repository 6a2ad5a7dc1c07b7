"""Which transformers models share prefixes exactly; all others are refused, before a forward or after it.

Before: architectures whose layers see past the mask or whose positions do not start at 0, adapters that depend on whole
sequences, and rotary scaling by the longest sequence. After: layers that the mask did not reach, sliding windows and
attention sinks that were not passed on, and random numbers that the forward consumed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpg.integrations.transformers.attention import NAME, Attended, attended
from flexpg.tree import PrefixTree

EXACT_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # of transformers' `layer_types`


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model, out of PEFT's wrapper if it has one.

    Raises:
        ValueError: If an adapter adds virtual tokens to the prompt or depends on whole sequences.
        TypeError: If the model is of another kind, or wrapped by something else.
    """
    peft = sys.modules.get("peft")  # not imported, no adapter
    if peft is not None and isinstance(model, peft.PeftModel):
        for config in model.peft_config.values():
            kind = config.peft_type.value
            if config.is_prompt_learning:
                raise ValueError(f"the adapter ({kind}) adds virtual tokens, which a packed sequence cannot hold")
            if kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"the adapter ({kind}) depends on the whole sequence; use one that does not, like LoRA"
                )
        return model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers or PEFT model, got {type(model).__name__}")
    return model


def inner_model(model: PreTrainedModel) -> nn.Module:
    """Return the decoder without its output layer; the model itself if it has no output layer."""
    if model.base_model is not model:
        return model.base_model
    # The `base_model_prefix` of Llama4ForCausalLM names a child that it does not have (transformers 5.23).
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse architectures in which a prefix cannot be shared exactly.

    Raises:
        TypeError: If layers see past the mask, positions do not start at 0, or inputs are not only text.
    """
    config, name = model.config, type(model).__name__
    if not model.is_backend_compatible():
        raise TypeError(f"{name} does not use transformers' attention interface, so it would ignore the mask")
    if config.is_encoder_decoder:
        raise TypeError(f"{name} is an encoder-decoder; prefixes can be shared in decoders only")
    if config.get_text_config() is not config:
        raise TypeError(f"{name} takes more than text; load its language model alone")
    other = set(getattr(config, "layer_types", None) or ()) - EXACT_LAYERS
    if other:
        raise TypeError(
            f"{name} has {', '.join(sorted(other))} layers, whose state passes from one completion to the next "
            "regardless of the mask; train it without flexpg"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            raise TypeError(f"{name} has convolutions over the sequence (state-space layers), which mix completions")
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            raise TypeError(f"{name} counts positions from its padding id on, like RoBERTa; they must start at 0")


def check_no_dropout(model: nn.Module, will_train: bool = False) -> None:
    """Refuse dropout of layers or attention in training.

    Args:
        model: A model of any kind.
        will_train: Whether layers in evaluation mode count too.

    Raises:
        ValueError: If a layer has dropout above 0.
    """
    for path, module in model.named_modules():
        if not (will_train or module.training):
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{path} has dropout {module.p}, which would differ between the copies of a prefix; set it to 0 "
                "(lora_dropout=0; in TRL's config disable_dropout=True)"
            )
        if (rate := vars(module).get("attention_dropout") or 0) > 0:
            raise ValueError(
                f"{path} has attention_dropout={rate}, which would differ between the copies of a prefix; load the "
                'model with attention_dropout=0 (in TRL\'s config model_init_kwargs={"attention_dropout": 0})'
            )


@contextmanager
def exact_forward(model: nn.Module, tree: PrefixTree, prefix: PrefixTree | None = None) -> Iterator[None]:
    """Run one forward of a packed sequence inside; raise before or after it if it is not exact.

    Args:
        model: An enabled transformers or PEFT model.
        tree: The packed sequence.
        prefix: The tree of the cached prompt, if any.

    Raises:
        ValueError: If the model is not enabled, has dropout, or the tree does not fit it.
        TypeError: If prefixes cannot be shared in the model.
    """
    base = unwrap(model)
    check_architecture(base)
    if base.config._attn_implementation != NAME:
        raise ValueError(
            f'{type(base).__name__} has attn_implementation="{base.config._attn_implementation}"; call '
            "flexpg.enable(model) first"
        )
    check_no_dropout(model)
    _check_tree(base, tree, tree if prefix is None else prefix)
    calls: dict[nn.Module, Attended] = {}
    random_state = _random_state(tree.end.device)
    token = attended.set(calls)
    try:
        yield
    finally:
        attended.reset(token)
    _check_layers(base, tree, calls)
    if not all(map(torch.equal, random_state, _random_state(tree.end.device))):
        raise ValueError(
            f"the forward of {type(base).__name__} consumed random numbers (dropout, router noise, NEFTune), which "
            "would differ between the copies of a prefix; disable them"
        )


def _check_tree(model: PreTrainedModel, tree: PrefixTree, prefix: PrefixTree) -> None:
    if tree.max_token >= (vocab := model.config.vocab_size):
        raise ValueError(f"token ids must be below the model's vocabulary size of {vocab}, got {tree.max_token}")
    shortest = min(int(tree.lengths.min()), prefix.max_length)  # a cached prompt is rotated by its own length
    rope = getattr(model.config, "rope_parameters", None) or {}
    for scaling in [rope] if "rope_type" in rope else rope.values():  # or one per kind of layer
        kind, original = scaling["rope_type"], scaling.get("original_max_position_embeddings")
        original = original or model.config.max_position_embeddings
        depends_on_longest = "dynamic" in kind or (kind == "longrope" and shortest <= original)
        if depends_on_longest and tree.max_length > original:
            raise ValueError(
                f"RoPE scaling {kind!r} depends on the longest sequence of a batch once it exceeds {original} tokens, "
                f"here {tree.max_length}; put such sequences into a tree of their own"
            )


def _check_layers(model: PreTrainedModel, tree: PrefixTree, calls: dict[nn.Module, Attended]) -> None:
    name, config = type(model).__name__, model.config
    if len(calls) != config.num_hidden_layers:
        raise TypeError(
            f"{len(calls)} of {config.num_hidden_layers} layers of {name} use transformers' attention interface; the "
            "others would ignore the mask"
        )
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    needed = 1 if kinds is None else kinds.count("sliding_attention")
    if isinstance(window, int) and window < tree.max_length:
        passed_on = sum(call.window is not None for call in calls.values())
        if passed_on < needed:
            raise TypeError(
                f"{name} has sliding_window={window}, but {passed_on} of its layers pass it to attention where "
                f"{needed} should; only sequences of up to {window} tokens are exact"
            )
    chunked = 0 if kinds is None else kinds.count("chunked_attention")
    passed_on = sum(call.chunk is not None for call in calls.values())
    if passed_on < chunked:
        raise TypeError(f"{name} has chunked attention in {chunked} layers, but {passed_on} of them know their chunk")
    sinks = sum(path.endswith(".sinks") for path, _ in model.named_parameters())
    passed_on = sum(call.has_sinks for call in calls.values())
    if passed_on < sinks:
        raise TypeError(
            f"{name} has attention sinks in {sinks} layers, but {passed_on} of them pass theirs to attention; train it "
            "without flexpg"
        )


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    module: Any = torch.get_device_module(device)
    return states if device.type == "cpu" else [*states, module.get_rng_state(device)]
