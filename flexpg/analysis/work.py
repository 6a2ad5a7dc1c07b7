"""Work: the tokens that a model encodes, counted by position, and the query-key pairs that they see.

`packed_work` is that of a packed sequence, `baseline_work` of its sequences on their own, `prompts_once_work` between
them, and `encoded_work` of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.prompt_inputs import Item
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class Work:
    """Tokens that go through a model.

    Attributes:
        positions: [T] int64 on the CPU, how many tokens are encoded at each position of a sequence.

    >>> Work(torch.tensor([1, 1, 2])).num_tokens, Work(torch.tensor([1, 1, 2])).num_pairs
    (4, 9)
    """

    positions: Tensor

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return int(self.positions.sum())

    @property
    def num_pairs(self) -> int:
        """Visible pairs of full attention: each token sees those before it and itself."""
        return self.pairs(len(self.positions))

    def pairs(self, window: int, is_chunked: bool = False) -> int:
        """Return the visible pairs if a token sees `window` tokens, or those of its own chunk of that size."""
        position = torch.arange(len(self.positions))
        visible = position % window + 1 if is_chunked else (position + 1).clamp(max=window)
        return int(self.positions @ visible)


def packed_work(tree: PrefixTree) -> Work:
    """Return the work of a packed sequence, without its padding.

    >>> packed_work(PrefixTree.from_lengths([3], [[2, 1]])).positions
    tensor([1, 1, 1, 2, 1])
    """
    return Work(torch.bincount(tree.position_ids[: tree.num_tokens].cpu()))


def baseline_work(tree: PrefixTree) -> Work:
    """Return the work of a tree's sequences if each is encoded on its own.

    >>> baseline_work(PrefixTree.from_lengths([3], [[2, 1]])).positions
    tensor([2, 2, 2, 2, 1])
    """
    return Work(_longer_than_position(tree.lengths.cpu()))


def prompts_once_work(rollouts: Rollouts) -> Work:
    """Return the work if only prompts are shared: every completion is encoded in full.

    >>> rollouts = Rollouts.from_groups([[1, 2, 3]], [[[4], [4]]], rewards=[[0.0, 1.0]])
    >>> prompts_once_work(rollouts).positions, packed_work(rollouts.tree).positions
    (tensor([1, 1, 1, 2]), tensor([1, 1, 1, 1]))
    """
    prompts = torch.tensor([len(prompt) for prompt in rollouts.prompts])  # [P]
    prompt_lens, completion_lens = rollouts.prompt_lens.cpu(), rollouts.completion_lens.cpu()  # [N]
    whole = _longer_than_position(prompt_lens + completion_lens)
    return total_work([Work(whole), Work(_longer_than_position(prompts))], [Work(_longer_than_position(prompt_lens))])


def baseline_images(rollouts: Rollouts) -> list[Item]:
    """Return the images that are encoded if each sequence is on its own: those of its prompt, for every rollout."""
    return [item for inputs in rollouts.sequence_inputs if inputs is not None for item in inputs.items]


def prompts_once_images(rollouts: Rollouts) -> list[Item]:
    """Return the images that are encoded if only prompts are shared: those of every prompt."""
    return [item for inputs in rollouts.prompt_inputs or () if inputs is not None for item in inputs.items]


def packed_images(rollouts: Rollouts) -> list[Item]:
    """Return the images that one packed sequence encodes: each different one once."""
    return list({item.identity: item for item in prompts_once_images(rollouts)}.values())


def encoded_images(batches: Iterable[MicroBatch]) -> list[Item]:
    """Return the images that micro-batches encode, with those of cached prompts once."""
    encoded = []
    for series in by_cache(batches):
        is_cached = any(batch.cached_tokens for batch in series)
        for number, batch in enumerate(series):
            encoded += packed_images(batch.rollouts) if not (is_cached and number and batch.cached_tokens) else []
    return encoded


def encoded_work(batches: Iterable[MicroBatch]) -> Work:
    """Return the work of micro-batches, without padding, with cached prompts once."""
    encoded, repeated = [], []
    for series in by_cache(batches):
        encoded += [packed_work(batch.tree) for batch in series]
        cached = [batch.cached_tokens for batch in series if batch.cached_tokens][1:]
        repeated += [Work(torch.ones(length, dtype=torch.int64)) for length in cached]
    return total_work(encoded, repeated)


def recomputed_tokens(batches: Sequence[MicroBatch]) -> int:
    """Return how many prefix tokens are encoded more than once, by several micro-batches or ranks.

    Args:
        batches: The micro-batches of all ranks, as `pack` returned them.
    """
    busy = [batch for batch in batches if not batch.is_idle]
    everything = PrefixTree.from_sequences([sequence for batch in busy for sequence in batch.rollouts.sequences])
    return encoded_work(busy).num_tokens - everything.num_tokens


def total_work(added: Sequence[Work], removed: Sequence[Work] = ()) -> Work:
    """Return the sum of several works, less that of others."""
    positions = torch.zeros(max(len(each.positions) for each in added), dtype=torch.int64)
    for each in added:
        positions[: len(each.positions)] += each.positions
    for each in removed:
        positions[: len(each.positions)] -= each.positions
    return Work(positions)


def _longer_than_position(lengths: Tensor) -> Tensor:
    """Return for each position how many of the sequences of these lengths have a token there."""
    return torch.bincount(lengths - 1).flip(0).cumsum(0).flip(0)
