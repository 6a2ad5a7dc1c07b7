"""Tests of the recipe's options: defaults, command lines, mistakes, and every YAML in recipes/configs."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from functools import cache
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from checkpoints_hf import PUBLISHED
from omegaconf import DictConfig, OmegaConf
from recipe_runs import LORA, TINY, load, make
from torch import nn
from torchtune.config._utils import _get_component_from_path

from flexpg.training.components import component
from flexpg.training.config import COMPONENTS, SETUP_ERRORS, GRPOConfig, LossConfig, load_config
from flexpg.training.models import build_model, library_of
from flexpg.training.reward_calls import Group
from flexpg.training.rewards import build_rewards, score
from flexpg.training.tasks import Problem
from recipes.grpo import recipe_main

ROOT = Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted(ROOT.glob("recipes/configs/*.yaml"))}
PARAMETERS = {  # of the published checkpoints, tied embeddings counted once
    "qwen2_5_0_5B": 494_032_768,
    "qwen2_5_3B": 3_085_938_688,
    "llama3_2_1B": 1_235_814_400,
    "llama3_2_3B": 3_212_749_824,
}
OF_TRANSFORMERS = {  # likewise; of Qwen3.5 0.8B with its vision tower, whose size is not published apart
    "qwen3_0_6B_full": 596_049_920,
    "qwen3_4B_lora": 4_022_468_096,
    "qwen3_5_0_8B_full": None,
    "gemma3_1B_full": 999_885_952,
    "gemma3_4B_lora": 4_300_079_472,
    "llama3_2_1B_transformers_full": 1_235_814_400,
    "gpt_oss_20b_lora": 20_914_757_184,
}
GPU_CONFIGS = [*(f"{size}_{kind}" for size in PARAMETERS for kind in ("full", "lora")), *OF_TRANSFORMERS]
every_config = pytest.mark.parametrize("name", PATHS)
every_gpu_config = pytest.mark.parametrize("name", GPU_CONFIGS)


def table(rows: list[tuple[str, ...]]) -> list[Any]:
    return [pytest.param(given, words, id=given) for given, *words in rows]


def assert_one_line(message: str, words: list[str]) -> None:
    assert message and "\n" not in message and all(word in message for word in words), message


# Merging options into the defaults.

OPTION_ERRORS = [
    ("groupsize=4", "groupsize: ", "Did you mean: 'group_size'?"),
    ("sampling.temprature=1", "sampling.temprature: ", "Did you mean: 'temperature'?"),
    ("loss.epsilonn=0.1", "loss.epsilonn: ", "Did you mean one of: 'epsilon', 'epsilon_high'?"),
    ("num_steps=ten", "num_steps: Value 'ten' of type 'str' could not be converted to Integer"),
    ("num_steps=null", "num_steps: Incompatible value 'None'"),
    ("sharing=maybe", "sharing: Invalid value 'maybe', expected one of ['auto', True, False]"),
    ("loss.loss_type=ppo", "loss.loss_type: Invalid value 'ppo', expected one of ['grpo', "),
    ("seed=${nowhere}", "Interpolation key 'nowhere' not found"),
    ("rewards=null", "rewards: field 'rewards' is not Optional"),
    ("rewards.correct=1", "rewards.correct: Value 1 (int) is incompatible with"),
    ("loss=null", "loss must be a mapping, got null; leave it out for the default"),
    ("seed=99999999999999999999", "seed must be at least 0 and below 2**63, got 99999999999999999999"),
    ("seed=-1", "seed must be at least 0 and below 2**63, got -1"),
    ("model=5", "model must be a mapping, got 5"),
    ("rewards=my_rewards.f", "rewards must be a mapping, got 'my_rewards.f'; options of it are written rewards.NAME="),
    ("model._component_=null", "model must have a _component_, got {'_component_': None, "),
    ("lr=1e-5", "lr: Key 'lr' not in 'GRPOConfig'; did you mean optimizer.lr?"),
    ("top_k=3", "top_k: Key 'top_k' not in 'GRPOConfig'; did you mean sampling.top_k?"),
    ("test_reward._component_=null", "rewards and test_reward must be set, unless there is an environment"),
    ("num_steps=0", "num_steps must be at least 1, got 0"),
    ("keep_last_n_checkpoints=0", "keep_last_n_checkpoints at least 1, got 0 and 0"),
    ("log_samples_every_n_steps=-1", "log_samples_every_n_steps must be at least 0 (0 for never), got -1"),
    ("group_size=1", "group_size must be at least 2, got 1: a group of one has no advantage"),
    ("clip_grad_norm=-1", "clip_grad_norm must be positive (.inf for no clipping), got -1.0"),
    ("sampling.temperature=0", "sampling.temperature must be positive for rollouts, got 0.0"),
    ("sampling.top_p=1.1", "top_p must be above 0 and at most 1, got 1.1"),
    ("loss.epsilon=2", "loss: epsilon must be between 0 and 1 and epsilon_high at least 0, got 2.0 and 0.28"),
    ("loss.beta=-0.1", "loss: beta must be at least 0, got -0.1"),
]


@pytest.mark.parametrize(("given", "words"), table(OPTION_ERRORS))
def test_load_config_reports_a_mistake_in_one_line(given, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        load(TINY, tmp_path, given)
    assert_one_line(str(caught.value), words)


def test_component_that_is_named_replaces_the_default(tmp_path):
    schedule = load(TINY, tmp_path, "lr_scheduler._component_=torch.optim.lr_scheduler.LinearLR").lr_scheduler
    assert schedule == {"_component_": "torch.optim.lr_scheduler.LinearLR"}  # the default's factor is gone
    given = OmegaConf.load(TINY)
    given.optimizer = "torch.optim.SGD"  # `optimizer=torch.optim.SGD` on the command line, with none in the YAML
    assert load_config(given).optimizer == {"_component_": "torch.optim.SGD"}


def test_single_option_of_a_component_keeps_the_rest_of_the_default(tmp_path):
    cfg = load(TINY, tmp_path, "lr_scheduler.factor=0.5", "metric_logger.filename=log.txt")
    assert cfg.lr_scheduler == {"_component_": "torch.optim.lr_scheduler.ConstantLR", "factor": 0.5}
    assert cfg.metric_logger == {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": f"{tmp_path}/logs",
        "filename": "log.txt",
    }
    assert cfg.loss == asdict(LossConfig())  # of a YAML that does not name them


def test_qwen_config_takes_a_local_file_as_test_problems(tmp_path):
    """The YAML names a split of the hub's data; a local file is one split, whatever it is called."""
    cfg = load(str(PATHS["qwen2_5_0_5B_full"]), tmp_path, "test_problems.source=recipes/assets/gsm8k_sample.jsonl")
    assert cfg.test_problems.split == "test"
    problems = component(cfg, "test_problems")
    assert len(problems) == 20
    assert problems[0].prompt.startswith("Natalia sold clips to 48 of her friends in April")
    assert problems[0].prompt.endswith("?\nPlease reason step by step, and put your final answer within \\boxed{}.")


