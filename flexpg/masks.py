"""The mask of a prefix tree: a mask_mod of three lines, and its block tables without evaluating it.

With lo and hi the least and greatest `end` in each block of 128 keys, query block i and key block j:

    visible(i, j) = j <= i and hi[j] > 128 * i          some query of i may see some key of j
    full(i, j)    = j <  i and lo[j] >= 128 * (i + 1)   every query of i sees every key of j
    partial       = visible and not full
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexpg.scalars import is_whole
from flexpg.tree import BLOCK, PrefixTree, checked_tree

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tree_mask_mod(end: Tensor) -> MaskMod:
    """A token sees itself and its ancestors, and nothing else.

    Args:
        end: [S] int32, one past the last packed token of each token's subtree.

    Raises:
        TypeError: `end` is no tensor.
    """
    if not isinstance(end, Tensor):
        raise TypeError(f"end is a {type(end).__name__}; give the tensor `tree.end`")

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx < end[kv_idx])

    return mask_mod


def later_mask_mod(mask_mod: MaskMod, first_query: Tensor) -> MaskMod:
    """The same for rows whose query 0 is the packed token `first_query`, a 0-d int tensor: an int would recompile."""

    def later(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + first_query, kv_idx)

    return later


def windowed_mask_mod(end: Tensor, position_ids: Tensor, window: Tensor) -> MaskMod:
    """A token sees itself and those of its ancestors that are less than `window` positions away.

    Args:
        end: [S] int32, one past the last packed token of each token's subtree.
        position_ids: [S] int, depth in the tree; a packed index is not a position.
        window: 0-d int, tokens in the window with the token itself. A tensor, as a captured int would recompile.
    """
    in_tree = tree_mask_mod(end)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return in_tree(b, h, q_idx, kv_idx) & (position_ids[q_idx] - position_ids[kv_idx] < window)

    return mask_mod


def dense_mask(end: Tensor) -> Tensor:
    """The whole mask, for pictures and as the oracle of the tests.

    Args:
        end: [S] int32, one past the last packed token of each token's subtree.

    Returns:
        [S, S] bool, True where the query (row) sees the key (column).

    Raises:
        TypeError: `end` is no tensor.

    >>> dense_mask(torch.tensor([3, 2, 3])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    mask_mod = tree_mask_mod(end)
    index = torch.arange(len(end), device=end.device)
    nothing = index.new_zeros(())
    return mask_mod(nothing, nothing, index[:, None], index[None, :])


class KeyValues(Protocol):
    """Keys and values of an earlier forward, per layer; `flexpg.prefix_cache.EncodedPrefix` is one."""

    tree: PrefixTree

    def joined(self, mask: TreeBlockMask, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A row's own [1, Hkv, S, D], with those that stand before them."""


class TreeBlockMask(BlockMask):
    """A BlockMask that also carries its tree, which the other attention backends read.

    Attributes:
        tree: the PrefixTree that it masks.
        window: the sliding window in positions, or None.
        first_query: the packed token that is query 0, a multiple of 128; keys and values are those of the whole tree.
        prefix: where the keys and values before the first query come from; None where the row is the whole tree.
    """

    tree: PrefixTree
    window: int | None
    first_query: int
    prefix: KeyValues | None
    _windowed: dict[int, TreeBlockMask]
    _elsewhere: dict[torch.device, TreeBlockMask]
    ndim = 4  # [1, 1, S, S], as some models of transformers ask of a mask

    def to(self, device: torch.device | str) -> TreeBlockMask:
        """The same mask on `device`: itself if it is there, or made once, however many layers ask for it."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one
        if device == self.tree.end.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = self._like(self.tree.to(device), self.window)
        return self._elsewhere[device]

    def for_window(self, window: int) -> TreeBlockMask:
        """The same tree's mask with another sliding window; made once, however many layers ask for it."""
        if window not in self._windowed:
            self._windowed[window] = self._like(self.tree, window)
        return self._windowed[window]

    def joined(self, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [1, Hkv, S, D] as `attention` takes them: behind those of the prefix, if any."""
        return (k, v) if self.prefix is None else self.prefix.joined(self, layer, k, v)

    def _like(self, tree: PrefixTree, window: int | None) -> TreeBlockMask:
        mask = block_mask(tree, window, first_query=self.first_query)
        mask.prefix = self.prefix
        return mask


def block_mask(tree: PrefixTree, window: int | None = None, *, first_query: int = 0) -> TreeBlockMask:
    """The FlexAttention mask of a tree: tables equal to `create_block_mask`'s, in O(blocks^2) booleans.

    With a window the tables may list a block that holds nothing visible, or evaluate one that is full; never one less.
    Made on the tree's device, on CUDA without a synchronisation, and fit for training even if made in inference mode.

    Args:
        tree: the packed row, of S tokens.
        window: tokens that a query sees at most, itself among them, counted in positions; None for all.
        first_query: the packed token that is query 0, a multiple of 128: those before it are keys alone.

    Raises:
        ValueError: a window that is no whole number or below 1, or a first query that is no block's first token.
        TypeError: a tree that is none.
    """
    checked_tree(tree)
    if window is not None and not is_whole(window):
        raise ValueError(f"window is {window!r}; a token sees at least itself, so give 1 or more, or None for none")
    if first_query % BLOCK or not 0 <= first_query < len(tree):
        raise ValueError(f"first_query is {first_query}; give a multiple of {BLOCK} from 0 to below {len(tree)}")
    window = None if window is None else int(window)
    with torch.inference_mode(False):
        end, size = tree.end, len(tree)
        start = torch.arange(0, size, BLOCK, device=end.device)  # [n] first token of each block
        row, column = start[:, None], start[None, :]
        by_block = end.view(-1, BLOCK)  # [n, 128]
        lo, hi = by_block.amin(1), by_block.amax(1)
        visible = (column <= row) & (hi > row)  # [n, n]
        full = (column < row) & (lo >= row + BLOCK)
        mask_mod = tree_mask_mod(end)
        if window is not None:
            position_ids = tree.position_ids
            first, last = position_ids.view(-1, BLOCK).amin(1), position_ids.view(-1, BLOCK).amax(1)
            visible &= first[:, None] - last[None, :] < window
            full &= last[:, None] - first[None, :] < window
            mask_mod = windowed_mask_mod(end, position_ids, torch.full((), window, device=end.device))
        if first_query:
            mask_mod = later_mask_mod(mask_mod, torch.full((), first_query, device=end.device))
            visible, full = visible[first_query // BLOCK :], full[first_query // BLOCK :]
        partial = visible & ~full
        mask = TreeBlockMask(
            (size - first_query, size),
            *_ordered(partial),
            *_ordered(full),
            *_ordered(partial.T),
            *_ordered(full.T),
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        )
    mask.tree, mask.window, mask.first_query, mask.prefix = tree, window, first_query, None
    mask._windowed, mask._elsewhere = {}, {}
    return mask


def mask_of(tree: PrefixTree, mask: TreeBlockMask | None) -> TreeBlockMask:
    """The mask that came, if it is the tree's, or a new one if none came.

    Raises:
        ValueError: a mask of another tree.
        TypeError: a tree that is none.
    """
    checked_tree(tree)
    if mask is None:
        return block_mask(tree)
    if mask.tree is not tree:
        raise ValueError(
            f"the mask was made for another tree ({mask.tree}); give block_mask(tree) of this one ({tree})"
        )
    return mask


def check_lengths(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, *, padded: bool) -> None:
    """Refuses what is no packed row of the mask's tree.

    Args:
        q: [1, Hq, S, D], less by the mask's first query.
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        mask: the packed row's mask.
        padded: the row's pads have to be there; else they may be left out, of all three.

    Raises:
        ValueError: other lengths.
    """
    length = len(mask.tree)
    if not padded and k.shape[2] == mask.tree.num_tokens:
        length = mask.tree.num_tokens
    queries = length - mask.first_query
    if [x.shape[2] for x in (q, k, v)] != [queries, length, length]:
        of_them = f", {queries} of them queries" if mask.first_query else ""
        raise ValueError(
            f"the mask's tree has {length} packed tokens{of_them}; got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}; pack and mask the same tree"
        )


def group_block_mask(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> TreeBlockMask:
    """The block mask of `[prefix, suffix, suffix, ...]` groups that stand one behind the other in a packed row.

    The row is padded to a multiple of 128 tokens, and to 256 at least; `mask.tree.position_ids` gives the positions.

    Args:
        prefix_lens: tokens of each group's shared prefix.
        suffix_lens: for each group, the list of its suffixes' lengths.
        device: where the mask is wanted.

    Raises:
        ValueError: lengths below 1, a group without suffix, or lists that do not match.

    >>> mask = group_block_mask([1000], [[200, 50, 300]])
    >>> tuple(mask.shape), mask.tree.num_tokens
    ((1, 1, 1664, 1664), 1550)
    """
    return block_mask(PrefixTree.from_lengths(prefix_lens, suffix_lens).to(device))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] bool -> int32 [1, 1, n] counts of the rows, and [1, 1, n, m] their set columns, then the others."""
    count = blocks.sum(1, dtype=torch.int32)
    # Where each column goes: set ones by their rank, the others behind them. A scatter, as a sort would cost more.
    rank = blocks.cumsum(1, dtype=torch.int32)
    column = torch.arange(blocks.shape[1], dtype=torch.int32, device=blocks.device)
    target = torch.where(blocks, rank - 1, count[:, None] + column - rank)
    indices = torch.empty_like(target, memory_format=torch.contiguous_format)
    indices.scatter_(1, target.long(), column.expand_as(target))
    return count[None, None], indices[None, None]
