"""Ways to the same result, timed by turns in one process, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def by_turns(
    ways: Mapping[str, Callable[[], object]], turns: int, device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of a call of each way, turn by turn, after one turn that does not count.

    A way that runs out of memory in that turn is left out of what is returned.

    Args:
        ways: functions without arguments; what they return is dropped.
        turns: how often each is timed.
        device: it is waited for before a clock is read.
        calls: of a way per turn, one after the other; their mean is the turn's time.
    """
    times: dict[str, list[float]] = {}
    for name, way in ways.items():
        if fits(way, device):
            times[name] = []
    for turn in range(turns):
        for name in list(times) if turn % 2 == 0 else reversed(times):  # nobody always follows the same neighbour
            times[name].append(_call_ms(ways[name], device, calls))
    return times


def fits(way: Callable[[], object], device: torch.device) -> bool:
    """Whether one call gets through without running out of memory; what it held is free again."""
    try:
        _call_ms(way, device, calls=1)
    except torch.OutOfMemoryError:
        pass  # the traceback holds the call's tensors until here
    else:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return False


def median(values: list[float]) -> dict[str, float]:
    """The middle one and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low_quartile": low, "high_quartile": high}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Of the two times of each turn: a median of ratios, not a ratio of medians."""
    return median([a / b for a, b in zip(slow, fast, strict=True)])


def _call_ms(way: Callable[[], object], device: torch.device, calls: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        way()
    _wait(device)
    return (time.perf_counter() - start) / calls * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
