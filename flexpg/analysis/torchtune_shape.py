"""The ModelShape of a torchtune decoder, or of the model in a recipe's configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params
from torchtune.modules.tied_linear import TiedLinear

from flexpg.analysis.flops import ModelShape
from flexpg.analysis.weights import keeps_input, layer_matrices, weight_fields


def shape_of(model: TransformerDecoder) -> ModelShape:
    """Read the shape from the model's modules; weights are not read, so they may be on the meta device.

    Parameters that do not require grad count as frozen, so the model may have LoRA adapters.

    Args:
        model: A decoder whose layers are all alike, with or without activation checkpointing.

    Raises:
        TypeError: If the model is not a TransformerDecoder of plain layers, or has other matrices (experts).
        ValueError: If no matrix of a layer requires grad.
    """
    if not isinstance(model, TransformerDecoder):
        raise TypeError(f"model must be a torchtune TransformerDecoder, got {type(model).__name__}")
    if any(isinstance(module, DoRALinear) for module in model.modules()):
        raise TypeError("adapters must be plain LoRA, got DoRA")
    layers = [module for module in model.modules() if isinstance(module, TransformerSelfAttentionLayer)]
    if not layers or len(layers) != len(model.layers):
        raise TypeError(f"all {len(model.layers)} layers must be TransformerSelfAttentionLayers, got {len(layers)}")
    attn, mlp = layers[0].attn, layers[0].mlp
    if not isinstance(attn, MultiHeadAttention | Gemma2Attention) or not isinstance(mlp, FeedForward):
        raise TypeError(
            f"layers must have attention and a FeedForward, got {type(attn).__name__}, {type(mlp).__name__}"
        )
    norms = (layers[0].sa_norm, layers[0].mlp_norm, layers[0].sa_scale, layers[0].mlp_scale)
    # FeedForward registers w2, which is applied last, before w3.
    matrices = [sorted(layer_matrices(layer), key=lambda matrix: matrix.projection == "mlp.w2") for layer in layers]
    embeddings, output = model.tok_embeddings, model.output
    output_weight = embeddings.weight if isinstance(output, TiedLinear) else output.weight
    windows = [getattr(layer.attn, "sliding_window_size", None) for layer in layers]
    return ModelShape(
        num_layers=len(layers),
        embed_dim=embeddings.embedding_dim,
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        intermediate_dim=mlp.w2.weight.shape[1],
        vocab_size=embeddings.num_embeddings,
        last_weights=matrices[0][-1].entries if isinstance(layers[0].mlp_scale, nn.Identity) else 0,
        mlp_tensors=(2 if mlp.w3 is None else 4) - (not keeps_input(matrices[0])),
        norms=sum(not isinstance(norm, nn.Identity) for norm in norms),
        has_qk_norm=attn.q_norm is not None,
        is_output_frozen=not output_weight.requires_grad,
        output_adapters=sum(map(Tensor.numel, get_adapter_params(output).values()))
        if isinstance(output, LoRALinear)
        else 0,
        windowed_layers=sum(window is not None for window in windows),
        window=max(window or 0 for window in windows),
        **weight_fields(matrices, embeds_are_trained=embeddings.weight.requires_grad),
    )


def recipe_shape(path: Path) -> ModelShape:
    """Read the shape of the model in a recipe's configuration; only adapters are trained if its builder adds them.

    Raises:
        ValueError: If the file has no `model` option.
    """
    options = OmegaConf.load(path)
    if not OmegaConf.is_dict(options) or "model" not in options:
        raise ValueError(f"{path} must have a `model` option; pass a recipe's configuration or a checkpoint's folder")
    with torch.device("meta"):
        model = config.instantiate(options.model)
    if adapters := get_adapter_params(model):
        set_trainable_params(model, adapters)
    return shape_of(model)
