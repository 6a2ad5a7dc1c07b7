"""Linear layers in 4 bits, by bitsandbytes, under LoRA adapters (QLoRA, arXiv 2305.14314).

    model:
      _component_: flexpg.training.causal_lm.model
      path: /tmp/Qwen3-4B
      quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}  # options of transformers.BitsAndBytesConfig
      lora: {r: 32, lora_alpha: 64, target_modules: all-linear}

A 4-bit layer dequantizes its weight and multiplies each token with it, so shared equals baseline. Layers in 8 bits are
refused, because which features they compute in 16 bits depends on all tokens of the input.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

REFUSED = ("load_in_8bit", "llm_int8_enable_fp32_cpu_offload")


def quantize_layers(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Replace the linear layers of a model on the meta device by layers in 4 bits, but for the output layer.

    Args:
        model: A transformers model, changed in place.
        quantization: Options of `transformers.BitsAndBytesConfig`.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If the layers would not be in 4 bits.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; model.quantization needs it, run: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    if not quantization.get("load_in_4bit") or any(quantization.get(name) for name in REFUSED):
        raise ValueError(f"quantization must have load_in_4bit: true and none of {REFUSED}, got {dict(quantization)}")
    quantizer: Any = Bnb4BitHfQuantizer(BitsAndBytesConfig(**quantization), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers in 4 bits, by name."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # not imported, no such layer
    if bitsandbytes is None:
        return {}
    return {path: module for path, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def take_weights(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Remove the weights of layers in 4 bits, so that they are never allocated in more bits.

    Args:
        model: On the meta device.

    Returns:
        By the name of the weight, how it is quantized.
    """
    taken = {}
    for path, layer in quantized_layers(model).items():
        taken[f"{path}.weight"] = dict(layer.weight.__dict__)
        layer.weight = None
    return taken


def quantize_weights(
    model: nn.Module, taken: Mapping[str, dict[str, Any]], weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Quantize weights on a device, one layer at a time.

    Args:
        model: A model whose 4-bit weights `take_weights` has removed.
        taken: What `take_weights` returned.
        weights: All weights of the model by name, not quantized.
        device: The device of the model.
    """
    from bitsandbytes.nn import Params4bit

    for name, options in taken.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = Params4bit(weights[name], requires_grad=False, **options).to(device)


def dequantized_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model, with the values of 4-bit weights that the model computes with."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    state = model.state_dict()  # first: on some CPUs it also restores the order of the weights
    layers = quantized_layers(model)
    extra = tuple(f"{path}.weight." for path in layers)
    kept = {name: value for name, value in state.items() if not name.startswith(extra)}
    return kept | {f"{path}.weight": dequantize_bnb_weight(layer.weight) for path, layer in layers.items()}
