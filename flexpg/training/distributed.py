"""Thin wrappers over torch.distributed that do nothing in a single process.

A step's rollouts, rewards and metrics are small, so every rank gets all of them and takes the same decisions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flexpg.training.errors import one_line

T = TypeVar("T")


class RankError(ValueError):
    """An error of some ranks, raised on all of them; its cause is this rank's own error, None if it had none."""


@dataclass(frozen=True)
class World:
    """This rank among all of them.

    Attributes:
        rank: From 0.
        size: The world size.
        device: The device of this rank.
        context: The ranks that share every packed sequence with this one; None if it is alone.
    """

    rank: int
    size: int
    device: torch.device
    context: DeviceMesh | None = None

    @classmethod
    def init(cls, device: torch.device, context_parallel: int = 1) -> World:
        """Initialize the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or a world of one.

        Args:
            device: The device of this rank; with several GPUs, the one at its local rank.
            context_parallel: How many consecutive ranks share every packed sequence.

        Raises:
            ValueError: If the world size is not a multiple of it.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if context_parallel < 1 or size % context_parallel:
            raise ValueError(f"context_parallel must divide the number of ranks, {size}, got {context_parallel}")
        if size == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
        if context_parallel == 1:
            return cls(dist.get_rank(), size, device)
        shape = size // context_parallel, context_parallel
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
        return cls(dist.get_rank(), size, device, mesh["context"])

    @property
    def context_size(self) -> int:
        """How many ranks share a packed sequence."""
        return 1 if self.context is None else self.context.size()

    @property
    def data_size(self) -> int:
        """How many parts of a step are trained at the same time."""
        return self.size // self.context_size

    @property
    def data_rank(self) -> int:
        """Which of them this rank trains on."""
        return self.rank // self.context_size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every `size`-th one."""
        return list(items[self.rank :: self.size])

    def all_gather(self, results: Sequence[T]) -> list[T]:
        """Return the results for the items of every rank's `shard`, in the order of the items, on all ranks.

        Args:
            results: One per item of this rank's shard, picklable, without GPU tensors.
        """
        if self.size == 1:
            return list(results)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(results))
        return [parts[n % self.size][n // self.size] for n in range(sum(map(len, parts)))]

    def all_reduce_sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values summed over data ranks: those that share a packed sequence have the same, which count once.

        Args:
            values: All ranks must pass the same names.
        """
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.context_size).tolist(), strict=True))

    def all_reduce_max(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        return max(self.all_gather([value]))

    @contextmanager
    def raise_on_all_ranks(self, *errors: type[Exception]) -> Iterator[None]:
        """Re-raise an error of any rank on all ranks, so that no rank blocks in a collective. No collectives inside.

        Args:
            errors: The types that are raised on all ranks; any other error ends its own rank at once.

        Raises:
            RankError: With the message of the first rank that failed, in one line.
        """
        cause, message = None, ""
        try:
            yield
        except errors as error:
            cause, message = error, one_line(error)
        messages = self.all_gather([message])
        failed = [rank for rank, message in enumerate(messages) if message]
        if failed:
            where = "" if len(failed) == self.size else f" (on rank {failed[0]} of {self.size})"
            raise RankError(messages[failed[0]] + where) from cause

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Let the ranks meet at the end, and raise on all of them if any has raised. No collectives inside.

        Then all ranks are at the same place and can still save together. In a single process errors pass unchanged.

        Raises:
            RankError: It names the first rank that failed and what it raised.
        """
        if self.size == 1:
            yield
            return
        cause, text = None, ""
        try:
            yield
        except Exception as error:
            cause, text = error, f"{type(error).__name__}: {one_line(error)}"
        texts = self.all_gather([text])
        failed = [rank for rank, text in enumerate(texts) if text]
        if failed:
            raise RankError(f"rank {failed[0]} of {self.size} raised {texts[failed[0]]}") from cause

    @contextmanager
    def save_on_error(self, save: Callable[[], None]) -> Iterator[None]:
        """Save on an error that all ranks know of, a RankError, and raise this rank's own error, if it has one.

        An error that only its own rank knows of passes without saving, because the others may be in a collective.

        Args:
            save: All ranks call it.
        """
        raised: Exception | None = None
        try:
            yield
        except Exception as error:
            raised = error
            if isinstance(error, RankError) or self.size == 1:
                save()
        if raised is not None:  # not in the handler, where the rank's own error would get another context
            cause = raised.__cause__ if isinstance(raised, RankError) else None
            raise cause or raised

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def shutdown(self) -> None:
        """Destroy the process group."""
        if self.size > 1:
            dist.destroy_process_group()