# Mistakes that setup finds.

SETUP_MISTAKES = [
    ("minibatches=3", "prompts_per_step must be a multiple of minibatches", "got 8 in 3 on 1 ranks"),
    ("rewards.correct.digits=3", "reward 'correct' must be ", "unexpected keyword argument 'digits'"),
    ("rewards.correct.weight=much", "weight of reward 'correct' must be a finite number, got 'much'"),
    ("test_reward._component_=flexpg.training.tasks.no_such_reward", "reward 'test_reward'", "no_such_reward"),
    ("test_reward._component_=math.pi", "reward 'test_reward' must be a reward function with options {}"),
    ("checkpointer.model_type=LAMA3", "checkpointer: ", "LAMA3"),
    ("checkpointer.checkpoint_files=[nothing.safetensors]", "checkpointer: ", "nothing.safetensors"),
    ("checkpointer.checkpoint_dir=recipes/nowhere", "checkpointer: ", "recipes/nowhere"),
    ("output_dir=README.md", "output_dir must be a folder, got the file README.md"),
    ("context_parallel=0", "context_parallel must be at least 1, got 0"),
    ("model._component_=torchtune.models.no_such_model", "model: ", "no_such_model"),
    (
        "model.embed_dim=64",
        "does not fit `model`: ",
        "is [260, 128] in it and [260, 64] in the model",
    ),
    ("model.num_heads=8 model.num_kv_heads=4", "it has (4, 2) query and key/value heads, the model (8, 4)"),
    ("model.attn_dropout=0.1", "dropout must be 0, got 0.1"),
    (f"{' '.join(LORA)} model.use_dora=true", "model must not have use_dora or quantize_base"),
    ("model.max_seq_len=128", "train_problems, problem 0: ", "max_seq_len"),
    ("model.vocab_size=40", "train_problems, problem 0: ", "vocabulary"),
    ("sampling.max_new_tokens=5000", "train_problems, problem 0: ", "max_seq_len"),
    ("max_tokens=200", "train_problems, problem 0: prompt and completion need ", "more than max_tokens=200"),
    ("max_cache_tokens=200", "train_problems, problem 0: ", "more than max_cache_tokens=200"),
    ("train_problems.size=5", "train_problems must have at least 8 problems, got 5"),
    ("train_problems.splitt=train", "train_problems: ", "unexpected keyword argument 'splitt'", "you mean"),
    ("tokenizer._component_=torchtune.models.llama3.llama3_tokenizer tokenizer.path=/no", "tokenizer: ", "/no"),
    ("test_problems.size=0", "test_problems must have at least 1 problem, got 0"),
    ("test_problems.size=many", "test_problems: TypeError: 'str' object", "(given split='test', size='many')"),
    ("environment=my.Env rewards.environment.weight=1", "rewards must not have the name 'environment'"),
    ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
    ("optimizer.weight_decay=null", "optimizer: TypeError: '<=' not supported ", "(given weight_decay=None)"),
    ("optimizer.lr=high", "optimizer: TypeError: '<=' not supported ", "'float' and 'str' (given lr='high')"),
    ("lr_scheduler.factorr=2", "lr_scheduler: ", "factorr"),
    (
        "lr_scheduler._component_=torch.optim.lr_scheduler.ReduceLROnPlateau",
        "lr_scheduler must be a scheduler whose step() needs no argument, got ReduceLROnPlateau: ",
        "'metrics'",
    ),
    ("dtype=fp32 param_dtype=bf16", "param_dtype must not be bf16 if dtype is fp32"),
    ("device=gpu", "device=gpu, dtype=fp32: "),
]


