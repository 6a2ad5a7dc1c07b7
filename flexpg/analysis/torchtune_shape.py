"""The shape of a torchtune decoder, of which `flexpg.analysis.flops` makes FLOPs and bytes."""

from __future__ import annotations

from torch import nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import LoRALinear, get_adapter_params

from flexpg.analysis.flops import ModelShape


def shape_of(model: TransformerDecoder, *, with_adapters: bool = False) -> ModelShape:
    """Reads the shape off the model's own modules; no weight is looked at, so it may be on the meta device.

    Args:
        model: a decoder of plain layers, all of them alike, with or without activation checkpointing.
        with_adapters: take adapters (LoRA) for matrices like others; good for ratios, as an update that trains adapters
            alone takes fewer FLOPs than its shape says.

    Raises:
        TypeError: another model; adapters, of whose frozen matrices the backward takes no gradient; or layers with
            other matrices than nn.Linear's (experts).
    """
    if not isinstance(model, TransformerDecoder):
        raise TypeError(f"model is a {type(model).__name__}; the shape of a torchtune TransformerDecoder can be read")
    if not with_adapters and (adapters := get_adapter_params(model)):
        raise TypeError(
            f"{next(iter(adapters))} is an adapter's (LoRA), and costs are of updates that train every parameter; read "
            "the shape of the model without adapters"
        )
    layers = [module for module in model.modules() if isinstance(module, TransformerSelfAttentionLayer)]
    if not layers or len(layers) != len(model.layers):
        raise TypeError(f"{len(model.layers) - len(layers)} of the model's layers are not plain self-attention layers")
    attn, mlp = layers[0].attn, layers[0].mlp
    if not isinstance(attn, MultiHeadAttention | Gemma2Attention) or not isinstance(mlp, FeedForward):
        raise TypeError(f"a layer of {type(attn).__name__} and {type(mlp).__name__} is none whose matrices are known")
    norms = (layers[0].sa_norm, layers[0].mlp_norm, layers[0].sa_scale, layers[0].mlp_scale)
    return ModelShape(
        num_layers=len(layers),
        embed_dim=model.tok_embeddings.embedding_dim,
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        intermediate_dim=mlp.w2.weight.shape[1],
        vocab_size=model.tok_embeddings.num_embeddings,
        layer_weights=sum(map(_weights, layers)) // len(layers),
        last_weights=mlp.w2.weight.numel() if isinstance(layers[0].mlp_scale, nn.Identity) else 0,
        mlp_tensors=2 if mlp.w3 is None else 4,
        norms=sum(not isinstance(norm, nn.Identity) for norm in norms),
        has_qk_norm=attn.q_norm is not None,
    )


def _weights(layer: nn.Module) -> int:
    """Entries of a layer's matrices."""
    linear = (module for module in layer.modules() if isinstance(module, nn.Linear | LoRALinear))
    matrices = {id(module.weight): module.weight.numel() for module in linear}
    for path, parameter in layer.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in matrices:
            raise TypeError(f"{path} of a layer is no matrix of an nn.Linear; what a token does with it is not known")
    return sum(matrices.values())
