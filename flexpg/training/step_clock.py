"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch

NAMES = ("sample_s", "reward_s", "logprobs_s", "self_check_s", "train_s")


class StepClock:
    """Seconds of one step by what they were spent on.

    >>> clock = StepClock(torch.device("cpu"))
    >>> clock.lap("sample_s")
    >>> clock.seconds["sample_s"] > 0, clock.seconds["train_s"]
    (True, 0.0)

    Attributes:
        seconds: By name; those of NAMES are 0 until they are measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._device = device
        self._last = synchronized_time(device)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a name, when the device has finished its work."""
        now = synchronized_time(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def synchronized_time(device: torch.device) -> float:
    """Return a clock in seconds, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
