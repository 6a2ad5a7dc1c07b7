"""The processes of a run, as many as were started; one alone needs no process group, and all of this is then free.

What a step's rollouts, rewards and numbers need is little, so every process gets all of it, and decides the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: the device it works on.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Joins the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or stands alone.

        Args:
            device: this process's own; of GPUs, the one at its local rank.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's variables, as every launcher of PyTorch sets them
        if size == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that are this process's to do, one in `size`."""
        return list(items[self.rank :: self.size])

    def gather(self, shared: Sequence[T]) -> list[T]:
        """What came of every process's `share`, in the order of the items; the same list everywhere.

        Args:
            shared: one result for each item of this process's share, picklable, on no GPU.
        """
        if self.size == 1:
            return list(shared)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(shared))
        return [parts[n % self.size][n // self.size] for n in range(sum(map(len, parts)))]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values summed over the processes; all of them bring the same names."""
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        return max(self.gather([value]))

    @contextmanager
    def together(self, *errors: type[Exception]) -> Iterator[None]:
        """A block that fails everywhere where it fails anywhere, so that nobody waits for one who has left.

        What is in the block lets no process wait for another.

        Args:
            errors: what may be raised in it; anything else ends its own process alone, at once.

        Raises:
            ValueError: what was raised, in one line, on the first of the processes if on some of them alone.
        """
        cause, reason = None, ""
        try:
            yield
        except errors as error:
            cause, reason = error, one_line(error)
        reasons = self.gather([reason])
        failed = [rank for rank, reason in enumerate(reasons) if reason]
        if failed:
            where = "" if len(failed) == self.size else f" (process {failed[0]} of {self.size}, from 0)"
            raise ValueError(reasons[failed[0]] + where) from cause

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def one_line(error: BaseException) -> str:
    """What an error says, on one line, all of it: a YAML's last says where. Its kind, where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
