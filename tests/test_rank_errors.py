"""Errors of one rank while it samples or scores: all ranks save together, and a resumed run takes the same steps."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import Launched
from processes import run_processes
from recipe_runs import AGAIN, ROOT, SHORT, SMALL, TINY, Again, make, newest, spread_reward
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from flexpg.training.models import GATHER
from flexpg.training.tasks import Problem

pytestmark = pytest.mark.distributed

KEPT = ("reward", "loss", "grad_norm", "entropy", "completion_tokens", "lr")
OPTIONS = (*SMALL, *SHORT, "test_problems.size=2", "num_steps=3", "optimizer.lr=0.001")
SETUPS = {
    "environment": (TINY, [*AGAIN, "environment._component_=test_rank_errors.Shop"]),
    "reward": (TINY, ["rewards.correct._component_=test_rank_errors.reward", "sampling.temperature=1.3"]),
    "engine": (
        "recipes/configs/tiny_transformers_cpu.yaml",
        [
            *("sampler._component_=engines.BrokenEngine", "sampler.path=recipes/assets/tiny"),
            "sampler.is_shared=false",
        ],
    ),
}
EPISODES = 1 + 4  # of each rank: of the evaluation before training, and of a step


class Shop(Again):
    """An environment that raises or exits on rank 1, in the second turn of episodes from a number on."""

    episodes = 0

    def __init__(self, problem: Problem, fails_at: int = 0, exits: bool = False) -> None:
        super().__init__(problem)
        Shop.episodes += 1
        self.is_broken = os.environ["RANK"] == "1" and 0 < fails_at <= Shop.episodes
        self.exits = exits

    def step(self, messages: list) -> tuple[list, float]:
        if self.is_broken and len(messages) > 2:
            if self.exits:
                os._exit(7)
            raise LookupError("no such shop")
        return super().step(messages)


def reward(completion: str, answer: str, trainer_state: Any, fails_at: int = -1) -> float:
    if os.environ["RANK"] == "1" and trainer_state.global_step == fails_at:
        raise ZeroDivisionError("the judge does not answer")
    return spread_reward(completion, answer)


def fail(rank: int, output_dir: Path, config: str, options: list[str]) -> tuple[str, str]:
    """Return the error of a run."""
    run = make(output_dir, *OPTIONS, *options, config=config)
    run.plot = lambda rollouts: None
    with pytest.raises(Exception) as caught:
        run.train()
    return caught.typename, str(caught.value)


def finish(rank: int, output_dir: Path, config: str, options: list[str]) -> Any:
    """Return the metrics of all steps, the weights on rank 0, and accuracies."""
    run = make(output_dir, *OPTIONS, *options, config=config)
    run.plot = lambda rollouts: None
    run.train()
    weights = get_model_state_dict(run.model, options=GATHER)
    run.cleanup()
    return [[metrics[name] for name in KEPT] for metrics in run.history], weights, run.accuracies


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that returns what `finish` returns on two ranks; every setup runs once."""
    found = {}

    def run(setup: str) -> Any:
        if setup not in found:
            found[setup] = run_processes(2, finish, tmp_path_factory.mktemp(setup), *SETUPS[setup])[0]
        return found[setup]

    return run


def assert_same_steps(output_dir: Path, setup: str, whole: Any) -> None:
    """Resume a run on two ranks, and compare it with an uninterrupted one."""
    config, options = SETUPS[setup]
    history, weights, accuracies = run_processes(2, finish, output_dir, config, [*options, "resume=true"])[0]
    assert history == whole[0] and accuracies == whole[2]
    assert sum(step[KEPT.index("grad_norm")] > 0 for step in history) > 1
    assert weights.keys() == whole[1].keys() and len(weights) > 0
    assert all(torch.equal(weights[name], whole[1][name]) for name in weights)


FAULTS = {  # the setup, options, step of the checkpoint, type of the error, message
    "environment": ("environment", [f"environment.fails_at={EPISODES + 1}"], 1, "LookupError", "no such shop"),
    "evaluation": ("environment", ["environment.fails_at=1"], 0, "LookupError", "no such shop"),
    "reward": ("reward", ["rewards.correct.fails_at=2"], 2, "ZeroDivisionError", "the judge does not answer"),
    # Calls of `sample`: the check of the first weights, an evaluation, step 1, the check of its weights.
    "engine": (
        "engine",
        ["sampler.broken_call=4", "sampler.rank=1"],
        1,
        "ConnectionError",
        "the engine at localhost:8000 does not answer",
    ),
    "weights": (
        "engine",
        ["sampler.broken_version=2", "sampler.rank=1"],
        2,
        "RuntimeError",
        "the engine refuses these weights",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_error_of_one_rank_saves_on_all_and_resumes_to_the_same_steps(tmp_path, uninterrupted, fault):
    setup, options, step, kind, message = FAULTS[fault]
    config, given = SETUPS[setup]
    other, failed = run_processes(2, fail, tmp_path, config, [*given, *options], timeout_s=90)
    assert failed == (kind, message)
    assert other[0] == "RankError" and message in other[1] and "rank 1 of 2" in other[1], other
    if step:
        assert (tmp_path / f"checkpoints/step_{step:06d}").exists() and newest(tmp_path) == step
    else:  # nothing is done, so the run starts again
        assert not (tmp_path / "checkpoints").exists()
    assert_same_steps(tmp_path, setup, uninterrupted(setup))


def test_rank_that_exits_while_it_samples_ends_all_and_the_run_resumes(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests:{ROOT}")
    options = [*SETUPS["environment"][1], f"environment.fails_at={EPISODES + 1}", "environment.exits=true"]
    run = Launched(tmp_path, *OPTIONS, *options, "checkpoint_every_n_steps=1")
    printed = run.wait_for_failure()
    assert re.search(r"Root Cause .*\n\[0\]:\n(.*\n)* +rank +: 1 .*\n +exitcode +: 7 ", printed), printed
    assert newest(tmp_path / "out") == 1
    assert_same_steps(tmp_path / "out", "environment", uninterrupted("environment"))
