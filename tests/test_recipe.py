"""Tests of recipes/grpo.py in one process: its updates are exact, resumable, and abort before anything is spoiled."""

from __future__ import annotations

import io
import math
import re
import resource
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from recipe_runs import (
    DIFFERENT,
    GSM8K,
    LORA,
    ROOT,
    SHORT,
    SMALL,
    TINY,
    calls_of_group_reward,
    flat,
    make,
    nan_gradient,
    nan_loss,
    sums,
    train,
)
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen2ForCausalLM

from flexpg import Rollouts, group_advantages, grpo_loss, pack
from flexpg.training.components import component
from flexpg.training.episodes import StepRollouts
from flexpg.training.errors import out_of_memory_hint
from flexpg.training.packed_step import batches_to_check, pack_step
from flexpg.training.tasks import Problem
from flexpg.verify import SelfCheckError, baseline_logprobs
from recipes import grpo_minimal
from recipes.grpo import GRPORecipe, recipe_main

pytestmark = pytest.mark.slow


def difference(runs: list[GRPORecipe], name: str) -> list[float]:
    """Return how far a metric of two runs is apart at every step, relative to the larger, or to 0.01 if it is small."""
    pairs = zip(*([metrics[name] for metrics in run.history] for run in runs), strict=True)
    return [abs(a - b) / max(abs(a), abs(b), 0.01) for a, b in pairs]


def parameter_difference(runs: list[GRPORecipe]) -> float:
    ours, theirs = (flat(run.model.parameters()) for run in runs)
    return ((ours - theirs).norm() / theirs.norm()).item()


# The update.

# Adam's first steps would turn the rounding of nearly zero gradients into full steps.
GENTLE = ["optimizer.eps=1e-4", "optimizer.lr=5e-5"]


def test_shared_and_baseline_runs_agree_for_six_steps_and_sharing_is_faster(tmp_path):
    runs = [train(make(tmp_path / on, *SMALL, f"sharing={on}", "num_steps=6")) for on in ("true", "false")]
    assert max(difference(runs, "loss") + difference(runs, "grad_norm")) < 1e-4
    assert parameter_difference(runs) < 1e-4
    assert sum(abs(metrics["loss"]) for metrics in runs[0].history) > 0.1  # something was learned
    seconds, tokens = ([[m[name] for m in run.history] for run in runs] for name in ("train_s", "tokens_encoded"))
    assert sum(seconds[1]) > 1.5 * sum(seconds[0]) and sum(tokens[1]) > 3 * sum(tokens[0])


def test_gsm8k_prompts_give_the_update_of_the_baseline(tmp_path):
    options = ("prompts_per_step=1", "num_steps=1", "test_problems.size=1", "self_check=false", "loss.beta=0.0")
    runs = [train(make(tmp_path / on, *options, f"sharing={on}", config=GSM8K)) for on in ("true", "false")]
    assert min(len(prompt) for prompt in runs[0].prompts) >= 2000
    assert max(difference(runs, "loss") + difference(runs, "grad_norm")) < 1e-4
    assert runs[0].history[0]["grad_norm"] > 1e-4


def record_rollouts(run: GRPORecipe) -> list[Rollouts]:
    """Return the list to which the rollouts of every step are added."""
    recorded, score = [], run.score

    def score_and_record(*args: Any) -> tuple[StepRollouts, dict[str, float]]:
        data, metrics = score(*args)
        recorded.append(data.rollouts)
        return data, metrics

    run.score = score_and_record
    return recorded


def sample(run: GRPORecipe) -> StepRollouts:
    """Return the rollouts of the first step."""
    problems = run.order.of_step(1, run.cfg.prompts_per_step)
    return run.score(1, problems, run.generate(problems, "step 1"))[0]


