"""One packed sequence over the ranks of a group: each computes a part of its tokens in all layers.

The sequence is cut into twice as many ranges as there are ranks. Rank r takes range r and the r-th from the end, so
that all have about the same number of tokens and, as tokens at the end see more keys, of pairs.

In attention the queries of a rank are its own tokens, and the keys and values are those of all ranks up to the end of
a range: they are gathered in every layer, and their gradients are summed and scattered back. In depth-first order the
ancestors of a token are before it, so the mask is that of the tree, cut at the end of the range. A token is predicted
at its parent, so the rank that owns the parent scores it, and no hidden state leaves its rank.

Gradients of parameters are partial sums on each rank. FSDP2 sums them up if it shards the model over the group's ranks;
of other models, `flexpg.collectives.summed_gradients` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from flexpg.collectives import gather_ranges, start_to_gather
from flexpg.masks import TreeBlockMask
from flexpg.tree import BLOCK, PrefixTree


class ContextShard:
    """The two ranges of a packed sequence that this rank of a group computes.

    Args:
        tree: The packed sequence.
        group: The ranks that share it, each of which creates the same.
        first: The packed index of the first token that is computed at all, a multiple of 128; those before it are in a
            cached prompt.

    Attributes:
        group: The ranks.
        rank: This rank in the group.
        first: The packed index of the first token that is computed at all.
        tree: The packed sequence, with at least one block for every range.
        borders: Range i is the tokens from `borders[i]` up to `borders[i + 1]`.
        numbers: The numbers of this rank's ranges, ascending.
        index: [n] int64, the packed indices of this rank's tokens.
        stop: One past the last of them.
    """

    def __init__(self, tree: PrefixTree, group: ProcessGroup, first: int = 0) -> None:
        self.group, self.rank, self.first = group, dist.get_rank(group), first
        count = 2 * dist.get_world_size(group)
        self.tree = padded_to(tree, first // BLOCK + count)
        self.borders = token_ranges(self.tree, count, first)
        self.numbers = self.rank, count - 1 - self.rank
        ranges = [self.range_of(number) for number in self.numbers]
        self.index = torch.cat([torch.arange(start, stop, device=tree.end.device) for start, stop in ranges])
        self.stop = ranges[-1][1]

    @property
    def row_of(self) -> Tensor:
        """[S] int64, the row of this rank's hidden states for each packed token; -1 for those of other ranks."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return torch.full_like(self.tree.end, -1, dtype=torch.int64).scatter(0, self.index, rows)

    def range_of(self, number: int) -> tuple[int, int]:
        """Return where a range begins and ends."""
        return self.borders[number], self.borders[number + 1]

    def owner_of(self, number: int) -> int:
        """Return the rank that computes a range."""
        return min(number, len(self.borders) - 2 - number)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return a tensor of all tokens from this rank's part; gradients are summed over ranks and scattered back.

        Args:
            x: [..., n, ...].
            dim: The dimension of tokens.
        """
        return gather_ranges(x, dim, self.group, [b - a for a, b in pairwise(self.borders)])

    def start_to_gather_keys(
        self, k: Tensor, v: Tensor, stop: int | None = None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start to gather keys and values, by one collective.

        Args:
            k: [1, Hkv, n, D].
            v: Values, like `k`.
            stop: One past the last token whose keys are wanted; None for this rank's last token.

        Returns:
            A function that returns those of all tokens from `first` up to `stop`; to be called once.
        """
        count = (self.stop if stop is None else stop) - self.first
        lengths = [b - a for a, b in pairwise(self.borders)]
        finish = start_to_gather(torch.cat([k, v]), 2, self.group, lengths)

        def keys_and_values() -> tuple[Tensor, Tensor]:
            keys, values = finish()[:, :, :count].split(1)
            return keys, values

        return keys_and_values


