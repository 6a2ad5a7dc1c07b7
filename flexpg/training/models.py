"""A torchtune model for a recipe: built, given its weights on one device or on many, and written back to disk.

Builders, adapters and file formats are torchtune's; sharding and state dicts are PyTorch's own (FSDP2).
"""

from __future__ import annotations

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
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

from flexpg.training.checkpoints import CheckpointError, differences
from flexpg.training.distributed import World, one_line
from flexpg.training.setup import component

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)


def model_shape(cfg: DictConfig, dtype: torch.dtype, param_dtype: torch.dtype) -> TransformerDecoder:
    """The model of the YAML on the meta device: no memory, no weights; `load` gives it both.

    With a `lora_*` builder only the adapters are trained.

    Args:
        cfg: the whole configuration.
        dtype: of what is frozen.
        param_dtype: of what is trained.

    Raises:
        ValueError: adapters that are not plain LoRA: DoRA, or a quantized base.
        TypeError: the component is no TransformerDecoder.
    """
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = component("model", cfg)
    if not isinstance(model, TransformerDecoder):
        raise TypeError(f"model is a {type(model).__name__}; name a builder of a torchtune TransformerDecoder")
    for module in model.modules():
        if isinstance(module, DoRALinear) or (isinstance(module, LoRALinear) and module._quantize_base):
            raise ValueError("model: use_dora and quantize_base are not supported; set both to false")
    if adapters := get_adapter_params(model):
        set_trainable_params(model, adapters)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(param_dtype)
    return model


def checkpoint(cfg: DictConfig, model: TransformerDecoder) -> tuple[Any, dict[str, Tensor]]:
    """The checkpointer of the YAML, and the weights that it loads, in torchtune's names.

    Args:
        cfg: the whole configuration.
        model: as `model_shape` makes it; the heads of the checkpoint's config.json are compared too, since other heads
            may well have weights of the same shapes.

    Raises:
        ValueError: a missing file, or another model's: names, shapes or heads differ, and the first is named.
    """
    checkpointer = component("checkpointer", cfg)
    folder = Path(cfg.checkpointer.checkpoint_dir)
    try:
        weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    except Exception as error:  # of a model_type that is not the checkpoint's, torchtune raises no narrower one
        raise ValueError(f"checkpointer: {type(error).__name__}: {one_line(error)} (of {folder})") from error
    adapters = get_adapter_params(model)
    needed = {name: value.shape for name, value in model.state_dict().items() if name not in adapters}
    wrong = differences({name: value.shape for name, value in weights.items()}, needed)
    if wrong := wrong or _other_heads(model, folder / "config.json"):
        raise ValueError(f"the checkpoint in {folder} does not fit `model`: {wrong[0]} ({len(wrong)} differences)")
    return checkpointer, weights


def load(
    model: TransformerDecoder,
    weights: dict[str, Tensor],
    world: World,
    *,
    seed: int,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> TransformerDecoder:
    """Gives a model of `model_shape` its memory and weights, on one device or sharded over the processes by FSDP2.

    New adapters start as in the LoRA paper (arXiv 2106.09685): A random, B zero. They depend on the seed alone, so on
    any number of processes the same model starts.

    Args:
        model: on the meta device; changed in place.
        weights: in torchtune's names; read on the first process alone.
        world: the processes.
        seed: of the adapters.
        compiled: torch.compile for each layer.
        activation_checkpointing: recompute each layer in the backward.

    Returns:
        The model.
    """
    adapters = {name: (tuple(value.shape), value.dtype) for name, value in get_adapter_params(model).items()}
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    if compiled:
        training.compile_model(model, verbose=False)
        # With and without gradients, adapters and known lengths, a layer has more graphs than torch's limit of 8; and
        # beyond a limit it would run uncompiled in silence.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if world.size > 1:
        training.shard_model(model, [partial(training.get_shard_conditions, names_to_match=None)], cpu_offload=False)
    model.to_empty(device=world.device)
    if world.is_first:
        weights = {name: value.to(dtypes[name]) for name, value in weights.items()}
        weights |= {name: _adapter(name, *shape, seed) for name, shape in adapters.items()}
    if world.size > 1:
        set_model_state_dict(model, dict(weights) if world.is_first else {}, options=FROM_FIRST)
    else:
        model.load_state_dict(weights)
    with world.device:
        for module in model.modules():
            rope_init = getattr(module, "rope_init", None)
            if callable(rope_init):
                rope_init()  # its tables are in no state dict
    return model


def save(model: TransformerDecoder, cfg: DictConfig, checkpointer: Any, world: World) -> None:
    """Writes the weights in the format that they came in, for transformers and vLLM to load; every process calls it.

    `checkpointer.output_dir`/epoch_0 holds the model, adapters merged into it, in the dtype it was trained in, which
    its config.json then names. Adapters alone stand in `checkpointer.output_dir`/adapter/epoch_0, as PEFT reads them.
    Both are written aside and renamed when they are whole, over those of an earlier run.

    Args:
        model: on one device or sharded.
        cfg: the whole configuration.
        checkpointer: the one that loaded the weights.
        world: the processes.

    Raises:
        CheckpointError: they could not be written, and what was there is as it was; on the first process alone.
    """
    gathered = get_model_state_dict(model, options=WHOLE)  # on the first process alone
    if not world.is_first:
        return
    trained = {value.dtype for value in model.parameters() if value.requires_grad}.pop()
    weights = {name: value.to(trained) for name, value in gathered.items() if isinstance(value, Tensor)}
    lora = next((module for module in model.modules() if isinstance(module, LoRALinear)), None)
    place = Path(cfg.checkpointer.output_dir)
    aside = place / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
    try:
        if lora is not None:
            _save_adapters(weights, lora, model.head_dim, cfg, aside / "adapter")
            own = {name: value.clone() for name, value in weights.items()}  # merging adds in place: on a CPU, to these
            weights = get_merged_lora_ckpt(own, lora.rank, lora.alpha)
        checkpointer._output_dir = aside  # another checkpointer would have to read the weights first
        checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=0)
        _name_dtype(aside / "epoch_0" / "config.json", trained)
        _put_in_place(aside, place)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's, of a full disk
        shutil.rmtree(aside, ignore_errors=True)
        failed = f"the trained weights could not be written to {place / 'epoch_0'}: {one_line(error)}"
        raise CheckpointError(f"{failed}; free space and run again with resume=true") from error


