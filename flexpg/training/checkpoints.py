"""Training state on disk: whole or not there, whenever the run is killed; what is damaged is named, and not loaded.

A checkpoint is written beside its place and renamed into it, so a folder named step_... is complete. Tensors are kept
by torch.distributed.checkpoint, each process its own shards, in a folder that all see; another number of processes may
load them. The rest is JSON, and files.json holds a checksum of every other file.

That library reads its index by pickle, and entries that are no tensors too. Here both are read by an unpickler that
makes nothing but what an index or an option is made of: a checkpoint from anybody runs no code.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from flexpg.training.distributed import World, one_line

# What is not trained can be loaded from where it came. Strict loading would miss it; names are compared here instead.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
IN_AN_INDEX = {  # all that torch 2.13 writes into one: places, shapes and dtypes; the dtypes are allowed below
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # in Python 3.13
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.serialization": {"_get_layout"},
}


class CheckpointError(ValueError):
    """A checkpoint that could not be saved, or cannot be loaded, in one line that names it."""


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

    Raises:
        CheckpointError: it could not be written, and what was there before is as it was; or it was, and older ones
            could not be deleted. On every process, whichever failed.
    """
    final = folder / f"step_{step:06d}"
    if world.largest(final.exists()):  # one answer for all, however late a file system is
        return
    unfinished = final.with_suffix(".unfinished")
    try:
        with world.together(OSError):
            if world.is_first:
                for leftover in [*folder.glob("*.unfinished"), *folder.glob("*.deleted")]:
                    shutil.rmtree(leftover)
                unfinished.mkdir(parents=True)
        _write(unfinished, model, optimizer, progress, world)
        with world.together(OSError):
            if world.is_first:
                _sync(unfinished)
                unfinished.rename(final)
                _sync(folder)
    except (ValueError, CheckpointException) as error:
        if world.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)  # what cannot be deleted now goes with the next save
        world.wait()
        last = checkpoints(folder)[-1:]
        kept = f"{last[0]} is the last one" if last else "there is none before it"
        advice = "free space, or set another output_dir"
        failed = f"the checkpoint {final} could not be saved: {_reason(error)}"
        raise CheckpointError(f"{failed}; {kept}; {advice}") from error
    try:
        with world.together(OSError):
            if world.is_first:
                for old in checkpoints(folder)[:-keep_last]:
                    shutil.rmtree(old.rename(old.with_suffix(".deleted")))
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint {final} is saved, but an older one cannot be deleted: {error}"
        ) from error


def _write(folder: Path, model: nn.Module, optimizer: Optimizer, progress: Any, world: World) -> None:
    """All files of a checkpoint; those that a process wrote are read once more by it, for their checksums."""
    has_moments = bool(optimizer.state)
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    if not has_moments:  # PyTorch made them, by a step of zero, which would count as one
        optimizer.state.clear()
    with _no_dist_is_known():
        state = {"model": weights, "optimizer": moments}
        dcp.save(state, storage_writer=_Writer(folder), no_dist=world.size == 1)
    with world.together(OSError):
        checksums = _checksums(folder.glob(f"__{world.rank}_*"))
    checksums = {name: crc for part in world.gather([checksums]) for name, crc in part.items()}
    with world.together(OSError):
        if world.is_first:
            _write_json(folder / "trained.json", {"shapes": _shapes(weights), "has_moments": has_moments})
            _write_json(folder / "progress.json", progress)
            checksums |= _checksums(folder / name for name in (".metadata", "trained.json", "progress.json"))
            _write_json(folder / "files.json", checksums)


def read_progress(checkpoint: Path) -> Any:
    """The `progress` that a checkpoint was saved with.

    Args:
        checkpoint: one of `checkpoints(folder)`.

    Raises:
        CheckpointError: it cannot be read, or is not what was saved.
    """
    try:
        return _read_json(checkpoint, "progress.json", _saved_checksums(checkpoint))
    except (OSError, ValueError) as error:
        raise _refusal(checkpoint, one_line(error), is_whole=False) from error


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer, world: World) -> Any:
    """Puts a checkpoint's trained parameters and optimizer state in place, and returns its `progress`.

    They are put in place when every process has read all of its own, until when they are held in the host's memory.

    Args:
        checkpoint: one of `checkpoints(folder)`.
        model: as it was saved, on any number of processes.
        optimizer: over its trained parameters.
        world: the processes.

    Raises:
        CheckpointError: the checkpoint holds other parameters than the model, or is damaged; on every process,
            whichever found it. Model and optimizer are as they were.
    """
    had_moments = bool(optimizer.state)
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    groups = [group["params"] for group in state["optimizer"]["param_groups"]]
    is_whole = False
    try:
        saved, index = _verified(checkpoint, world)
        is_whole = True
        if wrong := differences(saved["trained.json"]["shapes"], _shapes(weights)):
            raise ValueError(f"{wrong[0]} ({len(wrong)} differences)")
        if not saved["trained.json"]["has_moments"]:
            moments["state"] = {}
        planner = _LoadAside()
        with _no_dist_is_known():
            dcp.load(state, storage_reader=_Reader(checkpoint, index), planner=planner, no_dist=world.size == 1)
        if groups != [group["params"] for group in state["optimizer"]["param_groups"]]:
            raise ValueError("the optimizer's groups have other parameters there")
    except (ValueError, CheckpointException) as error:
        if not had_moments:
            optimizer.state.clear()
        raise _refusal(checkpoint, _reason(error), is_whole) from error
    planner.put_in_place()
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    if not saved["trained.json"]["has_moments"]:
        optimizer.state.clear()
    return saved["progress.json"]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    complete = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
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


