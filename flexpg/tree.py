"""The prefix tree: any set of token sequences, laid out so that every shared prefix stands once.

The tokens stand in depth-first order, so the subtree under a token is one contiguous range, and one vector tells all:

    end[k]  = one past the last packed token of the subtree under token k
    q sees k  iff  k <= q  and  q < end[k]

A pad is a root of its own (`end[i] = i + 1`): it sees itself, nobody else sees it, and no row of the mask is empty.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # FlexAttention's block of tokens
MIN_BLOCKS = 2  # torch.compile specialises on a dimension of 1, and would compile once more for it

Tokens = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False, repr=False)
class PrefixTree:
    """A packed row of tokens that stands for N sequences. Made by `from_sequences`, `from_groups` or `from_lengths`.

    Attributes:
        tokens: [S] int64, the packed tokens, pads are 0; None for a tree made from lengths alone.
        end: [S] int32, one past the last packed token of each token's subtree.
        node: [N, T] int64, the packed index of token t of sequence n; -1 beyond the sequence's length.
        lengths: [N] int64, tokens of each sequence.
        num_tokens: packed tokens before the padding.
        max_length: T, tokens of the longest sequence: what a model's context has to hold.
        max_token: the largest token id, or -1 without tokens.
    """

    tokens: Tensor | None
    end: Tensor
    node: Tensor
    lengths: Tensor
    num_tokens: int
    max_length: int
    max_token: int

    @classmethod
    def from_sequences(cls, sequences: Sequence[Tokens]) -> PrefixTree:
        """Finds every prefix that sequences share, by itself; sequences may be equal or prefixes of one another.

        Args:
            sequences: N token sequences, each a 1-D integer tensor [T_n] or a list of ints, T_n >= 1.

        Raises:
            ValueError: no sequence, an empty sequence, negative token ids, or tensors on several devices.
            TypeError: no list of sequences, or tokens that are not integers.

        >>> PrefixTree.from_sequences([[5, 6, 7], [5, 6, 8, 9]]).node.tolist()
        [[0, 1, 2, -1], [0, 1, 3, 4]]
        """
        arrays, device = _token_arrays("sequence", sequences)
        order = sorted_order(arrays)
        lengths = np.array([len(a) for a in arrays])
        node = np.full((len(arrays), lengths.max()), -1)
        end = np.empty(lengths.sum(), dtype=np.int32)
        path: list[tuple[int, int, int]] = []  # runs on the way to the latest token: (depth, packed start, packed stop)
        parts, packed, previous = [], 0, None
        for n in order:
            tokens = arrays[n]
            shared = 0 if previous is None else common_prefix(arrays[previous], tokens)
            _close(path, shared, packed, end)
            if previous is not None:
                node[n, :shared] = node[previous, :shared]
            added = len(tokens) - shared
            if added:
                node[n, shared : len(tokens)] = np.arange(packed, packed + added)
                path.append((shared, packed, packed + added))
                parts.append(tokens[shared:])
                packed += added
            previous = n
        _close(path, 0, packed, end)
        return cls._padded(np.concatenate(parts), end[:packed], node, lengths, device)

    @classmethod
    def from_groups(cls, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]]) -> PrefixTree:
        """Lays out each prompt once, with its completions behind it, in the order given; sequence n is rollout n.

        Args:
            prompts: token sequences, each a 1-D integer tensor or a list of ints.
            completions: for each prompt, the list of its completions' token sequences.

        Raises:
            ValueError: an empty prompt, completion or group, negative token ids, or tensors on several devices.
            TypeError: lists that are none, or tokens that are not integers.

        >>> PrefixTree.from_groups([[5, 6]], [[[7], [8, 9]]]).node.tolist()
        [[0, 1, 2, -1], [0, 1, 3, 4]]
        """
        if _counted("prompts", prompts) != _counted("completions", completions):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(completions)} lists of completions; give each prompt one list"
            )
        _require_completions(completions)
        flat = [completion for group in completions for completion in group]
        prefixes, prompt_device = _token_arrays("prompt", prompts)
        suffixes, device = _token_arrays("completion", flat)
        if prompt_device != device:
            raise ValueError(f"prompts are on {prompt_device} and completions on {device}; move them to one device")
        suffix_lens = _regroup([len(s) for s in suffixes], completions)
        row = [part for p, group in zip(prefixes, _regroup(suffixes, completions), strict=True) for part in (p, *group)]
        return cls._padded(np.concatenate(row), *_group_layout([len(p) for p in prefixes], suffix_lens), device)

    @classmethod
    def from_lengths(cls, prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]) -> PrefixTree:
        """The tree of groups of which only the lengths are known: enough for masks.

        Args:
            prefix_lens: tokens of each prompt, each >= 1.
            suffix_lens: for each prompt, the list of its completions' lengths, each >= 1.

        Raises:
            ValueError: lengths below 1, a group without completion, or lists that do not match.
            TypeError: lists that are none.

        >>> PrefixTree.from_lengths([2], [[1, 2]]).end[:5].tolist()
        [5, 5, 3, 5, 5]
        """
        return cls._padded(None, *_group_layout(prefix_lens, suffix_lens), torch.device("cpu"))

    @classmethod
    @torch.inference_mode(False)  # a tensor made in inference mode could not be used in training
    def _padded(
        cls, tokens: np.ndarray | None, end: np.ndarray, node: np.ndarray, lengths: np.ndarray, device: torch.device
    ) -> PrefixTree:
        num_tokens = len(end)
        size = padded_size(num_tokens)
        padded_end = np.arange(1, size + 1, dtype=np.int32)
        padded_end[:num_tokens] = end
        row = None if tokens is None else torch.from_numpy(np.pad(tokens, (0, size - num_tokens)))
        tree = cls(
            tokens=row,
            end=torch.from_numpy(padded_end),
            node=torch.from_numpy(node),
            lengths=torch.from_numpy(lengths),
            num_tokens=num_tokens,
            max_length=int(lengths.max()),
            max_token=-1 if tokens is None else int(tokens.max()),
        )
        return tree.to(device)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> PrefixTree:
        """The same tree with its tensors on `device`."""
        return replace(
            self,
            tokens=None if self.tokens is None else self.tokens.to(device),
            end=self.end.to(device),
            node=self.node.to(device),
            lengths=self.lengths.to(device),
        )

    def __repr__(self) -> str:
        whole = int(self.lengths.sum())
        return f"PrefixTree({len(self.lengths)} sequences of {whole} tokens in {self.num_tokens}, on {self.end.device})"

    def __len__(self) -> int:
        """S, packed tokens with the padding."""
        return len(self.end)

    def token_row(self) -> Tensor:
        """[1, S] int64, the packed tokens as a model takes them.

        Raises:
            ValueError: a tree that was made from lengths.
        """
        if self.tokens is None:
            raise ValueError("this tree was made from lengths and has no tokens; use from_groups or from_sequences")
        return self.tokens[None]

    @cached_property
    @torch.inference_mode(False)
    def position_ids(self) -> Tensor:
        """[S] int64, depth in the tree: the position that each token has in its own sequence, for RoPE and windows."""
        index = torch.arange(len(self), device=self.end.device)
        # A token's ancestors are those before it whose subtree is still open: all k < q but the ones with end[k] <= q.
        ends_at = index.new_zeros(len(self) + 1).scatter_add_(0, self.end.long(), torch.ones_like(index))
        return index - ends_at.cumsum(0)[:-1]

    @cached_property
    @torch.inference_mode(False)
    def parent(self) -> Tensor:
        """[S] int64, the packed index of the token before each token in its sequence; -1 at roots (and pads)."""
        depth, size = self.position_ids, len(self)
        index = torch.arange(size, device=depth.device)
        # In depth-first order the parent is the latest earlier token that is one level higher.
        by_level = (depth * size + index).sort().values
        found = torch.searchsorted(by_level, (depth - 1) * size + index) - 1
        return torch.where(depth > 0, by_level[found.clamp(min=0)] % size, -1)

    @cached_property
    @torch.inference_mode(False)
    def segments(self) -> Tensor:
        """[K, 3] int64 (start, own end, subtree end) of each unbranched run of tokens, in packed order; no pads."""
        end = self.end[: self.num_tokens].long()
        starts = torch.cat([end.new_zeros(1), (end[1:] != end[:-1]).nonzero().flatten() + 1])
        stops = torch.cat([starts[1:], end.new_full((1,), self.num_tokens)])
        return torch.stack([starts, stops, end[starts]], dim=1)


def padded_size(num_tokens: int) -> int:
    """S, the length of a packed row of so many tokens."""
    return max(MIN_BLOCKS, -(-num_tokens // BLOCK)) * BLOCK


def checked_tree(tree: object) -> PrefixTree:
    """The same, if it is a tree.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree is of type {type(tree).__name__}; make one with PrefixTree.from_groups(prompts, completions) or "
            "PrefixTree.from_sequences(sequences)"
        )
    return tree


