"""Which problems a step asks, and the seeds of a run: functions of its seed, so that a resumed run has the same."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import torch


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed for one purpose of a run."""
    return random.Random(f"{seed} {purpose}").getrandbits(63)


@dataclass(frozen=True)
class ProblemOrder:
    """The order in which a run asks problems.

    Attributes:
        seed: The seed of the run.
        count: How many problems there are.
    """

    seed: int
    count: int

    def of_step(self, step: int, size: int) -> list[int]:
        """Return the numbers of a step's problems: all of them in random order, then again in another order.

        Args:
            step: From 1.
            size: Problems of each step.
        """
        rounds = [divmod(i, self.count) for i in range((step - 1) * size, step * size)]
        orders = {n: self._order(f"order {n}") for n, _ in rounds}
        return [orders[n][i] for n, i in rounds]

    def replacements(self, problems: Collection[int], size: int, purpose: str) -> list[int]:
        """Return the numbers of at most `size` problems other than these."""
        return [number for number in self._order(purpose) if number not in problems][:size]

    def _order(self, purpose: str) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose))
        order: list[int] = torch.randperm(self.count, generator=generator).tolist()
        return order
