"""The reference backend: attention over the whole [S, S] mask, slow and easy to verify."""

from __future__ import annotations

import torch
from torch import Tensor

from flexpg.masks import TreeBlockMask, dense_mask


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeBlockMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention with every score written out, in float32 or better, within the mask's window and chunks.

    Args:
        q: [1, Hq, S, D], from the mask's first query on, with or without padding.
        k: [1, Hkv, S, D]; query head h reads key/value head h // (Hq / Hkv).
        v: [1, Hkv, S, D].
        mask: The mask of the packed sequence.
        scale: Factor of the scores.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None for no softcap.
        sinks: [Hq] one more logit of each head's softmax, which has no value; None for no sinks.

    Returns:
        [1, Hq, S, D] in the dtype of q.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.to(exact).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.to(exact) @ keys.transpose(-1, -2) * scale  # [1, Hq, queries, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = k.shape[2]
    block_end = mask.tree.block_end if mask.bidirectional else None
    visible = dense_mask(mask.tree.end[:length], None if block_end is None else block_end[:length])[mask.first_query :]
    position_ids = mask.tree.position_ids[:length]
    if mask.window is not None:
        visible &= position_ids[mask.first_query :, None] - position_ids[None, :] < mask.window
    if mask.chunk is not None:
        chunk_ids = position_ids // mask.chunk
        visible &= chunk_ids[mask.first_query :, None] == chunk_ids[None, :]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(exact)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)  # [1, Hq, queries, S + 1]
    return (scores.softmax(-1)[..., :length] @ values).to(q.dtype)
