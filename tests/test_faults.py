"""Fault injection: killed runs that are resumed, crashed ranks, and disks that are full at the end of a run."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
import zlib
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from launcher import Launched
from processes import run_processes, start_command, wait_until
from recipe_runs import DIFFERENT, LORA, ROOT, SMALL, TINY, make, newest

from flexpg.training.checkpoints import CheckpointError, checkpoints, read_progress
from recipes.grpo import recipe_main

pytestmark = pytest.mark.distributed


# A full disk at the end of a run.


def contents(folder: Path) -> dict[str, int]:
    """Return checksums of all saved weights, and of what a failed save left."""
    files = [file for part in ("epoch_0", "adapter", "unfinished") for file in (folder / part).rglob("*")]
    return {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in files if file.is_file()}


def save_on_a_full_disk(rank: int, folder: Path, options: tuple[str, ...], max_bytes: int) -> str:
    """Return the error of saving on a full disk; with space again, new weights replace the old ones and leftovers."""
    run = make(folder, *SMALL, *options)
    run.save_checkpoint()
    before = contents(folder)
    with torch.no_grad():
        for parameter in run.trained:
            parameter.add_(1.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limit[1]))
    with pytest.raises(CheckpointError) as caught:
        run.save_checkpoint()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(folder) == before
    for leftover in (folder / "epoch_0/other.safetensors", folder / "unfinished/epoch_0/config.json"):
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_text("half")
    run.save_checkpoint()
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert after.keys() == before.keys()
    assert changed and all(name.endswith((".safetensors", ".pt")) for name in changed)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "max_bytes"), [((), 10_000), (LORA, 10_000), (LORA, 1_500_000)], ids=["model", "adapters", "merged"]
)
def test_full_disk_while_saving_weights_keeps_the_earlier_ones(tmp_path, options, max_bytes):
    (message,) = run_processes(1, save_on_a_full_disk, tmp_path, options, max_bytes)
    assert message.startswith(f"the trained weights could not be written to {tmp_path}/epoch_0: ")
    saved = "the run is saved: free disk space, or put missing files back, and run again with resume=true"
    lost = f"the checkpoint {tmp_path}/checkpoints/step_000000 could not be saved: .*; there is none before it; free .*"
    assert re.search(f"; ({saved}|{lost})$", message) and "\n" not in message
    assert message.endswith(saved) == (max_bytes > 1_000_000)  # the checkpoint of adapters is smaller


# Crashed ranks under torch's launcher.

FUNCTIONS = """
import os
from flexpg.training.tasks import arithmetic, arithmetic_reward

def reward(completion, answer):
    if os.environ["RANK"] == "1":
        raise LookupError("the judge does not answer")
    return arithmetic_reward(completion, answer)

def problems(**kwargs):
    if os.environ["RANK"] == "1":
        open("/no/such/file.jsonl")
    return arithmetic(**kwargs)
