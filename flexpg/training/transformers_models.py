"""transformers' models in a recipe (see `models.Library`).

Checkpoints are read and written by transformers, adapters by PEFT; sharding and state dicts are PyTorch's (FSDP2).
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

from flexpg.analysis import transformers_shape
from flexpg.analysis.flops import ModelShape
from flexpg.analysis.transformers_files import auto_class, local_config
from flexpg.integrations.transformers import layers
from flexpg.integrations.transformers.checks import check_architecture, check_no_dropout, unwrap
from flexpg.integrations.transformers.composite import text_config, tower_modules
from flexpg.training.causal_lm import with_adapters
from flexpg.training.checkpoints import WRITE_ERRORS, differences
from flexpg.training.distributed import World
from flexpg.training.models import BROADCAST, GATHER, refuse_own_weights
from flexpg.training.quantization import dequantized_state, quantize_weights, quantized_layers, take_weights

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

TOKENIZER = "flexpg.training.causal_lm.tokenizer"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def prepare(model: nn.Module) -> None:
    """Freeze towers of images and audio, which text does not reach, and refuse models that cannot share prefixes.

    PEFT has frozen what adapters leave out.

    Raises:
        ValueError: If the model has dropout.
        TypeError: If it is not a transformers model, or prefixes cannot be shared exactly in it.
    """
    check_architecture(unwrap(model))
    check_no_dropout(model, will_train=True)
    for module in tower_modules(unwrap(model)):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def has_adapters(model: Any) -> bool:
    """Return whether the model has PEFT adapters."""
    return unwrap(model) is not model


def without_adapters(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the adapters are disabled."""
    context: AbstractContextManager[None] = model.disable_adapter() if has_adapters(model) else nullcontext()
    return context


def shape_of(model: nn.Module) -> ModelShape:
    """Return the shape for the cost model."""
    return transformers_shape.shape_of(model, dora_as_lora=True)


def check_fits(model: nn.Module, max_token: int, length: int) -> None:
    """Check that the model has an embedding for every token and was made for sequences of a length.

    Args:
        model: A transformers model.
        max_token: The largest token id.
        length: Tokens of the longest sequence, prompt and completion.

    Raises:
        ValueError: If it has not.
    """
    config: Any = text_config(unwrap(model))
    if max_token >= config.vocab_size:
        raise ValueError(f"token ids must be below the model's vocabulary size of {config.vocab_size}, got {max_token}")
    longest = max_length(model)
    if longest is not None and length > longest:
        raise ValueError(f"sequences must have at most max_position_embeddings={longest} tokens, got {length}")


def max_length(model: nn.Module) -> int | None:
    """Return the tokens of the longest sequence that the model was made for; None for any, as recurrent models."""
    longest: int | None = getattr(text_config(unwrap(model)), "max_position_embeddings", None)
    return longest


def load_weights(cfg: Any, model: nn.Module) -> tuple[None, dict[str, Tensor]]:
    """Load the checkpoint of the configured model, with new adapters, which depend on the seed only.

    Args:
        cfg: The configuration, with `model.path` and `model.lora`.
        model: From `build_model`.

    Returns:
        None, and the weights and buffers by name.

    Raises:
        ValueError: If the checkpoint lacks a weight of the model.
    """
    path, dtype = cfg.model.path, next(p.dtype for p in unwrap(model).parameters() if p.is_floating_point())
    auto = auto_class(local_config(Path(path)))
    loaded, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"the checkpoint in {path} does not fit its config: it has no {wrong[0]} ({len(wrong)} such)")
    if lora := cfg.model.get("lora"):
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            loaded = with_adapters(loaded, lora)
    weights = dict(loaded.state_dict())
    needed = {name: value.shape for name, value in model.state_dict().items()}
    if different := differences({name: value.shape for name, value in weights.items()}, needed):
        raise ValueError(f"the checkpoint in {path} does not fit `model`: {different[0]}")
    return None, weights | dict(loaded.named_buffers())


