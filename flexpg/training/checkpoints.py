"""Atomic, checksummed training checkpoints.

A checkpoint is written to a temporary folder and renamed, so a folder named step_... is complete. Rank 0 writes the
whole state, which any world size can load. files.json holds the checksum of every file that is loaded, and tensors are
read with `torch.load(weights_only=True)`, so loading a checkpoint never executes code.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from flexpg.training.distributed import World
from flexpg.training.errors import one_line

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # RuntimeError is torch.save's for a full disk
STATE, PROGRESS, FILES = "state.pt", "progress.json", "files.json"
BEST = "best.txt"


class CheckpointError(ValueError):
    """A checkpoint could not be saved or cannot be loaded; the message names it and says what to do."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Any,
    keep_last: int,
    world: World,
    best_step: int | None = None,
    save_weights: Callable[[Path], None] | None = None,
) -> None:
    """Write `folder`/step_N unless it exists, then delete all but the newest `keep_last`; all ranks call it.

    Args:
        folder: The folder of a run's checkpoints.
        step: N, the number of completed steps.
        model: Its trained parameters are saved; frozen ones can be loaded from where they came.
        optimizer: The optimizer of these parameters.
        progress: Whatever else is needed to resume, as JSON.
        keep_last: Number of checkpoints to keep, at least 1.
        world: The ranks.
        best_step: The step of another checkpoint to keep, if it exists; its name is written to `folder`/best.txt. None
            to keep the one that is named there.
        save_weights: Writes weights in another format into the checkpoint's folder; all ranks call it. It raises
            ValueError on all ranks. These files have no checksum, because they are not loaded to resume.

    Raises:
        CheckpointError: If it could not be written (earlier checkpoints are untouched), or older ones not deleted. On
            all ranks, whichever failed.
    """
    final = folder / f"step_{step:06d}"
    if world.all_reduce_max(final.exists()):  # one answer for all ranks, however late a file system is
        return
    unfinished = final.with_suffix(".unfinished")
    options = _options(world)
    state = {  # on rank 0; empty elsewhere
        "model": _trained_state(model, options),
        # An optimizer without state would be given one by a step of size zero, which would count as a step.
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else None,
        "groups": [{**group, "params": len(group["params"])} for group in optimizer.param_groups],
    }
    try:
        with world.raise_on_all_ranks(*WRITE_ERRORS):
            if world.is_first:
                for leftover in [*folder.glob("*.unfinished"), *folder.glob("*.deleted")]:
                    shutil.rmtree(leftover)
                unfinished.mkdir(parents=True)
                _write(unfinished, state, progress)
        del state  # the weights below need the memory
        if save_weights is not None:
            save_weights(unfinished)
        with world.raise_on_all_ranks(OSError):
            if world.is_first:
                for path in (unfinished, *unfinished.rglob("*")):
                    _fsync(path)
                unfinished.rename(final)
                _fsync(folder)
    except ValueError as error:
        if world.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        world.barrier()
        kept = f"{checkpoints(folder)[-1]} is the last one" if checkpoints(folder) else "there is none before it"
        raise CheckpointError(
            f"the checkpoint {final} could not be saved: {error}; {kept}; free disk space or set another output_dir"
        ) from error
    try:
        with world.raise_on_all_ranks(OSError):
            if world.is_first:
                best = _mark_best(folder, best_step)
                for old in checkpoints(folder)[:-keep_last]:
                    if old != best:
                        shutil.rmtree(old.rename(old.with_suffix(".deleted")))
    except ValueError as error:
        raise CheckpointError(f"{final} is saved, but an older checkpoint cannot be deleted: {error}") from error


