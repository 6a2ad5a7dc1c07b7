"""Translation of a YAML of torchtune's GRPO recipes into one of recipes/grpo.py.

Every key of a file becomes an option, or a comment that says why not.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexpg.training.config import load_config
from flexpg.training.dotpaths import load_dotpath
from flexpg.training.tasks.dataset import partition_numbers
from flexpg.training.torchtune_keys import DROPPED, IF_SET, TorchtuneKeys, Translation

# The prompt of torchtune's datasets, which is that of DeepSeek-R1-Zero (arXiv 2501.12948, table 1).
PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think></think> and <answer></answer> tags, respectively, i.e., <think>"
    "reasoning process here</think> <answer>answer here</answer>. User: {question}. Assistant: <think>"
)
GSM8K = "flexpg.training.tasks.gsm8k"
GSM8K_ROWS = {"train": 7473, "test": 1319}
LOSSES = {  # torchtune's class: loss_type
    **dict.fromkeys(("GRPOSimpleLoss", "GRPOWithChunkedOutputLoss", "LinearGRPOLoss"), "grpo"),
    "GRPOLoss": "dapo",
}


def translate(path: Path, ranks: int | None = None) -> Translation:
    """Translate a YAML of torchtune's GRPO recipes.

    Args:
        path: The YAML.
        ranks: Processes that torchtune's sync recipe runs on, each with prompts of its own; None for one, with a note.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a YAML of these recipes, or would not become a valid configuration.
    """
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a YAML: {error}") from error
    if not isinstance(cfg, DictConfig) or not {"grpo_samples", "inference"} & set(cfg):
        raise ValueError(
            f"{path} must be a configuration of torchtune's GRPO, with grpo_samples or inference.group_size"
        )
    keys, out = TorchtuneKeys(cfg), Translation()
    _model(keys, out)
    _data(keys, out)
    _rewards(keys, out)
    _step(keys, out, ranks)
    _update(keys, out, ranks or 1)
    _others(keys, out)
    _check_imports(out)
    load_config(OmegaConf.create(out.options))
    return out


def _model(keys: TorchtuneKeys, out: Translation) -> None:
    out.set("output_dir", keys.get("output_dir"), keys.path("output_dir"))
    for name in ("tokenizer", "model", "checkpointer"):
        out.set(name, keys.component(name), keys.path(name))
    checkpointer = out.options["checkpointer"]
    if "recipe_checkpoint" in checkpointer:
        found = out.dropped if checkpointer.pop("recipe_checkpoint") is None else out.notes
        found[f"{keys.path('checkpointer')}.recipe_checkpoint"] = "optimizer states of torchtune are not read"
    reference = keys.get("ref_checkpointer", {})
    if reference.get("checkpoint_dir", checkpointer.get("checkpoint_dir")) != checkpointer.get("checkpoint_dir"):
        out.notes[keys.path("ref_checkpointer")] = "the reference is the model before training, no other checkpoint"
    elif reference:
        out.dropped[keys.path("ref_checkpointer")] = "the reference is the model before training, if loss.beta > 0"
    out.set("device", keys.get("device", "cuda"), keys.path("device"))
    dtype = keys.get("dtype", "bf16")
    out.set("dtype", dtype, keys.path("dtype"))
    out.set("param_dtype", dtype, "as in torchtune; fp32 does not lose small steps, and is the default here")
    out.set("compile", keys.get("compile", False), keys.path("compile"))
    name = "enable_activation_checkpointing"
    out.set("activation_checkpointing", keys.get(name, False), keys.path(name))
    if (name := "enable_activation_offloading") in keys.paths:
        out.set("activation_offloading", keys.get(name), keys.path(name))
    if (seed := keys.get("seed")) is not None:
        out.set("seed", seed, keys.path("seed"))
    elif "seed" in keys.paths:
        out.dropped[keys.path("seed")] = "the seed is 0, so that runs can be repeated"


def _data(keys: TorchtuneKeys, out: Translation) -> None:
    """Translate the dataset, and choose test problems, which torchtune's recipes do not have."""
    dataset = keys.component("dataset")
    known = {"_component_", "source", "split", "name", "partition"}
    out.set("prompt_format", "bos", "as in torchtune's datasets")
    if not re.fullmatch(r"torchtune\.dev\.\w+\.gsm8k\.gsm8k_dataset", dataset["_component_"]) or set(dataset) - known:
        adapter: dict[str, Any] = {
            "_component_": "flexpg.training.tasks.torchtune_dataset",
            "tokenizer": "${tokenizer}",
        }
        shared = {"dataset": "${train_problems.dataset}", "size": 100}
        out.set("train_problems", adapter | {"dataset": dataset, "skip": 100}, "dataset")
        out.set("test_problems", adapter | shared, "torchtune has none")
        out.notes["test_problems"] = (
            "torchtune does not evaluate; here the first 100 items are not trained on, for that"
        )
        return
    options: dict[str, Any] = {"subset" if name == "name" else name: value for name, value in dataset.items()}
    fixed: dict[str, Any] = {"_component_": GSM8K, "shots": 0, "template": PROMPT}
    out.set("train_problems", options | fixed, "dataset; the same prompts")
    held_out: dict[str, Any] = {"split": "test", "size": 256, "template": "${train_problems.template}"}
    rest = {name: value for name, value in options.items() if name != "partition"}
    out.set("test_problems", rest | fixed | held_out, "torchtune has none")