def materialize(
    model: nn.Module,
    weights: dict[str, Tensor],
    world: World,
    *,
    seed: int,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Allocate a model of `build_model` and load weights, on one device or sharded over the ranks by FSDP2.

    Args:
        model: A model on the meta device; changed in place.
        weights: From `load_weights`; read on rank 0 only.
        world: The ranks.
        seed: Not used; `load_weights` created the adapters.
        compile: Must be False.
        activation_checkpointing: Recompute each layer in the backward.

    Returns:
        The model.

    Raises:
        ValueError: If `compile` is set, or a quantized model would be sharded.
    """
    if compile:
        raise ValueError("compile must be false for transformers models")
    quantized = take_weights(model)
    if quantized and world.size > 1:
        raise ValueError(f"quantization needs a single process, got {world.size}: FSDP2 does not shard 4-bit weights")
    base: Any = unwrap(model)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    if activation_checkpointing:
        with warnings.catch_warnings():  # transformers 5.24 has another name for it
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            base.gradient_checkpointing_enable({"use_reentrant": False})
    if world.size > 1:
        for layer in layers(model).values():
            fully_shard(layer)
        fully_shard(model)
    model.to_empty(device=world.device)
    base.tie_weights()  # the parameters of `to_empty` are new ones
    if quantized:
        quantize_weights(model, quantized, weights, world.device)
    weights = {
        name: value.to(dtypes.get(name, value.dtype)) for name, value in weights.items() if name not in quantized
    }
    loaded = {name: value for name, value in weights.items() if name in dtypes}
    if world.size > 1:
        set_model_state_dict(model, dict(loaded), options=BROADCAST)
    else:
        model.load_state_dict(loaded, strict=not quantized)  # which have more entries, and are loaded
    # Tables of RoPE and the like are not in the state dict.
    tables = world.all_gather([{name: value for name, value in weights.items() if name not in dtypes}])[0]
    for name, value in tables.items():
        module, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(module), buffer, value.to(world.device))
    return model


def weights_folder(cfg: Any) -> Path:
    """Return the folder in which `save_weights` creates epoch_0.

    Raises:
        ValueError: If a checkpointer is configured, which nothing would use, or the model is loaded from there.
    """
    if cfg.checkpointer is not None:
        raise ValueError("checkpointer must not be set for a transformers model; model.path names its checkpoint")
    refuse_own_weights(cfg, "model.path", cfg.model.path, Path(cfg.output_dir))
    return Path(cfg.output_dir)


def save_weights(model: nn.Module, cfg: Any, source: None, world: World, folder: Path) -> None:
    """Save the weights in the checkpoint's own format; all ranks call it.

    `folder`/epoch_0 holds the model, adapters merged into it, in the dtype of the trained parameters, with the
    tokenizer of the run. `folder`/adapter/epoch_0 holds adapters for PEFT. Files are as large as transformers writes
    them, so a large model is sharded.

    Rank 0 needs main memory for the model twice: as it is gathered (frozen parameters in the dtype of the computation;
    on one CPU the model itself), and as it is written, in the dtype of the trained parameters.

    Args:
        model: On one device or sharded.
        cfg: The configuration.
        source: None.
        world: The ranks.
        folder: Need not exist.

    Raises:
        ValueError: If they could not be written, on all ranks.
    """
    gathered: dict[str, Any] = (
        dequantized_state(model)
        if quantized_layers(model)
        else get_model_state_dict(model, options=GATHER)  # on rank 0
    )
    trained = {value.dtype for value in model.parameters() if value.requires_grad}.pop()
    with world.raise_on_all_ranks(*WRITE_ERRORS, ValueError):  # ValueError: of files that are read again
        if world.is_first:
            _write_weights(gathered, cfg, trained, folder)


def _write_weights(gathered: dict[str, Any], cfg: Any, dtype: torch.dtype, folder: Path) -> None:
    path = cfg.model.path
    saved: Any = auto_class(local_config(Path(path))).from_pretrained(path, dtype=dtype)
    if lora := cfg.model.get("lora"):
        saved = with_adapters(saved, lora)
    with torch.no_grad():
        # In place, because `load_state_dict` of another dtype would need a third copy.
        for name, value in saved.state_dict().items():
            value.copy_(gathered[name])
    if lora:
        saved.save_pretrained(folder / "adapter" / "epoch_0")
        saved = saved.merge_and_unload()
    saved.save_pretrained(folder / "epoch_0")
    source = cfg.tokenizer.path if cfg.tokenizer["_component_"] == TOKENIZER else path  # the one that trained
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "epoch_0")
    for file in (Path(path) / name for name in PROCESSOR_FILES):  # of a model that takes images too
        if file.exists():
            shutil.copy(file, folder / "epoch_0")
