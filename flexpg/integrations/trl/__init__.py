"""TRL's trainers with shared prefixes: swap the class name, and shared prefixes are encoded once.

Sampling, rewards, losses, adapters, mixed precision, gradient accumulation and saving are TRL's; forward.py has the one
call that differs. TRL shuffles the rows of a generation batch before it cuts them into micro-batches, which would tear
groups apart, so here whole groups are shuffled.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexpg.integrations.trl.versions import TESTED as TESTED_TRL  # first: it refuses versions that have changed

# isort: split
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend, ParallelismConfig, TorchDynamoPlugin, parse_flag_from_env
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from flexpg.integrations.transformers.checks import check_no_dropout
from flexpg.integrations.trl.forward import share_prefixes
from flexpg.prompt_inputs import Identities
from flexpg.tree import PrefixTree

__all__ = [
    "TESTED_TRL",
    "SharedPrefixDPOTrainer",
    "SharedPrefixGRPOTrainer",
    "SharedPrefixRLOOTrainer",
    "share_prefixes",
]


@dataclass
class UpdateCost:
    """What the policy's forwards and backwards cost this rank since the last log line.

    Attributes:
        tokens: Tokens that were encoded.
        baseline_tokens: Tokens that TRL's own trainer would have encoded, without padding.
        seconds: Time of the updates, from the end of generation and scoring of a batch to the end of its backward.
    """

    tokens: int = 0
    baseline_tokens: int = 0
    seconds: float = 0.0


class _SharedPrefixTrainer(Trainer):
    """Common to all trainers below: shared forwards, and their savings among TRL's metrics."""

    model: Any  # attributes of all TRL trainers
    ref_model: Any
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        check_options(next((value for value in given if isinstance(value, TrainingArguments)), None))
        super().__init__(*args, **kwargs)
        check_no_dropout(self.model, will_train=True)
        self._cost, self._update_began = UpdateCost(), 0.0
        for model in (self.model, self.ref_model):
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model), self._count)

    def _count(self, tree: PrefixTree) -> None:
        if torch.is_grad_enabled():  # the policy's forward; the old and reference policies' are not counted
            self._cost.tokens += tree.num_tokens
            self._cost.baseline_tokens += tree.baseline_tokens

    def _prepare_inputs(self, batch: Any) -> Any:
        inputs = super()._prepare_inputs(batch)
        self._update_began = self._now()
        return inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._cost.seconds += self._now() - self._update_began
        return loss

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            cost, self._cost = self._cost, UpdateCost()
            saved = cost.baseline_tokens - cost.tokens
            self._metrics["train"] |= {
                "flexpg/tokens": [cost.tokens],
                "flexpg/tokens_saved": [saved],
                "flexpg/update_s": [cost.seconds],
                "flexpg/update_s_saved_estimate": [cost.seconds * saved / max(cost.tokens, 1)],
            }
        super().log(logs, start_time)


def check_options(options: TrainingArguments | None) -> None:
    """Refuse options with which no model could share prefixes.

    Args:
        options: The trainer's `args`; None for TRL's defaults.

    Raises:
        ValueError: If the model would be compiled, get noise, or generate with continuous batching, or if sequences
            would be divided over ranks.
    """
    recompiles = "every batch's prefix tree would recompile"
    plugins = [TorchDynamoPlugin()]  # what `accelerate launch` sets in the environment
    parallelism = [ParallelismConfig()] if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") else []
    if options is not None:
        if options.torch_compile:
            raise ValueError(f"torch_compile must be False: {recompiles}")
        if getattr(options, "use_transformers_continuous_batching", False):  # not in DPOConfig
            raise ValueError("use_transformers_continuous_batching must be False: it generates with sdpa only")
        if options.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha must be None: noise would differ between the copies of a prefix")
        if is_initialized():  # by an Accelerator, whose settings the trainer's takes over
            plugins.append(AcceleratorState().dynamo_plugin)
        if options.parallelism_config is not None:
            parallelism.append(options.parallelism_config)
    for config in parallelism:
        if config.cp_enabled or config.sp_enabled:
            raise ValueError(
                f"accelerate's parallelism_config must have cp_size=1 and sp_size=1, got {config.cp_size} and "
                f"{config.sp_size}: TRL has no context parallelism for prompts in groups; use the recipe, "
                "recipes/grpo.py, with context_parallel"
            )
    for plugin in plugins:
        if plugin.backend != DynamoBackend.NO:
            raise ValueError(
                f"accelerate's dynamo_backend must be 'no', got {plugin.backend.value.lower()!r}: {recompiles}; unset "
                "ACCELERATE_DYNAMO_BACKEND, or dynamo_config in the file of `accelerate config`"
            )