class ShardBlockMask(TreeBlockMask):
    """The TreeBlockMask of a rank's queries, which are those of its two ranges.

    Its own block tables are those of the second range.

    Attributes:
        shard: The rank's part of the packed sequence.
        ranges: The masks of both ranges.
    """

    def __init__(
        self,
        shard: ContextShard,
        window: int | None = None,
        chunk: int | None = None,
        bidirectional: bool = False,
    ) -> None:
        (start, stop), (second, last) = map(shard.range_of, shard.numbers)
        super().__init__(cut(shard.tree, last), window, second, chunk, bidirectional)
        first = TreeBlockMask(cut(shard.tree, stop), window, start, chunk, bidirectional)
        self.shard, self.ranges = shard, (first, TreeBlockMask(self.tree, window, second, chunk, bidirectional))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[1, 1, queries, keys]."""
        return 1, 1, len(self.shard.index), self.shard.stop

    @property
    def query_positions(self) -> Tensor:
        """[n] int64, the positions of the queries."""
        return self.shard.tree.position_ids[self.shard.index]

    @cached_property
    def whole(self) -> TreeBlockMask:
        """The mask of the whole packed sequence, for layers whose inputs are gathered."""
        return TreeBlockMask(self.shard.tree)

    def start_keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start to gather the keys and values of all tokens up to this rank's last one."""
        return self.shard.start_to_gather_keys(k, v)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("ShardBlockMask cannot be pickled or copied: it holds a process group; pickle mask.shard.tree")

    def to(self, device: torch.device | str) -> TreeBlockMask:
        """Return the mask itself.

        Raises:
            ValueError: If `device` is another one.
        """
        if torch.empty(0, device=device).device != self.tree.end.device:
            raise ValueError(f"ShardBlockMask must stay on {self.tree.end.device}, that of its ranks, got {device}")
        return self

    def _replace(self, tree: PrefixTree, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        return ShardBlockMask(self.shard, window, chunk, bidirectional)


def token_ranges(tree: PrefixTree, size: int, first: int = 0) -> list[int]:
    """Return where a packed sequence is cut into `size` ranges of about equally many tokens.

    Cuts are at block borders, and not inside of an image, which is encoded on one rank.

    Args:
        tree: The packed sequence, of at least `size` blocks from `first` on.
        size: Number of ranges.
        first: The packed index of the first token that is computed, a multiple of 128.

    Returns:
        `size + 1` packed indices, multiples of 128, ascending, from `first` to the end.

    Raises:
        ValueError: If images leave fewer places to cut than are needed.

    >>> token_ranges(PrefixTree.from_lengths([640], [[320, 320]]), 2)
    [0, 640, 1280]
    """
    cuts = torch.arange(first + BLOCK, tree.padded_length, BLOCK)
    if tree.block_end is not None:
        farthest = tree.block_end.cummax(0).values.cpu()  # an image block that begins before a cut ends before it
        cuts = cuts[farthest[cuts - 1] <= cuts]
    if len(cuts) < size - 1:
        raise ValueError(f"a sequence that is cut between images can have at most {len(cuts) + 1} parts, got {size}")
    borders = [first]
    for number in range(1, size):
        allowed = cuts[number - 1 : len(cuts) - (size - 1 - number)]  # one for each border before and after this one
        allowed = allowed[allowed > borders[-1]]
        even = first + (tree.padded_length - first) * number / size
        borders.append(int(allowed[(allowed - even).abs().argmin()]))
    return [*borders, tree.padded_length]


def padded_to(tree: PrefixTree, blocks: int) -> PrefixTree:
    """Return the tree with padding up to at least `blocks` blocks."""
    missing = blocks * BLOCK - tree.padded_length
    if missing <= 0:
        return tree
    ends = torch.arange(tree.padded_length + 1, blocks * BLOCK + 1, dtype=torch.int32, device=tree.end.device)
    return replace(
        tree,
        tokens=None if tree.tokens is None else functional.pad(tree.tokens, (0, missing)),
        end=torch.cat([tree.end, ends]),
        block_end=None if tree.block_end is None else torch.cat([tree.block_end, ends]),
    )


def cut(tree: PrefixTree, stop: int) -> PrefixTree:
    """Return the first `stop` tokens of a packed sequence, a multiple of 128; `node` and `lengths` stay as they are."""
    return replace(
        tree,
        tokens=None if tree.tokens is None else tree.tokens[:stop],
        end=tree.end[:stop].clamp(max=stop),
        num_tokens=min(tree.num_tokens, stop),
        block_end=None if tree.block_end is None else tree.block_end[:stop],
    )
