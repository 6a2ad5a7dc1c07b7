"""The recipe as its user runs it: it learns nothing new by sharing, it is faster, and it refuses what cannot work."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen2ForCausalLM

from benchmarks.sharing import parameter_difference, recipe, run_both, token_ratio
from flexpg import group_advantages, grpo_loss
from flexpg.integrations.torchtune import baseline_logprobs
from flexpg.training.rewards import RewardError
from recipes.grpo import GRPORecipe

ROOT = Path(__file__).parent.parent
TINY, GSM8K = "recipes/configs/tiny_cpu.yaml", "recipes/configs/gsm8k_bytes_cpu.yaml"
LORA = [
    "model._component_=torchtune.models.qwen2.lora_qwen2",
    "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=16",
    "model.lora_alpha=32",
]
SMALL = ["prompts_per_step=2", "group_size=4", "train_problems.size=64", "test_problems.size=8", "self_check=false"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def both(config, tmp_path, overrides, num_steps):
    runs = [recipe(config, sharing, tmp_path / str(sharing), overrides) for sharing in (True, False)]
    return runs, run_both(*runs, num_steps)


@pytest.mark.slow
def test_shared_and_unshared_runs_stay_together_for_20_steps_and_the_shared_one_is_faster(tmp_path, capsys):
    runs, pairs = both(TINY, tmp_path, SMALL, 20)
    assert max(pair.difference("loss") for pair in pairs) < 1e-4
    assert max(pair.difference("grad_norm") for pair in pairs) < 1e-4
    assert parameter_difference(*runs) < 1e-4
    assert sum(abs(pair.shared["loss"]) for pair in pairs) > 0.1  # they did train
    tokens = token_ratio(pairs, "trained")
    seconds = sum(p.unshared["train_s"] for p in pairs) / sum(p.shared["train_s"] for p in pairs)
    with capsys.disabled():
        print(f"\nshared against unshared: {tokens:.1f} x fewer tokens, {seconds:.1f} x faster training")
    assert seconds > 1.5


def test_a_step_is_the_update_written_out_by_hand(tmp_path):
    """Shared and unshared runs would agree on a temperature, a reference or a gradient that the recipe forgot."""
    options = ["sampling.temperature=1.5", "loss.beta=0.5", "num_iterations=2", "scale_rewards=batch"]
    run = recipe(TINY, True, tmp_path, [*SMALL, *options, "clip_grad_norm=0.1"])
    policy, reference, sample, drawn = deepcopy(run.model), deepcopy(run.model), run.sample, []
    run.sample = lambda number: drawn.append(sample(number)) or drawn[-1]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, weight_decay=0.0)
    for number in (1, 2, 3):
        run.step(number)
        rollouts = drawn[-1][0]
        with torch.no_grad():
            old, ref = (baseline_logprobs(model, rollouts, 1.5)[0] for model in (policy, reference))
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids, "batch")
        for _ in range(2):
            optimizer.zero_grad()
            logprobs, _ = baseline_logprobs(policy, rollouts, 1.5)
            kwargs = {"ref_logprobs": ref, "beta": 0.5, "epsilon_high": 0.28}
            grpo_loss(logprobs, old, advantages, rollouts.trained, **kwargs)[0].backward()
            clip_grad_norm_(policy.parameters(), 0.1)
            optimizer.step()
    ours, by_hand, start = (
        torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (run.model, policy, reference)
    )
    assert (ours - by_hand).norm() < 1e-3 * (ours - start).norm()


def test_mini_batches_are_updates_one_after_the_other_each_divided_by_its_own_tokens(tmp_path):
    """Runs of one process and of many would agree on rollouts that the recipe forgot."""
    options = ["minibatches=2", "num_iterations=2", "sampling.temperature=1.5", "clip_grad_norm=0.1"]
    run = recipe(TINY, True, tmp_path, [*SMALL, *options])
    policy, start, sample, drawn = deepcopy(run.model), deepcopy(run.model), run.sample, []
    run.sample = lambda number: drawn.append(sample(number)) or drawn[-1]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, weight_decay=0.0)
    for number in (1, 2, 3):
        run.step(number)
        rollouts = drawn[-1][0]
        advantages = group_advantages(rollouts.rewards, rollouts.group_ids)
        halves = [(rollouts.select(rows), advantages[rows]) for rows in torch.arange(8).split(4)]
        with torch.no_grad():
            olds = [baseline_logprobs(policy, half, 1.5)[0] for half, _ in halves]
        for _ in range(2):
            for (half, own), old in zip(halves, olds, strict=True):
                optimizer.zero_grad()
                logprobs, _ = baseline_logprobs(policy, half, 1.5)
                grpo_loss(logprobs, old, own, half.trained, epsilon_high=0.28)[0].backward()
                clip_grad_norm_(policy.parameters(), 0.1)
                optimizer.step()
    ours, by_hand, before = (
        torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (run.model, policy, start)
    )
    assert (ours - by_hand).norm() < 1e-3 * (ours - before).norm()


def test_a_run_with_another_seed_does_not_stay_together(tmp_path):
    runs = [recipe(TINY, True, tmp_path / str(seed), [*SMALL, f"seed={seed}"]) for seed in (0, 1)]
    pairs = run_both(*runs, 3)
    assert max(pair.difference("loss") for pair in pairs) > 1e-2


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_every_option_of_a_step_agrees_with_the_unshared_path(tmp_path, loss):
    overrides = [
        *SMALL,
        f"loss.loss_type={loss}",
        "loss.beta=0.1",
        "loss.importance_sampling_level=sequence",
        "num_iterations=2",
        *("max_tokens=352", "sampling.temperature=2.0"),  # a group of four in several micro-batches
        "scale_rewards=batch",
    ]
    runs, pairs = both(TINY, tmp_path, overrides, 2)
    for metric in ("loss", "grad_norm", "kl", "entropy", "ratio"):
        differences = [pair.difference(metric) for pair in pairs]
        assert differences[0] < 1e-4 and differences[1] < 1e-3, (metric, differences)  # Adam divides by small numbers
    assert pairs[1].shared["kl"] > 0 and pairs[1].shared["ratio"] != 1
    assert parameter_difference(*runs) < 1e-4


@pytest.mark.parametrize(
    "option",
    [
        "activation_checkpointing=true",
        "max_tokens=352",
        "max_cache_tokens=600",
        "sharing=auto",
        pytest.param("compile=true", marks=pytest.mark.slow),
    ],
)
def test_what_changes_memory_or_speed_does_not_change_the_update(tmp_path, option):
    common = [*SMALL, "sampling.temperature=2.0"]  # completions that differ, so that groups are over the budget
    plain, other = (recipe(TINY, True, tmp_path / str(n), [*common, *more]) for n, more in enumerate(([], [option])))
    pairs = run_both(other, plain, 2)
    for metric in ("reward", "loss", "grad_norm", "entropy"):
        assert max(pair.difference(metric) for pair in pairs) < 1e-4, metric
    assert pairs[1].unshared["grad_norm"] > 1e-3


def test_bf16_computes_nearly_the_same_and_keeps_parameters_in_float32(tmp_path):
    runs = [
        recipe(TINY, True, tmp_path / dtype, [*SMALL, f"dtype={dtype}", "self_check=true"])
        for dtype in ("bf16", "fp32")
    ]
    rollouts = runs[1].sample(1)[0]
    low, full = (next(run.logprobs(run.model, run.packed(rollouts)[0][0]))[0] for run in runs)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().mean() < 0.02
    assert {p.dtype for p in runs[0].model.parameters()} == {torch.float32}
    runs[0].step(1)
    assert all(p.grad.dtype == torch.float32 for p in runs[0].trained)


@pytest.mark.parametrize(("option", "bound"), [("compile=false", 1e-3), ("compile=true", 1e-3), ("dtype=bf16", 0.1)])
def test_on_a_gpu_shared_and_unshared_runs_stay_together(cuda, tmp_path, option, bound):
    _, pairs = both(TINY, tmp_path, [*SMALL, f"device={cuda}", option], 3)
    for metric in ("loss", "grad_norm"):
        assert max(pair.difference(metric) for pair in pairs) < bound, metric
    assert pairs[1].shared["grad_norm"] > 1e-3


def test_every_problem_is_asked_once_before_any_is_asked_again(tmp_path):
    run = recipe(TINY, True, tmp_path, [*SMALL, "train_problems.size=5", "prompts_per_step=3"])
    asked = [problem for number in range(1, 11) for problem in run.chosen(number)]
    rounds = [asked[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert run.chosen(7) == asked[18:21]  # whatever was asked before


def test_a_resumed_run_takes_bitwise_the_steps_of_one_left_alone(tmp_path):
    overrides = [*SMALL, "num_steps=4", "eval_every_n_steps=2", "minibatches=2", "num_iterations=2"]
    overrides += ["lr_scheduler.factor=0.5", "lr_scheduler.total_iters=3"]  # half of the rate for three steps
    alone = recipe(TINY, True, tmp_path / "alone", overrides)
    alone.train()
    stopped = recipe(TINY, True, tmp_path / "run", [*overrides, "checkpoint_every_n_steps=1"])
    update = stopped.update
    stopped.update = lambda *args: setattr(stopped, "is_told_to_stop", stopped.steps_done == 1) or update(*args)
    stopped.train()
    assert stopped.steps_done == 2
    resumed = recipe(TINY, True, tmp_path / "run", [*overrides, "resume=true"])
    resumed.train()
    for name in ("loss", "grad_norm", "reward", "entropy", "lr"):
        assert [metrics[name] for metrics in resumed.history] == [metrics[name] for metrics in alone.history]
    assert resumed.accuracies == alone.accuracies
    for ours, theirs in zip(resumed.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"holds .*step_000001 of an earlier run; set resume=true or another output_dir"),
        (["resume=true", "seed=3"], r"step_000001 was made with seed=0; resume with that, or start anew"),
        (["resume=true", "prompts_per_step=4"], r"was made with prompts_per_step=2; resume with that"),
        (["resume=true", *LORA], r"step_000001 was made with model="),
        (["resume=true", "optimizer.lr=1"], r"step_000001 was made with optimizer=.*'lr': 0.0002.*; resume with that"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, overrides, message):
    run = recipe(TINY, True, tmp_path, [*SMALL, "num_steps=2", "checkpoint_every_n_steps=1"])
    run.steps_done = 1
    run.save_progress(run.checkpoint_dir)
    with pytest.raises(ValueError, match=message):
        recipe(TINY, True, tmp_path, [*SMALL, *overrides])


def test_a_finished_run_that_is_resumed_has_nothing_to_do_and_says_what_it_was(tmp_path, capsys):
    overrides = [*SMALL, "num_steps=2", "checkpoint_every_n_steps=2"]
    recipe(TINY, True, tmp_path, overrides).train()
    again = recipe(TINY, True, tmp_path, [*overrides, "resume=true"])
    again.train()
    again.report()
    assert len(again.history) == 2 and again.is_finished()
    assert "going on after step 2" in (printed := capsys.readouterr().out) and "held-out accuracy" in printed
    with pytest.raises(ValueError, match=r"step_000002 is beyond num_steps=1; raise num_steps"):
        recipe(TINY, True, tmp_path, [*overrides, "num_steps=1", "resume=true"])


def test_compiled_layers_are_not_left_to_eager_by_what_sampling_and_adapters_ask_of_them(tmp_path, monkeypatch):
    """torch gives up at a limit of graphs, in silence; here that is an error, and sampling leaves them alone."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    overrides = [*SMALL, *LORA, "loss.beta=0.1", "minibatches=2", "activation_checkpointing=true", "self_check=true"]
    run, plain = (recipe(TINY, True, tmp_path / c, [*overrides, f"compile={c}"]) for c in ("true", "false"))
    pairs = run_both(run, plain, 3)
    assert max(pair.difference(metric) for pair in pairs for metric in ("loss", "grad_norm", "kl")) < 1e-4
    graphs = [len(count) for count in torch._dynamo.utils.guard_failures.values()]
    assert max(graphs, default=0) < 8


