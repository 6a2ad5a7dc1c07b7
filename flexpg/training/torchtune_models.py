"""torchtune's models in a recipe (see `models.Library`).

Builders, adapters and file formats are torchtune's; sharding and state dicts are PyTorch's (FSDP2).
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtune import training
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
    set_trainable_params,
)
from torchtune.modules.peft import disable_adapter as without_adapters

from flexpg.analysis.torchtune_shape import shape_of
from flexpg.integrations.torchtune import check_fits
from flexpg.training.checkpoints import WRITE_ERRORS, differences
from flexpg.training.components import component
from flexpg.training.distributed import World
from flexpg.training.errors import one_line
from flexpg.training.models import BROADCAST, GATHER, refuse_own_weights
from flexpg.training.problem_order import derive_seed

__all__ = [
    "check_fits",
    "has_adapters",
    "load_weights",
    "materialize",
    "max_length",
    "prepare",
    "save_weights",
    "shape_of",
    "weights_folder",
    "without_adapters",
]


def max_length(model: TransformerDecoder) -> int:
    """Return the tokens of the longest sequence that the model has positions for."""
    longest: int = model.max_seq_len
    return longest


def prepare(model: TransformerDecoder) -> None:
    """Freeze what LoRA adapters leave out.

    Raises:
        ValueError: If the adapters are not plain LoRA (DoRA, or a quantized base).
    """
    for module in model.modules():
        if isinstance(module, DoRALinear) or (isinstance(module, LoRALinear) and module._quantize_base):
            raise ValueError("model must not have use_dora or quantize_base, which the recipe does not support")
    if adapters := get_adapter_params(model):
        set_trainable_params(model, adapters)


def has_adapters(model: TransformerDecoder) -> bool:
    """Return whether the model has LoRA adapters."""
    return bool(get_adapter_params(model))


def weights_folder(cfg: Any) -> Path:
    """Return the folder in which `save_weights` creates epoch_0.

    Raises:
        ValueError: If no checkpointer is configured, or it loads the model from there.
    """
    if cfg.checkpointer is None:
        raise ValueError("missing option checkpointer, which loads the weights of a torchtune model")
    place = Path(cfg.checkpointer.output_dir)
    refuse_own_weights(cfg, "checkpointer.checkpoint_dir", cfg.checkpointer.checkpoint_dir, place)
    return place


def load_weights(cfg: Any, model: TransformerDecoder) -> tuple[Any, dict[str, Tensor]]:
    """Load the weights of the configured checkpointer.

    Args:
        cfg: The configuration.
        model: From `build_model`. The heads in the checkpoint's config.json are compared too, because a model with
            other heads may have weights of the same shapes.

    Returns:
        The checkpointer, and the weights under torchtune's names.

    Raises:
        ValueError: If a file is missing, or the weights belong to another model.
    """
    checkpointer = component(cfg, "checkpointer")
    folder = Path(cfg.checkpointer.checkpoint_dir)
    try:
        weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    except Exception as error:  # for a wrong model_type, torchtune raises nothing narrower
        raise ValueError(f"checkpointer: {type(error).__name__}: {one_line(error)} (in {folder})") from error
    adapters = get_adapter_params(model)
    needed = {name: value.shape for name, value in model.state_dict().items() if name not in adapters}
    wrong = differences({name: value.shape for name, value in weights.items()}, needed)
    if wrong := wrong or _head_differences(model, folder / "config.json"):
        raise ValueError(f"the checkpoint in {folder} does not fit `model`: {wrong[0]} ({len(wrong)} differences)")
    return checkpointer, weights


def materialize(
    model: TransformerDecoder,
    weights: dict[str, Tensor],
    world: World,
    *,
    seed: int,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> TransformerDecoder:
    """Allocate a model of `build_model` and load weights, on one device or sharded over the ranks by FSDP2.

    New adapters are initialized as in the LoRA paper (arXiv 2106.09685), A random and B zero. They depend on the seed
    only, so any world size starts from the same model.

    Args:
        model: A model on the meta device; changed in place.
        weights: Under torchtune's names; read on rank 0 only.
        world: The ranks.
        seed: The seed of the adapters' initial values.
        compile: Compile each layer.
        activation_checkpointing: Recompute each layer in the backward.

    Returns:
        The model.
    """
    adapters = {name: (tuple(value.shape), value.dtype) for name, value in get_adapter_params(model).items()}
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    if compile:
        training.compile_model(model, verbose=False)
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if world.size > 1:
        training.shard_model(model, [partial(training.get_shard_conditions, names_to_match=None)], cpu_offload=False)
    model.to_empty(device=world.device)
    if world.is_first:
        weights = {name: value.to(dtypes[name]) for name, value in weights.items()}
        weights |= {name: _new_adapter(name, *shape, seed) for name, shape in adapters.items()}
    if world.size > 1:
        set_model_state_dict(model, dict(weights) if world.is_first else {}, options=BROADCAST)
    else:
        model.load_state_dict(weights)
    with world.device:
        for module in model.modules():
            rope_init = getattr(module, "rope_init", None)
            if callable(rope_init):
                rope_init()  # its tables are not in the state dict
    return model


def save_weights(model: TransformerDecoder, cfg: Any, checkpointer: Any, world: World, folder: Path) -> None:
    """Save the weights in the format that they were loaded from, for transformers and vLLM; all ranks call it.

    `folder`/epoch_0 holds the model, adapters merged into it, in the dtype of the trained parameters, which its
    config.json then names. `folder`/adapter/epoch_0 holds adapters for PEFT.

    Args:
        model: On one device or sharded.
        cfg: The configuration.
        checkpointer: The one that loaded the weights.
        world: The ranks.
        folder: Need not exist.

    Raises:
        ValueError: If they could not be written, on all ranks.
    """
    gathered = get_model_state_dict(model, options=GATHER)  # on rank 0
    trained = {value.dtype for value in model.parameters() if value.requires_grad}.pop()
    lora = next((module for module in model.modules() if isinstance(module, LoRALinear)), None)
    with world.raise_on_all_ranks(*WRITE_ERRORS):
        if world.is_first:
            weights = {name: value.to(trained) for name, value in gathered.items() if isinstance(value, Tensor)}
            if lora is not None:
                _save_adapters(weights, lora, model.head_dim, cfg, folder / "adapter")
                weights = {name: value.clone() for name, value in weights.items()}  # on a CPU, they are the model's
                weights = get_merged_lora_ckpt(weights, lora.rank, lora.alpha)
            checkpointer._output_dir = folder  # another checkpointer would have to load the weights first
            checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=0)
            _set_dtype_in_config(folder / "epoch_0" / "config.json", trained)


def _save_adapters(weights: dict[str, Tensor], lora: LoRALinear, head_dim: int, cfg: Any, folder: Path) -> None:
    described = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": get_lora_module_names(
            list(cfg.model.lora_attn_modules),
            cfg.model.get("apply_lora_to_mlp", False),
            cfg.model.get("apply_lora_to_output", False),
        ),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # torchtune would write the hub's name here, where `tune` downloaded the base.
        "base_model_name_or_path": str(cfg.checkpointer.checkpoint_dir),
    }
    adapter = {training.ADAPTER_KEY: get_adapter_state_dict(weights), training.ADAPTER_CONFIG: described}
    is_qwen = cfg.checkpointer.model_type == "QWEN2"
    options = {"safe_serialization": True} if is_qwen else {}
    checkpointer = component(cfg, "checkpointer", output_dir=str(folder), **options)
    checkpointer.save_checkpoint(adapter, epoch=0, adapter_only=True)
    if is_qwen:
        _undo_llama_permutation(folder / "epoch_0" / "adapter_model.safetensors", head_dim)


def _head_differences(model: TransformerDecoder, config_file: Path) -> list[str]:
    if not config_file.exists():  # not a checkpoint in Hugging Face's format
        return []
    theirs = json.loads(config_file.read_text())
    heads = (theirs["num_attention_heads"], theirs.get("num_key_value_heads", theirs["num_attention_heads"]))
    attn = next(module for module in model.modules() if isinstance(module, MultiHeadAttention | Gemma2Attention))
    model_heads = (attn.num_heads, attn.num_kv_heads)
    return [] if heads == model_heads else [f"it has {heads} query and key/value heads, the model {model_heads}"]


def _new_adapter(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    weight = torch.zeros(shape)
    if name.endswith("lora_a.weight"):
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return weight.to(dtype)


def _undo_llama_permutation(adapter_file: Path, head_dim: int) -> None:
    """Order the rows of Qwen's query and key adapters as transformers does.

    torchtune 0.6.1 permutes them like Llama's, whose rotary pairs are adjacent in torchtune and half a head apart in
    transformers. Qwen's are half a head apart in both, and nothing else of it is permuted.
    """
    tensors = safetensors.load(adapter_file.read_bytes())
    for name, weight in tensors.items():
        if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight")):
            pairs = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)  # [H, D / 2, 2, rank]
            tensors[name] = pairs.flatten(0, 2).contiguous()
    safetensors.save_file(tensors, adapter_file, metadata={"format": "pt"})


def _set_dtype_in_config(config_file: Path, dtype: torch.dtype) -> None:
    """Write the dtype into config.json: transformers loads weights in it, and torchtune copies that of the source."""
    if config_file.exists():
        described = json.loads(config_file.read_text())
        keys = [key for key in ("dtype", "torch_dtype") if key in described] or ["torch_dtype"]
        described |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
        config_file.write_text(json.dumps(described, indent=2) + "\n")
