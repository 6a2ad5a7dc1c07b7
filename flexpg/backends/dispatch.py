"""Attention of a packed row, by backends that agree: flex (compiled kernels), split (CPU training), dense (oracle)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flexpg.backends.dense import dense_attention
from flexpg.backends.flex import packed_flex_attention
from flexpg.masks import TreeBlockMask, check_lengths

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
    backend: Backend = "auto",
) -> Tensor:
    """Every token of a packed row attends to itself and its ancestors: the same output and gradients as unshared.

    Args:
        q: [1, Hq, S, D] floating, S = len(mask.tree), less by `mask.first_query`. On CPU the pads at the end of all
            three may be left out, but for flex, and for dense in compiled code.
        k: [1, Hkv, S, D], heads not expanded: query head h reads key/value head h // (Hq / Hkv).
        v: [1, Hkv, S, D].
        mask: `block_mask(tree)`, on the device of q.
        scale: factor of the scores; None for 1 / sqrt(D).
        window: tokens that a query sees at most, itself among them, counted in positions; None for the mask's own.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for none.
        backend: "flex", "split" or "dense" is used, or refused with a sentence. "auto" takes flex on CUDA (dense for
            float64) and split on CPU (dense where there is a softcap, or a window that hides something).

    Returns:
        [1, Hq, S, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot do what is asked.
        TypeError: a mask that is no TreeBlockMask, or q, k or v that is no tensor.
    """
    _check(q, k, v, mask, softcap)
    if window is not None and window != mask.window:
        mask = mask.for_window(window)
    is_windowed = mask.window is not None and mask.window < mask.tree.max_length
    chosen = _chosen(backend, q, plain=not is_windowed and softcap is None)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen != "split":  # which looks itself, as a number of tokens in compiled code would compile anew
        is_eager = not torch.compiler.is_compiling()
        check_lengths(q, k, v, mask, padded=not (chosen == "dense" and is_eager and q.device.type == "cpu"))
    if chosen == "dense":
        return dense_attention(q, k, v, mask, scale, softcap)
    if chosen == "split":
        if q.device.type != "cpu":
            raise ValueError(f'backend "split" runs on the CPU and q is on {q.device}; use "flex"')
        if is_windowed or softcap is not None:
            raise ValueError(
                f'backend "split" has no softcap or window (got {softcap} and {mask.window}); use "dense" or "auto"'
            )
        from flexpg.backends.split import split_attention  # at first use: its torch.compiler.disable loads dynamo, 1 s

        return split_attention(q, k, v, mask, scale)
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError('backend "flex" has no backward on CPU (torch); use "split", or run under torch.no_grad()')
        if q.dtype == torch.float64:
            raise ValueError('backend "flex" has no float64 on CPU (torch); use "split" or "dense"')
        q, k, v = q.detach(), k.detach(), v.detach()  # torch refuses what requires grad under torch.no_grad() as well
    return packed_flex_attention(q, k, v, mask, scale, softcap)


def _chosen(backend: str, q: Tensor, plain: bool) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    if backend != "auto":
        return backend
    if q.device.type == "cuda":
        return "dense" if q.dtype == torch.float64 else "flex"
    if q.device.type == "cpu":
        return "split" if plain else "dense"
    raise ValueError(f'no attention backend is chosen on {q.device}; ask for "flex" or "dense" by name')


def _check(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, softcap: float | None) -> None:
    if not isinstance(mask, TreeBlockMask):
        raise TypeError(f"mask is a {type(mask).__name__}; make it with flexpg.block_mask(tree)")
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        raise TypeError(f"q, k and v are {', '.join(type(x).__name__ for x in (q, k, v))}; give tensors")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 or x.shape[0] != 1 for x in (q, k, v)):
        raise ValueError(f"a packed row is q [1, Hq, S, D] with k and v [1, Hkv, S, D]; got {shapes}")
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k and v need one shape, q's head size, and a number of heads that divides q's; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v need one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    devices = [q.device, k.device, v.device, mask.tree.end.device]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, v and the mask's tree are on {', '.join(map(str, devices))}; move them to one device")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no softcap")