@pytest.mark.parametrize(("given", "words"), table(SETUP_MISTAKES))
def test_setup_reports_a_mistake_before_anything_is_written(given, words, tmp_path):
    with pytest.raises(SETUP_ERRORS) as caught:
        make(tmp_path / "out", "train_problems.size=16", "test_problems.size=8", *given.split())
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_home_is_expanded_in_paths_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["output_dir=~/runs/a", "checkpointer.checkpoint_dir=~/base", "test_problems.source=~/b.jsonl"]
    cfg = load(TINY, tmp_path, *options, "test_problems.template=~/{q}", "metric_logger.log_dir=${output_dir}/logs")
    assert cfg.output_dir == cfg.checkpointer.output_dir == f"{tmp_path}/runs/a"
    assert (
        cfg.metric_logger.log_dir == f"{tmp_path}/runs/a/logs" and cfg.checkpointer.checkpoint_dir == f"{tmp_path}/base"
    )
    assert cfg.test_problems.source == f"{tmp_path}/b.jsonl" and cfg.test_problems.template == "~/{q}"


def test_component_error_names_existing_inputs_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1+1"}\n')
    options = {"template": str(rows), "answer": "{x}", "subset": str(tmp_path), "partition": "all"}
    described = {"_component_": "flexpg.training.tasks.problems", "source": str(rows), **options}
    cfg = OmegaConf.create({"train_problems": described})
    with pytest.raises(ValueError, match=rf"got 'all' \(given source={rows}, subset={tmp_path}\)$"):
        component(cfg, "train_problems")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_cuda_device_without_a_gpu_is_reported(tmp_path):
    with pytest.raises(ValueError, match="device must exist, got cuda on a machine without a GPU; set device=cpu"):
        make(tmp_path, "device=cuda")


# Command lines.

