"""One packed sequence over the ranks of a group: each computes a range of its tokens in all layers.

In attention the queries of a rank are its own tokens, and the keys and values are those of all ranks up to the end of
its range: they are gathered in every layer, and their gradients are summed and scattered back. In depth-first order the
ancestors of a token are before it, so the mask is that of the tree, cut at the end of the range. A token is predicted
at its parent, so the rank that owns the parent scores it, and no hidden state leaves its rank.

Gradients of parameters are partial sums on each rank. FSDP2 sums them up if it shards the model over the group's ranks;
of other models, `flexpg.collectives.summed_gradients` does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from flexpg.collectives import gather_parts
from flexpg.masks import TreeBlockMask
from flexpg.tree import BLOCK, PrefixTree


class ContextShard:
    """The range of a packed sequence that this rank of a group computes.

    Args:
        tree: The packed sequence.
        group: The ranks that share it, each of which creates the same.
        first: The packed index of the first token that is computed at all, a multiple of 128; those before it are in a
            cached prompt.

    Attributes:
        group: The ranks.
        rank: This rank in the group.
        first: The packed index of the first token that is computed at all.
        tree: The packed sequence, with at least one block for every rank.
        borders: Rank r of the group computes the tokens from `borders[r]` up to `borders[r + 1]`.
        start: The packed index of this rank's first token.
        stop: One past that of its last token.
    """

    def __init__(self, tree: PrefixTree, group: ProcessGroup, first: int = 0) -> None:
        self.group, self.rank, self.first = group, dist.get_rank(group), first
        size = dist.get_world_size(group)
        self.tree = padded_to(tree, first // BLOCK + size)
        self.borders = token_ranges(self.tree, size, first)
        self.start, self.stop = self.borders[self.rank], self.borders[self.rank + 1]

    @property
    def row_of(self) -> Tensor:
        """[S] int64, the row of this rank's hidden states for each packed token; -1 for those of other ranks."""
        index = torch.arange(self.tree.padded_length, device=self.tree.end.device)
        return torch.where((index >= self.start) & (index < self.stop), index - self.start, -1)

    @property
    def visible(self) -> PrefixTree:
        """The tree up to the end of this rank's range, which holds all that its tokens see."""
        return cut(self.tree, self.stop)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return a tensor of all tokens from this rank's part; gradients are summed over ranks and scattered back.

        Args:
            x: [..., start to stop, ...].
            dim: The dimension of tokens.
        """
        return gather_parts(x, dim, self.group, [b - a for a, b in pairwise(self.borders)])

    def gather_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens up to this rank's last one, from `first` on, by one collective.

        Args:
            k: [1, Hkv, stop - start, D].
            v: Likewise.
        """
        keys, values = self.gather(torch.cat([k, v]), 2)[:, :, : self.stop - self.first].split(1)
        return keys, values


class ShardBlockMask(TreeBlockMask):
    """The TreeBlockMask of a rank's queries, with the range that its keys are gathered for.

    Attributes:
        shard: The rank's range of the packed sequence.
    """

    def __init__(
        self,
        shard: ContextShard,
        tree: PrefixTree | None = None,
        window: int | None = None,
        chunk: int | None = None,
        bidirectional: bool = False,
    ) -> None:
        super().__init__(shard.visible if tree is None else tree, window, shard.start, chunk, bidirectional)
        self.shard = shard

    @cached_property
    def whole(self) -> TreeBlockMask:
        """The mask of the whole packed sequence, for layers whose inputs are gathered."""
        return TreeBlockMask(self.shard.tree)

    def keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of this rank's range and of all before it."""
        return self.shard.gather_keys(k, v)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("ShardBlockMask cannot be pickled or copied: it holds a process group; pickle mask.shard.tree")

    def _replace(self, tree: PrefixTree, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        return ShardBlockMask(self.shard, tree, window, chunk, bidirectional)


def token_ranges(tree: PrefixTree, size: int, first: int = 0) -> list[int]:
    """Return where a packed sequence is cut for `size` ranks, so that they have about equally many tokens, and memory.

    Cuts are at block borders, and not inside of an image, which is encoded on one rank.

    Args:
        tree: The packed sequence, of at least `size` blocks from `first` on.
        size: Number of ranks.
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
    for rank in range(1, size):
        allowed = cuts[rank - 1 : len(cuts) - (size - 1 - rank)]  # one for each border before and after this one
        allowed = allowed[allowed > borders[-1]]
        even = first + (tree.padded_length - first) * rank / size
        borders.append(int(allowed[(allowed - even).abs().argmin()]))
    return [*borders, tree.padded_length]


def padded_to(tree: PrefixTree, blocks: int) -> PrefixTree:
    """Return the tree with padding up to at least `blocks` blocks."""
    missing = blocks * BLOCK - tree.padded_length
    if missing <= 0:
        return tree
    own = torch.arange(tree.padded_length + 1, blocks * BLOCK + 1, dtype=torch.int32, device=tree.end.device)
    return replace(
        tree,
        tokens=None if tree.tokens is None else functional.pad(tree.tokens, (0, missing)),
        end=torch.cat([tree.end, own]),
        block_end=None if tree.block_end is None else torch.cat([tree.block_end, own]),
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
