"""500 steps of the recipe: memory stays flat, nothing is compiled again, and the last steps take no longer."""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path

import pytest
from processes import run_processes
from torch._dynamo.utils import counters

from benchmarks.sharing import recipe

ROOT = Path(__file__).parent.parent
STEPS, WARM = 500, 100  # all lengths of rows have been seen after some steps
# The policy stays as it is, so that every step has as much to do as any other.
OPTIONS = [
    *("prompts_per_step=2", "group_size=2", "minibatches=2", "loss.beta=0.01", "compile=true"),
    *("sampling.max_new_tokens=12", "max_tokens=400", "max_cache_tokens=4096"),
    *("optimizer.lr=0.0", "train_problems.size=64", "test_problems.size=8", f"num_steps={STEPS}"),
    *("eval_every_n_steps=50", "checkpoint_every_n_steps=50"),
]


def watched(rank: int, output_dir: str) -> list[tuple[float, int, int]]:
    """Of every step the seconds of the processor, the process's bytes in memory, and the graphs compiled so far."""
    run = recipe("recipes/configs/tiny_cpu.yaml", True, Path(output_dir), OPTIONS)
    found, step = [], run.step

    def watched_step(number: int) -> dict[str, float] | None:
        started = time.process_time()
        metrics = step(number)
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        found.append((time.process_time() - started, held, counters["stats"]["unique_graphs"]))
        return metrics

    run.step = watched_step
    run.train()
    run.cleanup()
    return found


@pytest.mark.proof
def test_500_steps_take_no_more_memory_graphs_or_time_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ((seconds, held, graphs),) = (
        zip(*own, strict=True) for own in run_processes(1, watched, str(tmp_path), timeout_s=1200)
    )
    assert len(seconds) == STEPS
    early, late = slice(WARM, 2 * WARM), slice(STEPS - WARM, STEPS)
    growth = statistics.median(held[late]) / statistics.median(held[early])
    slower = statistics.median(seconds[late]) / statistics.median(seconds[early])
    print(f"memory {growth:.4f}, seconds {slower:.4f}, graphs {graphs[WARM]} and {graphs[-1]}")
    assert growth < 1.02
    assert graphs[WARM] == graphs[-1] > 0
    assert slower < 1.05
