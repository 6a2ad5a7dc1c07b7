"""The attention mask of a prefix tree: a mask_mod of three lines, and FlexAttention's block tables.

The tables are computed without evaluating the mask. With lo and hi the smallest and largest `end` in each block of 128
keys, query block i and key block j are

    visible(i, j) = j <= i and hi[j] > 128 * i          if a query of i may see a key of j
    full(i, j)    = j <  i and lo[j] >= 128 * (i + 1)   if every query of i sees every key of j
    partial       = visible and not full

With a sliding window or chunks, a query sees its ancestors from a position `oldest` on. Let first[q] be the packed
index of the ancestor there. A block must then meet a further condition:

    visible(i, j): a query q of i has first[q] in block j or an earlier one, and hi[j] > q
    full(i, j):    no query of i has its oldest position after the smallest position in block j

With image blocks, whose tokens see one another in both directions, a query q sees keys before block_end[q] > q:

    visible(i, j) = a query of i has block_end > 128 * j   and hi[j] > 128 * i
    full(i, j)    = all of i have block_end >= 128 * (j + 1) and lo[j] >= 128 * (i + 1)

which are the formulas above where block_end[q] = q + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexpg.tree import BLOCK, PrefixTree

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tree_mask_mod(end: Tensor) -> MaskMod:
    """Return a mask_mod in which every token sees its ancestors and itself.

    Args:
        end: [S] int32, one past the last packed index of each token's subtree.

    Raises:
        TypeError: If `end` is a PrefixTree.
    """
    if isinstance(end, PrefixTree):
        raise TypeError("end must be a tensor, got PrefixTree; pass tree.end")

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx < end[kv_idx])

    return mask_mod


def image_mask_mod(end: Tensor, block_end: Tensor) -> MaskMod:
    """Return a mask_mod in which every token sees its ancestors, itself and, in an image block, the whole block.

    Args:
        end: [S] int32, one past the last packed index of each token's subtree.
        block_end: [S] int32, one past the last packed index of each token's image block, or of itself.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < block_end[q_idx]) & (q_idx < end[kv_idx])

    return mask_mod


