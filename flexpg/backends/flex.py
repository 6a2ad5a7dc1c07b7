"""FlexAttention over a tree's block mask, compiled once for all lengths.

A length that the compiler can prove divisible by 128 (q, k and v given as [1, H, S / 128, 128, D] and flattened in the
compiled function) would spare the kernels their boundary checks. It is not done: the CPU kernel refuses such a view
(torch 2.13), and no GPU has shown yet what it would gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexpg.masks import TreeBlockMask

# A model's layers differ in window and softcap, its calls in length, dtype and gradient: torch's limit of 8 is near.
RECOMPILE_LIMIT = 64


def packed_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, scale: float, softcap: float | None
) -> Tensor:
    """Compiled FlexAttention with unexpanded key/value heads.

    Args:
        q: [1, Hq, S, D].
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        mask: the packed row's mask.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for none.

    Returns:
        [1, Hq, S, D] in q's dtype.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: more than 64 variants were compiled.
    """
    cap = None if softcap is None else torch.full((), softcap, dtype=torch.float32, device=q.device)
    if torch.compiler.is_compiling():
        return _flex(q, k, v, mask, scale, cap)
    # Dynamic in the length alone: the kernels want heads and head size static, and a head count that happened to equal
    # the number of blocks would be taken for it. (By default torch compiles a second time, on CPU in vain.)
    for x in (q, k, v):
        for dim in (0, 1, 3):
            torch._dynamo.mark_static(x, dim)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled()(q, k, v, mask, scale, cap)


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: one variant too many is an error then, and not dense eager attention in silence.
    return torch.compile(_flex, dynamic=True, fullgraph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, scale: float, cap: Tensor | None) -> Tensor:
    score_mod = None if cap is None else _softcap_mod(cap)
    is_grouped = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=is_grouped)


def _softcap_mod(cap: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)  # a tensor, as a captured float would be made symbolic, and refused

    return score_mod