def _rewards(keys: TorchtuneKeys, out: Translation) -> None:
    functions = keys.get("reward_functions")
    rewards: dict[str, dict[str, Any]] = {}
    out.set("rewards", rewards, keys.path("reward_functions"))
    if not functions:
        functions = [{"_component_": "torchtune.dev.rl.rewards.batched_rewards"}]  # fixed in the sync recipe
    elif not keys.is_async:
        out.notes["reward_functions"] = "torchtune's sync recipe ignores them and uses torchtune.dev.rl.rewards."
        out.notes["reward_functions"] += "batched_rewards; choose"
    for function in functions:
        kind = str(function["_component_"]).rpartition(".")[2].removesuffix("Reward")
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower()
        rewards[f"{name}_{len(rewards) + 1}" if name in rewards else name] = function
    out.set("test_reward", {"_component_": "flexpg.training.rewards.math_correct"}, "torchtune has none")


def _step(keys: TorchtuneKeys, out: Translation, ranks: int | None) -> None:
    out.set("num_steps", keys.get("num_steps"), keys.path("num_steps"))
    group, batch = keys.get("grpo_samples"), keys.get("batch_size", 1)
    if keys.is_async:  # every training worker draws batch_size rollouts
        batch = max(1, math.ceil(batch * keys.get("num_training_workers", 1) / group))
        source = f"{keys.path('batch_size')} x {keys.path('num_training_workers')} rollouts"
    else:
        batch, source = batch * (ranks or 1), f"{keys.path('batch_size')} x {ranks or 1} ranks"
        if ranks is None:
            out.notes["prompts_per_step"] = "torchtune multiplies batch_size by its processes; give them by --ranks"
    out.set("prompts_per_step", batch, source)
    out.set("group_size", group, keys.path("grpo_samples"))
    out.set("num_iterations", keys.get("ppo_epochs", 1), keys.path("ppo_epochs"))
    names = {"max_new_tokens": "max_generated_tokens", "temperature": "temperature", "top_k": "top_k"}
    sampling = {ours: keys.get(theirs) for ours, theirs in names.items()}
    given = {name: value for name, value in sampling.items() if value is not None}
    out.set("sampling", given, ", ".join(map(keys.path, names.values())))


