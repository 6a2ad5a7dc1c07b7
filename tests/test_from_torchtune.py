"""Configurations of torchtune's GRPO recipes become configurations of recipes/grpo.py."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from recipe_runs import train
from torchtune.rlhf import masked_mean

from flexpg import grpo_loss
from flexpg.__main__ import main
from flexpg.training.config import load_config
from flexpg.training.from_torchtune import PROMPT, Translation, translate
from flexpg.training.torchtune_keys import GROUPS
from recipes.grpo import GRPORecipe

ROOT = Path(__file__).parent.parent
MODEL = """
name: mine
output_dir: runs/${name}
base: recipes/assets/tiny
tokenizer: {_component_: flexpg.training.tasks.ByteTokenizer, max_seq_len: null}
model:
  _component_: torchtune.models.qwen2.qwen2
  vocab_size: 260
  num_layers: 4
  num_heads: 4
  num_kv_heads: 2
  embed_dim: 128
  intermediate_dim: 384
  max_seq_len: 4096
  tie_word_embeddings: true
dataset: {_component_: torchtune.dev.grpo.gsm8k.gsm8k_dataset, partition: 1-9/10}
shuffle: false
reward_functions:
  - {_component_: torchtune.dev.rl.rewards.FormattedMathCorrectnessReward, answer_tag: answer, positive_reward: 10.0}
  - {_component_: torchtune.dev.rl.rewards.ThinkingAnswerFormattingReward, think_tag: think, answer_tag: answer}
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: "${output_dir}/logs"}
log_every_n_steps: 1
log_peak_memory_stats: true
"""
CHECKPOINT = """
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: ${base}
  checkpoint_files: [model.safetensors]
  model_type: QWEN2
"""
OWN_CHECKPOINT = f"{CHECKPOINT}  output_dir: ${{output_dir}}\n  recipe_checkpoint: null\n"
SYNC = f"""{MODEL}
seed: null
checkpointer:{OWN_CHECKPOINT}
ref_checkpointer:{CHECKPOINT}
resume_from_checkpoint: false
save_every_n_epochs: 1
batch_size: 2
grpo_samples: 4
forward_batch_size: 1
max_generated_tokens: 24
top_k: null
temperature: 0.9
ppo_epochs: 1
num_steps: 200
epochs: 10
clip_grad_norm: 1.0
optimizer: {{_component_: torch.optim.AdamW, lr: 1e-5}}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 50
loss: {{_component_: torchtune.dev.grpo.loss.GRPOSimpleLoss, kl_coeff: 0.01, epsilon: 0.2}}
device: cpu
enable_activation_checkpointing: true
compile: false
dtype: fp32
log_level: INFO
profiler: {{_component_: torchtune.training.setup_torch_profiler, enabled: false, output_dir: "${{output_dir}}/trace"}}
"""
NESTED_CHECKPOINT = OWN_CHECKPOINT.replace("\n  ", "\n    ")
ASYNC = f"""{MODEL}
orchestration:
  num_inference_workers: 4
  num_postprocessing_workers: 1
  num_training_workers: 3
  replay_buffer_size: ${{inference.batch_size}}
  num_steps: 250
inference:
  engine: vllm
  model: ${{base}}
  top_k: 50
  temperature: 1.0
  tensor_parallel_dim: 1
  max_generated_tokens: 24
  batch_size: 1
  group_size: 8
  total_batch_size: ${{eval:'${{inference.batch_size}} * 8'}}
  steps_before_weight_sync: 1
  queue_maxsize: ${{eval:'4 * ${{training.steps_before_weight_sync}}'}}
postprocessing:
  ref_checkpointer:{NESTED_CHECKPOINT}
training:
  checkpointer:{NESTED_CHECKPOINT}
  batch_size: 16
  ppo_epochs: 1
  clip_grad_norm: 0.5
  save_every_n_steps: 125
  enable_activation_checkpointing: true
  enable_activation_offloading: true
  compile: false
  steps_before_weight_sync: 2
  optimizer: {{_component_: torch.optim.AdamW, lr: 1e-5}}
  loss: {{_component_: torchtune.dev.rl.linear_grpo_loss.LinearGRPOLoss, epsilon: 0.3, num_output_chunks: 8}}
  seed: 3
