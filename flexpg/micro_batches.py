"""Micro-batches: the rollouts of one packed sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from flexpg.rollouts import LOGPROBS, Rollouts
from flexpg.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rollouts that go through the model in one packed sequence.

    Attributes:
        indices: [n] int64, which rollouts of the step they are; row i of a micro-batch's [n, C] tensors is rollout
            `indices[i]`. They ascend.
        rollouts: The rollouts at `indices`.
        tree: Their packed sequence; sequence i is the micro-batch's rollout i.
        rank: The rank that trains on it.
        cache_id: Consecutive micro-batches of a rank with the same id belong to one prefix cache. All ranks have the
            same ids, with equally many micro-batches each.
        cached_tokens: Tokens of the prompt that the micro-batches of this id have in common and that is encoded once;
            0 for a micro-batch that is complete by itself.
        step_has_images: Whether a prompt of the step has images, here or in another micro-batch of any rank.
        is_idle: Whether it only keeps a rank in step with the others: two tokens of text, an empty loss mask.
    """

    indices: Tensor
    rollouts: Rollouts
    tree: PrefixTree
    rank: int = 0
    cache_id: int = 0
    cached_tokens: int = 0
    step_has_images: bool = False
    is_idle: bool = False

    def __repr__(self) -> str:
        return f"MicroBatch(rollouts {self.indices.tolist()}, {self.tree})"

    @property
    def loss_mask(self) -> Tensor:
        """[n, C] bool, True where a completion token counts in the loss."""
        return self.rollouts.loss_mask

    @property
    def old_logprobs(self) -> Tensor | None:
        """[n, C] float, those of the rollouts."""
        return self.rollouts.old_logprobs

    @property
    def ref_logprobs(self) -> Tensor | None:
        """[n, C] float, those of the rollouts."""
        return self.rollouts.ref_logprobs

    @property
    def sampler_logprobs(self) -> Tensor | None:
        """[n, C] float, those of the rollouts."""
        return self.rollouts.sampler_logprobs


def by_cache(batches: Iterable[MicroBatch]) -> list[list[MicroBatch]]:
    """Group micro-batches by rank and cache id: those that may share one prefix cache."""
    return [list(series) for _, series in groupby(batches, key=lambda batch: (batch.rank, batch.cache_id))]


def idle_micro_batch(rollouts: Rollouts, index: int, rank: int, cache_id: int) -> MicroBatch:
    """Return a micro-batch of the first completion token of a rollout, twice, with an empty loss mask."""
    whole = rollouts.select([index])
    part = replace(
        whole,
        prompts=[whole.completions[0][:1]],  # not of the prompt, which may be an image
        prompt_inputs=None,
        completions=[whole.completions[0][:1]],
        loss_mask=torch.zeros_like(whole.loss_mask[:, :1]),
        **{name: table[:, :1] for name in LOGPROBS if (table := getattr(whole, name)) is not None},
    )
    indices = torch.tensor([index], device=rollouts.group_ids.device)
    return MicroBatch(
        indices,
        part,
        PrefixTree.from_sequences(part.sequences),
        rank,
        cache_id,
        step_has_images=rollouts.prompt_inputs is not None,
        is_idle=True,
    )


def causal_pairs(length: int) -> int:
    """Return the visible pairs of a sequence on its own: each token sees those before it and itself."""
    return length * (length + 1) // 2
