"""Signals that ask a run to stop: it ends after the update that has begun, and saves."""

from __future__ import annotations

import signal

from flexpg.training.distributed import World


class StopRequest:
    """Whether any rank was asked to stop.

    Args:
        world: The ranks.

    Attributes:
        number: The number of the signal, 0 if there was none.
    """

    def __init__(self, world: World) -> None:
        self.number = 0
        self._world = world

    def listen(self, *numbers: signal.Signals) -> None:
        """Remember these signals instead of ending the process."""
        for number in numbers:
            signal.signal(number, self.request)

    def request(self, number: int, frame: object = None) -> None:
        """Ask to stop, as a signal handler."""
        self.number = number

    def is_made(self) -> bool:
        """Return whether any rank was asked to stop; all ranks call it."""
        self.number = int(self._world.all_reduce_max(self.number))
        return self.number > 0
