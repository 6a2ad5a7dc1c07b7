"""The recipe on several processes: the same update on any number of them, and a run that is killed loses nothing."""

import json
import os
import signal
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtune._cli import tune

from benchmarks.sharing import recipe
from flexpg.training.checkpoints import checkpoints
from flexpg.training.models import WHOLE
from recipes.grpo import SETUP_ERRORS, recipe_main
from tests.processes import run_processes, start_command
from tests.test_recipe import LORA, TINY

pytestmark = pytest.mark.machines

ROOT = Path(__file__).parent.parent
SMALL = ["prompts_per_step=8", "group_size=4", "train_problems.size=64", "test_problems.size=6", "num_steps=2"]
LORA_CONFIG = "recipes/configs/tiny_lora_cpu.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def trained(rank: int, output_dir: str, overrides: list[str]) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """The recipe's steps in one of several processes: metrics, the whole model's weights, and accuracies."""
    run = recipe(TINY, True, Path(output_dir), [*SMALL, *overrides])
    run.train()
    weights = get_model_state_dict(run.model, options=WHOLE)
    run.save_checkpoint()
    run.cleanup()
    return run.history, weights, run.accuracies


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([weights[name].flatten() for name in sorted(theirs)]) for weights in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


COUNTS = {"every option": 4, "LoRA": 2}
OPTIONS = {
    "every option": [
        *("minibatches=2", "loss.beta=0.1", "loss.loss_type=grpo"),
        *("max_tokens=352", "sampling.temperature=2.0", "num_steps=1"),  # groups over the budget
    ],
    "LoRA": [*LORA, "loss.beta=0.1", "num_iterations=2", "activation_checkpointing=true"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_any_number_of_processes_gives_the_same_update(tmp_path, options):
    """With max_tokens=352 groups are runs of micro-batches that share a prompt, alike in number on every process."""
    runs = [
        run_processes(count, trained, str(tmp_path / str(count)), OPTIONS[options])[0] for count in (1, COUNTS[options])
    ]
    (history, weights, accuracies), (other_history, other_weights, other_accuracies) = runs
    start = recipe(TINY, True, tmp_path / "start", [*SMALL, *OPTIONS[options]]).model.state_dict()
    assert relative_difference(start, weights) > 1e-4  # there was something to differ in
    assert relative_difference(other_weights, weights) < 1e-5
    assert other_accuracies == accuracies
    for ours, theirs in zip(other_history, history, strict=True):
        for name in ("reward", "reward_std", "completion_tokens", "truncated", "tokens_unshared"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
        for name in ("loss", "grad_norm", "entropy", "ratio", *(["kl"] if "kl" in theirs else [])):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def learned(rank: int, config: str, output_dir: str) -> dict[int, float]:
    """Held-out accuracy before and after ten steps."""
    overrides = ["num_steps=10", "eval_every_n_steps=10", "test_problems.size=64"]
    run = recipe(config, True, Path(output_dir), overrides)
    run.train()
    run.cleanup()
    return run.accuracies


def test_ten_steps_of_lora_lift_held_out_accuracy_from_under_a_half_to_over_nine_tenths(tmp_path):
    accuracies = run_processes(1, learned, LORA_CONFIG, str(tmp_path))[0]
    assert accuracies[0] < 0.5
    assert accuracies[10] > 0.9


def without_scaling(rank: int, output_dir: str) -> float:
    """The gradient's norm when each process normalizes by its own tokens, as if it were alone."""
    run = recipe(TINY, True, Path(output_dir), SMALL)
    update = run.update
    run.update = lambda batches, old, ref, normalizer, advantages: update(
        batches, old, ref, sum(batch.rollouts.trained.sum() for batch in batches), advantages
    )
    norm = run.step(1)["grad_norm"]
    run.cleanup()
    return norm


def test_a_normalizer_of_each_process_alone_would_give_another_update(tmp_path):
    right = recipe(TINY, True, tmp_path / "right", SMALL).step(1)["grad_norm"]
    wrong = run_processes(2, without_scaling, str(tmp_path / "wrong"))[0]
    assert abs(wrong / right - 1) > 0.1


def refused(rank: int, output_dir: str, overrides: list[str]) -> str:
    with pytest.raises(SETUP_ERRORS) as error:
        recipe(TINY, True, Path(output_dir), overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("minibatches=8", "prompts_per_step=8 in minibatches=8 on a world of 2: give a multiple"),
        ("test_problems.size=1", "test_problems has 1; this run needs 2 or more"),
    ],
)
def test_more_processes_than_groups_or_test_problems_are_refused(tmp_path, option, message):
    messages = run_processes(2, refused, str(tmp_path), [*SMALL, option])
    assert messages[0].startswith(message)
    assert messages[0] == messages[1]