SGD = ["optimizer._component_=torch.optim.SGD", "optimizer.lr=0.1", "clip_grad_norm=.inf"]  # shows a wrong scale
UPDATES = {
    "kl": ["loss.beta=0.5", "num_iterations=2", "scale_rewards=batch"],
    "minibatches": ["minibatches=2", "num_iterations=2", *SGD],
    "lora kl": [*LORA, "loss.beta=0.5", "minibatches=2"],
}


@pytest.mark.parametrize("options", UPDATES)
def test_step_equals_the_update_written_out_by_hand(tmp_path, options):
    """Shared and baseline runs would agree on a temperature, a reference or rollouts that the recipe forgets."""
    common = [*SMALL, "sampling.temperature=1.5", "clip_grad_norm=0.1", "num_steps=2"]
    run = make(tmp_path, *common, *UPDATES[options])
    policy, reference = deepcopy(run.model), deepcopy(run.model)
    recorded = record_rollouts(run)
    train(run)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = component(run.cfg, "optimizer", trained)
    for rollouts in recorded:
        advantages = group_advantages(rollouts, run.cfg.scale_rewards)
        minibatches = []
        for rows in torch.arange(8).chunk(run.cfg.minibatches):
            part = rollouts.select(rows)
            with torch.no_grad():
                old, ref = (baseline_logprobs(model, part, temperature=1.5)[0] for model in (policy, reference))
            minibatches.append((part, advantages[rows], old, ref))
        for part, advantage, old, ref in minibatches * run.cfg.num_iterations:
            optimizer.zero_grad()
            (logprobs,) = baseline_logprobs(policy, part, temperature=1.5)
            options = {"old_logprobs": old, "ref_logprobs": ref, "beta": run.cfg.loss.beta, "epsilon_high": 0.28}
            grpo_loss(logprobs, advantage, part.loss_mask, **options).backward()
            clip_grad_norm_(trained, run.cfg.clip_grad_norm)
            optimizer.step()
    ours, by_hand, start = (flat(model.parameters()) for model in (run.model, policy, reference))
    assert (ours - by_hand).norm() < 1e-3 * (ours - start).norm()


def test_oversized_groups_with_every_loss_option_agree_with_the_baseline(tmp_path):
    options = [*SMALL, *SHORT, "loss.loss_type=grpo", "loss.beta=0.1", "loss.importance_sampling_level=sequence"]
    options += ["num_iterations=2", "max_tokens=328", DIFFERENT, "scale_rewards=batch", "num_steps=2", *GENTLE]
    runs = [train(make(tmp_path / on, *options, f"sharing={on}")) for on in ("true", "false")]
    for name in ("loss", "grad_norm", "kl", "entropy", "ratio"):
        assert max(difference(runs, name)) < 1e-4, name
    assert runs[0].history[1]["kl"] > 0 and runs[0].history[1]["ratio"] != 1
    assert parameter_difference(runs) < 1e-4


TWO_STEPS = [*SMALL, *SHORT, DIFFERENT, "num_steps=2", *GENTLE]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return train(make(tmp_path_factory.mktemp("plain"), *TWO_STEPS))


@pytest.mark.parametrize(
    "option",
    [
        "activation_checkpointing=true",
        "max_tokens=328",
        "max_cache_tokens=600",
        "sharing=auto",
        pytest.param("compile=true", marks=pytest.mark.proof),  # the test of the recompile limit compiles without C++
    ],
)
def test_option_for_memory_or_speed_does_not_change_the_update(tmp_path, plain_run, option):
    runs = [train(make(tmp_path, *TWO_STEPS, option)), plain_run]
    for name in ("reward", "loss", "grad_norm", "entropy"):
        assert max(difference(runs, name)) < 1e-4, name
    assert plain_run.history[1]["grad_norm"] > 1e-3


@pytest.mark.parametrize(("min_speedup", "is_shared"), [(1.05, True), (1e9, False)])
def test_sharing_auto_shares_if_the_cost_model_says_that_it_pays(tmp_path, monkeypatch, min_speedup, is_shared):
    monkeypatch.setattr("flexpg.training.packed_step.MIN_SPEEDUP", min_speedup)
    metrics = train(make(tmp_path, *SMALL, "sharing=auto", "num_steps=1")).history[0]
    assert (metrics["tokens_encoded"] < metrics["tokens_baseline"]) == is_shared
    assert metrics["flop_ratio"] > 2 if is_shared else metrics["flop_ratio"] == 1