debug_logging_enabled: false
debug_num_samples_per_step: 1
"""


def translated(folder: Path, text: str, *overrides: str, ranks: int | None = 3) -> Translation:
    given = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(list(overrides)))
    (folder / "theirs.yaml").write_text(OmegaConf.to_yaml(given))
    return translate(folder / "theirs.yaml", ranks)


def loaded(found: Translation) -> Any:
    return OmegaConf.to_container(load_config(OmegaConf.create(found.yaml("Translated."))))


# Configurations.


def test_translate_sync_config_loads_with_the_same_values(tmp_path):
    found = translated(tmp_path, SYNC)
    ours = loaded(found)
    assert ours["output_dir"] == ours["checkpointer"]["output_dir"] == "runs/mine"
    assert ours["checkpointer"]["checkpoint_dir"] == "recipes/assets/tiny"
    assert "recipe_checkpoint" not in ours["checkpointer"]
    assert (ours["prompts_per_step"], ours["group_size"], ours["num_steps"]) == (6, 4, 200)
    assert ours["sampling"] == {"max_new_tokens": 24, "temperature": 0.9, "top_k": None, "top_p": 1.0}
    loss = {name: ours["loss"][name] for name in ("loss_type", "beta", "epsilon", "epsilon_high")}
    assert loss == {"loss_type": "grpo", "beta": 0.01, "epsilon": 0.2, "epsilon_high": None}
    assert (ours["dtype"], ours["param_dtype"], ours["device"], ours["compile"]) == ("fp32", "fp32", "cpu", False)
    assert ours["activation_checkpointing"] is True and ours["prompt_format"] == "bos"
    assert ours["optimizer"] == {"_component_": "torch.optim.AdamW", "lr": 1e-5}
    assert ours["train_problems"]["partition"] == "1-9/10" and "partition" not in ours["test_problems"]
    assert ours["train_problems"]["template"] == ours["test_problems"]["template"] == PROMPT
    assert list(ours["rewards"]) == ["formatted_math_correctness", "thinking_answer_formatting"]
    assert ours["metric_logger"]["log_dir"] == "runs/mine/logs"
    assert ours["profiler"]["output_dir"] == "runs/mine/trace" and not ours["profiler"]["enabled"]
    assert {*found.notes} == {"reward_functions", *(f"rewards.{name}" for name in ours["rewards"])}


def test_translate_async_config_loads_with_the_same_values(tmp_path):
    found = translated(tmp_path, ASYNC, ranks=None)
    ours = loaded(found)
    assert (ours["prompts_per_step"], ours["group_size"], ours["num_steps"]) == (6, 8, 250)  # 3 workers x 16 rollouts
    assert ours["sampling"] == {"max_new_tokens": 24, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert (ours["loss"]["loss_type"], ours["loss"]["beta"], ours["loss"]["epsilon"]) == ("grpo", 0.1, 0.3)
    assert (ours["dtype"], ours["device"], ours["seed"], ours["clip_grad_norm"]) == ("bf16", "cuda", 3, 0.5)
    assert (ours["checkpoint_every_n_steps"], ours["activation_checkpointing"]) == (125, True)
    assert ours["lr_scheduler"]["_component_"] == "torch.optim.lr_scheduler.ConstantLR"
    assert ours["activation_offloading"] is True and "reward_functions" not in found.notes


@pytest.mark.parametrize("text", [SYNC, ASYNC], ids=["sync", "async"])
def test_translate_accounts_for_every_key(text, tmp_path):
    found = translated(tmp_path, text)
    cfg = OmegaConf.create(text)
    sources = set(re.findall(r"[\w.]+", " ".join(found.sources.values())))
    for key, value in cfg.items_ex(resolve=False):
        for path in [f"{key}.{name}" for name in value] if key in GROUPS else [key]:
            assert path in sources | set(found.dropped) | set(found.notes), path
    assert {*found.dropped} >= {"name", "base", "shuffle", "log_every_n_steps"}


def test_translate_notes_keys_that_torchtune_does_not_read(tmp_path):
    typos = ["grpo_sample=4", "loss.kl_coef=0.1", "resume=true"]
    assert translated(tmp_path, SYNC, *typos).notes.keys() >= {"grpo_sample", "loss.kl_coef", "resume"}
    typos = ["seed=4", "inference.group=2", "training.loss.beta=1", "temperature=2.0", "custom_sharded_layers=[output]"]
    found = translated(tmp_path, ASYNC, *typos)
    assert found.notes.keys() >= {"seed", "inference.group", "training.loss.beta", "temperature"}
    assert "custom_sharded_layers" in found.notes  # the async recipe reads it under `training`
    assert (found.options["seed"], found.options["sampling"]["temperature"]) == (3, 1.0)


def test_translate_gives_absent_keys_the_defaults_of_torchtune(tmp_path):
    (tmp_path / "theirs.yaml").write_text(
        re.sub(
            r"(?m)^(clip_grad_norm|enable_activation_checkpointing|lr_scheduler|reward_functions).*\n(  .*\n)*",
            "",
            SYNC,
        ).replace("kl_coeff: 0.01, epsilon: 0.2", "")
    )
    found = translate(tmp_path / "theirs.yaml", 1)
    ours = loaded(found)
    assert (ours["clip_grad_norm"], ours["activation_checkpointing"]) == (math.inf, False)
    assert (ours["loss"]["beta"], ours["loss"]["epsilon"]) == (0.1, 0.1)
    assert ours["rewards"] == {"batched_rewards": {"_component_": "torchtune.dev.rl.rewards.batched_rewards"}}
    assert ours["lr_scheduler"]["_component_"] == "torch.optim.lr_scheduler.ConstantLR"


@pytest.mark.parametrize(
    ("override", "noted"),
    [
        ("fsdp_cpu_offload=true", "fsdp_cpu_offload"),
        ("resume_from_checkpoint=true", "resume_from_checkpoint"),
        ("stop_token_ids=[7]", "stop_token_ids"),
        ("checkpointer.recipe_checkpoint=recipe_state.pt", "checkpointer.recipe_checkpoint"),
        ("ref_checkpointer.checkpoint_dir=elsewhere", "ref_checkpointer"),
        ("loss._component_=torchtune.dev.grpo.loss.GRPOCompletionLoss", "loss"),
        ("ppo_epochs=2", "loss"),
        ("ppo_epochs=2", "lr_scheduler"),
        ("model._component_=torchtune.models.qwen3.qwen3_4b", "model"),
        ("dataset._component_=mine.dataset", "test_problems"),
    ],
)
def test_translate_notes_what_has_no_equal_here(override, noted, tmp_path):
    assert noted not in translated(tmp_path, SYNC).notes
    found = translated(tmp_path, SYNC, override)
    assert noted in found.notes and noted not in found.dropped
    loaded(found)


def test_translate_without_ranks_notes_the_prompts_of_a_step(tmp_path):
    found = translated(tmp_path, SYNC, ranks=None)
    assert found.options["prompts_per_step"] == 2 and "--ranks" in found.notes["prompts_per_step"]


@pytest.mark.parametrize(
    ("override", "noted", "words"),
    [
        ("model._component_=torchtune.models.qwen9.qwen9", "model", "flexpg.training.causal_lm.model"),
        ("optimizer._component_=my_optimizers.Best", "optimizer", "put its file into the folder"),
        ("dataset._component_=my_data.questions", "train_problems.dataset", "flexpg.training.tasks.problems"),
    ],
)
def test_translate_missing_component_notes_what_to_do(override, noted, words, tmp_path):
    note = translated(tmp_path, SYNC, override).notes[noted]
    assert "cannot be imported here" in note and words in note


@pytest.mark.parametrize(("ranks", "batch_size", "steps"), [(4, 1, 16_820), (1, 1, 67_250), (4, 4, 4_200)])
def test_translate_plans_the_learning_rate_for_all_epochs(ranks, batch_size, steps, tmp_path):
    # 7,473 rows less the 748 whose number ends in 0, on `ranks` processes, without the rest of a batch, ten times
    found = translated(tmp_path, SYNC, f"batch_size={batch_size}", ranks=ranks)
    assert found.options["lr_scheduler"]["num_training_steps"] == steps
    other = translated(tmp_path, SYNC, "dataset.source=mine.jsonl", ranks=ranks)
    assert loaded(other)["lr_scheduler"]["num_training_steps"] == 200 and "lr_scheduler" in other.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps: 3", "must be a configuration of torchtune's GRPO, with grpo_samples"),
        ("- a", "must be a configuration of torchtune's GRPO"),
        ("a: [", "must be a YAML"),
        ("grpo_samples: 4", "tokenizer must be a mapping with a _component_, got None"),
        (SYNC.replace("grpo_samples: 4", "grpo_samples: 1"), "group_size must be at least 2, got 1"),
        (SYNC.replace("dtype: fp32", "dtype: fp16"), "dtype"),
        (SYNC.replace("${base}", "${bass}"), "checkpointer: Interpolation key 'bass' not found"),
        (SYNC.replace("1-9/10", "1-10/10"), "partition must be FIRST-LAST/TOTAL"),
    ],
)
def test_translate_refuses_what_is_no_configuration(text, message, tmp_path):
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        translate(tmp_path / "theirs.yaml", 4)


def test_from_torchtune_command_writes_the_yaml_and_prints_notes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(SYNC)
    main(["from-torchtune", "theirs.yaml", "-o", "ours.yaml", "--ranks", "2"])
    printed = capsys.readouterr()
    assert printed.out == "wrote ours.yaml\n"
    assert printed.err.startswith("note: reward_functions: torchtune's sync recipe ignores them")
    text = Path("ours.yaml").read_text()
    assert text.startswith("# Translated by `flexpg from-torchtune theirs.yaml --ranks 2`")
    assert load_config(OmegaConf.load("ours.yaml")).prompts_per_step == 4
    main(["from-torchtune", "theirs.yaml", "--ranks", "2"])
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit, match=r"error: files exist and differ: ours\.yaml; --force overwrites them"):
        main(["from-torchtune", "theirs.yaml", "-o", "ours.yaml"])
    assert Path("ours.yaml").read_text() == text
    main(["from-torchtune", "theirs.yaml", "-o", "ours.yaml", "--force"])
    assert load_config(OmegaConf.load("ours.yaml")).prompts_per_step == 2


def test_translated_example_of_the_docs_is_the_one_shown(tmp_path):
    page = (ROOT / "docs/coming_from_torchtune.md").read_text()
    theirs, ours = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[:2]
    text = translated(tmp_path, theirs, ranks=4).yaml("Translated.")
    first, last = ours.splitlines()[0], ours.splitlines()[-1]
    assert text[text.index(first) : text.index(last) + len(last)] == ours.strip()


# Losses: torchtune's formulas, in its own terms.


def per_token(logprobs, ref, advantages, kl_coeff):
    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
    return -((logprobs - logprobs.detach()).exp() * advantages[:, None] - kl_coeff * kl)


@pytest.mark.parametrize("kind", ["GRPOSimpleLoss", "GRPOLoss"])
def test_translated_loss_equals_torchtunes_on_an_update_of_one_step(kind, tmp_path):
    overrides = [f"loss._component_=torchtune.dev.grpo.loss.{kind}", "loss.kl_coeff=0.3"]
    options = loaded(translated(tmp_path, SYNC, *overrides))["loss"]
    draw = torch.Generator().manual_seed(0)
    logprobs, ref = torch.randn(2, 5, 7, generator=draw, dtype=torch.float64)
    advantages = torch.randn(5, generator=draw, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 1, 3])[:, None]
    logprobs.requires_grad_()
    tokens = per_token(logprobs, ref, advantages, 0.3)
    theirs = masked_mean(tokens, mask, dim=1).mean() if kind == "GRPOSimpleLoss" else masked_mean(tokens, mask)
    ours = grpo_loss(logprobs, advantages, mask, ref_logprobs=ref, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)  # masked_mean adds 1e-8 to the number of tokens
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-15)


def test_translate_names_rewards_after_their_components(tmp_path):
    given = OmegaConf.create(SYNC)
    kinds = ("mine.FormatReward", "mine.FormatReward", "mine.batched", "other.HTMLTagsReward")
    given.reward_functions = [{"_component_": kind, "n": n} for n, kind in enumerate(kinds)]
    OmegaConf.save(given, tmp_path / "theirs.yaml")
    rewards = loaded(translate(tmp_path / "theirs.yaml", 1))["rewards"]
    assert {name: reward["n"] for name, reward in rewards.items()} == {
        "format": 0,
        "format_2": 1,
        "batched": 2,
        "htmltags": 3,
    }


@pytest.mark.slow
def test_translated_config_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.grpo.length", lambda completion, answer: len(completion), raising=False)
    given = OmegaConf.create(SYNC)
    given.output_dir, given.num_steps, given.dataset.source = str(tmp_path), 1, "recipes/assets/gsm8k_sample.jsonl"
    given.reward_functions = [{"_component_": "recipes.grpo.length"}]
    OmegaConf.save(given, tmp_path / "theirs.yaml")
    cfg = load_config(OmegaConf.create(translate(tmp_path / "theirs.yaml", 1).yaml("Translated.")))
    cfg.test_problems.size, cfg.sampling.max_new_tokens, cfg.self_check = 1, 4, False
    recipe = GRPORecipe(cfg)
    recipe.setup()
    train(recipe)
    assert recipe.history[0]["kl"] == 0.0 and len(recipe.problems) == 18
    assert recipe.prompts[0].tolist() == [257, *recipe.problems[0].prompt.encode()]