def read_progress(checkpoint: Path) -> Any:
    """Return the `progress` that a checkpoint was saved with.

    Args:
        checkpoint: One of `checkpoints(folder)`.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    try:
        _verify(checkpoint, PROGRESS)
        return json.loads((checkpoint / PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise _load_error(checkpoint, one_line(error)) from error


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Load a checkpoint's parameters and optimizer state; all ranks call it.

    Model and optimizer do not change unless the whole checkpoint is intact and belongs to them.

    Args:
        checkpoint: One of `checkpoints(folder)`.
        model: The model that was saved, on any number of ranks.
        optimizer: The optimizer of its trained parameters.
        world: The ranks.

    Raises:
        CheckpointError: If the checkpoint belongs to another model or is damaged; on all ranks.
    """
    weights = _trained_state(model, StateDictOptions(ignore_frozen_params=True))
    trained = {name: list(weight.shape) for name, weight in weights.items()}
    groups = [len(group["params"]) for group in optimizer.param_groups]
    state: dict[str, Any] = {"model": {}, "optimizer": {}, "groups": []}
    try:
        with world.raise_on_all_ranks(OSError, ValueError, RuntimeError, pickle.UnpicklingError):
            if world.is_first:
                state = _read(checkpoint, trained, groups)
    except ValueError as error:
        raise _load_error(checkpoint, str(error)) from error
    has_state, saved_groups = world.all_gather([(bool(state["optimizer"]), state["groups"])])[0]  # of rank 0
    options = _options(world, load=True)
    set_model_state_dict(model, state["model"], options=options)
    if has_state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    else:
        optimizer.state.clear()
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):  # the learning rate among them
            group.update({name: value for name, value in saved.items() if name != "params"})


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    complete = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def differences(saved: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> list[str]:
    """Return in words how saved weights differ from those that a model needs, by names and shapes."""
    return [
        *(f"it has no {name}" for name in needed if name not in saved),
        *(f"the model has no {name}" for name in saved if name not in needed),
        *(
            f"{name} is {list(saved[name])} in it and {list(shape)} in the model"
            for name, shape in needed.items()
            if name in saved and list(saved[name]) != list(shape)
        ),
    ]


def _mark_best(folder: Path, step: int | None) -> Path | None:
    """Return the path of the best checkpoint, after writing its name to a file, atomically, if `step` was saved.

    Otherwise it is the one that the file names: a run that resumes without the option does not delete it.
    """
    marker = folder / BEST
    if step is not None and (best := folder / f"step_{step:06d}").exists():
        unfinished = folder / f".{BEST}"
        unfinished.write_text(f"{best.name}\n")
        unfinished.replace(marker)
    return folder / marker.read_text().strip() if marker.exists() else None


def _trained_state(model: nn.Module, options: StateDictOptions) -> dict[str, Any]:
    """Return the state of trained parameters only: torch keeps tied frozen ones, and parts such as `weight.absmax`."""
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    parts = tuple(f"{name}." for name in frozen)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if name not in frozen and not name.startswith(parts)}


def _options(world: World, *, load: bool = False) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True,
        cpu_offload=not load,
        broadcast_from_rank0=load and world.size > 1,
        ignore_frozen_params=True,
        strict=False,  # frozen parameters are not in a checkpoint; trained ones are compared by name
    )


def _write(folder: Path, state: dict[str, Any], progress: Any) -> None:
    torch.save(state, folder / STATE)
    # The learning rate of torchao's optimizers, and with it the schedule's, is a tensor.
    (folder / PROGRESS).write_text(json.dumps(progress, default=float))
    checksums = {name: _checksum(folder / name) for name in (STATE, PROGRESS)}
    (folder / FILES).write_text(json.dumps(checksums))


def _read(checkpoint: Path, trained: Mapping[str, Sequence[int]], groups: Sequence[int]) -> dict[str, Any]:
    for name in (STATE, PROGRESS):
        _verify(checkpoint, name)
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    wrong = differences({name: weight.shape for name, weight in state["model"].items()}, trained)
    if wrong:
        raise ValueError(f"{wrong[0]} ({len(wrong)} differences)")
    if [group["params"] for group in state["groups"]] != groups:
        raise ValueError("its optimizer has other parameter groups")
    return state


def _verify(checkpoint: Path, name: str) -> None:
    expected = json.loads((checkpoint / FILES).read_text())
    if not isinstance(expected, dict) or _checksum(checkpoint / name) != expected.get(name):
        raise ValueError(f"{name} is damaged: its checksum differs")


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, which detects damage but not malice."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _load_error(checkpoint: Path, reason: str) -> CheckpointError:
    older = list(takewhile(lambda other: other != checkpoint, checkpoints(checkpoint.parent)))
    advice = f"delete it to resume from {older[-1]}" if older else "delete it to start from scratch"
    return CheckpointError(
        f"the checkpoint {checkpoint} cannot be loaded: {reason}; if it belongs to another model or optimizer, use "
        f"those, otherwise {advice}"
    )


def _fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