def test_self_check_with_context_parallel_takes_what_one_rank_holds():
    prompts = [torch.arange(3000) + n for n in range(2)]
    completions = [[[n, 2, 3] * 200 for n in range(8)], [[4] * 10] * 8]
    batches = pack(Rollouts.from_groups(prompts, completions, [[0.0] * 8] * 2), 10_000)
    assert batches_to_check(batches, 10_000, 1) is batches
    (batch,) = batches_to_check(batches, 10_000, 8)
    assert 0.9 * 1250 < batch.tree.num_tokens <= 1250
    assert batch.rollouts.prompts[0].tolist() == list(range(3000 - 625, 3000))
    assert [len(tokens) for tokens in batch.rollouts.completions] == [156] * 4


def test_bf16_changes_log_probabilities_little_and_keeps_fp32_parameters(tmp_path):
    runs = [make(tmp_path / dtype, *SMALL, f"dtype={dtype}", "num_steps=1") for dtype in ("bf16", "fp32")]
    data = sample(runs[1])
    batches = pack_step(data, runs[1].cfg, runs[1].world, runs[1].shape).minibatches[0]
    low, full = (next(run.logprobs(run.model, batches, True))[1] for run in runs)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().mean() < 0.02
    train(runs[0])
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in runs[0].trained)


@pytest.mark.parametrize(("option", "bound"), [("compile=false", 1e-3), ("compile=true", 1e-3), ("dtype=bf16", 0.1)])
def test_shared_and_baseline_runs_agree_on_cuda(cuda, tmp_path, option, bound):
    options = [*SMALL, f"device={cuda}", option, "num_steps=3"]
    runs = [train(make(tmp_path / on, *options, f"sharing={on}")) for on in ("true", "false")]
    assert max(difference(runs, "loss") + difference(runs, "grad_norm")) < bound
    assert runs[0].history[1]["grad_norm"] > 1e-3


