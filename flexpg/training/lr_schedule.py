"""The learning-rate schedule of a recipe, which takes one step per GRPO step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from flexpg.training.components import component
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


@contextmanager
def lr_scheduler_errors(world: World) -> Iterator[None]:
    """Raise an error of a scheduler's step on all ranks, below a line that names the option; all ranks enter it."""
    with world.raise_together(), error_context("lr_scheduler cannot take another step, such as one past its last"):
        yield
