"""The prefix tree of a set of token sequences, in which every shared prefix is stored once.

The tokens are laid out in depth-first order, so the subtree of a token is one contiguous range and one vector
describes the whole tree:

    end[k]  = one past the last packed index of the subtree of token k
    q sees k  iff  k <= q  and  q < end[k]

A padding token is a root of its own (`end[i] = i + 1`): it sees itself and no other token sees it, so no query is
fully masked.

Prompts may have images. Their tokens are compared by what they show, and the tokens of one image block, which stand
next to one another in every sequence that has it, are never torn apart by a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexpg.token_sequences import Tokens, common_prefix_length, lexicographic_order, token_ids

if TYPE_CHECKING:
    from flexpg.prompt_inputs import PromptInputs

BLOCK = 128  # tokens per block of FlexAttention
MIN_BLOCKS = 2  # torch.compile specializes on a dimension of size 1 and would recompile for it


@dataclass(frozen=True, eq=False, repr=False)
class PrefixTree:
    """The packed sequence of N sequences. Created by `from_sequences`, `from_groups` or `from_lengths`.

    Attributes:
        tokens: [S] int64 packed token ids, 0 at padding; None for a tree that was created from lengths.
        end: [S] int32, one past the last packed index of each token's subtree.
        node: [N, T] int64, the packed index of token t of sequence n; -1 past the end of the sequence.
        lengths: [N] int64, tokens of each sequence.
        num_tokens: packed tokens without padding.
        max_length: T, tokens of the longest sequence.
        max_token: the largest token id; -1 for a tree without tokens.
        block_end: [S] int32, one past the last packed index of each token's image block, or of itself; None without
            images.
        inputs: for each sequence the images of its prompt, or None; None without images.
    """

    tokens: Tensor | None
    end: Tensor
    node: Tensor
    lengths: Tensor
    num_tokens: int
    max_length: int
    max_token: int
    block_end: Tensor | None = None
    inputs: tuple[PromptInputs | None, ...] | None = None

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Tokens], inputs: Sequence[PromptInputs | None] | None = None
    ) -> PrefixTree:
        """Build the tree of any sequences; shared prefixes are found by comparing token ids, and the pixels of images.

        Sequences may be equal, or prefixes of one another.

        Args:
            sequences: N token sequences, each a 1-D integer tensor, array or list with at least one token.
            inputs: For each sequence the images of its prompt, None for a text prompt, all from one call of
                `flexpg.prompt_inputs.read_prompt_inputs`; None if there are only text prompts.

        Raises:
            ValueError: If there is no sequence, or one is empty, not 1-D or has a negative token id.
            TypeError: If token ids are not integers.

        >>> PrefixTree.from_sequences([[5, 6, 7], [5, 6, 8, 9]]).node.tolist()
        [[0, 1, 2, -1], [0, 1, 3, 4]]
        """
        arrays = [token_ids(f"sequences[{n}]", tokens).cpu().numpy() for n, tokens in enumerate(sequences)]
        if not arrays:
            raise ValueError("sequences must not be empty")
        compared = arrays
        if inputs is not None:
            compared = [a if given is None else given.compared(a) for a, given in zip(arrays, inputs, strict=True)]
            inputs = None if all(given is None for given in inputs) else inputs
        lengths = np.array([len(a) for a in arrays])
        node = np.full((len(arrays), lengths.max()), -1)
        end = np.empty(lengths.sum(), dtype=np.int32)
        path: list[tuple[int, int, int]] = []  # runs from the root to the latest token: (depth, packed start, stop)
        parts, packed, previous = [], 0, None
        for n in lexicographic_order(compared):
            tokens = arrays[n]
            shared = 0 if previous is None else common_prefix_length(compared[previous], compared[n])
            _close_subtrees(path, shared, packed, end)
            if previous is not None:
                node[n, :shared] = node[previous, :shared]
            added = len(tokens) - shared
            if added:
                node[n, shared : len(tokens)] = np.arange(packed, packed + added)
                path.append((shared, packed, packed + added))
                parts.append(tokens[shared:])
                packed += added
            previous = n
        _close_subtrees(path, 0, packed, end)
        return cls._padded(np.concatenate(parts), end[:packed], node, lengths, _device(sequences[0]), inputs)

    @classmethod
    def from_groups(cls, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]]) -> PrefixTree:
        """Build the tree of groups: each prompt once, followed by its completions in the given order.

        Prefixes that several completions or several prompts share are not merged. Sequence n is rollout n.

        Args:
            prompts: Token sequences, each a 1-D integer tensor, array or list.
            completions: For each prompt, the list of its completions' token sequences.

        Raises:
            ValueError: If a prompt, completion or group is empty, a token id is negative, or there is not one list of
                completions per prompt.
            TypeError: If token ids are not integers.

        >>> PrefixTree.from_groups([[5, 6]], [[[7], [8, 9]]]).node.tolist()
        [[0, 1, 2, -1], [0, 1, 3, 4]]
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"completions must have one list per prompt, got {len(completions)} for {len(prompts)} prompts"
            )
        groups = [
            [
                token_ids(f"prompts[{g}]", prompt),
                *(token_ids(f"completions[{g}][{i}]", completion) for i, completion in enumerate(group)),
            ]
            for g, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        ]
        layout = _group_layout(
            [len(group[0]) for group in groups], [[len(completion) for completion in group[1:]] for group in groups]
        )
        packed = np.concatenate([tokens.cpu().numpy() for tokens in chain(*groups)])
        return cls._padded(packed, *layout, _device(prompts[0]))

    @classmethod
    def from_lengths(cls, prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]) -> PrefixTree:
        """Build the tree of groups of which only the lengths are known, which is enough for masks and positions.

        Args:
            prefix_lens: Tokens of each prompt, at least 1.
            suffix_lens: For each prompt, the list of its completions' lengths, each at least 1.

        Raises:
            ValueError: If there is no group, a group has no completion, a length is below 1, or `suffix_lens` is one
                flat list.

        >>> PrefixTree.from_lengths([2], [[1, 2]]).end[:5].tolist()
        [5, 5, 3, 5, 5]
        """
        return cls._padded(None, *_group_layout(prefix_lens, suffix_lens), torch.device("cpu"))

    @classmethod
    @torch.inference_mode(False)  # inference tensors could not be used in a training forward
    def _padded(
        cls,
        tokens: np.ndarray | None,
        end: np.ndarray,
        node: np.ndarray,
        lengths: np.ndarray,
        device: torch.device,
        inputs: Sequence[PromptInputs | None] | None = None,
    ) -> PrefixTree:
        num_tokens = len(end)
        size = padded_length(num_tokens)
        padded_end = np.arange(1, size + 1, dtype=np.int32)
        padded_end[:num_tokens] = end
        block_end = None
        if inputs is not None:
            block_end = np.arange(1, size + 1, dtype=np.int32)
            for row, prompt_inputs in zip(node, inputs, strict=True):
                for start, stop in [] if prompt_inputs is None else prompt_inputs.blocks:
                    block_end[row[start:stop]] = row[stop - 1] + 1
        tree = cls(
            tokens=None if tokens is None else torch.from_numpy(np.pad(tokens, (0, size - num_tokens))),
            end=torch.from_numpy(padded_end),
            node=torch.from_numpy(node),
            lengths=torch.from_numpy(lengths),
            num_tokens=num_tokens,
            max_length=int(lengths.max()),
            max_token=-1 if tokens is None else int(tokens.max()),
            block_end=None if block_end is None else torch.from_numpy(block_end),
            inputs=None if inputs is None else tuple(inputs),
        )
        return tree.to(device)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> PrefixTree:
        """Return the same tree with its tensors on `device`."""
        return replace(
            self,
            tokens=None if self.tokens is None else self.tokens.to(device),
            end=self.end.to(device),
            node=self.node.to(device),
            lengths=self.lengths.to(device),
            block_end=None if self.block_end is None else self.block_end.to(device),
        )

    def __repr__(self) -> str:
        return (
            f"PrefixTree({len(self.lengths)} sequences, {self.baseline_tokens} tokens packed into {self.num_tokens}, "
            f"device={self.end.device})"
        )

    @property
    def padded_length(self) -> int:
        """S, the length of the packed sequence with its padding."""
        return len(self.end)

    @property
    def input_ids(self) -> Tensor:
        """[1, S] int64, the packed sequence as a batch of one.

        Raises:
            ValueError: If the tree was created from lengths.
        """
        if self.tokens is None:
            raise ValueError("a tree created by from_lengths has no tokens; use from_groups or from_sequences")
        return self.tokens[None]

    @cached_property
    @torch.inference_mode(False)
    def position_ids(self) -> Tensor:
        """[S] int64, each token's position in its own sequence (its depth in the tree), for RoPE and windows."""
        index = torch.arange(self.padded_length, device=self.end.device)
        # The ancestors of q are all k < q but those with end[k] <= q.
        closed_at = index.new_zeros(self.padded_length + 1).scatter_add_(0, self.end.long(), torch.ones_like(index))
        return index - closed_at.cumsum(0)[:-1]

    @cached_property
    @torch.inference_mode(False)
    def parent(self) -> Tensor:
        """[S] int64, the packed index of the token before each token in its sequence; -1 at roots and padding."""
        depth = self.position_ids
        return torch.where(depth > 0, self.ancestors_at((depth - 1).clamp(min=0)), -1)

    @torch.inference_mode(False)
    def ancestors_at(self, positions: Tensor) -> Tensor:
        """Return [S] int64, the packed index of each token's ancestor, or the token itself, at a position.

        Args:
            positions: [S] int64, at least 0 and at most the token's own.
        """
        depth, size = self.position_ids, self.padded_length
        index = torch.arange(size, device=depth.device)
        # In depth-first order the ancestor is the latest token up to this one that is on its level.
        by_level = (depth * size + index).sort().values
        return by_level[torch.searchsorted(by_level, positions * size + index, right=True) - 1] % size

    @cached_property
    @torch.inference_mode(False)
    def segments(self) -> Tensor:
        """[K, 3] int64, (start, stop, subtree end) of each segment in packed order, without padding."""
        end = self.end[: self.num_tokens].long()
        starts = torch.cat([end.new_zeros(1), (end[1:] != end[:-1]).nonzero().flatten() + 1])
        stops = torch.cat([starts[1:], end.new_full((1,), self.num_tokens)])
        return torch.stack([starts, stops, end[starts]], dim=1)

    @cached_property
    @torch.inference_mode(False)
    def blocks(self) -> Tensor:
        """[K, 2] int64, (start, stop) of each image block of at least two tokens in packed order."""
        if self.block_end is None:
            return torch.empty(0, 2, dtype=torch.int64, device=self.end.device)
        stop = self.block_end.long()
        index = torch.arange(len(stop), device=stop.device)
        previous = torch.cat([stop.new_zeros(1), stop[:-1]])
        starts = ((stop > index + 1) & (stop != previous)).nonzero().flatten()
        return torch.stack([starts, stop[starts]], 1)

    @cached_property
    def num_pairs(self) -> int:
        """Visible query-key pairs of the packed sequence: every token with itself and its ancestors.

        >>> PrefixTree.from_lengths([3], [[1, 1]]).num_pairs
        14
        """
        return int((self.position_ids[: self.num_tokens] + 1).sum())

    @cached_property
    def baseline_tokens(self) -> int:
        """Tokens of all sequences, which the baseline encodes."""
        return int(self.lengths.sum())

    @cached_property
    def baseline_pairs(self) -> int:
        """Visible query-key pairs of the baseline: every sequence under a causal mask of its own.

        >>> PrefixTree.from_lengths([3], [[1, 1]]).baseline_pairs
        20
        """
        return int((self.lengths * (self.lengths + 1) // 2).sum())


def padded_length(num_tokens: int) -> int:
    """Return S, the length of a packed sequence of `num_tokens` tokens with its padding."""
    return max(MIN_BLOCKS, -(-num_tokens // BLOCK)) * BLOCK


def _group_layout(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `end`, `node` and `lengths` of groups `[prefix, suffix, suffix, ...]`, one after another."""
    if any(np.ndim(lens) == 0 for lens in suffix_lens):
        raise ValueError(f"suffix_lens must have one list of lengths per prompt, got {list(suffix_lens)}")
    if len(prefix_lens) == 0 or len(prefix_lens) != len(suffix_lens) or not all(map(len, suffix_lens)):
        raise ValueError(
            f"every group must have one prompt and at least one completion, got {len(prefix_lens)} prompts and "
            f"groups of {[len(group) for group in suffix_lens]} completions"
        )
    sizes = np.array([len(group) for group in suffix_lens])
    prefix, suffix = np.asarray(prefix_lens), np.concatenate([np.asarray(lens) for lens in suffix_lens])
    for name, lens in (("prefix_lens", prefix), ("suffix_lens", suffix)):
        if lens.dtype.kind not in "iu" or lens.min() < 1:
            raise ValueError(f"{name} must be integers >= 1, got {lens.tolist()}")
    group = np.repeat(np.arange(len(sizes)), sizes)  # [N] group of each sequence
    is_prefix = np.zeros(len(prefix) + len(suffix), dtype=bool)
    is_prefix[np.cumsum(sizes + 1) - sizes - 1] = True
    runs = np.empty(len(is_prefix), dtype=np.int64)  # lengths of prompt, completion, ..., prompt, completion, ...
    runs[is_prefix], runs[~is_prefix] = prefix, suffix
    stop = np.cumsum(runs)
    prefix_start, suffix_start = (stop - runs)[is_prefix][group], (stop - runs)[~is_prefix]
    subtree_end = stop.copy()
    subtree_end[is_prefix] = stop[np.cumsum(sizes + 1) - 1]  # a prompt's subtree ends with its last completion
    lengths = prefix[group] + suffix
    t = np.arange(lengths.max())  # [T]
    start = np.where(t < prefix[group, None], prefix_start[:, None], (suffix_start - prefix[group])[:, None])
    node = np.where(t < lengths[:, None], start + t, -1)  # [N, T]
    return np.repeat(subtree_end, runs), node, lengths


def _close_subtrees(path: list[tuple[int, int, int]], depth: int, packed: int, end: np.ndarray) -> None:
    """End the subtree of every token on the path that is at `depth` or deeper, at packed index `packed`."""
    while path:
        run_depth, start, stop = path.pop()
        keep = min(start + max(depth - run_depth, 0), stop)
        end[keep:stop] = packed
        if keep > start:
            path.append((run_depth, start, keep))
            return


def _device(tokens: Tokens) -> torch.device:
    return tokens.device if isinstance(tokens, Tensor) else torch.device("cpu")
