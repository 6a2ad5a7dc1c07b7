"""Models that take more than text: a language model, and towers for images and other inputs.

The tower keeps its attention implementation: only the language model's is set to "flexpg".
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flexpg.integrations.transformers.attention import NAME


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the config of a model's language model, which is the model's own if it takes only text."""
    return model.config.get_text_config(decoder=True)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that encodes text, which is the whole model if it takes only text."""
    if text_config(model) is model.config:
        return model
    decoder: PreTrainedModel = model.get_decoder()
    return decoder


def tower_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return the modules of vision and audio towers, which a text batch does not use."""
    text_model = language_model(model)
    text_modules = set(text_model.modules())
    others = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part not in text_modules]
    return {module for part in others if text_model not in (inside := set(part.modules())) for module in inside}


def backbone(model: PreTrainedModel) -> Any:
    """Return the model below the output layer, which is the whole model if it has none.

    Raises:
        TypeError: If it cannot be told which of its parts that is.
    """
    base_model: Any = model.base_model
    if base_model is not model or model.get_output_embeddings() is None:
        return base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:  # Llama4ForCausalLM names a base_model_prefix that it does not have, but has one part
        raise TypeError(f"{type(model).__name__} must have one decoder, got {len(parts)}; train it without flexpg")
    return parts[0]


def set_attention(model: PreTrainedModel) -> None:
    """Switch the language model of a transformers model to the attention implementation "flexpg"."""
    if text_config(model)._attn_implementation != NAME:
        language_model(model).set_attn_implementation(NAME)
    for module in language_model(model).modules():
        if type(config := getattr(module, "config", None)) is type(text_config(model)):
            config._attn_implementation = NAME  # copied layers, like those of PEFT's layer_replication, have a copy


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the prefix of the names of a module's parameters in the model: "" or one that ends in a dot."""
    return next(f"{name}." if name else "" for name, part in model.named_modules() if part is module)