def _group_layout(
    prefix_lens: Sequence[int], suffix_lens: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`end`, `node` and `lengths` of `[prefix, suffix, suffix, ...]` groups one behind the other."""
    if _counted("prefix_lens", prefix_lens) != _counted("suffix_lens", suffix_lens):
        raise ValueError(
            f"{len(prefix_lens)} prefix lengths came with {len(suffix_lens)} lists of suffixes; give each prefix one"
        )
    if not len(prefix_lens):
        raise ValueError("no prefix length came; a tree needs at least one")
    _require_completions(suffix_lens)
    sizes = np.array([len(group) for group in suffix_lens])
    prefix = np.array([_length(f"prefix {g}", n) for g, n in enumerate(prefix_lens)])
    suffix = np.array(
        [_length(f"suffix {i} of group {g}", n) for g, group in enumerate(suffix_lens) for i, n in enumerate(group)]
    )
    group = np.repeat(np.arange(len(sizes)), sizes)  # [N] group of each sequence
    is_prefix_run = np.zeros(len(prefix) + len(suffix), dtype=bool)
    is_prefix_run[np.cumsum(sizes + 1) - sizes - 1] = True
    runs = np.empty(len(is_prefix_run), dtype=np.int64)  # lengths of prompt, completion, ..., prompt, completion, ...
    runs[is_prefix_run], runs[~is_prefix_run] = prefix, suffix
    stop = np.cumsum(runs)
    prefix_start, suffix_start = (stop - runs)[is_prefix_run][group], (stop - runs)[~is_prefix_run]
    subtree_end = stop.copy()
    subtree_end[is_prefix_run] = stop[np.cumsum(sizes + 1) - 1]  # a prompt's subtree ends with its last completion
    lengths = prefix[group] + suffix
    t = np.arange(lengths.max())  # [T]
    start = np.where(t < prefix[group, None], prefix_start[:, None], (suffix_start - prefix[group])[:, None])
    node = np.where(t < lengths[:, None], start + t, -1)  # [N, T]
    return np.repeat(subtree_end, runs), node, lengths


def sorted_order(arrays: list[np.ndarray]) -> list[int]:
    """Lexicographic order of [T_n] int64: a prefix stands before what extends it, and what is alike side by side."""
    # Big-endian bytes compare as the tokens do.
    width = ">u4" if max((int(a.max(initial=0)) for a in arrays), default=0) < 2**32 else ">u8"
    keys = [a.astype(width).tobytes() for a in arrays]
    return sorted(range(len(arrays)), key=keys.__getitem__)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common from their first on."""
    shortest = min(len(a), len(b))
    if not shortest:
        return 0
    differs = a[:shortest] != b[:shortest]
    first = int(differs.argmax())
    return first if differs[first] else shortest


def _close(path: list[tuple[int, int, int]], depth: int, packed: int, end: np.ndarray) -> None:
    """Ends, at index `packed`, the subtree of every token on the path that stands at `depth` or deeper."""
    while path:
        run_depth, start, stop = path.pop()
        keep = min(start + max(depth - run_depth, 0), stop)
        end[keep:stop] = packed
        if keep > start:
            path.append((run_depth, start, keep))
            return


def _token_arrays(what: str, sequences: Sequence[Tokens]) -> tuple[list[np.ndarray], torch.device]:
    """Every sequence as a 1-D int64 array, and the device they came from (the CPU for lists of ints)."""
    if not _counted(f"{what}s", sequences):
        raise ValueError(f"no {what} came; a tree needs at least one")
    arrays, device = [], None
    for n, tokens in enumerate(sequences):
        name = f"{what} {n} of {len(sequences)}"
        if isinstance(tokens, str):
            raise TypeError(f"{name} is text; give its token ids, as a tokenizer makes them")
        try:
            tensor = torch.as_tensor(tokens)
        except (RuntimeError, TypeError, ValueError) as error:  # whichever of them torch has for what it cannot read
            raise TypeError(f"{name} is no row of token ids, a 1-D integer tensor or list: {error}") from error
        if not tensor.numel():
            raise ValueError(f"{name} is empty; drop it, or give it at least one token")
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}; token ids are integers")
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give each one as a 1-D row of token ids")
        if device not in (None, tensor.device):
            raise ValueError(f"{name} is on {tensor.device}, those before it on {device}; move them to one device")
        device = tensor.device
        array = tensor.long().cpu().numpy()
        if array.min() < 0:
            raise ValueError(f"{name} holds token id {array.min()}; ids start at 0, and padding is given by lengths")
        arrays.append(array)
    return arrays, device or torch.device("cpu")


def _counted(name: str, items: object) -> int:
    """How many items a list has."""
    if not isinstance(items, Sized):
        raise TypeError(f"{name} is a {type(items).__name__}; give a list")
    return len(items)


def _require_completions(groups: Sequence[Sequence]) -> None:
    for g, group in enumerate(groups):
        if not _counted(f"group {g} of {len(groups)}", group):
            raise ValueError(f"group {g} of {len(groups)} has no completion; drop its prompt")


def _regroup(flat: list, like: Sequence[Sequence]) -> list[list]:
    """The items of `flat`, in lists as long as those of `like`."""
    items = iter(flat)
    return [[next(items) for _ in group] for group in like]


def _length(name: str, n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, Tensor | SupportsIndex | Real) or n < 1 or n % 1:
        raise ValueError(f"{name} has length {n!r}; every prefix and suffix needs a whole number of tokens, 1 or more")
    return int(n)
