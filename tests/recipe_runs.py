"""Small runs of recipes/grpo.py in the tests, a reward that configurations name, and losses that are NaN.

load(config, output_dir, *overrides)    the configuration, as the recipe would get it
make(output_dir, *overrides)            a recipe after setup
train(recipe)                           train it without plots, and return it

Paths in configurations are relative to the repository, in which the tests run.
"""

from __future__ import annotations

import math
import signal
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from flexpg.training.checkpoints import checkpoints
from flexpg.training.config import load_config
from flexpg.training.tasks import Problem
from recipes.grpo import GRPORecipe

ROOT = Path(__file__).parent.parent
TINY, GSM8K = "recipes/configs/tiny_cpu.yaml", "recipes/configs/gsm8k_bytes_cpu.yaml"
SMALL = (
    *("prompts_per_step=2", "group_size=4", "train_problems.size=64", "test_problems.size=4", "self_check=false"),
    *("eval_every_n_steps=100", "sharing=true"),
)
LORA = (
    "model._component_=torchtune.models.qwen2.lora_qwen2",
    "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=16",
    "model.lora_alpha=32",
)
SHORT = (  # completions that are cut off before their answer; sampling takes most of a step
    *("sampling.max_new_tokens=12", "rewards.correct._component_=recipe_runs.spread_reward"),
    "test_reward._component_=recipe_runs.spread_reward",
)
DIFFERENT = "sampling.temperature=2.0"  # completions share little, so that groups exceed a small budget
AGAIN = (  # episodes of two turns: the second comes if the first is not cut off
    *("environment._component_=recipe_runs.Again", "environment.max_length=512", "sampling.temperature=1.3"),
    "sampling.max_new_tokens=36",
)


def load(config: str, output_dir: Path, *overrides: str) -> Any:
    given = OmegaConf.merge(OmegaConf.load(config), {"output_dir": str(output_dir)})
    return load_config(OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides))))


def make(output_dir: Path, *overrides: str, config: str = TINY) -> GRPORecipe:
    recipe = GRPORecipe(load(config, output_dir, *overrides))
    recipe.setup()
    return recipe


def train(recipe: GRPORecipe) -> GRPORecipe:
    recipe.plot = lambda rollouts: None  # it takes longer than a step
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        recipe.train()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return recipe


def newest(output_dir: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    found = checkpoints(output_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def flat(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def spread_reward(completion: str, answer: str) -> float:
    """Return a number that random text gets more or less of."""
    return zlib.crc32(completion.encode()) % 7


def sums(size: int, **options: Any) -> list[Problem]:
    """Return problems whose data row has another column."""
    return [Problem(f"{n}+{n}:", f"{n}+{n}", {"solution": f"{2 * n}"}) for n in range(100, 100 + size)]


calls_of_group_reward: list[dict[str, Any]] = []


def group_reward(prompts, completions, completion_ids, log_metric, **others):
    """Return a number per completion, with the signature of TRL, and record what it is called with."""
    arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    calls_of_group_reward.append(others | arguments)
    log_metric("tokens", sum(map(len, completion_ids)))
    return [None, *(float(len(ids)) for ids in completion_ids[1:])]


def forgets_to_return(completion: str) -> None:
    """Compute a reward, and do not return it."""
    float(len(completion))


# Losses, in place of a recipe's own.


def nan_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss in which one rollout's log-probability is NaN."""

    def loss_of_nan(logprobs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logprobs = logprobs.clone()
        logprobs[2, 0] = math.nan
        return loss(logprobs, *args, **kwargs)

    return loss_of_nan


def nan_gradient(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss plus a term that is 0 and has gradient NaN."""
    return lambda logprobs, *args, **kwargs: loss(logprobs, *args, **kwargs) + (0 * logprobs.sum()).sqrt()


class Again:
    """An environment that asks once more, and then gives a reward that depends on both turns."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def step(self, messages: list) -> tuple[list, float]:
        if len(messages) == 2:
            return [{"role": "user", "content": "12+34:"}], 0.0
        return [], spread_reward(messages[1]["content"] + messages[3]["content"], self.problem.answer)
