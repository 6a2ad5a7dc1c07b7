"""FlexAttention over the block mask of a prefix tree, compiled once for all lengths.

The kernels for a dynamic length check boundaries, for which they lack registers. A packed sequence is a multiple of 128
tokens, the block size of its mask, which the kernels' own block sizes divide; so the check is left out, by an option
that torch sets itself for static lengths. Where the kernels then need more registers, it is not (docs/performance.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexpg.masks import TreeBlockMask

# Layers of a model differ in window, softcap and sinks, its calls in length, dtype and gradients; torch's limit is 8.
RECOMPILE_LIMIT = 64


def packed_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeBlockMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute compiled FlexAttention; key/value heads are not expanded.

    Args:
        q: [1, Hq, S, D].
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        mask: The mask of the packed sequence.
        scale: Factor of the scores.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None for no softcap.
        sinks: [Hq] one more logit of each head's softmax, which has no value; None for no sinks.

    Returns:
        [1, Hq, S, D] in the dtype of q.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: If more than 64 variants were compiled.
    """
    cap = None if softcap is None else torch.full((), softcap, dtype=torch.float32, device=q.device)
    options = kernel_options(compute_capability(q.device))
    if torch.compiler.is_compiling():
        return _flex(q, k, v, mask, scale, cap, sinks, options)
    if q.device.type == "cuda" and q.dtype == torch.float32:
        warn_of_float32_precision()
    # Only the length is dynamic: the kernels need static heads and head size, and a head count that happens to equal
    # the number of blocks would be unified with it. With dynamic=None torch would compile a second time.
    for x in (q, k, v):
        for dim in (0, 1, 3):
            torch._dynamo.mark_static(x, dim)
    if sinks is not None:
        torch._dynamo.mark_static(sinks, 0)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(q, k, v, mask, scale, cap, sinks, options)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, (0, 0) for a CPU."""
    if device.type != "cuda":
        return 0, 0
    properties = torch.cuda.get_device_properties(device)  # which dynamo knows, other than get_device_capability
    return properties.major, properties.minor


def kernel_options(capability: tuple[int, int]) -> dict[str, Any]:
    """Return options of torch's kernels: lengths are whole blocks, which is not one of the documented options.

    Args:
        capability: The GPU's compute capability. From 10.0 on, the backward without checks needs more registers.
    """
    return {"fwd_IS_DIVISIBLE": True} | ({"bwd_IS_DIVISIBLE": True} if capability < (10, 0) else {})


def warn_of_float32_precision() -> None:
    """Warn if float32 products are computed at torch's highest precision, for which the kernels lack registers."""
    if torch.get_float32_matmul_precision() == "highest":
        warnings.warn(
            'FlexAttention in float32 spills registers to memory at the matmul precision "highest"; use bfloat16, or '
            'call torch.set_float32_matmul_precision("high")',
            stacklevel=2,
        )


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph=True makes one variant too many an error instead of dense eager attention.
    return torch.compile(_flex, dynamic=True, fullgraph=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeBlockMask,
    scale: float,
    cap: Tensor | None,
    sinks: Tensor | None,
    options_of_kernels: dict[str, Any],
) -> Tensor:
    score_mod = None if cap is None else _softcap_mod(cap)
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scale}
    options |= {"enable_gqa": q.shape[1] != k.shape[1], "kernel_options": options_of_kernels}
    if sinks is None:
        return flex_attention(q, k, v, **options)
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
    assert aux.lse is not None
    share = torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype))  # [1, Hq, S], of the keys in the softmax
    return (out * share[..., None]).to(q.dtype)


def _softcap_mod(cap: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)  # a tensor, because a captured float would become symbolic and be refused

    return score_mod