class _GroupTrainer(_SharedPrefixTrainer):
    """Common to the trainers that sample groups: micro-batches of whole groups."""

    args: Any  # attributes of GRPOTrainer and RLOOTrainer
    num_generations: Any
    _step: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        batch_size, group_size = self.args.per_device_train_batch_size, self.num_generations
        parts = batches_per_group(batch_size, group_size, batch_size * self.args.steps_per_generation)
        if parts > 1:
            warnings.warn(
                f"per_device_train_batch_size={batch_size} splits groups of num_generations={group_size}: a prompt is "
                f"encoded {parts:.3g} times per update instead of once; use a multiple of {group_size}, with fewer "
                "gradient_accumulation_steps",
                stacklevel=2,
            )
        generations, steps = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if generations > steps and batch_size * generations > group_size:
            warnings.warn(
                f"steps_per_generation={generations} is more than gradient_accumulation_steps={steps}: an optimizer "
                "step has whole groups instead of rows of many groups, so steps differ from TRL's own trainer; with "
                "equal values they do not",
                stacklevel=2,
            )

    def _prepare_inputs(self, batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in regroup(self._buffered_inputs)]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


def batches_per_group(batch_size: int, group_size: int, generated: int) -> float:
    """Return over how many micro-batches the completions of a prompt are spread, on average.

    Args:
        batch_size: Rows of a micro-batch of one rank.
        group_size: Completions per prompt.
        generated: Rows that one rank generates at a time.

    >>> batches_per_group(8, 8, 32), batches_per_group(4, 8, 32)
    (1.0, 2.0)
    """
    parts = {(row // group_size, row // batch_size) for row in range(generated)}
    return len(parts) / (generated / group_size)


def regroup(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same rows in micro-batches of whole groups, as far as groups fit.

    Groups come in the order in which TRL's shuffle shows their first row, which is a shuffle of groups and consumes no
    random number beyond TRL's own.

    Args:
        batches: TRL's micro-batches: tensors [B, ...] and lists of B; 0-d tensors and None are common to all. Prompts
            with equal tokens and other images are other groups.
    """
    first = batches[0]

    def concatenated(name: str) -> Any:
        parts = [batch[name] for batch in batches]
        if isinstance(parts[0], list):
            return [item for part in parts for item in part]
        return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]

    rows = {name: concatenated(name) for name in first}
    pixels = rows.get("pixel_values")
    if isinstance(pixels, Tensor) and (pixels.dim() < 5 or "image_sizes" in rows):  # else a row per prompt already
        rows = split_pixel_values_by_grid(rows)
    prompts = zip(rows["prompt_ids"].cpu().numpy(), rows["prompt_mask"].bool().cpu().numpy(), strict=True)
    images, identities = rows.get("pixel_values"), Identities()
    groups: dict[tuple[bytes, int], list[int]] = {}
    for row, (ids, present) in enumerate(prompts):
        image = -1 if images is None else identities.of_item({"pixel_values": images[row]})
        groups.setdefault((ids[present].tobytes(), image), []).append(row)
    order = [row for group in groups.values() for row in group]

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in order]
        return value[order] if isinstance(value, Tensor) and value.dim() else value

    return split_tensor_dict({name: ordered(value) for name, value in rows.items()}, len(batches))


class SharedPrefixGRPOTrainer(_GroupTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with each prompt encoded once per micro-batch.

    It takes the same arguments and gives the same losses and gradients up to rounding; micro-batches hold whole groups.
    """


class SharedPrefixRLOOTrainer(_GroupTrainer, RLOOTrainer):
    """TRL's RLOOTrainer with each prompt encoded once per micro-batch.

    It takes the same arguments and gives the same losses and gradients up to rounding; micro-batches hold whole groups.
    """


class SharedPrefixDPOTrainer(_SharedPrefixTrainer, DPOTrainer):
    """TRL's DPOTrainer with the prompt of a chosen and a rejected completion encoded once.

    It takes the same arguments and gives the same losses and gradients up to rounding.
    """
