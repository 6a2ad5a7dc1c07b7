"""The ModelShape of a transformers model.

Configs of different families name the same thing differently and leave things out, so what can be counted is counted in
the model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from flexpg.analysis.flops import ModelShape
from flexpg.analysis.transformers_files import meta_model
from flexpg.analysis.transformers_recurrent import recurrent_work
from flexpg.analysis.weights import Matrix, keeps_input, layer_matrices, weight_fields
from flexpg.integrations.transformers import layers
from flexpg.integrations.transformers.checks import check_architecture, unwrap
from flexpg.integrations.transformers.composite import language_model, text_config
from flexpg.integrations.transformers.recurrent import is_recurrent, recurrent_modules


def shape_of(model_or_config: nn.Module | PretrainedConfig, *, dora_as_lora: bool = False) -> ModelShape:
    """Read the shape from the model's layers; weights are not read.

    Parameters that do not require grad count as frozen, so the model may have PEFT's LoRA adapters. Of experts, the
    share counts that a token is routed to.

    Args:
        model_or_config: A causal language model on any device, plain or with one adapter; of a model that takes images
            too, the language model counts. Or a config, whose model is built on the meta device.
        dora_as_lora: Accept DoRA and leave out what it adds to LoRA: norms of weights, once per forward and not per
            token, so that ratios of work remain meaningful.

    Raises:
        TypeError: If prefixes cannot be shared in the architecture, or its layers are of an unknown kind.
        ValueError: If the model has no layer, no matrix of a layer requires grad, or transformers does not know
            the config.
    """
    model = meta_model(model_or_config) if isinstance(model_or_config, PretrainedConfig) else model_or_config
    _check_adapters(model, dora_as_lora)
    base = unwrap(model)
    check_architecture(base)
    config, name = text_config(base), type(base).__name__
    if base.get_output_embeddings() is None:
        raise TypeError(f"{name} has no output layer; load it with AutoModelForCausalLM")
    own_layers = list(layers(base).values())
    if not own_layers:
        raise ValueError(f"{name} must have at least one layer, got num_hidden_layers=0")
    parts = [_parts(layer, getattr(config, "num_experts_per_tok", 0)) for layer in own_layers]
    with_mlp = [part for part in parts if part.mlp]
    mlp_entries = sum(m.entries for part in with_mlp for m in part.mlp)
    # Three matrices of one size, not two.
    is_gated = any(part.experts for part in parts) or mlp_entries > 2.5 * sum(part.mlp[-1].entries for part in with_mlp)
    # 0.5 * x * (1 + tanh(... x ** 3)), written out, keeps x, 0.5 x, tanh and 1 + tanh, where a kernel keeps only x.
    is_written_out = any(isinstance(module, NewGELUActivation) for module in own_layers[0].modules())
    norms = [path for path, module in own_layers[0].named_children() if "Norm" in type(module).__name__]
    output = {path: p for path, p in base.get_output_embeddings().named_parameters() if p.dim() == 2}
    # A hook may make embeddings require grad, as gradient checkpointing does with adapters.
    embeds = base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64, device=base.device))
    shape = ModelShape(
        num_layers=len(own_layers),
        embed_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        intermediate_dim=mlp_entries // (len(own_layers) * config.hidden_size * (3 if is_gated else 2)),
        vocab_size=config.vocab_size,
        last_weights=sum(part.last_entries for part in parts) // len(parts),
        mlp_tensors=(4 if is_gated else 2) + (3 if is_written_out else 0) - (not keeps_input(parts[0].matrices)),
        norms=len(norms),
        has_qk_norm=any(path.endswith(("q_norm", "q_layernorm")) for path, _ in base.named_modules()),
        experts_per_token=max(part.experts for part in parts),
        is_output_frozen=not any(p.requires_grad for path, p in output.items() if "lora_" not in path),
        output_adapters=sum(p.numel() for path, p in output.items() if "lora_" in path),
        **_attention_fields(config, [part.attention for part in parts]),
        **weight_fields(
            [part.matrices for part in parts],
            embeds_are_trained=embeds.requires_grad,
            is_parallel=len(norms) == 1 and not any(part.recurrent for part in parts),
        ),
    )
    shape = replace(shape, layer_weights=shape.layer_weights + _entries_outside_layers(base) // len(own_layers))
    modules = [module for part in parts for module in part.recurrent]
    return _with_recurrent_layers(shape, modules, meta_model(base.config).to(base.dtype)) if modules else shape


def _entries_outside_layers(model: PreTrainedModel) -> int:
    """Count the entries of matrices before and after the layers, such as those of the inputs to Gemma 4's layers."""
    parts = [*layers(model).values(), model.get_output_embeddings()]
    in_parts = {module for part in parts for module in part.modules()}
    outside = [module for module in language_model(model).modules() if module not in in_parts]
    return sum(module.weight.numel() for module in outside if isinstance(module, nn.Linear))


