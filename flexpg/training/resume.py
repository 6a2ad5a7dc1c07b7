"""Which runs may resume from a checkpoint, and with which options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flexpg.training.checkpoints import checkpoints, read_progress
from flexpg.training.distributed import World

# Options that must not change between a checkpoint and the run that resumes from it.
SAME_ON_RESUME = (
    *("seed", "prompts_per_step", "group_size", "minibatches", "num_iterations", "train_problems"),
    *("test_problems", "prompt_format", "model", "optimizer", "lr_scheduler"),
)
SAME_ON_EVAL = ("model", "optimizer", "lr_scheduler")  # what a checkpoint is loaded into


def newest_checkpoint(cfg: Any, folder: Path, world: World) -> Path | None:
    """Return the newest checkpoint in a run's folder, None if there is none; all ranks call it.

    Args:
        cfg: The configuration.
        folder: Of checkpoints.
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
    return newest


def same_options(cfg: Any) -> dict[str, Any]:
    """Return the options that a run that resumes must have too."""
    options: Any = OmegaConf.to_container(cfg)
    return {name: options[name] for name in SAME_ON_RESUME}


def read_own_progress(checkpoint: Path, cfg: Any) -> Any:
    """Return the progress of a checkpoint that was saved with `same_options`.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        ValueError: If its options are others, or it has more steps than the run.
    """
    options: Any = OmegaConf.to_container(cfg)
    progress = read_progress(checkpoint)
    for name, saved in progress["options"].items():
        if name in SAME_ON_EVAL or not cfg.eval_only:
            for option, value, given in _differences(name, saved, options[name]):
                raise ValueError(
                    f"{option} must be {value} to resume from {checkpoint}, got {given}; use that, or start from "
                    "scratch with another output_dir"
                )
    if progress["steps_done"] > cfg.num_steps and not cfg.eval_only:
        raise ValueError(f"num_steps must be at least {progress['steps_done']} to resume from {checkpoint}")
    return progress


def _differences(name: str, saved: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of each option that differs, such as `optimizer.lr`."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in saved | given:
            yield from _differences(f"{name}.{key}", saved.get(key), given.get(key))
    elif saved != given:
        yield name, saved, given
