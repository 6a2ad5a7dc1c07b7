"""Tests of recipes/grpo.py on several ranks: equal updates on any world size, errors on one rank, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes, start_command, wait_until
from recipe_runs import AGAIN, DIFFERENT, LORA, ROOT, SHORT, SMALL, TINY, flat, make, nan_gradient, newest, train
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtune._cli import tune
from transformers import AutoModelForCausalLM

import recipes.grpo
from flexpg.training.checkpoints import checkpoints
from flexpg.training.config import SETUP_ERRORS
from flexpg.training.models import GATHER

pytestmark = pytest.mark.distributed

OPTIONS = (*SMALL, *SHORT, "prompts_per_step=8", "test_problems.size=6", "num_steps=2")
KEPT = ("reward", "loss", "grad_norm", "entropy", "tokens_baseline")  # metrics that do not depend on time and ranks


def train_on_rank(rank: int, output_dir: Path, options: list[str]) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """Return metrics, the full model's weights on rank 0, and accuracies."""
    run = make(output_dir, *OPTIONS, *options)
    run.train()
    weights = get_model_state_dict(run.model, options=GATHER)
    run.save_checkpoint()
    run.cleanup()
    return run.history, weights, run.accuracies


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    a, b = (flat(weights[name] for name in sorted(theirs)) for weights in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


UPDATES = {
    "every option": (
        4,
        ["minibatches=2", "loss.beta=0.1", "loss.loss_type=grpo", "max_tokens=328", DIFFERENT, "num_steps=1"],
    ),
    "lora": (2, [*LORA, "loss.beta=0.1", "num_iterations=2", "activation_checkpointing=true", "max_resamplings=1"]),
    "environment": (2, [*AGAIN, "kl_in_reward=0.1", "max_resamplings=1", "loss.beta=0.1", "num_steps=1"]),
    "context parallel": (
        4,
        ["minibatches=2", "loss.beta=0.1", "kl_in_reward=0.1", "max_tokens=328", DIFFERENT, "num_steps=1"],
    ),
}
OF_RANKS = {"context parallel": ["context_parallel=2"]}  # options of several ranks only


@pytest.mark.parametrize("update", UPDATES)
def test_fsdp_update_is_the_same_on_any_world_size(tmp_path, update):
    """With max_tokens=328 groups are oversized: cached prompts, of which every rank must have equally many."""
    world_size, options = UPDATES[update]
    of_ranks = {1: options, world_size: [*options, *OF_RANKS.get(update, [])]}
    runs = [run_processes(size, train_on_rank, tmp_path / str(size), extra)[0] for size, extra in of_ranks.items()]
    (history, weights, accuracies), (other_history, other_weights, other_accuracies) = runs
    start = make(tmp_path / "start", *OPTIONS, *options).model.state_dict()
    assert relative_difference(start, weights) > 1e-4
    assert relative_difference(other_weights, weights) < 1e-5
    assert other_accuracies == accuracies
    for ours, theirs in zip(other_history, history, strict=True):
        for name in ("reward", "reward_std", "completion_tokens", "truncated", "tokens_baseline"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
        for name in ("loss", "grad_norm", "entropy", "ratio", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def learn(rank: int, output_dir: Path) -> dict[int, float]:
    options = ("num_steps=10", "eval_every_n_steps=10", "test_problems.size=64")
    run = train(make(output_dir, *options, config="recipes/configs/tiny_lora_cpu.yaml"))
    run.cleanup()
    return run.accuracies


def test_ten_steps_of_lora_raise_accuracy_from_below_a_half_to_over_0_9(tmp_path):
    (accuracies,) = run_processes(1, learn, tmp_path)
    assert accuracies[0] < 0.5
    assert accuracies[10] > 0.9


def setup_errors(rank: int, output_dir: Path, options: list[str]) -> list[str]:
    messages = []
    for option in options:
        with pytest.raises(SETUP_ERRORS) as error:
            make(output_dir, *OPTIONS, option)
        messages.append(str(error.value))
    return messages


SETUP_MISTAKES = {
    "minibatches=8": "at least one prompt per rank in each, got 8 in 8 on 2 ranks",
    "context_parallel=3": "context_parallel must divide the number of ranks, 2, got 3",
    "test_problems.size=1": "test_problems must have at least 2 problems, got 1",
}


def test_more_ranks_than_prompts_or_test_problems_are_refused(tmp_path):
    first, second = run_processes(2, setup_errors, tmp_path, list(SETUP_MISTAKES))
    assert first == second
    for message, expected in zip(first, SETUP_MISTAKES.values(), strict=True):
        assert expected in message


def check_and_train(rank: int, output_dir: Path, *options: str) -> Any:
    run = make(output_dir, *OPTIONS, "max_tokens=600", "num_steps=1", *options)
    run.train()
    run.cleanup()
    return run.history[0]["loss"], run.history[0]["self_check_s"] > 0


@pytest.mark.parametrize("context", [1, 2])
def test_self_check_does_not_change_a_step_of_several_ranks(tmp_path, context):
    found = [
        run_processes(2, check_and_train, tmp_path / checked, f"self_check={checked}", f"context_parallel={context}")
        for checked in ("true", "false")
    ]
    losses, is_checked = zip(*[zip(*by_rank, strict=True) for by_rank in found], strict=True)
    assert losses[0] == losses[1] and is_checked == ((True, True), (False, False))


def abort(rank: int, output_dir: Path) -> tuple[str, bool, list[str]]:
    """Train with a NaN gradient on rank 1 only; return the error, whether weights changed, and the dumped files."""
    run = make(output_dir, *OPTIONS)
    before = [parameter.full_tensor().clone() for parameter in run.trained]
    if rank == 1:
        run.loss = nan_gradient(run.loss)
    with pytest.raises(FloatingPointError) as caught:
        run.train()
    is_changed = any(not torch.equal(a, b.full_tensor()) for a, b in zip(before, run.trained, strict=True))
    run.world.barrier()
    run.cleanup()
    return str(caught.value), is_changed, sorted(path.name for path in output_dir.glob("nonfinite/rank_*"))


def test_nan_on_one_rank_aborts_all_before_the_optimizer_step(tmp_path):
    for message, is_changed, files in run_processes(2, abort, tmp_path):
        assert message.startswith("step 1: loss ") and "gradient norm nan, first in the gradient of " in message
        assert not is_changed
        assert files == ["rank_0.pt", "rank_1.pt"]


def logged_metrics(output_dir: Path) -> list[dict[str, float]]:
    lines = max((output_dir / "logs").iterdir(), key=os.path.getmtime).read_text().splitlines()
    steps = [dict(pair.split(":") for pair in line.split(" | ")[1].split()) for line in lines if " loss:" in line]
    return [{name: float(step[name]) for name in KEPT} for step in steps]


def test_two_nodes_give_the_update_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests:{ROOT}")  # of the launched processes
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "flexpg"]
    nodes += ["--rdzv_endpoint", f"localhost:{port}"]
    command = ["run", *nodes, "recipes/grpo.py", "--config", TINY, *OPTIONS, f"output_dir={tmp_path / 'nodes'}"]
    files = [tmp_path / f"{n}.txt" for n in range(2)]
    launchers = [start_command(tune.main, command, file) for file in files]
    for launcher in launchers:
        launcher.join(240)
    outputs = [file.read_text() for file in files]
    assert [launcher.exitcode for launcher in launchers] == [0, 0], "\n".join(outputs)
    assert sum("held-out accuracy" in output for output in outputs) == 1  # only rank 0 prints
    single = train(make(tmp_path / "single", *OPTIONS))
    for metrics, expected in zip(logged_metrics(tmp_path / "nodes"), single.history, strict=True):
        assert metrics == pytest.approx({name: expected[name] for name in KEPT}, rel=1e-5, abs=1e-7)


LONG = [*OPTIONS, "num_steps=4", "eval_every_n_steps=2", "checkpoint_every_n_steps=1", "num_iterations=2"]


def train_until_killed(rank: int, output_dir: Path) -> None:
    def kill() -> None:
        while not newest(output_dir):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    make(output_dir, *LONG).train()


@pytest.mark.proof
def test_run_killed_on_two_ranks_and_resumed_on_one_takes_the_same_steps(tmp_path):
    uninterrupted = train(make(tmp_path / "uninterrupted", *LONG, "checkpoint_every_n_steps=0"))
    with pytest.raises(RuntimeError, match=f"died with exit code -{signal.SIGKILL:d}"):
        run_processes(2, train_until_killed, tmp_path / "killed")
    assert 1 <= newest(tmp_path / "killed") < 4
    options = ["--config", TINY, *LONG, f"output_dir={tmp_path / 'killed'}", "resume=true"]
    run = start_command(recipes.grpo.recipe_main, options, tmp_path / "resumed.txt")
    run.join(240)
    printed = (tmp_path / "resumed.txt").read_text()
    assert run.exitcode == 0 and "resuming after step" in printed, printed
    assert f"step    4  held-out accuracy {uninterrupted.accuracies[4]:.3f}" in printed
    progress = json.loads((checkpoints(tmp_path / "killed/checkpoints")[-1] / "progress.json").read_text())
    for ours, theirs in zip(progress["history"], uninterrupted.history, strict=True):
        for name in (*KEPT, "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("number", "every", "status", "weights"),
    [(signal.SIGTERM, 0, 143, "every_checkpoint"), (signal.SIGINT, 500, 130, "end")],
    ids=["SIGTERM", "SIGINT"],
)
def test_signal_saves_a_checkpoint_and_exits_with_its_status(tmp_path, number, every, status, weights):
    options = ["--config", TINY, *OPTIONS, f"output_dir={tmp_path}", "num_steps=1000", f"save_weights={weights}"]
    printed = tmp_path / "printed.txt"
    run = start_command(recipes.grpo.recipe_main, [*options, f"checkpoint_every_n_steps={every}"], printed)
    wait_until(lambda: any("loss:" in log.read_text() for log in tmp_path.glob("logs/*")), run, printed)
    os.kill(run.pid, number)
    run.join(60)
    assert run.exitcode == status, printed.read_text()
    step = newest(tmp_path)
    assert step >= 1
    assert f"stopped after step {step} of 1000; resume=true continues from there" in printed.read_text()
    assert f"stopped after step {step} of 1000" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "epoch_0").exists()  # this is written at the end of a run
    saved = checkpoints(tmp_path / "checkpoints")[-1] / "epoch_0"
    if weights == "every_checkpoint":
        trained = torch.load(saved.parent / "state.pt", weights_only=True)["model"]
        embedding = AutoModelForCausalLM.from_pretrained(saved).get_input_embeddings().weight
        assert torch.equal(embedding, trained["tok_embeddings.weight"])
    else:
        assert not saved.exists()
