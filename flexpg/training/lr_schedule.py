"""The learning-rate schedule of a recipe, which takes one step per GRPO step."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from flexpg.training.config import component
from flexpg.training.distributed import World
from flexpg.training.errors import error_context


def build_lr_scheduler(cfg: Any, optimizer: Optimizer) -> Any:
    """Build the configured scheduler.

    Raises:
        ValueError: If its component cannot be built, or its `step` needs an argument, such as a metric.
    """
    scheduler = component(cfg, "lr_scheduler", optimizer)
    try:
        inspect.signature(scheduler.step).bind()
    except TypeError as error:
        raise ValueError(
            f"lr_scheduler must be a scheduler whose step() needs no argument, got {type(scheduler).__name__}: {error}"
        ) from None
    return scheduler


def step_lr_scheduler(scheduler: Any, world: World) -> None:
    """Take a step of a scheduler, and raise on all ranks if it raises on any; all ranks call it."""
    with world.raise_together(), error_context("lr_scheduler cannot take another step, such as one past its last"):
        scheduler.step()
