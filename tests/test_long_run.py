"""500 steps of the recipe: memory stays flat, nothing is compiled again, and the last steps take no longer."""

from __future__ import annotations

import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
from processes import run_processes
from recipe_runs import make, train
from torch._dynamo.utils import counters

STEPS, WARMUP = 500, 100  # after some steps, all lengths have occurred
# The policy does not change, so that every step has as much to do as any other.
OPTIONS = [
    *("prompts_per_step=2", "group_size=2", "minibatches=2", "loss.beta=0.01", "compile=true"),
    *("sampling.max_new_tokens=12", "max_tokens=400", "max_cache_tokens=4096"),
    *("optimizer.lr=0.0", "train_problems.size=64", "test_problems.size=8", f"num_steps={STEPS}"),
    *("eval_every_n_steps=50", "checkpoint_every_n_steps=50"),
]


def monitor(rank: int, output_dir: Path) -> list[tuple[float, int, int]]:
    """Return the CPU time since the start, the resident bytes and the number of compiled graphs after every step."""
    run = make(output_dir, *OPTIONS)
    found, log = [], run.log

    def log_and_measure(metrics: dict[str, float]) -> None:
        log(metrics)
        used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        found.append((time.process_time(), used, counters["stats"]["unique_graphs"]))

    run.log = log_and_measure
    train(run).cleanup()
    return found


@pytest.mark.proof
def test_500_steps_need_no_more_memory_graphs_or_time_at_the_end(tmp_path):
    (found,) = run_processes(1, monitor, tmp_path, timeout_s=1200)
    times, used, graphs = zip(*found, strict=True)
    seconds = [after - before for before, after in pairwise(times)]
    assert len(times) == STEPS
    early, late = slice(WARMUP, 2 * WARMUP), slice(STEPS - WARMUP, STEPS)
    growth = statistics.median(used[late]) / statistics.median(used[early])
    slowdown = statistics.median(seconds[late]) / statistics.median(seconds[early])
    print(f"memory {growth:.4f}, seconds {slowdown:.4f}, graphs {graphs[WARMUP]} and {graphs[-1]}")
    assert growth < 1.02
    assert graphs[WARMUP] == graphs[-1] > 0
    assert slowdown < 1.05
