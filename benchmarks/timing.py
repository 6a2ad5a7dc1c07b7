"""Paired timing: implementations of one computation alternate in one process, so that other load affects all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = Mapping[str, list[float]]  # by implementation, of each repeat


def alternate(
    implementations: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Return the milliseconds of a call of each implementation, repeat by repeat, after a warm-up call.

    An implementation that runs out of memory in the warm-up is left out.

    Args:
        implementations: Functions without arguments.
        repeats: How often each is timed; the order is reversed from one repeat to the next.
        device: Synchronized before the clock is read.
        calls: Calls per repeat, of which the mean is taken.
    """
    times: dict[str, list[float]] = {name: [] for name, call in implementations.items() if fits(call, device)}
    for repeat in range(repeats):
        for name in list(times) if repeat % 2 == 0 else reversed(times):
            times[name].append(call_ms(implementations[name], device, calls))
    return times


def fits(call: Callable[[], object], device: torch.device) -> bool:
    """Return whether a call runs without running out of memory; what it allocated is freed."""
    try:
        call_ms(call, device)
    except torch.OutOfMemoryError:
        pass  # the traceback holds the call's tensors until here
    else:
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return False


def call_ms(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean milliseconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low_quartile": low, "high_quartile": high}


def paired_ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Return the median of the repeats' ratios, which is not the ratio of the medians."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])