COMMAND_ERRORS = [
    ("--config nowhere.yaml", "No such file or directory: ", "nowhere.yaml"),
    ("--config broken.yaml", "while parsing a flow ", "broken.yaml", "line 2"),
    ("--config list.yaml", "--config must be a YAML mapping"),
    (
        "--config empty.yaml",
        "missing option metric_logger.log_dir, ",
        " model, ",
        " sampling.max_new_tokens, ",
        " train_problems",
    ),
    ("--config TINY output_dir", "key=value"),
    ("--config TINY --seed 3", "Additional flag arguments not supported: ['--seed']"),
    ("--config TINY ~sampling", "missing option sampling.max_new_tokens"),
    ("--config TINY groupsize=4", "groupsize: ", "Did you mean: 'group_size'?"),
    ("--config TINY minibatches=3", "prompts_per_step must be a multiple of minibatches"),
]


def run_command(given: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Return what the recipe's command line exits with."""
    for name, content in {"broken": "model: [\n", "list": "- 1\n", "empty": ""}.items():
        (folder / f"{name}.yaml").write_text(content)
    arguments = [str(folder / word) if (folder / word).exists() else word for word in given.split()]
    arguments = [word.replace("TINY", TINY) for word in arguments]
    if "TINY" in given:
        arguments.append(f"output_dir={folder}/out")
    monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        recipe_main()
    assert not (folder / "out").exists()
    return caught.value.code


@pytest.mark.parametrize(("given", "words"), table(COMMAND_ERRORS))
def test_command_line_mistake_ends_with_one_error_line(given, words, tmp_path, monkeypatch):
    message = str(run_command(given, tmp_path, monkeypatch))
    assert message.startswith("error: ")
    assert_one_line(message, words)


@pytest.mark.parametrize("given", ["", "--config", "--confg tiny.yaml"])
def test_command_line_without_a_config_prints_the_usage(given, tmp_path, monkeypatch, capsys):
    assert run_command(given, tmp_path, monkeypatch) == 2
    assert capsys.readouterr().err.startswith("usage: grpo.py [-h] --config CONFIG")


# The configurations.


def resolved(name: str) -> Any:
    return load_config(OmegaConf.load(PATHS[name]))


def header(name: str) -> list[str]:
    return [line[1:].strip() for line in PATHS[name].read_text().split("\n\n")[0].splitlines()]


@cache
def meta_model(name: str) -> nn.Module:
    """Build a configuration's model; one of transformers from the config that the published checkpoint has."""
    cfg = resolved(name)
    with TemporaryDirectory() as folder:
        if name in PUBLISHED:
            PUBLISHED[name].save_pretrained(folder)
            cfg.model.path = folder
        return build_model(cfg, torch.bfloat16, torch.float32)


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_there_is_a_config_for_every_model():
    on_cpu = {f"{name}_cpu" for name in ("tiny", "tiny_lora", "tiny_transformers", "tiny_tools", "gsm8k_bytes")}
    assert set(PATHS) == on_cpu | set(GPU_CONFIGS)
    assert set(OF_TRANSFORMERS) == set(PUBLISHED)


@every_config
def test_config_sets_no_option_to_its_default(name):
    """A YAML shows what differs. A component is one option, because naming it replaces the default as a whole."""

    def compare(config: DictConfig, default: DictConfig) -> None:
        for key, value in config.items():
            if key in ("sampling", "loss"):
                compare(value, default[key])
            elif not OmegaConf.is_missing(default, key):
                assert value != default[key], key

    compare(OmegaConf.load(PATHS[name]), OmegaConf.structured(GRPOConfig))


@every_config
def test_config_components_exist_and_take_their_arguments(name):
    cfg = resolved(name)
    for option in COMPONENTS:
        if cfg[option] is None:
            continue
        of_the_recipe = ("_component_", "weight", "max_turns", "max_length", "timeout_s")
        arguments = {key: value for key, value in cfg[option].items() if key not in of_the_recipe}
        signature(_get_component_from_path(cfg[option]._component_)).bind_partial(**arguments)
    assert (cfg.checkpointer is None) == (cfg.model._component_ == "flexpg.training.causal_lm.model")
    assert (cfg.environment is None) == bool(cfg.rewards) == bool(cfg.test_reward)
    assert not cfg.rewards or len(build_rewards(cfg.rewards)) == len(cfg.rewards)
    assert cfg.prompts_per_step % cfg.minibatches == 0
    assert cfg.max_cache_tokens > cfg.group_size * cfg.sampling.max_new_tokens  # a group is sampled at once


@every_config
def test_config_header_names_the_commands_of_this_file(name):
    commands = [line for line in header(name) if line.startswith("tune run")]
    processes = ["1", "8"] if name in GPU_CONFIGS else ["1"]
    command = "tune run --nproc_per_node {} recipes/grpo.py --config recipes/configs/{}.yaml"
    assert commands[: len(processes)] == [command.format(number, name) for number in processes]
    assert all(line.split("--config ")[1].split()[0] == f"recipes/configs/{name}.yaml" for line in commands)
    if name in GPU_CONFIGS:
        cfg = resolved(name)
        (download,) = [line for line in header(name) if line.startswith("tune download")]
        folder = cfg.model.path if cfg.checkpointer is None else cfg.checkpointer.checkpoint_dir
        assert f"--output-dir {folder}" in download
        assert cfg.tokenizer.path.startswith(folder)


@every_gpu_config
def test_learning_rate_warms_up_and_stays(name):
    cfg = resolved(name)
    optimizer = component(cfg, "optimizer", [nn.Parameter(torch.zeros(1))])
    scheduler = component(cfg, "lr_scheduler", optimizer)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.1 * cfg.optimizer.lr)
    assert rates[:11] == sorted(set(rates[:11]))
    assert rates[10:] == pytest.approx([cfg.optimizer.lr] * 10)