def test_compiled_layers_do_not_exceed_the_recompile_limit(tmp_path, monkeypatch):
    """At the limit, torch silently runs a layer in eager mode. Sampling and disabled adapters must not count."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    options = [*SMALL, *SHORT, *LORA, "loss.beta=0.1", "minibatches=2", "self_check=true"]
    options += ["activation_checkpointing=true"]
    runs = [train(make(tmp_path / on, *options, "num_steps=2", f"compile={on}")) for on in ("true", "false")]
    assert max(max(difference(runs, name)) for name in ("loss", "grad_norm", "kl")) < 1e-4
    graphs = [len(count) for count in torch._dynamo.utils.guard_failures.values()]
    assert max(graphs, default=0) < 8


# Steps, resumption and logs.


def test_samples_are_a_function_of_seed_and_step(tmp_path):
    runs = [make(tmp_path / seed, *SMALL, *SHORT, f"seed={seed}") for seed in ("0", "0", "1")]
    found = []
    for run, step in ((runs[0], 1), (runs[1], 2), (runs[1], 1), (runs[2], 1)):
        episodes = run.generate([0, 1], f"step {step}")
        found.append([turn.completion.tolist() for group in episodes for episode in group for turn in episode.turns])
    assert found[0] == found[2] and found[0] not in (found[1], found[3])


def test_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(tmp_path):
    options = [*SMALL, *SHORT, "num_steps=3", "eval_every_n_steps=2", "minibatches=2", "num_iterations=2"]
    options += ["lr_scheduler.factor=0.5", "lr_scheduler.total_iters=3"]
    uninterrupted = train(make(tmp_path / "uninterrupted", *options))
    stopped = make(tmp_path / "stopped", *options, "checkpoint_every_n_steps=3")
    log = stopped.log
    stopped.log = lambda metrics: log(metrics) or (stopped.steps_done == 2 and stopped.stop.request(signal.SIGTERM))
    assert train(stopped).steps_done == 2 and not stopped.is_finished()
    resumed = train(make(tmp_path / "stopped", *options, "resume=true"))
    assert resumed.is_finished()
    for name in ("loss", "grad_norm", "reward", "entropy", "lr"):
        assert [metrics[name] for metrics in resumed.history] == [metrics[name] for metrics in uninterrupted.history]
    assert resumed.accuracies == uninterrupted.accuracies and len(resumed.accuracies) == 3
    assert torch.equal(flat(resumed.model.parameters()), flat(uninterrupted.model.parameters()))


def test_resume_refuses_other_options_and_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    options = [*SMALL, *SHORT, "num_steps=2", "checkpoint_every_n_steps=2"]
    train(make(tmp_path, *options))
    mistakes = [
        ([], r"holds .*step_000002 of an earlier run; set resume=true or another output_dir"),
        (["resume=true", "seed=3"], r"seed must be 0 to resume from .*step_000002, got 3; use that, or start"),
        (["resume=true", "prompts_per_step=4"], r"prompts_per_step must be 2 to resume from"),
        (["resume=true", "optimizer.lr=1"], r"optimizer.lr must be 0.0002 to resume from .*, got 1;"),
        (["resume=true", *LORA], r"model._component_ must be "),
        (
            ["resume=true", "test_reward._component_=recipe_runs.group_reward"],
            r"test_reward._component_ must be recipe_",
        ),
        (["resume=true", "num_steps=1"], r"num_steps must be at least 2 to resume from .*step_000002"),
    ]
    for more, message in mistakes:
        with pytest.raises(ValueError, match=message):
            make(tmp_path, *options, *more)
    again = train(make(tmp_path, *options, "resume=true"))
    again.report()
    assert len(again.history) == 2 and again.is_finished()
    assert "resuming after step 2" in (printed := capsys.readouterr().out) and "held-out accuracy" in printed


def test_resume_refuses_data_that_changed_under_the_same_options(tmp_path, monkeypatch):
    options = [*SMALL, *SHORT, "num_steps=1", "checkpoint_every_n_steps=1"]
    options.append("train_problems._component_=recipe_runs.sums")
    train(make(tmp_path, *options))
    make(tmp_path, *options, "resume=true")
    monkeypatch.setattr("recipe_runs.sums", lambda size, **others: [*sums(size - 1), Problem("7+7:", "7+7")])
    message = r"the data of train_problems must be 64 problems .checksum \w{8}. to resume .*, got 64 problems .checksum"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, *options, "resume=true")
    make(tmp_path, *options, "resume=true", "eval_only=true")


HOLD_THE_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_second_run_in_an_output_dir_is_refused_until_the_first_dies(tmp_path):
    make(tmp_path, *SMALL).cleanup()
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(
            ValueError, match=f"output_dir must not be that of another run, got {tmp_path}, where one is"
        ):
            make(tmp_path, *SMALL)
        make(tmp_path, *SMALL, "eval_only=true")
        other.kill()
        other.wait()
    make(tmp_path, *SMALL)


def test_lr_scheduler_that_raises_saves_the_steps_done(tmp_path, capsys):
    options = [*SMALL, *SHORT, "num_steps=4", "lr_scheduler.max_lr=1e-3", "lr_scheduler.total_steps=1"]
    options.append("lr_scheduler._component_=torch.optim.lr_scheduler.OneCycleLR")
    recipe = make(tmp_path, *options)
    with pytest.raises(ValueError, match="The specified number of total steps is 1"):
        train(recipe)
    assert "error: lr_scheduler cannot take another step" in capsys.readouterr().err
    again = make(tmp_path, *options, "resume=true")
    assert again.steps_done == len(again.history) == recipe.steps_done == 2  # torch raises one step late
    assert torch.equal(flat(again.model.parameters()), flat(recipe.model.parameters()))


def test_error_in_the_first_step_saves_nothing_so_that_the_run_can_start_again(tmp_path, monkeypatch):
    recipe = make(tmp_path, *SMALL, "num_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "rewarded", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipe.train()
    assert not (tmp_path / "checkpoints").exists()
    assert len(train(make(tmp_path, *SMALL, "num_steps=1")).history) == 1


@pytest.mark.parametrize(
    ("options", "counts"), [([], "821,888 of 821,888"), (LORA, "155,648 of 977,536")], ids=["all", "LoRA"]
)
def test_run_prints_how_many_parameters_it_trains(options, counts, tmp_path, capsys):
    make(tmp_path, *SMALL, *options)
    assert f"training {counts} parameters\n" in capsys.readouterr().out


def test_docs_explain_every_metric(tmp_path):
    metrics = train(make(tmp_path, *SMALL, "loss.beta=0.1", "num_steps=1")).history[0]
    rows = re.findall(
        r"^\| (`.*?`) \|", (ROOT / "docs/recipes.md").read_text().partition("## Metrics")[2], re.MULTILINE
    )
    explained = {name for row in rows for name in re.findall("`(.*?)`", row)} - {"held_out_accuracy"}
    of_options = {"reward_kl", "groups_resampled", "sampler_kl", "sampler_ratio", "sampler_ratio_max", "sync_s"}
    assert {name.replace("reward/correct", "reward/NAME") for name in metrics} == explained - of_options
    assert of_options <= explained  # test_recipe_sampler.py has runs with these


def test_rewards_of_trl_get_messages_columns_and_the_step(tmp_path):
    options = [*SMALL, "prompt_format=chat"]
    options += [f"{name}_problems._component_=recipe_runs.sums" for name in ("train", "test")]
    options += ["rewards.correct._component_=trl.rewards.accuracy_reward", "num_steps=2"]
    options += ["rewards.mine._component_=recipe_runs.group_reward", "rewards.mine.weight=0.5"]
    run = make(tmp_path, *options, "test_reward._component_=trl.rewards.think_format_reward")
    recorded = record_rollouts(run)
    calls_of_group_reward.clear()
    train(run)
    calls = calls_of_group_reward
    assert [call["trainer_state"].global_step for call in calls] == [0, 0, 1, 1]
    for n, call in enumerate(calls):
        completions = recorded[n // 2].completions[n % 2 * 4 :][:4]
        assert call["completion_ids"] == [tokens.tolist() for tokens in completions]
        texts = [run.tokenizer.decode(tokens.tolist()).rstrip("\n") for tokens in completions]
        assert call["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
        assert call["prompts"] == [[{"role": "user", "content": f"{call['answer'][0]}:"}]] * 4
        assert call["solution"] == [str(eval(call["answer"][0]))] * 4
        assert call["trainer_state"].max_steps == 2
    lengths = recorded[0].completion_lens.float()
    metrics = run.history[0]
    assert metrics["reward/mine"] == pytest.approx(lengths.view(2, 4)[:, 1:].mean().item())
    assert metrics["reward/mine/std"] == pytest.approx(lengths.view(2, 4)[:, 1:].flatten().std().item())
    assert metrics["reward/tokens"] == lengths.sum() / 2
    assert {"reward/correct", "reward/correct/std"} < metrics.keys()
    expected = 0.5 * lengths * torch.tensor([False, True, True, True] * 2)
    assert metrics["reward"] == pytest.approx(expected.mean().item() + metrics["reward/correct"])
    assert run.accuracies.keys() == {0, 2}


def test_reward_that_returns_nothing_is_named_after_the_first_step(tmp_path, capsys):
    train(make(tmp_path, *SMALL, *SHORT, "num_steps=2", "rewards.mine._component_=recipe_runs.forgets_to_return"))
    assert (
        capsys.readouterr().out.count("warning: reward 'mine' returned None for every rollout of step 1, so it ") == 1
    )


def test_self_check_runs_before_the_first_update_and_is_timed_separately(tmp_path, capsys):
    run = make(tmp_path, *SMALL, "self_check=true", "num_steps=2")
    before = flat(run.trained)
    attn = run.model.layers[2].attn
    project = attn.q_proj.forward
    attn.q_proj.forward = lambda x: project(x.roll(1, 1))  # uses the neighbour in the packed sequence
    with pytest.raises(SelfCheckError, match=r"self-check failed: token \d+ of the .* of rollout \d+ .* layers\.2"):
        train(run)
    assert torch.equal(before, flat(run.trained))
    del attn.q_proj.forward
    train(run)
    assert capsys.readouterr().out.count("self-check passed: ") == 1
    assert run.history[0]["self_check_s"] > 10 * run.history[0]["logprobs_s"] > 0
    assert run.history[1]["self_check_s"] == 0


# Commands.


def test_tune_run_trains_plots_and_saves_a_model_that_transformers_loads(tmp_path):
    options = [*SMALL, f"output_dir={tmp_path}", "num_steps=2", "eval_every_n_steps=1", "prompts_per_step=6"]
    command = [sys.executable, "-m", "torchtune._cli.tune", "run", "--nproc_per_node", "1", "recipes/grpo.py"]
    done = subprocess.run([*command, "--config", TINY, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for line in ("step    2  held-out accuracy", "seconds per step", "x fewer", "reward,mask,savings"):
        assert line in done.stdout
    assert not [line for line in done.stderr.splitlines() if "torchao" not in line], done.stderr
    for plot in ("reward.png", "mask.png", "savings.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2
    assert "Step 2 | reward:" in next((tmp_path / "logs").iterdir()).read_text()
    saved = tmp_path / "epoch_0"
    names = ",".join(file.name for file in saved.glob("*.safetensors"))
    place = [f"checkpointer.checkpoint_dir={saved}", f"checkpointer.checkpoint_files=[{names}]"]
    trained, before = (make(tmp_path / str(n), *SMALL, *extra) for n, extra in enumerate((place, [])))
    tokens = trained.test_prompts[0][None]
    theirs = Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(trained.model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(before.model.tok_embeddings.weight, trained.model.tok_embeddings.weight)


def test_reward_that_raises_is_named_in_one_error_line_above_its_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text("def broken(completion, answer):\n    return len(completion) / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        train(make(tmp_path / "out", *SMALL, "rewards.correct._component_=my_rewards.broken"))
    assert str(caught.traceback[-1].path) == f"{tmp_path}/my_rewards.py"
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: reward 'correct', rollout 0, completion '") for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line]  # Python prints it below, once


def test_mistake_in_the_options_ends_with_one_line_and_no_traceback(tmp_path, monkeypatch, capsys):
    arguments = ["recipes/grpo.py", "--config", TINY, f"output_dir={tmp_path}/out", "minibatches=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"^error: prompts_per_step must be a multiple of minibatches.*$"):
        recipe_main()
    assert capsys.readouterr().out == ""


@pytest.mark.distributed  # a minute
@pytest.mark.parametrize("steps", [8, pytest.param(20, marks=pytest.mark.proof)])  # 20 is the default
def test_minimal_recipe_learns_addition_to_over_0_9(capsys, steps):
    options = ["--steps", "8", "--eval-every", "8"] if steps == 8 else []
    assert grpo_minimal.main(["--device", "cpu", *options]) > 0.9
    printed = capsys.readouterr().out
    assert float(re.search(r"step +0 +held-out accuracy ([\d.]+)", printed).group(1)) < 0.5
    found = re.findall(r"step +\d+ +reward ([\d.]+) +loss ([-+.\d]+) +([\d.]+)x fewer", printed)
    assert len(found) == steps and all(math.isfinite(float(loss)) and float(fewer) > 2 for _, loss, fewer in found)


# NaN, Inf and out of memory.


NONFINITE = {
    "loss": (nan_loss, r"step 2: loss nan, gradient norm [0-9.e-]+, first in the loss\."),
    "gradient": (nan_gradient, r"step 2: loss -?[0-9.e-]+, gradient norm nan, first in the gradient of "),
}


@pytest.mark.parametrize("what", NONFINITE)
def test_nan_aborts_before_the_optimizer_step_and_dumps_the_micro_batches(tmp_path, what):
    loss, message = NONFINITE[what]
    train(make(tmp_path, *SMALL, *SHORT, "num_steps=1", "checkpoint_every_n_steps=1"))
    (tmp_path / "nonfinite/of an earlier run").mkdir(parents=True)
    run = make(tmp_path, *SMALL, *SHORT, "num_steps=2", "resume=true")
    before = flat(run.model.parameters())
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    run.loss = loss(run.loss)
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(run)
    assert str(caught.value).endswith(f"micro-batches of each rank are in {tmp_path}/nonfinite")
    assert torch.equal(flat(run.model.parameters()), before)
    assert all(map(torch.equal, moments, (state["exp_avg"] for state in run.optimizer.state.values())))
    assert {path.name for path in (tmp_path / "nonfinite").iterdir()} == {"step_000001", "rank_0.pt"}
    dump = torch.load(tmp_path / "nonfinite/rank_0.pt", weights_only=True)
    assert sorted(n for batch in dump["micro_batches"] for n in batch["indices"]) == list(range(8))
    for batch in dump["micro_batches"]:
        assert batch["logprobs"].isfinite().all()
        assert len(batch["completions"]) == len(batch["advantages"]) == len(batch["logprobs"])
    assert any(map(math.isnan, dump["gradient_norms"].values())) == (what == "gradient")


def test_nan_abort_says_so_if_nothing_can_be_saved(tmp_path):
    run = make(tmp_path, *SMALL)
    (tmp_path / "nonfinite").touch()  # not a folder
    run.loss = nan_gradient(run.loss)
    with pytest.raises(FloatingPointError, match=r"norm nan, .* was not updated; .* could not be saved: "):
        train(run)


def starve(rank: int, output_dir: Path, stage: str) -> tuple[str, str]:
    """Return stderr and the error of a stage that gets no more memory."""
    run = make(output_dir, *SMALL, "prompts_per_step=32")
    problems, data = run.order.of_step(2, run.cfg.prompts_per_step), sample(run)
    packed, advantages = pack_step(data, run.cfg, run.world, run.shape), group_advantages(data.rollouts)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**21, resource.RLIM_INFINITY))
    run.cfg.group_size = 256  # of generate
    with redirect_stderr(io.StringIO()) as printed, pytest.raises((RuntimeError, MemoryError)) as caught:
        run.generate(problems, "step 2") if stage == "generate" else run.update(1, data.rollouts, packed, advantages)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return printed.getvalue(), str(caught.value)


HINTS = {
    "generate": "error: out of memory; lower max_cache_tokens (now 65536)\n",
    "update": "error: out of memory; lower max_tokens (now 8192) or set activation_checkpointing=true\n",
}


@pytest.mark.parametrize("stage", HINTS)
def test_oom_names_the_budget_to_lower_above_torchs_traceback(tmp_path, stage):
    ((printed, error),) = run_processes(1, starve, tmp_path, stage)
    assert printed == HINTS[stage]
    assert "can't allocate memory" in error


OOM = ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", "you can't allocate memory"]
ERRORS = [
    *((error, True) for error in (torch.OutOfMemoryError("of its own type"), MemoryError(), *map(RuntimeError, OOM))),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("can't allocate memory"), False),
]


@pytest.mark.parametrize(("error", "is_oom"), ERRORS, ids=repr)
def test_oom_hint_is_printed_for_oom_errors_only(capsys, error, is_oom):
    with pytest.raises(type(error)) as caught, out_of_memory_hint("lower max_tokens"):
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == "error: out of memory; lower max_tokens\n" * is_oom