def _verified(checkpoint: Path, world: World) -> tuple[dict[str, Any], Metadata]:
    """A checkpoint's JSON and index, when the processes, each a share, have found every file to be what was saved."""
    with world.together(OSError, ValueError):
        expected = _saved_checksums(checkpoint)
        for name in world.share(sorted(expected)):
            _verify(checkpoint / name, expected)
    with world.together(OSError, ValueError):
        saved = {name: _read_json(checkpoint, name, expected) for name in ("trained.json", "progress.json")}
        index = _read_index(checkpoint, expected)
    return saved, index


def _read_json(checkpoint: Path, name: str, expected: Mapping[str, int]) -> Any:
    _verify(checkpoint / name, expected)
    return json.loads((checkpoint / name).read_text())


def _read_index(checkpoint: Path, expected: Mapping[str, int]) -> Metadata:
    """What stands where in the files of tensors, made by an unpickler that can make nothing else."""
    try:
        index = _Unpickler(io.BytesIO((checkpoint / ".metadata").read_bytes())).load()
        named = {place.relative_path for place in index.storage_data.values()}
    except OSError:
        raise
    except Exception as error:  # a pickle can raise whatever it likes, of what it is allowed to name
        raise ValueError(f".metadata is no index of tensors: {one_line(error)}") from error
    if strays := named - set(expected):
        raise ValueError(f".metadata names {min(strays)}, which is no file of this checkpoint")
    return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A class that an index is made of; these run nothing but their own constructors."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in IN_AN_INDEX.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


class _Writer(dcp.FileSystemWriter):
    """Says of a full disk what the system says."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save's, of where it stands in the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class _Reader(dcp.FileSystemReader):
    """Reads tensors by an index that has been read."""

    def __init__(self, checkpoint: Path, index: Metadata) -> None:
        super().__init__(checkpoint)
        self.index = index

    def read_metadata(self) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            raise ValueError("an entry is neither a tensor nor a plain value, and could run code") from error


class _LoadAside(DefaultLoadPlanner):
    """Keeps what is read beside its place, and makes nothing but tensors and plain values of it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[Tensor, Tensor]] = []  # the place, and what belongs there

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)  # it would load whatever is pickled

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = super().resolve_tensor(read_item)
        aside = torch.empty_like(place, device="cpu", requires_grad=False)
        self.read.append((place, aside))
        return aside

    @torch.no_grad()
    def put_in_place(self) -> None:
        for place, aside in self.read:
            place.copy_(aside)


def _saved_checksums(checkpoint: Path) -> dict[str, int]:
    expected = json.loads((checkpoint / "files.json").read_text())
    if not isinstance(expected, dict) or any(Path(name).name != name for name in expected):
        raise ValueError("files.json does not name the files of this checkpoint")
    return expected


def _verify(file: Path, expected: Mapping[str, int]) -> None:
    if _checksum(file) != expected.get(file.name):
        raise ValueError(f"{file.name} is damaged: it is not what was saved")


def _checksums(files: Iterable[Path]) -> dict[str, int]:
    return {file.name: _checksum(file) for file in files}


def _checksum(path: Path) -> int:
    """CRC-32 of a file: no flip of bits within 32 in a row escapes it, and one in 4 billion others."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _refusal(checkpoint: Path, reason: str, is_whole: bool) -> CheckpointError:
    """What is wrong with a checkpoint, and what to do: a whole one may be another model's, and worth keeping."""
    older = list(takewhile(lambda other: other != checkpoint, checkpoints(checkpoint.parent)))
    advice = f"delete it to {f'go on from {older[-1]}' if older else 'start anew'}"
    if is_whole:
        advice = f"load it into the model and optimizer that it was saved from, or {advice}"
    return CheckpointError(f"the checkpoint {checkpoint} cannot be loaded: {reason}; {advice}")


def _reason(error: BaseException) -> str:
    """The first process's error, of those that PyTorch has gathered."""
    return one_line(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)


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
