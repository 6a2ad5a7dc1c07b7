"""The model of a recipe, of torchtune or transformers: built, loaded on one device or sharded, and saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torchtune import training
from torchtune.modules import TransformerDecoder

from flexpg.analysis.flops import ModelShape
from flexpg.training.checkpoints import CheckpointError
from flexpg.training.components import component
from flexpg.training.distributed import World

# State dicts: whole on rank 0, and from there to all ranks.
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)


class Library(Protocol):
    """What a recipe needs to know about the models of a library; a module for each."""

    def prepare(self, model: Any) -> None:
        """Freeze what adapters leave out, and refuse what the recipe does not support."""

    def has_adapters(self, model: Any) -> bool:
        """Return whether only adapters are trained."""

    def without_adapters(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model is its base."""

    def check_fits(self, model: Any, max_token: int, length: int) -> None:
        """Raise ValueError unless the model has an embedding for every token and a position for every length."""

    def max_length(self, model: Any) -> int | None:
        """Return the tokens of the longest sequence that the model was made for; None for any."""

    def shape_of(self, model: Any) -> ModelShape:
        """Return the shape for the cost model."""

    def load_weights(self, cfg: Any, model: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return what `save_weights` needs to know of the checkpoint, and its weights."""

    def materialize(
        self,
        model: Any,
        weights: dict[str, Tensor],
        world: World,
        *,
        seed: int,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> Any:
        """Allocate a model of `build_model` and load weights, on one device or sharded over the ranks by FSDP2."""

    def weights_folder(self, cfg: Any) -> Path:
        """Return the folder in which `save_weights` creates epoch_0."""

    def save_weights(self, model: Any, cfg: Any, source: Any, world: World, folder: Path) -> None:
        """Write epoch_0, and adapter/epoch_0, in the format that the weights were loaded from; all ranks call it."""


def build_model(cfg: Any, dtype: torch.dtype, param_dtype: torch.dtype) -> nn.Module:
    """Build the configured model on the meta device, without memory or weights, which `materialize` provides.

    With adapters, only these require gradients.

    Args:
        cfg: The configuration.
        dtype: The dtype of frozen parameters.
        param_dtype: The dtype of trained parameters.

    Raises:
        ValueError: If the recipe does not support the adapters.
        TypeError: If the component is of another kind.
    """
    with training.set_default_dtype(dtype), torch.device("meta"):
        model: nn.Module = component(cfg, "model")
    library_of(model).prepare(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(param_dtype)
    return model


def library_of(model: nn.Module) -> Library:
    """Return the module for the library that a model comes from."""
    name = "torchtune_models" if isinstance(model, TransformerDecoder) else "transformers_models"
    library: Any = import_module(f"flexpg.training.{name}")
    return library


def refuse_own_weights(cfg: Any, option: str, base: str, place: Path) -> None:
    """Raise ValueError if a run would load its base model from where it writes its weights.

    A run that is resumed would load the trained weights as its base, and apply the adapters a second time.

    Args:
        cfg: The configuration.
        option: The option that `base` is from.
        base: The folder that weights are loaded from.
        place: The folder that gets epoch_0 and adapter/epoch_0.
    """
    written = [folder / "epoch_0" for folder in (place, place / "adapter", Path(cfg.output_dir) / "engine")]
    if not cfg.eval_only and Path(base).resolve() in [folder.resolve() for folder in written]:
        raise ValueError(
            f"{option} must not be where this run writes its weights, got {base}; set another output_dir, or move it"
        )


def replace_weights(place: Path, save: Callable[[Path], None], save_progress: Callable[[], None], world: World) -> None:
    """Save trained weights to a temporary folder, and rename its parts over those of an earlier run.

    If they cannot be written, the progress is saved instead, so that the training is not lost.

    Args:
        place: The folder that gets epoch_0 and adapter/epoch_0.
        save: Writes them into the folder that it is given, on rank 0; all ranks call it.
        save_progress: Saves a checkpoint unless there is one of the last step; all ranks call it.
        world: The ranks.

    Raises:
        CheckpointError: If they could not be written, on all ranks; what was there is untouched.
    """
    unfinished = place / "unfinished"
    if world.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    try:
        save(unfinished)
        with world.raise_on_all_ranks(OSError):
            if world.is_first:
                for new in [*unfinished.glob("adapter/epoch_0"), *unfinished.glob("epoch_0")]:
                    final = place / new.relative_to(unfinished)
                    final.parent.mkdir(exist_ok=True)
                    if final.exists():
                        final.rename(new.with_name("replaced"))
                    new.rename(final)
    except ValueError as error:
        if world.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)  # the checkpoint needs the space
        failed = f"the trained weights could not be written to {place / 'epoch_0'}: {error}"
        try:
            save_progress()
        except CheckpointError as other:
            raise CheckpointError(f"{failed}; {other}") from error
        raise CheckpointError(
            f"{failed}; the run is saved: free disk space, or put missing files back, and run again with resume=true"
        ) from error
    if world.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