def _put_in_place(aside: Path, place: Path) -> None:
    for new in [*aside.glob("adapter/epoch_0"), *aside.glob("epoch_0")]:
        final = place / new.relative_to(aside)
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            final.rename(new.with_name("replaced"))
        new.rename(final)
    shutil.rmtree(aside, ignore_errors=True)  # the weights are in place, whatever stays of those before


def _save_adapters(weights: dict[str, Tensor], lora: LoRALinear, head_dim: int, cfg: DictConfig, folder: Path) -> None:
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
        # torchtune puts the hub's name here instead, where `tune` downloaded the base.
        "base_model_name_or_path": str(cfg.checkpointer.checkpoint_dir),
    }
    adapter = {training.ADAPTER_KEY: get_adapter_state_dict(weights), training.ADAPTER_CONFIG: described}
    is_qwen = cfg.checkpointer.model_type == "QWEN2"
    as_file = {"safe_serialization": True} if is_qwen else {}
    apart = component("checkpointer", cfg, output_dir=str(folder), **as_file)
    apart.save_checkpoint(adapter, epoch=0, adapter_only=True)
    if is_qwen:
        _in_order(folder / "epoch_0" / "adapter_model.safetensors", head_dim)


def _other_heads(model: TransformerDecoder, config_file: Path) -> list[str]:
    if not config_file.exists():  # not a checkpoint in Hugging Face's format
        return []
    theirs = json.loads(config_file.read_text())
    heads = (theirs["num_attention_heads"], theirs.get("num_key_value_heads", theirs["num_attention_heads"]))
    attn = next(module for module in model.modules() if isinstance(module, MultiHeadAttention | Gemma2Attention))
    ours = (attn.num_heads, attn.num_kv_heads)
    return [] if heads == ours else [f"it has {heads} heads, the model {ours}"]


def _adapter(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    weight = torch.zeros(shape)
    if name.endswith("lora_a.weight"):
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(63))
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return weight.to(dtype)


def _in_order(adapter_file: Path, head_dim: int) -> None:
    """Puts the rows of Qwen's query and key adapters as transformers has them.

    Torchtune 0.6.1 takes them for Llama's, whose rotary pairs are neighbours in torchtune and half a head apart in
    transformers. Qwen's are half a head apart in both, and nothing else of it is permuted.
    """
    tensors = safetensors.load(adapter_file.read_bytes())
    for name, weight in tensors.items():
        if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight")):
            pairs = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)  # [H, D / 2, 2, rank]
            tensors[name] = pairs.flatten(0, 2).contiguous()
    safetensors.save_file(tensors, adapter_file, metadata={"format": "pt"})


def _name_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Transformers loads weights in the dtype of config.json, and torchtune copies that of the source."""
    if config_file.exists():
        described = json.loads(config_file.read_text())
        keys = [key for key in ("dtype", "torch_dtype") if key in described] or ["torch_dtype"]
        described |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
        config_file.write_text(json.dumps(described, indent=2) + "\n")
