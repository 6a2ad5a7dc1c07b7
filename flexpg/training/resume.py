"""Which runs may resume from a checkpoint, and with which options."""

from __future__ import annotations

import fcntl
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from flexpg.training.checkpoints import checkpoints, read_progress
from flexpg.training.distributed import World
from flexpg.training.tasks.problem import Problem

# Options that must not change between a checkpoint and the run that resumes from it.
SAME_ON_RESUME = (
    *("seed", "prompts_per_step", "group_size", "minibatches", "num_iterations", "train_problems"),
    *("test_problems", "test_reward", "prompt_format", "model", "optimizer", "lr_scheduler"),
)
SAME_ON_EVAL = ("model", "optimizer", "lr_scheduler")  # what a checkpoint is loaded into


def newest_checkpoint(cfg: Any, folder: Path, weights: Path, world: World) -> Path | None:
    """Return the newest checkpoint in a run's folder, None if there is none; all ranks call it.

    A new run prints that it will replace the weights of an earlier one.

    Args:
        cfg: The configuration.
        folder: The folder of checkpoints.
        weights: The folder of the trained weights.
        world: The ranks.

    Raises:
        ValueError: If ranks see different checkpoints, or there is one that the run neither resumes from nor evaluates,
            or there is none to evaluate.
    """
    newest = next(reversed(checkpoints(folder)), None)
    if len(set(world.all_gather([str(newest)]))) > 1:
        raise ValueError(f"output_dir must be a folder that all ranks share, got {cfg.output_dir}")
    if cfg.eval_only and cfg.resume and not newest:
        raise ValueError(f"resume must be false with eval_only, got true without a checkpoint in {folder}")
    if newest and not (cfg.resume or cfg.eval_only):
        raise ValueError(f"output_dir holds {newest} of an earlier run; set resume=true or another output_dir")
    if world.is_first and weights.exists() and not (newest or cfg.eval_only):
        print(f"the trained weights in {weights} will be replaced at the end of this run")
    return newest


def lock_output_dir(cfg: Any, folder: Path, newest: Path | None, world: World) -> IO[str] | None:
    """Lock a run's folder, so that no other run deletes or skips its checkpoints; all ranks call it.

    The lock ends with the process, however it ends.

    Args:
        cfg: The configuration.
        folder: The folder of checkpoints.
        newest: The checkpoint that `newest_checkpoint` has returned.
        world: The ranks.

    Returns:
        The file, which is locked until it is closed; None on other ranks, and with `eval_only`.

    Raises:
        RankError: If another run has the lock, or has saved a checkpoint meanwhile, on all ranks.
    """
    file = None
    with world.raise_on_all_ranks(OSError, ValueError):
        if world.is_first and not cfg.eval_only:
            output_dir = Path(cfg.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            file = (output_dir / ".lock").open("w")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(
                    f"output_dir must not be that of another run, got {output_dir}, where one is training; wait until "
                    "it ends, or set another output_dir"
                ) from error
            if checkpoints(folder)[-1:] != ([newest] if newest else []):
                raise ValueError(f"output_dir={output_dir} has got a checkpoint of another run meanwhile; run again")
    return file


def same_options(cfg: Any, **problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the options that a run that resumes must have too, and what tells its problems from others.

    Args:
        cfg: The configuration.
        problems: By the name of their option.
    """
    options: Any = OmegaConf.to_container(cfg)
    data = {f"the data of {name}": _fingerprint(rows) for name, rows in problems.items()}
    return {name: options[name] for name in SAME_ON_RESUME} | data


def read_own_progress(checkpoint: Path, cfg: Any, same: dict[str, Any]) -> Any:
    """Return the progress of a checkpoint that was saved with `same_options`.

    Args:
        checkpoint: The checkpoint.
        cfg: The configuration.
        same: The `same_options` of this run.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        ValueError: If its options or data are others, or it has more steps than the run.
    """
    progress = read_progress(checkpoint)
    for name, saved in progress["options"].items():
        if name in SAME_ON_EVAL or not cfg.eval_only:
            for option, value, given in _differences(name, saved, same[name]):
                expected, got = ("null" if other is None else other for other in (value, given))
                raise ValueError(
                    f"{option} must be {expected} to resume from {checkpoint}, got {got}; use that, or start from "
                    "scratch with another output_dir"
                )
    if progress["steps_done"] > cfg.num_steps and not cfg.eval_only:
        raise ValueError(f"num_steps must be at least {progress['steps_done']} to resume from {checkpoint}")
    return progress


def _fingerprint(problems: Sequence[Problem]) -> str:
    crc = 0
    for problem in problems:
        crc = zlib.crc32(repr((problem.prompt, problem.answer)).encode(), crc)
    return f"{len(problems)} problems (checksum {crc:08x})"


def _differences(name: str, saved: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of each option that differs, such as `optimizer.lr`."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in saved | given:
            yield from _differences(f"{name}.{key}", saved.get(key), given.get(key))
    elif saved != given:
        yield name, saved, given
