"""What ends a run in the middle of training: it stops before it spoils anything, and says where to look."""

from __future__ import annotations

import math
import re
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run_processes, start_command
from torch import Tensor
from baseline import tiny_model

from benchmarks.sharing import recipe
from flexpg.losses import grpo_loss
from flexpg.training.failures import NotFinite, OutOfMemory, gradient_norms, within_memory
from flexpg.verify import SelfCheckError
from recipes.grpo import RUN_ERRORS, recipe_main

ROOT = Path(__file__).parent.parent
TINY = "recipes/configs/tiny_cpu.yaml"
SMALL = ["prompts_per_step=4", "group_size=4", "train_problems.size=64", "test_problems.size=8", "num_steps=3"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def nan_loss(*args, at: int, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's, but for one rollout's log-probability that is no number."""
    logprobs = args[0].clone()
    logprobs[at, 0] = math.nan
    return grpo_loss(logprobs, *args[1:], **kwargs)


def nan_gradient(*args, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss, with a term that is 0 and whose gradient is none."""
    loss, metrics = grpo_loss(*args, **kwargs)
    return loss + (0 * args[0].sum()).sqrt(), metrics


LOSSES = {
    "loss": (partial(nan_loss, at=2), "step 2: the loss is nan and the gradient's norm [0-9.]+, first in the loss"),
    "gradient": (nan_gradient, r"step 2: the loss is -?[0-9.]+ and the gradient's norm nan, first in the gradient of "),
}


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_that_are_none_stop_the_run_before_the_update_and_all_is_kept_to_look_at(tmp_path, name):
    run = recipe(TINY, True, tmp_path, SMALL)
    run.step(1)
    run.steps_done = 1
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    loss, words = LOSSES[name]
    run.loss = partial(loss, **run.loss.keywords)
    with pytest.raises(NotFinite, match=words) as caught:
        run.step(2)
    assert re.search(r"was not updated; .*not_finite holds its weights, and rank_0\.pt there", str(caught.value))
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(map(torch.equal, moments, (state["exp_avg"] for state in run.optimizer.state.values())))
    kept = torch.load(tmp_path / "not_finite/rank_0.pt", weights_only=True)
    assert sorted(n for batch in kept["micro_batches"] for n in batch["indices"]) == list(range(16))
    for batch in kept["micro_batches"]:
        assert batch["logprobs"].shape == batch["trained"].shape and batch["logprobs"].isfinite().all()
        assert len(batch["completions"]) == len(batch["advantages"]) == len(batch["indices"])
    assert any(map(math.isnan, kept["gradient_norms"].values())) == (name == "gradient")
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "not_finite/of an earlier run").touch()
    run.steps_done = 0
    with pytest.raises(NotFinite, match="step 1: "):
        run.step(1)
    assert {path.name for path in (tmp_path / "not_finite").iterdir()} == {"step_000000", "rank_0.pt"}


def test_a_stop_says_so_where_nothing_can_be_kept(tmp_path):
    run = recipe(TINY, True, tmp_path, SMALL)
    (tmp_path / "not_finite").touch()  # where a folder belongs
    run.loss = partial(nan_gradient, **run.loss.keywords)
    with pytest.raises(NotFinite, match=r"norm nan, .* was not updated; what it was .* could not be saved \("):
        run.step(1)


def test_weights_that_are_not_finite_end_the_run_while_it_samples(tmp_path):
    run = recipe(TINY, True, tmp_path, SMALL)
    with torch.no_grad():
        run.trained[0].fill_(math.nan)
    with pytest.raises(RUN_ERRORS, match="some log-probabilities are not finite"):
        run.train()


def stopped(rank: int, output_dir: str) -> tuple[str, bool, list[str]]:
    """A run on two processes, on one of which a loss is no number: its error, whether it has changed, and its files."""
    run = recipe(TINY, True, Path(output_dir), SMALL)
    before = [parameter.full_tensor().clone() for parameter in run.trained]
    if rank == 1:
        run.loss = partial(nan_gradient, **run.loss.keywords)
    with pytest.raises(NotFinite) as caught:
        run.train()
    is_changed = any(not torch.equal(a, b.full_tensor()) for a, b in zip(before, run.trained, strict=True))
    run.world.wait()
    run.cleanup()
    return str(caught.value), is_changed, sorted(path.name for path in Path(output_dir).glob("not_finite/rank_*"))


@pytest.mark.machines
def test_a_number_that_is_none_on_one_process_stops_all_before_the_update(tmp_path):
    for message, is_changed, files in run_processes(2, stopped, str(tmp_path)):
        assert "step 1: " in message and "nan" in message
        assert not is_changed
        assert files == ["rank_0.pt", "rank_1.pt"]


def starved(rank: int, output_dir: str, method: str) -> str:
    """The error of a recipe that the machine gives no more memory, while it samples or trains."""
    run = recipe(TINY, True, Path(output_dir), [*SMALL, "prompts_per_step=32"])
    rollouts, _ = run.sample(1)
    (batches,), _ = run.packed(rollouts)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**21, resource.RLIM_INFINITY))
    run.cfg.group_size = 256  # of samples alone: the rollouts are there
    with pytest.raises(OutOfMemory) as caught:
        if method == "sample":
            run.sample(2)
        else:
            run.update(batches, [None] * len(batches), [None] * len(batches), 1.0, rollouts.rewards)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sample", r"out of memory in _drawn; lower max_cache_tokens, which is 65536"),
        (
            "update",
            r"out of memory in update; lower max_tokens, which is 8192, or set activation_checkpointing=true",
        ),
    ],
)
def test_without_memory_the_budget_to_lower_is_named(tmp_path, method, words):
    (message,) = run_processes(1, starved, str(tmp_path), method)
    assert re.fullmatch(words, message)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    class Recipe:
        def __init__(self) -> None:
            self.cfg = {"max_tokens": 5}

        @within_memory("max_tokens")
        def method(self, error: Exception) -> None:
            raise error

    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("can't allocate memory: none")):
        with pytest.raises(type(error)) as caught:
            Recipe().method(error)
        assert caught.value is error
    texts = [
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling",
        "you can't allocate memory",
    ]
    for error in (torch.OutOfMemoryError("of its own type"), MemoryError(), *map(RuntimeError, texts)):
        with pytest.raises(OutOfMemory, match="lower max_tokens, which is 5"):
            Recipe().method(error)