@every_gpu_config
def test_reward_prefers_a_correct_answer_in_a_box(name):
    rewards = build_rewards(resolved(name).rewards)
    values = {"48 + 24 is \\boxed{72}.": 1.1, "so it is 72": 1.0, "so it is \\boxed{71}": 0.1, "I do not know": 0.0}
    for completion, value in values.items():
        (scores,) = score(rewards, [Group(Problem("", "72"), [completion])])
        assert scores.total.item() == pytest.approx(value)


@pytest.mark.parametrize("size", PARAMETERS)
def test_model_on_meta_device_has_the_published_number_of_parameters(size):
    base, lora = meta_model(f"{size}_full"), meta_model(f"{size}_lora")
    assert all(parameter.is_meta for parameter in (*base.parameters(), *lora.parameters()))
    assert count(base.parameters()) == PARAMETERS[size]
    rank = resolved(f"{size}_lora").model.lora_rank
    adapted = re.compile(r"layers\.\d+\.(attn\.(q_proj|v_proj|output_proj)|mlp\.w[123])")
    sizes = [sum(module.weight.shape) for path, module in base.named_modules() if adapted.fullmatch(path)]
    assert len(sizes) == 6 * len(base.layers)
    trained = count(parameter for parameter in lora.parameters() if parameter.requires_grad)
    assert trained == rank * sum(sizes) == count(lora.parameters()) - PARAMETERS[size]
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_transformers_model_has_the_published_number_of_parameters(name):
    model, published = meta_model(name), OF_TRANSFORMERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    base = count(p for path, p in model.named_parameters() if "lora_" not in path)
    if published is not None:
        assert base == published
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32} | ({False: torch.bfloat16} if False in dtypes else {})
    frozen = {path.split(".")[1] for path, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model"} if name.endswith("lora") else frozen <= {"visual"}


@every_gpu_config
def test_memory_estimate_is_the_sum_that_the_docs_describe(name):
    cfg, model = resolved(name), meta_model(name)
    shape = library_of(model).shape_of(model)
    trained = count(p for p in model.parameters() if p.requires_grad)
    state = 2 * (count(model.parameters()) - trained) + 18 * trained
    cache = 4 * shape.num_attention_layers * shape.num_kv_heads * shape.head_dim * cfg.max_cache_tokens
    width = shape.embed_dim
    work = cfg.max_tokens * (4 * shape.num_layers * width + 8 * shape.intermediate_dim + 40 * width)
    estimate = round((state + max(cache, work + 12 * 1024 * shape.vocab_size)) / 1e9)
    assert f"Estimated memory on one GPU: {estimate} GB (docs/recipes.md)." in header(name)
    (row,) = re.findall(rf"^\| {name} \|.*", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    assert f"| {trained:,}" in row and row.endswith(f"| {estimate} GB |")
    assert re.search(r"max_cache_tokens: .* ([\d.]+) GB", PATHS[name].read_text())[1] == f"{cache / 1e9:.1f}"
