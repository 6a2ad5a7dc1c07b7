"""Every configuration keeps its word: it parses, names what exists, builds the published model, and is explained."""

import re
from dataclasses import fields
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import MultiHeadAttention
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from flexpg import SamplingParams, grpo_loss

ROOT = Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted(ROOT.glob("recipes/configs/*.yaml"))}
PARAMETERS = {  # of the published checkpoints, tied embeddings counted once
    "qwen2_5_0_5B": 494_032_768,
    "qwen2_5_3B": 3_085_938_688,
    "llama3_2_1B": 1_235_814_400,
    "llama3_2_3B": 3_212_749_824,
}
MODELS = [f"{size}_{kind}" for size in PARAMETERS for kind in ("full", "lora")]
KEYS = list(OmegaConf.load(PATHS["qwen2_5_3B_full"]))
DOCS = (ROOT / "docs/recipes.md").read_text()

every_config = pytest.mark.parametrize("name", PATHS)
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def resolved(name):
    cfg = OmegaConf.load(PATHS[name])
    OmegaConf.resolve(cfg)
    return cfg


def header(name):
    return [line[1:].strip() for line in PATHS[name].read_text().split("\n\n")[0].splitlines()]


def model_of(name):
    with torch.device("meta"):
        return config.instantiate(resolved(name).model)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def arguments(component):
    return {key: value for key, value in component.items() if key != "_component_"}


def test_there_is_one_for_every_model():
    assert set(PATHS) == {*MODELS, "tiny_cpu", "tiny_lora_cpu", "gsm8k_bytes_cpu"}


@every_config
def test_the_commands_at_the_top_name_the_file_itself(name):
    commands = [line for line in header(name) if line.startswith("tune run")]
    processes = ["1", "8"] if name in MODELS else ["1"]
    command = "tune run --nproc_per_node {} recipes/grpo.py --config recipes/configs/{}.yaml"
    assert commands[: len(processes)] == [command.format(number, name) for number in processes]
    assert all(line.split("--config ")[1].split()[0] == f"recipes/configs/{name}.yaml" for line in commands)


@every_model
def test_what_is_read_is_what_the_command_at_the_top_downloads(name):
    cfg = resolved(name)
    (download,) = [line for line in header(name) if line.startswith("tune download")]
    folder = re.search(r"--output-dir (\S+)", download)[1]
    assert folder.endswith(download.split()[2].split("/")[1])
    assert cfg.checkpointer.checkpoint_dir == folder
    files = [value for key, value in cfg.tokenizer.items() if key in ("path", "merges_file")]
    assert files and all(file.startswith(folder + "/") for file in files)


@every_model
def test_it_says_that_no_gpu_has_run_it(name):
    assert any("has not been run on a GPU yet" in line for line in header(name))


@every_config
def test_all_have_the_same_keys_in_the_same_order(name):
    assert list(OmegaConf.load(PATHS[name])) == KEYS


@every_config
def test_every_component_and_function_exists_and_takes_its_arguments(name):
    cfg = resolved(name)
    components = [value for value in cfg.values() if isinstance(value, DictConfig) and "_component_" in value]
    assert len(components) == 9
    for component in components:
        signature(_get_component_from_path(component._component_)).bind_partial(**arguments(component))
    for given in (*cfg.rewards.values(), {**cfg.test_reward, "weight": 1.0}):
        options = {key: value for key, value in given.items() if key not in ("function", "weight")}
        signature(resolve_name(given["function"])).bind("completion", "answer", **options)
        assert isinstance(given["weight"], float)
    signature(grpo_loss).bind_partial(**cfg.loss)


@every_config
def test_the_prompts_of_a_step_can_be_shared_out(name):
    cfg = resolved(name)
    assert cfg.prompts_per_step % cfg.minibatches == 0
    assert cfg.prompts_per_step // cfg.minibatches >= (8 if name in MODELS else 2)


@every_config
def test_a_prompt_s_whole_group_fits_the_cache(name):
    cfg = resolved(name)
    assert cfg.max_cache_tokens > cfg.group_size * cfg.sampling.max_new_tokens


@every_model
def test_the_learning_rate_warms_up_and_stays(name):
    cfg = resolved(name)
    optimizer = config.instantiate(cfg.optimizer, [nn.Parameter(torch.zeros(1))])
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.1 * cfg.optimizer.lr)
    assert rates[:11] == sorted(set(rates[:11]))
    assert rates[10:] == pytest.approx([cfg.optimizer.lr] * 10)


