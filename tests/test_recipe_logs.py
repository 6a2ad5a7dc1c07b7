"""What a run of recipes/grpo.py leaves to look at: samples, best checkpoint, trace, report; and evaluation only."""

from __future__ import annotations

import gzip
import json
import signal
import sys
from pathlib import Path

import pytest
from recipe_runs import DIFFERENT, SMALL, TINY, make, train

from flexpg.training.checkpoints import checkpoints
from flexpg.training.samples_log import read_samples
from recipes.grpo import GRPORecipe, recipe_main

pytestmark = pytest.mark.slow

OPTIONS = [
    *SMALL,
    DIFFERENT,
    "sampling.max_new_tokens=8",
    "num_steps=3",
    "eval_every_n_steps=1",
    "log_samples_every_n_steps=2",
]
OPTIONS += [
    "rewards.correct._component_=recipe_runs.spread_reward",
    "keep_best_checkpoint=true",
    "keep_last_n_checkpoints=1",
]
PROFILER = [
    f"profiler.{option}"
    for option in ("enabled=true", "cuda=false", "xpu=false", "wait_steps=0", "warmup_steps=1", "active_steps=1")
]
ACCURACIES = {0: 0.25, 1: 0.75, 2: 0.5, 3: 0.75}


def make_run(output_dir: Path, *options: str) -> GRPORecipe:
    run = make(output_dir, *OPTIONS, *options)
    run.evaluate = lambda: run.accuracies.update({run.steps_done: ACCURACIES[run.steps_done]})
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[GRPORecipe]:
    """A run that is stopped after its second step, and the run that resumes it."""
    output_dir = tmp_path_factory.mktemp("watched")
    stopped = make_run(output_dir, *PROFILER, "profiler.num_cycles=1")
    log = stopped.log
    stopped.log = lambda metrics: log(metrics) or (stopped.steps_done == 2 and stopped.stop.request(signal.SIGTERM))
    train(stopped).report()
    (output_dir / "reward.png").rename(output_dir / "stopped.png")
    samples = output_dir / "samples.jsonl"
    with samples.open("r+") as file:  # as if it had been killed after step 3
        file.writelines([line.replace('"step": 2', '"step": 3') for line in file if '"step": 2' in line])
    resumed = train(make_run(output_dir, "resume=true"))
    resumed.report()
    return [stopped, resumed]


def test_samples_have_the_steps_of_both_runs_once_and_their_advantages(runs):
    samples = read_samples(runs[1].output_dir / "samples.jsonl")
    assert [sample.step for sample in samples] == [1] * 4 + [2] * 4
    assert any(sample.advantage for sample in samples)
    for best, worst in zip(samples[::2], samples[1::2], strict=True):
        assert best.prompt == worst.prompt and best.completion_tokens <= 8
        assert best.reward == best.rewards["correct"] >= worst.reward
        assert (best.advantage > 0 > worst.advantage) if best.reward > worst.reward else best.advantage == 0


def test_stopped_run_plots_the_reward_next_to_its_report(runs):
    for name in ("stopped.png", "reward.png"):
        assert (runs[0].output_dir / name).read_bytes().startswith(b"\x89PNG"), name


def test_best_checkpoint_is_kept_and_a_tie_does_not_replace_it(runs):
    folder = runs[1].checkpoint_dir
    assert [path.name for path in checkpoints(folder)] == ["step_000001", "step_000002"]  # of the stop: step 2
    assert (folder / "best.txt").read_text() == "step_000001\n"
    assert runs[1].is_finished() and runs[1].accuracies == ACCURACIES


def test_profiler_writes_a_trace_of_the_active_step(runs):
    (trace,) = runs[0].output_dir.glob("profiler/iteration_*/*.pt.trace.json.gz")
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "ProfilerStep#1" in names and any("Backward" in str(name) for name in names)


def test_report_covers_the_resumed_run(runs):
    page = (runs[1].output_dir / "report.html").read_text()
    assert "finished after step 3 of 3" in page and "<h3>Step 2</h3>" in page and page.count("<svg") >= 5


def test_seconds_of_rewards_and_sampling_are_separate(runs):
    for metrics in runs[1].history:
        assert metrics["sample_s"] > metrics["reward_s"] > 0
        assert metrics["sampled_tokens_per_s"] == metrics["sampled_tokens"] / metrics["sample_s"]
        assert metrics["sampled_tokens"] == 8 * metrics["completion_tokens"]


def files(folder: Path) -> dict[str, int]:
    found = (path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in found}


def logged_evaluations(folder: Path) -> int:
    return sum(path.read_text().count("held_out_accuracy:") for path in folder.glob("logs/*"))


@pytest.mark.parametrize("resume", ["true", "false"])
def test_eval_only_prints_the_accuracy_and_changes_no_file(runs, resume, monkeypatch, capsys):
    output_dir = runs[1].output_dir
    before, logged = files(output_dir), logged_evaluations(output_dir)
    options = [*OPTIONS, "eval_only=true", f"resume={resume}", "test_problems.size=2", f"output_dir={output_dir}"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--config", TINY, *options])
    recipe_main()  # does not exit with another status than 0
    out = capsys.readouterr().out
    assert f"step    {2 * (resume == 'true')}  held-out accuracy 0." in out
    assert "reward" not in out  # which would be that of the checkpoint's run
    assert files(output_dir) == before
    assert logged_evaluations(output_dir) == logged + 1


def test_eval_only_of_a_checkpoint_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume must be false with eval_only, got true without a checkpoint in"):
        make(tmp_path, *SMALL, "eval_only=true", "resume=true")