def test_the_docs_explain_every_metric(tmp_path):
    metrics = recipe(TINY, True, tmp_path, [*SMALL, "loss.beta=0.1"]).step(1)
    table = (ROOT / "docs/recipes.md").read_text().partition("## Metrics")[2]
    explained = {
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    assert {"reward/NAME" if name.startswith("reward/") else name for name in metrics} == explained - {
        "held_out_accuracy"
    }


def test_gsm8k_questions_give_the_same_loss_and_gradient_norm_shared_and_unshared(tmp_path):
    runs, pairs = both(GSM8K, tmp_path, ["group_size=3"], 1)
    assert min(len(prompt) for prompt in runs[0].prompts) >= 2000
    for pair in pairs:
        assert pair.difference("loss") < 1e-4 and pair.difference("grad_norm") < 1e-4
        assert pair.shared["grad_norm"] > 1e-4  # a step that trains something


def test_tune_run_trains_draws_and_saves_what_transformers_loads(tmp_path):
    overrides = [f"output_dir={tmp_path}", *SMALL, "num_steps=2", "eval_every_n_steps=1", "prompts_per_step=6"]
    command = [
        Path(sys.executable).parent / "tune",
        "run",
        "--nproc_per_node",
        "1",
        "recipes/grpo.py",
        "--config",
        TINY,
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, env=os.environ, timeout=240)
    assert done.returncode == 0, done.stderr
    for line in ("step    2  held-out accuracy", "seconds per step", "x fewer", "reward,mask,savings"):
        assert line in done.stdout
    noise = [line for line in done.stderr.splitlines() if "torchao" not in line]  # tune imports it before we can speak
    assert not noise, noise
    for picture in ("reward.png", "mask.png", "savings.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "Step 2 | reward:" in next((tmp_path / "logs").iterdir()).read_text()
    saved = tmp_path / "epoch_0"
    cfg = OmegaConf.merge(OmegaConf.load(TINY), {"checkpointer": {"checkpoint_dir": str(saved)}})
    cfg.checkpointer.checkpoint_files = [file.name for file in saved.glob("*.safetensors")]
    cfg.output_dir = str(tmp_path / "again")
    OmegaConf.resolve(cfg)
    trained = GRPORecipe(cfg)
    trained.setup()
    tokens = trained.test_prompts[0][None]
    theirs = Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(trained.model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    before = recipe(TINY, True, tmp_path / "before", SMALL)
    assert not torch.equal(before.model.tok_embeddings.weight, trained.model.tok_embeddings.weight)


def not_a_number(completion: str, answer: str) -> float:
    return float("nan")


def test_a_reward_that_is_not_a_number_stops_the_run_before_the_update(tmp_path):
    run = recipe(TINY, True, tmp_path, [*SMALL, "rewards.correct.function=tests.test_recipe.not_a_number"])
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(RewardError, match="rollout 0 of 8"):
        run.step(1)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize(
    ("pays", "says"), [(1.05, "prompts are shared, for"), (1e9, "every prompt is encoded once per")]
)
def test_auto_shares_where_it_pays_says_so_once_and_logs_the_ratio(tmp_path, capsys, monkeypatch, pays, says):
    monkeypatch.setattr("flexpg.training.metrics.PAYS", pays)
    shared = str(pays < 2).lower()
    runs = [recipe(TINY, True, tmp_path / name, [*SMALL, f"sharing={name}"]) for name in ("auto", shared)]
    pairs = run_both(*runs, 2)
    assert capsys.readouterr().out.count("sharing=auto: " + says) == 1
    for auto, told in ((pair.shared, pair.unshared) for pair in pairs):
        assert {name: auto[name] for name in ("loss", "tokens_trained", "flop_ratio")} == {
            name: told[name] for name in ("loss", "tokens_trained", "flop_ratio")
        }
        assert auto["flop_ratio"] > 2 if pays < 2 else auto["flop_ratio"] == 1


def test_the_recipe_stays_short_enough_to_be_read():
    assert len((ROOT / "recipes/grpo.py").read_text().splitlines()) < 450
