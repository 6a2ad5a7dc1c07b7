"""The shape of a transformers model, of which `flexpg.analysis.flops` makes FLOPs and bytes.

Configs of different families name the same thing differently, and leave things out; so what can be counted is counted
in the model's own layers.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from flexpg.analysis.flops import ModelShape
from flexpg.integrations.transformers.checks import check_architecture


def shape_of(model_or_config: PreTrainedModel | PretrainedConfig) -> ModelShape:
    """Reads the shape off the model's layers; no weight is looked at.

    Of experts a token goes through `num_experts_per_tok`, so that share of their matrices counts.

    Args:
        model_or_config: a causal language model, on any device, or its config, which is built on the meta device.

    Raises:
        TypeError: something else (PEFT's adapters too, of whose frozen matrices the backward takes no gradient), an
            architecture in which prefixes cannot be shared, or one whose layers are not understood.
        ValueError: a config that AutoModelForCausalLM does not know, or one of no layer.
    """
    model = model_or_config
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is of type {type(model).__name__}; give a transformers model without adapters, or its config"
        )
    check_architecture(model)
    config, name = model.config, type(model).__name__
    if model.get_output_embeddings() is None:
        raise TypeError(f"{name} has no output layer; load it with AutoModelForCausalLM")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise TypeError(f"{name} has keys and values of different sizes (latent attention); write its ModelShape out")
    layers = _layers(model)
    if not layers:
        raise ValueError(f"{name} has no layer (num_hidden_layers is 0); give it at least one")
    weights = [_weights(model, layer) for layer in layers]
    first, (*_, last) = weights[0], weights[0]
    if "." not in last.removesuffix(".weight"):
        raise TypeError(f"{name} has an MLP that is no module of its own; write its ModelShape out")
    in_mlp = sum(sum(own[path] for path in own if path.split(".")[0] == last.split(".")[0]) for own in weights)
    has_experts = any(parameter.dim() == 3 for layer in layers for parameter in layer.parameters())
    is_gated = has_experts or in_mlp > 2.5 * len(layers) * first[last]  # three matrices of one size, not two
    # 0.5 * x * (1 + tanh(... x ** 3)), written out, keeps x, 0.5 x, tanh and 1 + tanh, where a kernel keeps x alone.
    is_written_out = any(isinstance(module, NewGELUActivation) for module in layers[0].modules())
    norms = [child for child, module in layers[0].named_children() if "Norm" in type(module).__name__]
    is_normed_after = any("post_feedforward" in child or "post_mlp" in child for child in norms)
    return ModelShape(
        num_layers=len(layers),
        embed_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_dim=in_mlp // (len(layers) * config.hidden_size * (3 if is_gated else 2)),
        vocab_size=config.vocab_size,
        layer_weights=sum(sum(own.values()) for own in weights) // len(layers),
        last_weights=0 if is_normed_after or has_experts else first[last],  # experts' results are weighted yet
        mlp_tensors=(4 if is_gated else 2) + (3 if is_written_out else 0),
        norms=len(norms),
        has_qk_norm=any(path.endswith(("q_norm", "q_layernorm")) for path, _ in layers[0].named_modules()),
        experts_per_token=config.num_experts_per_tok if has_experts else 0,
    )


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    count = model.config.num_hidden_layers
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise TypeError(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers in its decoder, where one is needed; "
            "write its ModelShape out"
        )
    return list(lists[0])


def _weights(model: PreTrainedModel, layer: nn.Module) -> dict[str, int]:
    """Entries that a token is multiplied with, by the path of each of the layer's matrices, in their order."""
    experts_per_token, counts = getattr(model.config, "num_experts_per_tok", None), {}
    for path, module in layer.named_modules():
        if "Norm" in type(module).__name__:  # Cohere's has a weight for each head
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and not isinstance(module, nn.Embedding):
                counts[f"{path}.{own}"] = parameter.numel()
            elif parameter.dim() == 3 and experts_per_token:
                counts[f"{path}.{own}"] = parameter.numel() * experts_per_token // len(parameter)
            elif parameter.dim() > 1:
                raise TypeError(
                    f"{type(model).__name__} has {path}.{own} of shape {tuple(parameter.shape)}, and what a token does "
                    "with it is not known; write its ModelShape out"
                )
    return counts
