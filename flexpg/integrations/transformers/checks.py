"""Which transformers models share prefixes exactly; all others are refused, before a forward or after it.

Before: architectures whose layers see past the mask or whose positions do not start at 0, adapters that depend on whole
sequences, and rotary scaling by the longest sequence. After: layers that the mask did not reach, sliding windows and
attention sinks that were not passed on, and random numbers that the forward consumed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpg.integrations.transformers.attention import NAME, Attended, attended
from flexpg.integrations.transformers.composite import backbone, language_model, text_config, tower_modules
from flexpg.integrations.transformers.recurrent import driven, is_recurrent, recurrent_modules
from flexpg.tree import PrefixTree

FEED_FORWARD = {"mlp", "moe"}  # kinds of layers in which tokens do not see one another
EXACT_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", *FEED_FORWARD}  # of `layer_types`
RECURRENT_LAYERS = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}
ONLY_RECURRENT = RECURRENT_LAYERS - {"hybrid", "hybrid_sliding"} | FEED_FORWARD
SPARSE_LAYERS = {
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
}


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
                raise ValueError(
                    f"the adapter ({kind}) adds virtual tokens, which a packed sequence cannot hold; use LoRA"
                )
            if kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"the adapter ({kind}) depends on the whole sequence; use one that does not, like LoRA"
                )
        return model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers or PEFT model, got {type(model).__name__}")
    return model


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse architectures in which a prefix cannot be shared exactly.

    Of a composite model, only the language model is looked at: a text batch uses nothing else.

    Raises:
        TypeError: If layers see past the mask, or positions cannot be passed or do not start at 0.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"{name} is an encoder-decoder; prefixes can be shared in decoders only; train it without flexpg"
        )
    config, text_model = text_config(model), language_model(model)
    recurrent, kinds = set(recurrent_modules(text_model)), set(getattr(config, "layer_types", None) or ())
    _check_kinds_of_layers(name, text_model, kinds, has_states=bool(recurrent))
    has_attention = not recurrent or not kinds <= ONLY_RECURRENT
    if has_attention and not text_model._can_set_attn_implementation():
        raise TypeError(
            f"{name} computes attention in its own way instead of by transformers' attention interface, so it would "
            "ignore the mask; train it without flexpg"
        )
    if has_attention and "position_ids" not in signature(type(backbone(text_model)).forward).parameters:
        raise TypeError(f"{name} takes no position_ids, so it would count packed tokens; train it without flexpg")
    for path, module in text_model.named_modules():
        if isinstance(module, nn.Conv1d) and text_model.get_submodule(path.rpartition(".")[0]) not in recurrent:
            raise TypeError(
                f"{name} has a convolution over the sequence, {path}, which mixes completions and keeps no state in "
                "transformers' cache; train it without flexpg"
            )
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            raise TypeError(
                f"{name} counts positions from its padding id on, like RoBERTa; they must start at 0, so train it "
                "without flexpg"
            )


def _check_kinds_of_layers(name: str, text_model: PreTrainedModel, kinds: set[str], has_states: bool) -> None:
    """Refuse kinds of layers that neither a mask nor the state of a parent segment reaches, each with its reason."""
    recurrent, sparse = kinds & RECURRENT_LAYERS, kinds & SPARSE_LAYERS
    if not has_states and (recurrent or (text_model._is_stateful and not sparse)):
        which = ", ".join(sorted(recurrent)) or "recurrent"
        raise TypeError(
            f"{name} has {which} layers, whose state passes from one completion to the next regardless of the mask; "
            "train it without flexpg"
        )
    if sparse:
        raise TypeError(
            f"{name} has {', '.join(sorted(sparse))} layers, which choose the keys that a token attends to by scores "
            "over the whole packed sequence; train it without flexpg"
        )
    if other := kinds - EXACT_LAYERS - recurrent:
        raise TypeError(
            f"{name} has {', '.join(sorted(other))} layers, which flexpg does not support; train it without flexpg"
        )


def check_no_dropout(model: nn.Module, will_train: bool = False) -> None:
    """Refuse dropout of layers or attention in training, except for that of a vision or audio tower.

    Args:
        model: A transformers or PEFT model.
        will_train: Whether layers in evaluation mode count too.

    Raises:
        ValueError: If a layer has dropout above 0, or an adapter that draws random numbers without it.
    """
    towers = tower_modules(unwrap(model))
    for path, module in model.named_modules():
        if not (will_train or module.training) or module in towers:
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{path} has dropout {module.p}, which would differ between the copies of a prefix; set `p` of every "
                "torch.nn.Dropout to 0 (for LoRA, lora_dropout=0; in TRL's config, disable_dropout=True)"
            )
        if (rate := vars(module).get("attention_dropout") or 0) > 0:
            raise ValueError(
                f"{path} has attention_dropout={rate}, which would differ between the copies of a prefix; load the "
                'model with attention_dropout=0 (in TRL\'s config model_init_kwargs={"attention_dropout": 0})'
            )
        if vars(module).get("module_dropout"):  # PEFT's LoHa and LoKr: a dict of each adapter's
            kind = type(module).__module__.split(".")[-2]
            raise ValueError(
                f"{path} has an adapter ({kind}) that draws random numbers in training, even without dropout; use LoRA"
            )


@contextmanager
def exact_forward(
    model: nn.Module, tree: PrefixTree, prefix: PrefixTree | None = None, longest: int = 0
) -> Iterator[None]:
    """Run one forward of a packed sequence inside; raise before or after it if it is not exact.

    Args:
        model: An enabled transformers or PEFT model.
        tree: The packed sequence.
        prefix: The tree of the cached prompt, if any.
        longest: Tokens of the longest sequence that a sampler continues the tree to.

    Raises:
        ValueError: If the model is not enabled, has dropout, or the tree does not fit it.
        TypeError: If prefixes cannot be shared in the model.
    """
    base = unwrap(model)
    check_architecture(base)
    if (implementation := text_config(base)._attn_implementation) != NAME:
        raise ValueError(
            f'{type(base).__name__} has attn_implementation="{implementation}"; call flexpg.enable(model) first'
        )
    if any("forward" not in vars(module) for module in recurrent_modules(language_model(base))):
        raise ValueError(
            f"{type(base).__name__} has recurrent layers that do not follow a packed sequence yet; call "
            "flexpg.enable(model) first"
        )
    check_no_dropout(model)
    _check_not_compiled(base)
    _check_tree(base, tree, tree if prefix is None else prefix, max(longest, tree.max_length))
    calls: dict[nn.Module, Attended] = {}
    random_state = _random_state(tree.end.device)
    token, recurrent = attended.set(calls), driven.set(set())
    try:
        yield
        modules = driven.get() or set()
    except (AttributeError, TypeError) as error:
        if "BlockMask'" not in str(error):  # as Python quotes the type
            raise
        raise TypeError(
            f"{type(base).__name__} computes with the attention mask instead of handing it on ({error}); train it "
            "without flexpg"
        ) from error
    finally:
        attended.reset(token)
        driven.reset(recurrent)
    _check_layers(base, tree, calls, modules)
    if not all(map(torch.equal, random_state, _random_state(tree.end.device))):
        raise ValueError(
            f"the forward of {type(base).__name__} consumed random numbers (dropout, router noise, NEFTune), which "
            "would differ between the copies of a prefix; disable them, as with from_pretrained(..., dropout=0)"
        )


def _check_not_compiled(model: PreTrainedModel) -> None:
    """Raise before the forward: compiling a recurrence takes minutes, and the compiled one would miss the tree."""
    for path, module in backbone(model).named_modules():
        if module._compiled_call_impl is not None and any(map(is_recurrent, module.modules())):
            raise TypeError(
                f"{path or 'the backbone'} of {type(model).__name__} is compiled and has a recurrent layer, which "
                "would not get the mask of a packed sequence; call compile() on layers without recurrence only"
            )


def rope_by_longest(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Return the RoPE scalings that depend on the longest sequence of a batch, and the lengths from which they do."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope] if "rope_type" in rope else filter(None, rope.values())  # or one per kind of layer, or None
    return [
        (scaling["rope_type"], scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
        for scaling in scalings
        if "dynamic" in scaling["rope_type"] or scaling["rope_type"] == "longrope"
    ]


def _check_tree(model: PreTrainedModel, tree: PrefixTree, prefix: PrefixTree, longest: int) -> None:
    config = text_config(model)
    if tree.max_token >= (vocab := config.vocab_size):
        raise ValueError(f"token ids must be below the model's vocabulary size of {vocab}, got {tree.max_token}")
    for path, module in language_model(model).named_modules():
        if isinstance(module, nn.Embedding) and ("position" in path or path.endswith("wpe")):  # GPT-2's name
            limit = config.max_position_embeddings
            if longest > limit:
                raise ValueError(
                    f"sequences must have at most {limit} tokens, the learned positions (max_position_embeddings) of "
                    f"{type(model).__name__}, got {longest}"
                )
    shortest = min(int(tree.lengths.min()), prefix.max_length)  # a cached prompt is rotated by its own length
    for kind, original in rope_by_longest(model):
        if longest > original and (kind != "longrope" or shortest <= original):
            raise ValueError(
                f"RoPE scaling {kind!r} depends on the longest sequence of a batch once it exceeds {original} tokens, "
                f"here {longest}; keep prompts with their completions within {original} tokens (in TRL, by "
                "max_completion_length), or pack longer ones separately"
            )


def _check_layers(
    model: PreTrainedModel, tree: PrefixTree, calls: dict[nn.Module, Attended], recurrent: set[nn.Module]
) -> None:
    name, config = type(model).__name__, text_config(model)
    kinds = getattr(config, "layer_types", None)
    for path, module in language_model(model).named_modules():
        if is_recurrent(module) and module not in recurrent:
            raise TypeError(
                f"{path} of {name} did not get the mask of a packed sequence; train it without torch.compile, if its "
                "layers are compiled, or without flexpg"
            )
    needed = config.num_hidden_layers - sum(kind in FEED_FORWARD for kind in kinds or ())
    if (found := len({*calls, *recurrent})) < needed or (not recurrent and found != needed):
        raise TypeError(
            f"{found} of {needed} layers of {name} use transformers' attention interface or its cache of recurrent "
            "layers; the others would ignore the mask; train it without flexpg"
        )
    window, needed = getattr(config, "sliding_window", None), 1 if kinds is None else kinds.count("sliding_attention")
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