def _update(keys: TorchtuneKeys, out: Translation, ranks: int) -> None:
    loss, passes = keys.component("loss"), out.options["num_iterations"]
    kind = loss.pop("_component_").rpartition(".")[2]
    beta, epsilon = loss.pop("kl_coeff", 0.1), loss.pop("epsilon", 0.1)  # torchtune's defaults
    options = {"loss_type": LOSSES.get(kind, "grpo"), "beta": beta, "epsilon": epsilon, "epsilon_high": None}
    out.set("loss", options, f"{keys.path('loss')}: {kind}")
    _drop(out, {f"{keys.path('loss')}.{name}": f"loss.{name}" for name in loss})
    if kind not in LOSSES:
        out.notes["loss"] = (
            f"no loss here equals {kind}; choose loss.loss_type, or name your own loss as its _component_"
        )
    elif passes > 1 and LOSSES[kind] == "grpo":
        out.notes["loss"] = f"{kind} does not clip, also not in the later of {passes} passes, which are clipped here"
    out.set("optimizer", keys.component("optimizer"), keys.path("optimizer"))
    if scheduler := keys.get("lr_scheduler"):
        out.set("lr_scheduler", scheduler | {"num_training_steps": "${num_steps}"}, keys.path("lr_scheduler"))
        if steps := _scheduled_steps(keys, out, ranks):
            out.options["lr_scheduler"]["num_training_steps"] = steps
        else:
            out.notes["lr_scheduler"] = "torchtune sets num_training_steps to its epochs' steps, which need not be run"
        if passes > 1:
            out.notes["lr_scheduler"] = "torchtune takes a step per update, this recipe one per num_iterations updates"
    norm = keys.get("clip_grad_norm")
    out.set("clip_grad_norm", math.inf if norm is None else norm, keys.path("clip_grad_norm"))


def _scheduled_steps(keys: TorchtuneKeys, out: Translation, ranks: int) -> int | None:
    """Return the steps of all epochs, for which torchtune plans the learning rate; None if the rows are not known."""
    data, epochs = out.options["train_problems"], keys.get("epochs")
    rows = GSM8K_ROWS.get(data.get("split", "train"))
    is_known = data["_component_"] == GSM8K and data.get("source", "openai/gsm8k") == "openai/gsm8k"
    if not is_known or rows is None or epochs is None:
        return None
    out.dropped["epochs"] = DROPPED["epochs"]
    asked = len(partition_numbers(rows, data.get("partition")))
    return int(epochs * (math.ceil(asked / ranks) // (out.options["prompts_per_step"] // ranks)))


def _others(keys: TorchtuneKeys, out: Translation) -> None:
    """Translate checkpoints and the log, and account for every key that is left."""
    if steps := keys.get("save_every_n_steps"):
        out.set("checkpoint_every_n_steps", steps, keys.path("save_every_n_steps"))
    if logger := keys.get("metric_logger"):
        out.set("metric_logger", logger, keys.path("metric_logger"))
    if profiler := keys.get("profiler"):
        out.set("profiler", profiler, keys.path("profiler"))
    for name, text in IF_SET.items():
        if name in keys.paths:
            found = out.notes if keys.get(name) else out.dropped
            found[keys.path(name)] = text if found is out.notes else "not set"
    names = {path: name for name, path in keys.paths.items()}
    left = {path: names.get(path, "") for path in keys.left}
    variables = keys.variables()
    for path in [path for path, name in left.items() if name not in DROPPED and path in variables]:
        out.dropped[path] = "its value is where it was used"
        del left[path]
    _drop(out, left)


def _drop(out: Translation, paths: dict[str, str]) -> None:
    """Say why keys (path in the file: name) are dropped, or that nobody reads them."""
    for path, name in paths.items():
        if name in DROPPED:
            out.dropped[path] = DROPPED[name]
        else:
            out.notes[path] = "torchtune's GRPO recipes do not read this key, and it is not translated"


def _check_imports(out: Translation) -> None:
    """Note components that are not installed."""
    components = {name: out.options.get(name) for name in ("tokenizer", "model", "checkpointer", "optimizer")}
    components |= {name: out.options.get(name) for name in ("lr_scheduler", "metric_logger", "profiler")}
    components |= {f"rewards.{name}": reward for name, reward in out.options["rewards"].items()}
    components["train_problems.dataset"] = out.options["train_problems"].get("dataset")
    for name, component in components.items():
        if component is None:
            continue
        try:
            load_dotpath(component["_component_"])
        except (ImportError, ValueError):
            way_out = "install its package, or put its file into the folder in which you start `tune`"
            if name in ("tokenizer", "model", "checkpointer"):
                way_out = "models that torchtune lacks are built by flexpg.training.causal_lm.model"
            elif name == "train_problems.dataset":
                way_out = "problems of a file or the hub are read by flexpg.training.tasks.problems"
            if component["_component_"].startswith("torchtune.dev."):
                way_out = "torchtune.dev is not in torchtune's wheel; copy the file from its repository"
            out.notes[name] = f"{component['_component_']} cannot be imported here; {way_out}"
