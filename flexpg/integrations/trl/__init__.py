"""TRL's trainers with shared prefixes: swap the class name, and rows that start alike are encoded once.

Sampling, rewards, losses, adapters, mixed precision, gradient accumulation and saving are TRL's; trl_forward.py has the
one call that differs. Of groups it asks one thing: TRL shuffles the rows of a generation batch before it cuts them into
micro-batches, which would tear them apart. Here they are shuffled as groups.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexpg.integrations.trl.forward import share_prefixes  # before TRL, whose other versions it refuses in words

# isort: split
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.trainer.utils import split_tensor_dict

from flexpg.integrations.transformers.checks import check_no_dropout
from flexpg.tree import PrefixTree

__all__ = ["SharedPrefixDPOTrainer", "SharedPrefixGRPOTrainer", "SharedPrefixRLOOTrainer", "share_prefixes"]


@dataclass
class Update:
    """What the policy's forwards and backwards cost this process since the last line of the log.

    Attributes:
        tokens: tokens that were encoded.
        tokens_unshared: tokens that TRL's own trainer would have encoded, without its padding.
        seconds: time of the updates: from the end of generating and scoring a batch to the end of its backward.
    """

    tokens: int = 0
    tokens_unshared: int = 0
    seconds: float = 0.0


class _SharesPrefixes(Trainer):
    """What the trainers below have in common: shared forwards, and what those saved among TRL's metrics."""

    model: Any  # what all of TRL's trainers hold
    ref_model: Any
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.torch_compile:
            raise ValueError("torch_compile=True would compile anew for every batch's prefix tree; leave it off")
        if getattr(self.args, "use_transformers_continuous_batching", False):  # DPO's config has none
            raise ValueError("use_transformers_continuous_batching=True generates with sdpa alone; leave it off")
        check_no_dropout(self.model, will_train=True)
        self._update, self._update_began = Update(), 0.0
        for model in (self.model, self.ref_model):
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model), self._count)

    def _count(self, tree: PrefixTree) -> None:
        if torch.is_grad_enabled():  # the policy's; the old and the reference policy's are shared, and not counted
            self._update.tokens += tree.num_tokens
            self._update.tokens_unshared += int(tree.lengths.sum())

    def _prepare_inputs(self, batch: Any) -> Any:
        inputs = super()._prepare_inputs(batch)
        self._update_began = self._now()
        return inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._update.seconds += self._now() - self._update_began
        return loss

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            done, self._update = self._update, Update()
            saved = done.tokens_unshared - done.tokens
            self._metrics["train"] |= {
                "flexpg/tokens": [done.tokens],
                "flexpg/tokens_saved": [saved],
                "flexpg/update_s": [done.seconds],
                "flexpg/update_s_saved_estimate": [done.seconds * saved / max(done.tokens, 1)],
            }
        super().log(logs, start_time)


class _KeepsGroups(_SharesPrefixes):
    """And of trainers that sample groups: micro-batches of whole groups."""

    args: Any  # what GRPOTrainer and RLOOTrainer hold
    num_generations: Any
    _step: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows, group = self.args.per_device_train_batch_size, self.num_generations
        parts = parts_per_group(rows, group, rows * self.args.steps_per_generation)
        if parts > 1:
            warnings.warn(
                f"per_device_train_batch_size={rows} cuts groups of num_generations={group}: a prompt is encoded "
                f"{parts:.3g} times per update instead of once; a multiple of {group}, with fewer "
                "gradient_accumulation_steps, keeps groups whole",
                stacklevel=2,
            )

    def _prepare_inputs(self, batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regrouped(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


def parts_per_group(rows: int, group: int, generated: int) -> float:
    """Micro-batches that a group's completions are spread over, on average.

    Args:
        rows: of a micro-batch of one process.
        group: completions of a prompt.
        generated: rows that one process generates at a time.

    >>> parts_per_group(rows=8, group=8, generated=32), parts_per_group(rows=4, group=8, generated=32)
    (1.0, 2.0)
    """
    cuts = {(row // group, row // rows) for row in range(generated)}
    return len(cuts) / (generated / group)


def regrouped(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in micro-batches of whole groups, as far as the groups fit.

    The groups stand in the order in which TRL's shuffle shows their first row, which is a shuffle of groups, and takes
    no random number beyond TRL's own.

    Args:
        batches: TRL's micro-batches: tensors [B, ...] and lists of B; 0-d tensors and None are common to all.
    """
    first = batches[0]

    def whole(name: str) -> Any:
        parts = [batch[name] for batch in batches]
        if isinstance(parts[0], list):
            return [item for part in parts for item in part]
        return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]

    rows = {name: whole(name) for name in first}
    prompts = zip(rows["prompt_ids"].cpu().numpy(), rows["prompt_mask"].bool().cpu().numpy(), strict=True)
    groups: dict[bytes, list[int]] = {}
    for row, (ids, present) in enumerate(prompts):
        groups.setdefault(ids[present].tobytes(), []).append(row)
    order = [row for group in groups.values() for row in group]

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in order]
        return value[order] if isinstance(value, Tensor) and value.dim() else value

    return split_tensor_dict({name: ordered(value) for name, value in rows.items()}, len(batches))


class SharedPrefixGRPOTrainer(_KeepsGroups, GRPOTrainer):
    """TRL's GRPOTrainer, each prompt encoded once per micro-batch.

    Same arguments, and same losses and gradients up to rounding; micro-batches hold whole groups.
    """


class SharedPrefixRLOOTrainer(_KeepsGroups, RLOOTrainer):
    """TRL's RLOOTrainer, each prompt encoded once per micro-batch.

    Same arguments, and same losses and gradients up to rounding; micro-batches hold whole groups.
    """


class SharedPrefixDPOTrainer(_SharesPrefixes, DPOTrainer):
    """TRL's DPOTrainer, the prompt of a chosen and a rejected completion encoded once.

    Same arguments, and same losses and gradients up to rounding.
    """
