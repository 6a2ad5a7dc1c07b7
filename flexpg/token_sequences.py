"""Token sequences: how they are given, compared and ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Tokens = Tensor | np.ndarray | Sequence[int]


def token_ids(name: str, tokens: Tokens) -> Tensor:
    """Return a copy of token ids as a 1-D int64 tensor.

    Args:
        name: What the error calls them.
        tokens: A 1-D integer tensor, array or sequence with at least one element.

    Raises:
        ValueError: If `tokens` is empty, not 1-D or has a negative id.
        TypeError: If `tokens` is a string or a mapping, or its elements are not integers.
    """
    if isinstance(tokens, str):
        raise TypeError(f"{name} must be token ids, got the string {tokens[:40]!r}; tokenize it first")
    if isinstance(tokens, Mapping):  # what a tokenizer returns, and apply_chat_template by default
        raise TypeError(f'{name} must be token ids, got a {type(tokens).__name__}; pass its ["input_ids"]')
    if not isinstance(tokens, Tensor | np.ndarray | Sequence):
        raise TypeError(f"{name} must be a list, an array or a tensor of token ids, got a {type(tokens).__name__}")
    if isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], str):  # as tokenizer.tokenize returns
        raise TypeError(f"{name} must be token ids, got a list of strings; convert them to ids first")
    tensor = torch.as_tensor(tokens)
    if tensor.dim() != 1 or not len(tensor):
        raise ValueError(f"{name} must be 1-D with at least one token id, got shape {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer token ids, got {tensor.dtype}")
    tensor = tensor.to(torch.int64, copy=True)  # before min(), which torch does not have for unsigned integers
    if (smallest := int(tensor.min())) < 0:
        raise ValueError(f"{name} must hold token ids >= 0, got {smallest}; leave padding out")
    return tensor


def lexicographic_order(arrays: Sequence[np.ndarray]) -> list[int]:
    """Return the indices that sort [T_n] int64 sequences lexicographically, a prefix before its extensions."""
    # Big-endian bytes compare as the tokens do.
    width = ">u4" if max((int(a.max(initial=0)) for a in arrays), default=0) < 2**32 else ">u8"
    keys = [a.astype(width).tobytes() for a in arrays]
    return sorted(range(len(arrays)), key=keys.__getitem__)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences have in common from the first one on."""
    shortest = min(len(a), len(b))
    if not shortest:
        return 0
    differs = a[:shortest] != b[:shortest]
    first = int(differs.argmax())
    return first if differs[first] else shortest
