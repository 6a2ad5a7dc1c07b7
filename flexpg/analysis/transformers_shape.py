"""The ModelShape of a transformers model.

Configs of different families name the same thing differently and leave things out, so what can be counted is counted in
the model's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import NewGELUActivation

from flexpg.analysis.flops import ModelShape
from flexpg.analysis.transformers_files import meta_model
from flexpg.analysis.weights import keeps_input, layer_matrices, weight_fields
from flexpg.integrations.transformers import layers
from flexpg.integrations.transformers.checks import check_architecture, unwrap
from flexpg.integrations.transformers.composite import text_config
from flexpg.integrations.transformers.recurrent import recurrent_modules


def shape_of(model_or_config: nn.Module | PretrainedConfig) -> ModelShape:
    """Read the shape from the model's layers; weights are not read.

    Parameters that do not require grad count as frozen, so the model may have PEFT's LoRA adapters. Of experts, the
    share counts that a token is routed to.

    Args:
        model_or_config: A causal language model on any device, plain or with one adapter; of a model that takes images
            too, the language model counts. Or a config, whose model is built on the meta device.

    Raises:
        TypeError: If prefixes cannot be shared in the architecture, or its layers are of an unknown kind.
        ValueError: If the model has no layer, no matrix of a layer requires grad, or transformers does not know
            the config.
    """
    model = meta_model(model_or_config) if isinstance(model_or_config, PretrainedConfig) else model_or_config
    _check_adapters(model)
    base = unwrap(model)
    check_architecture(base)
    config, name = text_config(base), type(base).__name__
    if base.get_output_embeddings() is None:
        raise TypeError(f"{name} has no output layer; load it with AutoModelForCausalLM")
    if next(recurrent_modules(base), None) is not None:
        raise TypeError(f"{name} has recurrent layers, whose FLOPs are not counted yet; write its ModelShape by hand")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise TypeError(
            f"{name} has keys and values of different sizes (latent attention); write its ModelShape by hand"
        )
    own_layers = list(layers(base).values())
    if not own_layers:
        raise ValueError(f"{name} must have at least one layer, got num_hidden_layers=0")
    first_layer = own_layers[0]
    has_experts = any(parameter.dim() == 3 for parameter in first_layer.parameters())
    experts = config.num_experts_per_tok if has_experts else 0
    matrices = [layer_matrices(layer, experts) for layer in own_layers]
    if matrices[0][-1].path.count(".") < 2:
        raise TypeError(f"{name} must have its MLP in a module of its own; write its ModelShape by hand")
    in_mlp = [m.entries for own in matrices for m in own if m.block == own[-1].block and not m.is_adapter]
    last = [m for m in matrices[0] if not m.is_adapter][-1].entries
    is_gated = has_experts or sum(in_mlp) > 2.5 * len(own_layers) * last  # three matrices of one size, not two
    # 0.5 * x * (1 + tanh(... x ** 3)), written out, keeps x, 0.5 x, tanh and 1 + tanh, where a kernel keeps only x.
    is_written_out = any(isinstance(module, NewGELUActivation) for module in first_layer.modules())
    norms = {path: module for path, module in first_layer.named_children() if "Norm" in type(module).__name__}
    is_normed_after = any("post_feedforward" in path or "post_mlp" in path for path in norms)
    output = {path: p for path, p in base.get_output_embeddings().named_parameters() if p.dim() == 2}
    # A hook may make embeddings require grad, as gradient checkpointing does with adapters.
    embeds = base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64, device=base.device))
    return ModelShape(
        num_layers=len(own_layers),
        embed_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_dim=sum(in_mlp) // (len(own_layers) * config.hidden_size * (3 if is_gated else 2)),
        vocab_size=config.vocab_size,
        last_weights=0 if is_normed_after or has_experts else matrices[0][-1].entries,  # experts' outputs are weighted
        mlp_tensors=(4 if is_gated else 2) + (3 if is_written_out else 0) - (not keeps_input(matrices[0])),
        norms=len(norms),
        has_qk_norm=any(path.endswith(("q_norm", "q_layernorm")) for path, _ in first_layer.named_modules()),
        experts_per_token=experts,
        is_output_frozen=not any(p.requires_grad for path, p in output.items() if "lora_" not in path),
        output_adapters=sum(p.numel() for path, p in output.items() if "lora_" in path),
        **weight_fields(
            matrices,
            embeds_are_trained=embeds.requires_grad,
            is_parallel=len(norms) == 1,
        ),
    )


def _check_adapters(model: nn.Module) -> None:
    """Refuse adapters whose work is not that of LoRA's two matrices."""
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    for name, config in adapters.items():
        kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
        if kind != "LORA" or len(adapters) > 1:
            raise TypeError(f"the model must have one LORA adapter, got {kind} {name!r} of {len(adapters)}")