def limited_mask_mod(mask_mod: MaskMod, position_ids: Tensor, oldest: Tensor) -> MaskMod:
    """Return a mask_mod in which every token sees what `mask_mod` shows it from a position on.

    Args:
        mask_mod: The mask without a limit.
        position_ids: [S] int64, positions; packed indices would be wrong.
        oldest: [S] int64, the smallest position that each token sees.
    """

    def limited(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & (position_ids[kv_idx] >= oldest[q_idx])

    return limited


def offset_mask_mod(mask_mod: MaskMod, first_query: Tensor) -> MaskMod:
    """Return a mask_mod whose query 0 is packed token `first_query` [0-d int64] of `mask_mod`."""

    def offset(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + first_query, kv_idx)

    return offset


def dense_mask(end: Tensor, block_end: Tensor | None = None) -> Tensor:
    """Materialize the whole mask, for plots and tests.

    Args:
        end: [S] int32, one past the last packed index of each token's subtree.
        block_end: [S] int32, of bidirectional image blocks; None if images are causal.

    Returns:
        [S, S] bool, True where the query (row) sees the key (column).

    >>> dense_mask(torch.tensor([3, 2, 3])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    mask_mod = tree_mask_mod(end) if block_end is None else image_mask_mod(end, block_end)
    index = torch.arange(len(end), device=end.device)
    zero = index.new_zeros(())
    return mask_mod(zero, zero, index[:, None], index[None, :])


class TreeBlockMask(BlockMask):
    """The BlockMask of a prefix tree. It keeps the tree, which the other attention backends read.

    Attributes:
        tree: The prefix tree that is masked.
        window: The sliding window in positions, or None.
        first_query: The packed index of query 0, a multiple of 128. Keys and values are those of the whole tree.
        chunk: Positions of a chunk, outside of which a query sees nothing, or None.
        bidirectional: Whether the tokens of an image block see one another in both directions.
    """

    ndim = 4  # [1, 1, S, S]; some transformers models check it
    ranges: tuple[TreeBlockMask, ...] = ()  # masks of parts of the queries, if they are not one range

    def __init__(
        self,
        tree: PrefixTree,
        window: int | None = None,
        first_query: int = 0,
        chunk: int | None = None,
        bidirectional: bool = False,
    ) -> None:
        if not isinstance(tree, PrefixTree):
            raise TypeError(f"tree must be a PrefixTree, got {type(tree).__name__}")
        for name, size in (("window", window), ("chunk", chunk)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 (a token sees itself) or None, got {size}")
        if first_query % BLOCK or not 0 <= first_query < tree.padded_length:
            raise ValueError(f"first_query must be a multiple of {BLOCK} in the packed sequence, got {first_query}")
        with torch.inference_mode(False):  # inference tensors could not be used in a training forward
            mask_mod, partial, full = _mask_mod_and_blocks(
                tree, tree.block_end if bidirectional else None, window, first_query, chunk
            )
            super().__init__(
                (tree.padded_length - first_query, tree.padded_length),
                *_ordered(partial),
                *_ordered(full),
                *_ordered(partial.T),
                *_ordered(full.T),
                BLOCK_SIZE=(BLOCK, BLOCK),
                mask_mod=mask_mod,
            )
        self.tree, self.window, self.first_query, self.chunk = tree, window, first_query, chunk
        self.bidirectional = bidirectional
        self._by_limits: dict[tuple[int | None, int | None, bool], TreeBlockMask] = {}
        self._by_device: dict[torch.device, TreeBlockMask] = {}

    def __repr__(self) -> str:
        chunk = "" if self.chunk is None else f", chunk={self.chunk}"
        images = ", bidirectional=True" if self.bidirectional else ""
        return (
            f"{type(self).__name__}({self.tree}, window={self.window}, first_query={self.first_query}{chunk}{images})"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy: a mask_mod is a closure, which cannot be pickled
        return type(self), (self.tree, self.window, self.first_query, self.chunk, self.bidirectional)

    def __getitem__(self, index: Any) -> Any:
        """Return the mask itself for an index that keeps everything, which layers with shared keys use; or a slice."""
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, slice) and part in (slice(None), slice(0, None)) for part in parts):
            return self
        return super().__getitem__(index)

    def for_window(self, window: int | None) -> TreeBlockMask:
        """Return the same mask with another sliding window; computed once, however many layers ask for it."""
        return self._with_limits(window, self.chunk, self.bidirectional)

    def for_chunk(self, chunk: int | None) -> TreeBlockMask:
        """Return the same mask with another chunk; computed once, however many layers ask for it."""
        return self._with_limits(self.window, chunk, self.bidirectional)

    def for_images(self, bidirectional: bool) -> TreeBlockMask:
        """Return the same mask with image blocks that are bidirectional, or not; computed once."""
        return self._with_limits(self.window, self.chunk, bidirectional)

    @property
    def query_positions(self) -> Tensor:
        """[Q] int64, the positions of the queries."""
        return self.tree.position_ids[self.first_query :]

    def keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the queries of a layer attend to: here its keys and values as they are.

        Args:
            layer: What tells the model's layers apart.
            k: [1, Hkv, S', D] of the tokens that are encoded now.
            v: [1, Hkv, S', D], like `k`.
        """
        return self.start_keys_and_values(layer, k, v)()

    def start_keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return a function that returns `keys_and_values`; masks of several ranks communicate until it is called."""
        return lambda: (k, v)

    def to(self, device: torch.device | str) -> TreeBlockMask:
        """Return the same mask on `device`; computed once, however many layers ask for it."""
        device = torch.empty(0, device=device).device  # "cuda" is the current device
        if device == self.tree.end.device:
            return self
        if device not in self._by_device:
            self._by_device[device] = self._replace(self.tree.to(device), self.window, self.chunk, self.bidirectional)
        return self._by_device[device]

    def check_lengths(self, q: Tensor, k: Tensor, *, padded: bool) -> None:
        """Check that queries [1, Hq, S, D] (less by `first_query`) and keys [1, Hkv, S, D] are of this mask's tree.

        Args:
            q: Queries.
            k: Keys.
            padded: Whether the padding must be there; otherwise it may be left out.

        Raises:
            ValueError: If the lengths differ.
        """
        length = self.tree.padded_length
        if not padded and k.shape[2] == self.tree.num_tokens:
            length = self.tree.num_tokens
        if (q.shape[2], k.shape[2]) != (length - self.first_query, length):
            raise ValueError(
                f"q and k must have {length - self.first_query} and {length} tokens, those of the mask's tree, got "
                f"{q.shape[2]} and {k.shape[2]}; the mask was built for another tree"
            )

    def _with_limits(self, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        limits = window, chunk, bidirectional
        if limits == (self.window, self.chunk, self.bidirectional):
            return self
        if limits not in self._by_limits:
            self._by_limits[limits] = self._replace(self.tree, *limits)
        return self._by_limits[limits]

    def _replace(self, tree: PrefixTree, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        return TreeBlockMask(tree, window, self.first_query, chunk, bidirectional)


def block_mask(
    tree: PrefixTree,
    window: int | None = None,
    *,
    first_query: int = 0,
    chunk: int | None = None,
    bidirectional: bool = False,
) -> TreeBlockMask:
    """Build the block mask of a prefix tree: tables equal to those of `create_block_mask`, in O(blocks^2) booleans.

    The mask is computed on the tree's device, on CUDA without a synchronization, and is fit for training even if it was
    built in inference mode.

    Args:
        tree: The prefix tree, of S packed tokens.
        window: Tokens that a query sees at most, itself included, counted in positions; None for all.
        first_query: The packed index of query 0, a multiple of 128: the tokens before it are keys only.
        chunk: Positions of a chunk (chunked attention, as in Llama 4): a query at position p sees no token before
            `p // chunk * chunk`; None for no chunks.
        bidirectional: Whether the tokens of an image block see one another in both directions (as in Gemma 3).

    Raises:
        ValueError: If `window` or `chunk` is below 1, or `first_query` is not the start of a block.
        TypeError: If `tree` is not a PrefixTree.
    """
    return TreeBlockMask(tree, window, first_query, chunk, bidirectional)


def group_block_mask(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> TreeBlockMask:
    """Build the block mask of groups `[prefix, suffix, suffix, ...]` that are packed one after another.

    The packed sequence is padded to a multiple of 128 tokens, at least 256; `mask.tree.position_ids` gives positions.

    Args:
        prefix_lens: Tokens of each group's shared prefix.
        suffix_lens: For each group, the list of its suffixes' lengths.
        device: The device of the mask.

    Raises:
        ValueError: If a length is below 1, a group has no suffix, or `suffix_lens` is one flat list.

    >>> mask = group_block_mask([1000], [[200, 50, 300]])
    >>> tuple(mask.shape), mask.tree.num_tokens
    ((1, 1, 1664, 1664), 1550)
    """
    return block_mask(PrefixTree.from_lengths(prefix_lens, suffix_lens).to(device))


def _mask_mod_and_blocks(
    tree: PrefixTree, block_end: Tensor | None, window: int | None, first_query: int, chunk: int | None
) -> tuple[MaskMod, Tensor, Tensor]:
    """Return the mask_mod and which blocks are partial and full, both [query blocks, key blocks] bool."""
    end = tree.end
    start = torch.arange(0, tree.padded_length, BLOCK, device=end.device)  # [n] first token of each block
    row, column = start[:, None], start[None, :]
    lo, hi = _block_ranges(end)
    if block_end is None:
        mask_mod = tree_mask_mod(end)
        visible = (column <= row) & (hi > row)  # [n, n]
        full = (column < row) & (lo >= row + BLOCK)
    else:
        mask_mod = image_mask_mod(end, block_end)
        nearest, farthest = _block_ranges(block_end)
        visible = (column < farthest[:, None]) & (hi > row)
        full = (column + BLOCK <= nearest[:, None]) & (lo >= row + BLOCK)
    if window is not None or chunk is not None:
        position_ids = tree.position_ids
        oldest = torch.zeros_like(position_ids) if chunk is None else position_ids // chunk * chunk  # [S]
        if window is not None:
            oldest = torch.maximum(oldest, position_ids - window + 1)
        visible &= _blocks_from(tree.ancestors_at(oldest), hi)
        full &= _block_ranges(oldest)[1][:, None] <= _block_ranges(position_ids)[0][None, :]
        mask_mod = limited_mask_mod(mask_mod, position_ids, oldest)
    if first_query:
        mask_mod = offset_mask_mod(mask_mod, torch.full((), first_query, device=end.device))
        visible, full = visible[first_query // BLOCK :], full[first_query // BLOCK :]
    return mask_mod, visible & ~full, full


def _blocks_from(first: Tensor, hi: Tensor) -> Tensor:
    """Return [n, n] bool, whether a query of block i sees a key of block j <= i, if it sees its ancestors from one on.

    Args:
        first: [S] int64, the packed index of the first ancestor that each query sees, or its own.
        hi: [n] int32, the largest `end` of each block.
    """
    n, index = len(hi), torch.arange(len(first), device=first.device)
    # Query q sees a key of block j if its first key is there or before, and the block has an ancestor of it: hi[j] > q.
    # So of the queries of a block whose first keys are in the same block, the earliest sees all that the others see.
    earliest = index.new_full((n * n,), len(first))
    earliest.scatter_reduce_(0, index // BLOCK * n + first // BLOCK, index, "amin")
    return hi[None, :] > earliest.view(n, n).cummin(1).values


def _block_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value [n] of each block, from [S] values."""
    by_block = values.view(-1, BLOCK)
    return by_block.amin(1), by_block.amax(1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for [n, m] bool, int32 counts [1, 1, n] of each row and indices [1, 1, n, m], set columns first."""
    count = blocks.sum(1, dtype=torch.int32)
    # Set columns go to their rank, the others after them. A scatter, because a sort would cost more.
    rank = blocks.cumsum(1, dtype=torch.int32)
    column = torch.arange(blocks.shape[1], dtype=torch.int32, device=blocks.device)
    target = torch.where(blocks, rank - 1, count[:, None] + column - rank)
    indices = torch.empty_like(target, memory_format=torch.contiguous_format)
    indices.scatter_(1, target.long(), column.expand_as(target))
    return count[None, None], indices[None, None]