def metrics_of(output_dir: Path) -> list[dict[str, float]]:
    """What a run's log says of its steps, without times."""
    lines = max((output_dir / "logs").iterdir(), key=os.path.getmtime).read_text().splitlines()
    steps = [dict(pair.split(":") for pair in line.split(" | ")[1].split()) for line in lines if " loss:" in line]
    kept = ("reward", "loss", "grad_norm", "entropy", "tokens_unshared")
    return [{name: float(step[name]) for name in kept} for step in steps]


def test_two_launchers_as_two_nodes_give_the_update_of_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "flexpg"]
    nodes += ["--rdzv_endpoint", f"localhost:{port}"]
    command = ["run", *nodes, "recipes/grpo.py", "--config", TINY, *SMALL, f"output_dir={tmp_path / 'nodes'}"]
    files = [tmp_path / f"{n}.txt" for n in range(2)]
    launchers = [start_command(tune.main, command, file) for file in files]
    for launcher in launchers:
        launcher.join(240)
    outputs = [file.read_text() for file in files]
    assert [launcher.exitcode for launcher in launchers] == [0, 0], "\n".join(outputs)
    assert sum("held-out accuracy" in output for output in outputs) == 1  # the first process alone speaks
    alone = recipe(TINY, True, tmp_path / "alone", SMALL)
    for step, metrics in enumerate(metrics_of(tmp_path / "nodes"), start=1):
        expected = alone.step(step)
        for name, value in metrics.items():
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


LONG = [*SMALL, "num_steps=4", "eval_every_n_steps=2", "checkpoint_every_n_steps=1", "num_iterations=2"]


def killed(rank: int, output_dir: str) -> None:
    """Trains, until a SIGKILL at some moment after the first checkpoint."""

    def kill() -> None:
        while not newest(Path(output_dir)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    recipe(TINY, True, Path(output_dir), LONG).train()


@pytest.mark.proof
def test_a_run_that_is_killed_and_resumed_ends_as_one_left_alone(tmp_path):
    """It is killed on two processes, and resumed on one."""
    alone = recipe(TINY, True, tmp_path / "alone", [*LONG, "checkpoint_every_n_steps=0"])
    alone.train()
    with pytest.raises(RuntimeError, match=f"died with exit code -{signal.SIGKILL:d}"):
        run_processes(2, killed, str(tmp_path / "killed"))
    assert 1 <= newest(tmp_path / "killed") < 4
    options = ["--config", TINY, *LONG, f"output_dir={tmp_path / 'killed'}", "resume=true"]
    run = start_command(recipe_main, options, tmp_path / "resumed.txt")
    run.join(240)
    printed = (tmp_path / "resumed.txt").read_text()
    assert run.exitcode == 0, printed
    assert "going on after step" in printed
    progress = json.loads((checkpoints(tmp_path / "killed/checkpoints")[-1] / "progress.json").read_text())
    assert dict(progress["accuracies"]) | {4: alone.accuracies[4]} == alone.accuracies  # it was saved before the last
    assert f"step    4  held-out accuracy {alone.accuracies[4]:.3f}" in printed
    for ours, theirs in zip(progress["history"], alone.history, strict=True):
        for name in ("reward", "loss", "grad_norm", "entropy", "tokens_unshared", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("number", "every"), [(signal.SIGTERM, 0), (signal.SIGINT, 500)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_ends_the_run(tmp_path, number, every):
    options = ["--config", TINY, *SMALL, f"output_dir={tmp_path}"]
    options += ["num_steps=1000", f"checkpoint_every_n_steps={every}"]
    file = tmp_path / "printed.txt"
    run = start_command(recipe_main, options, file)
    wait_until(lambda: any("loss:" in log.read_text() for log in tmp_path.glob("logs/*")), run, file)
    os.kill(run.pid, number)
    run.join(60)
    printed = file.read_text()
    assert run.exitcode == 0, printed
    step = newest(tmp_path)
    assert step >= 1
    assert f"stopped after step {step} of 1000; resume=true goes on from there" in printed
    assert not (tmp_path / "epoch_0").exists()  # weights are written when the run is done


def newest(output_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = checkpoints(output_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def wait_until(condition, run: BaseProcess, printed: Path, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert run.is_alive(), printed.read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