"""
CRASH = r"Root Cause .*\n\[0\]:\n(.*\n)* +rank +: 1 .*\n +exitcode +: -9 .*\n(.*\n)* +traceback : Signal 9 \(SIGKILL\)"


@pytest.mark.parametrize("is_other_stopped", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_killed_rank_is_named_and_ends_the_others(tmp_path, is_other_stopped):
    """A stopped rank, like a rank that is blocked in an NCCL collective, is ended by the launcher after 30 seconds."""
    run = Launched(tmp_path)
    run.wait_until(run.has_trained)
    if is_other_stopped:
        os.kill(run.workers[0], signal.SIGSTOP)
    os.kill(run.workers[1], signal.SIGKILL)
    printed = run.wait_for_failure()
    assert re.search(CRASH, printed), printed


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("rewards.correct._component_=of_a_test.reward", r"LookupError: the judge does not answer"),
        pytest.param(
            "train_problems._component_=of_a_test.problems",
            r"error: train_problems: .*/no/such/file\.jsonl",
            marks=pytest.mark.proof,  # the launcher does the same
        ),
    ],
    ids=["reward", "setup"],
)
def test_error_on_one_rank_is_shown_and_ends_the_others(tmp_path, monkeypatch, override, error):
    (tmp_path / "of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    assert re.search(error, Launched(tmp_path, override).wait_for_failure())


# SIGKILL at any moment, and resumption.

TINIEST = (
    *(*SMALL, DIFFERENT, "sampling.max_new_tokens=8", "train_problems.size=16", "test_problems.size=2"),
    *("eval_every_n_steps=100000", "optimizer.lr=1e-3", "rewards.correct._component_=recipe_runs.spread_reward"),
)
INTERVAL = 2  # steps between checkpoints


def start_run(folder: Path, *overrides: str) -> BaseProcess:
    options = ["--config", TINY, *TINIEST, f"output_dir={folder}", *overrides]
    return start_command(recipe_main, options, folder / "printed.txt")


def last_logged_step(folder: Path) -> int:
    text = "".join(log.read_text() for log in (folder / "logs").glob("*"))
    return max(map(int, re.findall(r"^Step (\d+) \| .* loss:", text, re.MULTILINE)), default=0)


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("*.unfinished"))


def resume_and_kill(folder: Path, moment: str, rng: random.Random) -> None:
    """Kill a resumed run at any moment, within a step, or while it writes a checkpoint; it loses one interval."""
    before, printed = newest(folder), folder / "printed.txt"
    run = start_run(folder, "num_steps=100000", f"checkpoint_every_n_steps={INTERVAL}", "resume=true")
    if moment == "step":
        wait_until(lambda: last_logged_step(folder) > before, run, printed)
    if moment == "checkpoint":
        wait_until(lambda: newest(folder) > before, run, printed)  # so that leftovers are this run's
        while not unfinished(folder):
            assert run.is_alive()
    time.sleep(rng.uniform(0, {"any": 4.0, "step": 1.0, "checkpoint": 0.05}[moment]))
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert before <= newest(folder) and last_logged_step(folder) - newest(folder) <= INTERVAL
    assert f"resuming after step {before}" in printed.read_text() or "resuming" not in printed.read_text()


def metrics(folder: Path) -> list[dict[str, float]]:
    history = read_progress(checkpoints(folder / "checkpoints")[-1])["history"]
    names = ("reward", "loss", "grad_norm", "entropy", "tokens_encoded", "lr")
    return [{name: step[name] for name in names} for step in history]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.proof)])
def test_run_killed_and_resumed_is_bitwise_identical(tmp_path, kills):
    rng, killed, uninterrupted, halves = random.Random(kills), tmp_path / "killed", tmp_path / "uninterrupted", 0
    killed.mkdir()
    uninterrupted.mkdir()
    for n in range(kills):
        resume_and_kill(killed, ["checkpoint", "step", "any"][n % 3], rng)
        halves += bool(unfinished(killed))
    assert halves >= kills // 10 + 1  # some kills hit a checkpoint that was being written
    steps = newest(killed) + 2 * INTERVAL
    runs = {
        killed: start_run(killed, f"num_steps={steps}", "resume=true", f"checkpoint_every_n_steps={INTERVAL}"),
        uninterrupted: start_run(uninterrupted, f"num_steps={steps}", f"checkpoint_every_n_steps={steps}"),
    }
    for folder, run in runs.items():
        run.join(300)
        assert run.exitcode == 0, (folder / "printed.txt").read_text()
    assert not unfinished(killed)
    assert len(metrics(killed)) == steps and metrics(killed) == metrics(uninterrupted)
    assert sum(step["grad_norm"] > 0 for step in metrics(killed)) > steps / 2  # something was learned
    ours, theirs = (next((folder / "epoch_0").glob("*.safetensors")).read_bytes() for folder in runs)
    assert ours == theirs