@every_model
def test_a_right_answer_in_a_box_gets_all_of_the_reward_and_no_number_none(name):
    cfg = resolved(name)

    def reward(completion):
        total = 0.0
        for given in cfg.rewards.values():
            options = {key: value for key, value in given.items() if key not in ("function", "weight")}
            total += given.weight * resolve_name(given.function)(completion, "72", **options)
        return total

    assert reward("48 / 2 = 24, and 48 + 24 is \\boxed{72}.") == pytest.approx(1.1)
    assert reward("so it is 72") == 1.0
    assert reward("so it is \\boxed{71}") == pytest.approx(0.1)
    assert reward("I do not know") == 0.0


@every_model
def test_the_prompt_is_the_question_and_how_to_answer(name):
    given = OmegaConf.to_container(resolved(name).train_problems)
    problems = config.instantiate(OmegaConf.create({**given, "source": "recipes/assets/gsm8k_sample.jsonl"}))
    prompt = problems[0].prompt
    assert prompt.startswith("Natalia sold clips to 48 of her friends in April")
    assert prompt.endswith("?\nPlease reason step by step, and put your final answer within \\boxed{}.")


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_model_has_the_parameters_of_the_published_one_and_lora_adds_adapters(size):
    base, lora = model_of(f"{size}_full"), model_of(f"{size}_lora")
    assert count(base.parameters()) == PARAMETERS[size]
    rank = resolved(f"{size}_lora").model.lora_rank
    adapted = re.compile(r"layers\.\d+\.(attn\.(q_proj|v_proj|output_proj)|mlp\.w[123])")
    pairs = [sum(m.weight.shape) for path, m in base.named_modules() if adapted.fullmatch(path)]
    assert len(pairs) == 6 * len(base.layers)
    assert count(lora.parameters()) == PARAMETERS[size] + rank * sum(pairs)
    set_trainable_params(lora, get_adapter_params(lora))
    trained = count(parameter for parameter in lora.parameters() if parameter.requires_grad)
    assert trained == rank * sum(pairs)
    assert 0.02 < trained / count(lora.parameters()) < 0.07


@every_model
def test_the_memory_at_the_top_and_in_the_docs_is_the_sum_that_the_docs_give(name):
    cfg, model = resolved(name), model_of(name)
    adapters = count(get_adapter_params(model).values())
    base = count(model.parameters()) - adapters
    kept = 2 * base + 18 * adapters if adapters else 18 * base
    attn = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    cache = 4 * len(model.layers) * attn.num_kv_heads * attn.head_dim * cfg.max_cache_tokens
    vocabulary, width = model.tok_embeddings.weight.shape
    inner = model.layers[0].mlp.w1.out_dim if adapters else model.layers[0].mlp.w1.out_features
    work = cfg.max_tokens * (4 * len(model.layers) * width + 8 * inner + 40 * width) + 12 * 1024 * vocabulary
    (line,) = [line for line in header(name) if "estimate" in line]
    estimate = round((kept + max(cache, work)) / 1e9)
    assert int(re.search(r"(\d+) GB", line)[1]) == estimate
    (row,) = re.findall(rf"^\| {name} \|.*", DOCS, re.MULTILINE)
    assert f"| {adapters or base:,}" in row and row.endswith(f"| {estimate} GB |")
    text = PATHS[name].read_text()
    assert re.search(r"max_cache_tokens: .* ([\d.]+) GB", text)[1] == f"{cache / 1e9:.1f}"


def test_every_key_is_explained_and_nothing_else_is():
    keys = {f"sampling.{field.name}" for field in fields(SamplingParams)} - {"sampling.stop_tokens"}  # the tokenizer's
    for name in PATHS:
        cfg = OmegaConf.load(PATHS[name])
        keys |= set(cfg) | {f"loss.{key}" for key in cfg.loss}
        keys |= {
            f"rewards.NAME.{key}" for given in cfg.rewards.values() for key in given if key in ("function", "weight")
        }
        keys |= {f"test_reward.{key}" for key in cfg.test_reward if key == "function"}
    table = DOCS.partition("## Every key")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == sorted(keys)
