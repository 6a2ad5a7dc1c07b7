"""Attention over a prefix tree: the public function, and the choice of a backend."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flexpg.backends.dense import dense_attention
from flexpg.backends.flex import packed_flex_attention
from flexpg.masks import TreeBlockMask

Backend = Literal["auto", "flex", "split", "dense"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeBlockMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute attention of a packed sequence, in which every token attends to its ancestors and itself.

    Output and gradients equal those of causal attention over each sequence of the tree on its own.

    Args:
        q: [1, Hq, S, D], floating point; [1, Hq, S - first_query, D] for a mask with `first_query`. All three have one
            dtype, to which autocast does not cast them. On CPU the padding at the end of all three may be left out,
            except for "flex", and for "dense" in compiled code.
        k: [1, Hkv, S, D], heads not expanded: query head h reads key/value head h // (Hq / Hkv).
        v: [1, Hkv, S, D].
        mask: `block_mask(tree)`, on the device of q.
        scale: Factor of the scores; None for 1 / sqrt(D).
        window: Tokens that a query sees at most, itself included, counted in positions; None for the mask's own.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None for no softcap.
        sinks: [Hq] learned logits, one per query head, that join its softmax without a value (attention sinks): the
            weights of the keys add up to less than 1. They get a gradient. None for no sinks.
        backend: "flex", "split" or "dense" is used or raises. "auto" is flex on CUDA (dense for float64) and split on
            CPU (dense with a softcap, or a window or chunks that hide something).

    Returns:
        [1, Hq, S, D] in the dtype of q.

    Raises:
        ValueError: If shapes do not belong to the mask's tree, `scale` or `softcap` is not a positive finite number, or
            the backend does not support what is asked.
        TypeError: If `mask` is not a TreeBlockMask.
    """
    if not isinstance(mask, TreeBlockMask):
        raise TypeError(f"mask must be a TreeBlockMask, got {type(mask).__name__}; use flexpg.block_mask(tree)")
    if len(q) != 1 or len(k) != 1 or k.shape != v.shape:
        raise ValueError(
            f"q must be [1, Hq, S, D] with k and v [1, Hkv, S, D], got {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None and not 0 < factor < inf:
            raise ValueError(f"{name} must be a finite number above 0, or None, got {factor}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}], one logit per query head, got {list(sinks.shape)}")
    if window is not None:
        mask = mask.for_window(window)
    if mask.ranges:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "backend": backend}
        parts = zip(q.split([part.shape[-2] for part in mask.ranges], 2), mask.ranges, strict=True)
        outs = [
            attention(rows, k[:, :, : part.shape[-1]], v[:, :, : part.shape[-1]], part, **options)
            for rows, part in parts
        ]
        return torch.cat(outs, 2)
    hides = any(size is not None and size < mask.tree.max_length for size in (mask.window, mask.chunk))
    chosen = _choose(backend, q, is_plain=not hides and softcap is None)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen != "split":  # which checks itself: a number of tokens in compiled code would recompile
        is_eager = not torch.compiler.is_compiling()
        mask.check_lengths(q, k, padded=not (chosen == "dense" and is_eager and q.device.type == "cpu"))
    if chosen == "dense":
        return dense_attention(q, k, v, mask, scale, softcap, sinks)
    if chosen == "split":
        if hides or softcap is not None or q.device.type != "cpu":
            raise ValueError(
                f'backend "split" supports neither a softcap ({softcap}) nor a window ({mask.window}) or chunk '
                f'({mask.chunk}), and runs on the CPU (q is on {q.device}); use "auto"'
            )
        from flexpg.backends.split import split_attention  # here, because torch.compiler.disable loads dynamo, 1 s

        return split_attention(q, k, v, mask, scale, sinks)
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError('backend "flex" has no backward on CPU; use "split", or torch.no_grad()')
        if q.dtype == torch.float64:
            raise ValueError('backend "flex" has no float64 on CPU; use "split" or "dense"')
        if sinks is not None:
            raise ValueError('backend "flex" has no sinks on CPU, where torch returns no logsumexp; use "split"')
        q, k, v = q.detach(), k.detach(), v.detach()  # torch refuses requires_grad under torch.no_grad() too
    return packed_flex_attention(q, k, v, mask, scale, softcap, sinks)


def _choose(backend: str, q: Tensor, is_plain: bool) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend != "auto":
        return backend
    if q.device.type == "cuda":
        return "dense" if q.dtype == torch.float64 else "flex"
    if q.device.type == "cpu":
        return "split" if is_plain else "dense"
    raise ValueError(f'backend="auto" knows cpu and cuda, got {q.device}; choose "flex" or "dense"')