def nothing_but_nan(completion: str, answer: str) -> float:
    return math.nan


def test_a_mistake_that_shows_in_training_is_one_line(tmp_path):
    printed = tmp_path / "printed.txt"
    reward = "rewards.correct.function=tests.test_failures.nothing_but_nan"
    run = start_command(recipe_main, ["--config", TINY, *SMALL, f"output_dir={tmp_path}", reward], printed)
    run.join(60)
    *_, last = printed.read_text().strip().splitlines()
    assert run.exitcode == 1 and "Traceback" not in printed.read_text()
    assert last.startswith("error: reward 'correct': rollout 0 of 16 returned nan; return a finite number")


def test_the_recipe_checks_itself_once_before_the_first_update(tmp_path, capsys):
    run = recipe(TINY, True, tmp_path, SMALL)
    before = [parameter.clone() for parameter in run.trained]
    attn = run.model.layers[2].attn
    project = attn.q_proj.forward
    attn.q_proj.forward = lambda x: project(x.roll(1, 1))  # a layer that looks at its neighbour in the row
    with pytest.raises(SelfCheckError, match=r"self-check: token \d+ of the .* of rollout \d+ .* layers\.2"):
        run.step(1)
    assert all(map(torch.equal, before, run.trained))
    del attn.q_proj.forward
    for number in (1, 2):
        run.step(number)
    assert capsys.readouterr().out.count("self-check: completions do not see each other") == 1


def checked(rank: int, output_dir: str, overrides: list[str]) -> tuple[dict[str, float], bool]:
    run = recipe(TINY, True, Path(output_dir), [*SMALL, "max_tokens=600", *overrides])
    metrics = run.step(1)
    run.cleanup()
    return metrics["loss"], run.is_checked


@pytest.mark.machines
def test_the_check_changes_no_step_of_several_processes(tmp_path):
    found = [run_processes(2, checked, str(tmp_path / value), [f"self_check={value}"]) for value in ("true", "false")]
    assert found[0] == found[1] and found[0][0][1]


def refused(rank: int, output_dir: str) -> str:
    """What the self-check says on each of two processes, on the second of which a layer looks past its mask."""
    run = recipe(TINY, True, Path(output_dir), SMALL)
    if rank == 1:
        attn = run.model.layers[1].attn
        project = attn.q_proj.forward
        attn.q_proj.forward = lambda x: project(x.roll(1, 1))
    with pytest.raises(SelfCheckError) as caught:
        run.step(1)
    run.world.wait()
    run.cleanup()
    return str(caught.value)


@pytest.mark.machines
def test_a_check_that_fails_on_one_process_ends_all_and_waits_for_none(tmp_path):
    first, second = run_processes(2, refused, str(tmp_path))
    assert first == "self-check: it failed on another process"
    assert "moved in layers.1" in second


def test_gradient_norms_are_those_of_every_parameter_with_a_gradient():
    model = tiny_model("qwen2")
    model.norm.scale.grad = torch.full_like(model.norm.scale, 2.0)
    assert gradient_norms(model) == {"norm.scale": pytest.approx(2 * math.sqrt(32))}
