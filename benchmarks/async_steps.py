"""A step of the recipe that samples ahead (`async_steps=1`) and one that does not, with a server as the sampler.

    .venv-vllm/bin/python -m benchmarks.async_steps    # CPU, float32, with vLLM (make vllm installs it)
    python -m benchmarks.async_steps --tiny            # as a test, with flexpg.sample in a process of its own

Trainer and server have one thread each. One recipe takes steps with both settings by turns, of the same prompts per
step and with completions of the same length, as no token ends them. A step without sampling ahead takes

    sample + log-probabilities + train + sync

and one that samples ahead at least max(sample, train) instead of sample + train, because the server samples the next
step only while the model trains: not while old log-probabilities are computed, and not while new weights are written
and loaded (sync). So the bound of the speed-up is 2 if sampling and training take equally long and nothing else takes
any time, and near 1 if one of them takes most of it. The measured step is the middle one of three: the first of a run
has nothing that was sampled ahead, and the last samples nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.record import run
from benchmarks.servers import start_vllm, stop_vllm
from benchmarks.timing import paired_ratio, quartiles
from flexpg.training.config import load_config
from recipes.grpo import GRPORecipe

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "recipes/configs/tiny_transformers_cpu.yaml"
TINY = ROOT / "recipes/assets/tiny"
STAGES = ("sample_s", "reward_s", "logprobs_s", "train_s", "sync_s")


@dataclass(frozen=True)
class Case:
    """A step: prompts, completions of each, their length in tokens, few-shot examples of a prompt, and the model."""

    sampler: Literal["vllm", "flexpg"]
    prompts: int
    group: int
    completion: int
    shots: int = 8
    minibatches: int = 1
    width: int = 256
    layers: int = 4


CASES = {
    "cpu": [Case("vllm", 8, 8, 64), Case("vllm", 1, 4, 512)],
    "tiny": [Case("flexpg", 2, 2, 4, shots=1, minibatches=2, width=64, layers=1)],
}


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the seconds of every stage and of whole steps, after a repeat that is not counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, running_recipe(case, device, Path(folder)) as recipe:
            steps: dict[str, list[dict[str, float]]] = {"0": [], "1": []}  # by async_steps
            for repeat in range(repeats + 1):
                for name in steps if repeat % 2 == 0 else reversed(steps):
                    steps[name].append(take_step(recipe, int(name)))
            prompt_tokens = sum(map(len, recipe.prompts)) / len(recipe.prompts)
    finally:
        torch.set_num_threads(threads)
    counted = {name: series[1:] for name, series in steps.items()}
    seconds = {name: [sum(step[stage] for stage in STAGES) for step in series] for name, series in counted.items()}
    hidden = [min(step["sample_s"], step["train_s"]) for step in counted["0"]]
    return {
        "prompt_tokens": prompt_tokens,
        "stage_s": {
            name: {stage: quartiles([step[stage] for step in series])["median"] for stage in STAGES}
            for name, series in counted.items()
        },
        "step_s": {name: quartiles(values) for name, values in seconds.items()},
        "speedup": paired_ratio(seconds["0"], seconds["1"]),
        "bound": quartiles([full / (full - most) for full, most in zip(seconds["0"], hidden, strict=True)])["median"],
        "sampler_kl": {
            name: quartiles([step["sampler_kl"] for step in series])["median"] for name, series in counted.items()
        },
    }


@contextmanager
def running_recipe(case: Case, device: torch.device, folder: Path) -> Iterator[GRPORecipe]:
    """Yield a recipe with a model of random weights and its server."""
    checkpoint, process = folder / "checkpoint", None
    save_checkpoint(case, checkpoint)
    sampler = ["sampler._component_=benchmarks.servers.ProcessEngine", f"sampler.path={checkpoint}"]
    if case.sampler == "vllm":
        process, address = start_vllm(checkpoint, folder / "vllm.txt")
        sampler = ["sampler._component_=flexpg.integrations.vllm.engine", sampler[1]]
        sampler += ["sampler.mode=server", f"sampler.base_url={address}"]
    overrides = [
        f"device={device}",
        f"output_dir={folder}/run",
        f"model.path={checkpoint}",
        f"train_problems.shots={case.shots}",
        "train_problems.size=64",
        "test_problems.size=1",
        "rewards.correct._component_=benchmarks.async_steps.distinct_characters",
        f"prompts_per_step={case.prompts}",
        f"group_size={case.group}",
        f"minibatches={case.minibatches}",
        f"sampling.max_new_tokens={case.completion}",
        "sharing=true",
        "self_check=false",
        "log_samples_every_n_steps=0",
        *sampler,
    ]
    try:
        recipe = GRPORecipe(load_config(OmegaConf.merge(OmegaConf.load(CONFIG), OmegaConf.from_dotlist(overrides))))
        recipe.setup()
        recipe.sampling = replace(recipe.sampling, stop_tokens=())
        yield recipe
        recipe.cleanup()
    finally:
        if process:
            stop_vllm(process)


def save_checkpoint(case: Case, folder: Path) -> None:
    """Write a model with random weights and the tokenizer of bytes."""
    sizes = {"hidden_size": case.width, "intermediate_size": 3 * case.width, "num_hidden_layers": case.layers}
    config = AutoConfig.for_model(**json.loads((TINY / "config.json").read_text()) | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)


def distinct_characters(completion: str) -> float:
    """Return a reward in which random completions differ."""
    return float(len(set(completion)))


def take_step(recipe: GRPORecipe, async_steps: int) -> dict[str, float]:
    """Return the metrics of a step by the recipe's own loop, sampled ahead while the one before it trained, or not."""

    def skip_evaluation() -> None:
        recipe.accuracies[recipe.steps_done] = 0.0

    recipe.evaluate, recipe.plot = skip_evaluation, lambda data: None
    recipe.cfg.async_steps = async_steps
    recipe.cfg.num_steps = recipe.steps_done + 1 + 2 * async_steps
    recipe.train()
    return recipe.history[-1 - async_steps]


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("async_steps", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