@dataclass(frozen=True)
class _Parts:
    """What a decoder layer consists of.

    Attributes:
        attention: Its attention module, if it has one.
        recurrent: Its recurrent modules.
        matrices: All matrices, those of the MLP last.
        mlp: The matrices outside attention and recurrence, without adapters.
        experts: Experts that a token is routed to; 0 without experts.
        last_entries: Entries of the last matrix if checkpointing does not recompute it, else 0.
    """

    attention: nn.Module | None
    recurrent: list[nn.Module]
    matrices: list[Matrix]
    mlp: list[Matrix]
    experts: int
    last_entries: int


def _parts(layer: nn.Module, experts_per_token: int) -> _Parts:
    recurrent = {path: module for path, module in layer.named_modules() if is_recurrent(module)}
    attention = {path: module for path, module in layer.named_modules() if _is_attention(module)}
    # Of a recurrent module, a token is multiplied with the matrices of Linear layers only.
    others = {part for module in recurrent.values() for part in module.modules() if not isinstance(part, nn.Linear)}
    parameters = [p for part in layer.modules() if part not in others for p in part.parameters(recurse=False)]
    experts = experts_per_token if any(parameter.dim() == 3 for parameter in parameters) else 0
    matrices = layer_matrices(layer, experts, no_matrices=others)
    mixers = tuple(f"{path}." for path in (*recurrent, *attention))
    mlp = [matrix for matrix in matrices if not matrix.path.startswith(mixers)]
    matrices = [matrix for matrix in matrices if matrix not in mlp] + mlp
    # Of a norm after it, experts, which are weighted, and a recurrent layer's segments, the backward needs inputs.
    is_recomputed = any(re.search("post_(feedforward|mlp|ffn)", path) for path, _ in layer.named_children())
    is_recomputed |= bool(experts) or matrices[-1].path.startswith(tuple(f"{path}." for path in recurrent))
    return _Parts(
        attention=next(iter(attention.values()), None),
        recurrent=list(recurrent.values()),
        matrices=matrices,
        mlp=[matrix for matrix in mlp if not matrix.is_adapter],
        experts=experts,
        last_entries=0 if is_recomputed else matrices[-1].entries,
    )


def _is_attention(module: nn.Module) -> bool:
    is_layer = isinstance(module, GradientCheckpointingLayer)  # BambaAttentionDecoderLayer
    return "Attention" in type(module).__name__ and not is_layer and not is_recurrent(module)


def _attention_fields(config: PretrainedConfig, modules: Sequence[nn.Module | None]) -> dict[str, Any]:
    """Return the fields of a ModelShape that describe attention.

    Args:
        config: The configuration of the language model.
        modules: The attention module of each layer.
    """
    attention = [module for module in modules if module is not None]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "kv_lora_rank", None) is not None:  # latent attention
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    kinds = getattr(config, "layer_types", None)
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    chunked = len(attention) if kinds is None else kinds.count("chunked_attention")
    sliding = len(attention) if kinds is None else sum("sliding" in kind for kind in kinds)
    windowed = chunked if chunk else sliding if window else 0
    return {
        "head_dim": head_dim,
        "global_head_dim": getattr(config, "global_head_dim", None) or 0,
        "value_dim": 0 if (size := getattr(config, "v_head_dim", None) or head_dim) == head_dim else size,
        "attention_layers": None if len(attention) == len(modules) else len(attention),
        "windowed_layers": windowed,
        "window": (chunk or window) if windowed else 0,
        "is_chunked": bool(windowed and chunk),
    }


def _with_recurrent_layers(shape: ModelShape, modules: Sequence[nn.Module], on_meta: nn.Module) -> ModelShape:
    """Return the shape with the work of recurrent modules; one of each kind runs, in a model on the meta device."""
    kinds = {type(module): module for module in recurrent_modules(on_meta)}
    work = {kind: recurrent_work(module, shape.embed_dim) for kind, module in kinds.items()}
    work_of_layers = [work[type(module)] for module in modules]
    return replace(
        shape,
        recurrent_layers=len(work_of_layers),
        recurrent_flops=sum(each.flops for each in work_of_layers),
        recurrent_backward_flops=sum(each.backward_flops for each in work_of_layers),
        recurrent_bytes=sum(each.kept_bytes for each in work_of_layers),
    )


def _check_adapters(model: nn.Module, dora_as_lora: bool) -> None:
    """Refuse adapters whose work is not that of LoRA's two matrices."""
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    for name, config in adapters.items():
        kind = "DoRA" if getattr(config, "use_dora", False) and not dora_as_lora else config.peft_type.value
        if kind != "LORA" or len(adapters) > 1:
            raise TypeError(f"the model must have one LORA adapter, got {kind} {name!r} of {len(adapters)}")
