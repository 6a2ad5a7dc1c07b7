"""Shared prefixes in TRL's trainers: the same trainer, with rows that start alike encoded as one prefix tree.

TRL scores every policy, old, and reference batch through one call, `model(input_ids, attention_mask, labels,
fused_lm_head=True)`, which gives log-probabilities and entropies of the labels. Here that call packs the rows, runs
TRL's own fused head on the hidden states at the labels' parents, and puts the results back where TRL expects them. All
else is TRL's: sampling, rewards, losses, adapters, mixed precision, gradient accumulation, saving.

Of groups it asks one thing: TRL shuffles the rows of a generation batch before it cuts them into micro-batches, which
would tear them apart. Here they are shuffled as groups.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.trainer.utils import FusedCausalLMOutput, split_tensor_dict

import flexpg.integrations.transformers as shared
from flexpg.tree import PrefixTree

SUPPORTED = "1.16"  # the version of TRL whose fused head this file was written and tested against

if not version("trl").startswith(f"{SUPPORTED}."):
    raise ImportError(
        f"flexpg shares prefixes in trl {SUPPORTED} and {version('trl')} is installed: pip install 'trl=={SUPPORTED}.*'"
    )

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
PASSED_ON = {"use_cache", "output_router_logits", "num_items_in_batch", "return_dict"}


@dataclass(frozen=True)
class Rows:
    """A padded batch as a prefix tree.

    Attributes:
        tree: the rows, packed.
        copies: [S] int64, the rows that hold each packed token; 0 for pads.
        row: [M] int64, the row of each label.
        column: [M] int64, where it stands in `labels[:, 1:]`.
        predicted_at: [M] int64, the packed token that predicts it.
        labels: [M] int64.
    """

    tree: PrefixTree
    copies: Tensor
    row: Tensor
    column: Tensor
    predicted_at: Tensor
    labels: Tensor


def packed_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Rows:
    """The prefix tree of a padded batch, and where each of its labels is predicted.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens; each row one run of them, padded on the left, the right, or both.
        labels: [B, T] int64, -100 where nothing is scored.

    Raises:
        ValueError: a row with a hole or without tokens, or a label that no token of its row precedes.
    """
    present = attention_mask.bool()
    ones, count = present.int(), len(present)
    start, stop = ones.argmax(1), ones.shape[1] - ones.flip(1).argmax(1)  # [B] each, of the run of tokens
    broken = (ones.sum(1) != stop - start).nonzero()
    if len(broken):
        n = int(broken[0])
        raise ValueError(
            f"row {n} of {count} has no token, or padding between its tokens; pad on the left or the right"
        )
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # [M] each
    unpredicted = ((column < start[row]) | (column + 1 >= stop[row])).nonzero()
    if len(unpredicted):
        n = int(row[unpredicted[0]])
        raise ValueError(f"row {n} of {count} has a label at padding or at its first token, which nothing predicts")
    sequences = [ids[here] for ids, here in zip(input_ids.cpu(), present.cpu(), strict=True)]
    tree = PrefixTree.from_sequences(sequences).to(input_ids.device)
    copies = torch.bincount(tree.node[tree.node >= 0], minlength=len(tree))
    return Rows(tree, copies, row, column, tree.node[row, column - start[row]], labels[:, 1:][row, column])


def share_prefixes(model: nn.Module, count: Callable[[PrefixTree], None] = lambda tree: None) -> None:
    """Makes a model with TRL's fused head encode rows that start alike as one prefix tree; exact, forward and backward.

    Calls without the fused head (generation, evaluation of logits) stay what they are.

    Args:
        model: a transformers model on which TRL called `add_fused_lm_head`, bare or in PEFT's wrapper.
        count: called with each tree before it is run.

    Raises:
        ValueError: as `flexpg.integrations.transformers.forward`; at the call, for images and other inputs.
        TypeError: as `flexpg.integrations.transformers.forward`.
    """
    whole = shared.causal_lm(model)
    shared.register()
    before, usual = whole.config._attn_implementation, "sdpa" if shared.softcap_of(whole.config) is None else "eager"
    whole.set_attn_implementation(shared.NAME)
    shared.check(model)
    if before not in (usual, shared.NAME):
        warnings.warn(f"attn_implementation={before!r} gives way to flexpg, and to {usual} for all else", stacklevel=2)
    unshared = whole.forward

    @functools.wraps(type(whole).forward)  # `generate` reads the signature
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return unshared(*args, **kwargs)
        return _shared_forward(model, unshared, count, *args, **kwargs)

    whole.forward = MethodType(forward, whole)


def _shared_forward(
    model: nn.Module,
    unshared: Callable[..., FusedCausalLMOutput],
    count: Callable[[PrefixTree], None],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    other = sorted(name for name, value in kwargs.items() if value is not None and name not in PASSED_ON)
    if other or input_ids is None or attention_mask is None or labels is None:
        got = ", ".join(other) or "no input_ids, attention_mask or labels"
        raise ValueError(f"prefixes are shared in padded rows of text, and {got} came; use TRL's own trainer for that")
    rows = packed_rows(input_ids, attention_mask, labels)
    count(rows.tree)

    def give_mask(module: nn.Module, args: Any, kwargs: dict) -> tuple[Any, dict]:
        return args, kwargs | {"attention_mask": mask}

    def keep_predicting(module: nn.Module, args: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state.index_select(1, rows.predicted_at)  # [1, M, E]
        return out

    decoder = shared.causal_lm(model).base_model
    with (
        shared.packed_forward(model, rows.tree) as mask,
        decoder.register_forward_pre_hook(give_mask, with_kwargs=True),
        decoder.register_forward_hook(keep_predicting),
    ):
        out = unshared(
            input_ids=rows.tree.token_row(),
            attention_mask=rows.copies[None],  # for the experts' auxiliary loss: a token counts once per row
            position_ids=rows.tree.position_ids[None],
            shift_labels=rows.labels[None],
            fused_lm_head=True,
            **kwargs,
        )
    at = (rows.row, rows.column)
    shape = labels[:, 1:].shape
    per_token = {name: x for name in PER_TOKEN if (x := getattr(out, name)) is not None}
    return replace(out, **{name: x.new_zeros(shape).index_put(at, x[0]) for name, x in per_token.items()})


@dataclass
class Update:
    """What the policy's forwards and backwards cost since the last line of the log.

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
        self._update_began = time.perf_counter()
        return inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._update.seconds += time.perf_counter() - self._update_began
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            mine = torch.tensor([self._update.tokens, self._update.tokens_unshared, self._update.seconds])
            tokens, unshared, seconds = self.accelerator.reduce(mine.to(self.accelerator.device)).tolist()
            seconds /= self.accelerator.num_processes
            self._metrics["train"] |= {
                "flexpg/tokens": [tokens],
                "flexpg/tokens_saved": [unshared - tokens],
                "flexpg/update_s": [seconds],
                "flexpg/update_s_saved_estimate": [seconds * (unshared - tokens) / max(tokens, 1)],
            }
            self._update = Update()
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
    prompts = zip(rows["prompt_ids"].tolist(), rows["prompt_mask"].tolist(), strict=True)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, mask) in enumerate(prompts):
        groups.setdefault(tuple(token for token, here in zip(ids, mask, strict=True) if here), []).append(row)
    order = [row for group in groups.values() for row in group]

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in order]
        return value[order] if isinstance(value, Tensor) and value.dim() else value

    return split_tensor_dict({name: ordered(value) for name, value in rows.items()}, len(batches))


class SharedPrefixGRPOTrainer(_KeepsGroups, GRPOTrainer):
    """TRL's GRPOTrainer, each prompt encoded once per micro-batch: same arguments, same losses, same gradients."""


class SharedPrefixRLOOTrainer(_KeepsGroups, RLOOTrainer):
    """TRL's RLOOTrainer, each prompt encoded once per micro-batch: same arguments, same losses, same gradients."""


class SharedPrefixDPOTrainer(_SharesPrefixes, DPOTrainer):
    """TRL's DPOTrainer, the prompt of a chosen and a rejected completion encoded once: same losses, same gradients."""
