"""Training state on disk: whole or not there, whenever the run is killed.

A checkpoint is written beside its place and renamed into it, so a folder named step_... is complete. Tensors are kept
by torch.distributed.checkpoint, each process its own shards, in a folder that all see; another number of processes may
load them. The rest is JSON. That library's index is a pickle, so load no checkpoint from somebody you do not trust.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from flexpg.distributed import World

# What is not trained can be loaded from where it came. Strict loading would miss it; names are compared here instead.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: Any, keep_last: int, world: World
) -> None:
    """Writes `folder`/step_N unless it is there, then deletes all but the newest `keep_last`; every process calls it.

    Args:
        folder: where the run's checkpoints stand.
        step: N, the steps that are done.
        model: its trained parameters are saved, frozen ones are not.
        optimizer: over these parameters.
        progress: whatever else the run needs to go on, as JSON holds it.
        keep_last: checkpoints to keep, 1 or more.
        world: the processes.
    """
    final = folder / f"step_{step:06d}"
    if world.largest(final.exists()):  # one answer for all, however late a file system is
        return
    unfinished = final.with_suffix(".unfinished")
    if world.is_first:
        for leftover in [*folder.glob("*.unfinished"), *folder.glob("*.deleted")]:
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    world.wait()
    has_moments = bool(optimizer.state)
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    if not has_moments:  # PyTorch made them, by a step of zero, which would count as one
        optimizer.state.clear()
    with _no_dist_is_known():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished, no_dist=world.size == 1)
    if world.is_first:
        _write_json(unfinished / "trained.json", {"shapes": _shapes(weights), "has_moments": has_moments})
        _write_json(unfinished / "progress.json", progress)
        _sync(unfinished)
        unfinished.rename(final)
        _sync(folder)
        for old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old.rename(old.with_suffix(".deleted")))
    world.wait()


def read_progress(checkpoint: Path) -> Any:
    """The `progress` that a checkpoint was saved with.

    Args:
        checkpoint: one of `checkpoints(folder)`.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {checkpoint} has no readable progress.json: {error}") from error


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer, world: World) -> Any:
    """Puts a checkpoint's trained parameters and optimizer state in place, and returns its `progress`.

    Args:
        checkpoint: one of `checkpoints(folder)`.
        model: as it was saved, on any number of processes.
        optimizer: over its trained parameters.
        world: the processes.

    Raises:
        ValueError: the checkpoint holds other parameters than the model, or cannot be read.
    """
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        progress, saved = read_progress(checkpoint), json.loads((checkpoint / "trained.json").read_text())
        if wrong := differences(saved["shapes"], _shapes(weights)):
            raise ValueError(f"{wrong[0]} ({len(wrong)} differences)")
        if not saved["has_moments"]:
            moments["state"] = {}
        with _no_dist_is_known():
            dcp.load(state, checkpoint_id=checkpoint, no_dist=world.size == 1)
    except (OSError, ValueError, RuntimeError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = str(cause) or type(cause).__name__
        raise ValueError(f"the checkpoint {checkpoint} does not fit this model and optimizer: {reason}") from error
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    if not saved["has_moments"]:
        optimizer.state.clear()
    return progress


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    complete = (path for path in folder.glob("step_*") if path.suffix == "")
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def differences(saved: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong with saved weights, in words, by their names and shapes."""
    return [
        *(f"it has no {name}" for name in needed if name not in saved),
        *(f"the model has no {name}" for name in saved if name not in needed),
        *(
            f"{name} is {list(saved[name])} there and {list(shape)} in the model"
            for name, shape in needed.items()
            if name in saved and list(saved[name]) != list(shape)
        ),
    ]


def _shapes(weights: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}


@contextmanager
def _no_dist_is_known() -> Iterator[None]:
    """Without the warning that one process saves and loads for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
