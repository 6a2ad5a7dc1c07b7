"""Exact attention on CPU, forward and backward, segment by segment, with no [S, S] tensor anywhere.

Each segment attends causally to itself; and everything under a segment, one contiguous range of queries, attends fully
to it: one dense rectangle, its keys and values neither copied nor gathered. The pieces of a query's softmax are merged
by their logsumexp. In the backward each piece is given the merged output and logsumexp, so that it recomputes the
probabilities of the whole softmax, and its gradients simply add up (the two-part attention of arXiv 2506.05433, carried
over to trees).

The two aten operators are private: this file alone names them. They take keys and values whose heads are expanded with
stride 0, so grouped-query attention costs no copy either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexpg.masks import TreeBlockMask, check_lengths

Piece = tuple[slice, slice, bool]  # queries, keys, and whether these are the queries' own, under a causal mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.compiler.disable  # the loop over segments would be unrolled, and compiled anew for every tree
def split_attention(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, scale: float) -> Tensor:
    """Attention of a packed row in causal and rectangular pieces, merged by logsumexp.

    Args:
        q: [1, Hq, S, D] on the CPU, from the mask's first query on, with the row's pads or without.
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        mask: the packed row's mask, of which tree and first query are read.
        scale: factor of the scores.

    Returns:
        [1, Hq, S, D] in q's dtype.

    Raises:
        ValueError: lengths that are not the tree's.
    """
    check_lengths(q, k, v, mask, padded=False)
    return _SplitAttention.apply(q, k, v, mask, scale)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, scale: float) -> Tensor:
        queries, keys, values = _by_kv_head(q, k, v)
        merged = torch.promote_types(q.dtype, torch.float32)
        heads, group, size, width = queries.shape
        # In memory [S, Hkv, group, D], which is what the output projection reads.
        out = q.new_empty(size, heads, group, width, dtype=merged).permute(1, 2, 0, 3)
        lse = q.new_empty(heads, group, size, dtype=merged)
        pieces = _pieces(mask)
        for rows, columns, is_causal in pieces:
            piece, piece_lse = _flash(
                queries[:, :, rows], keys[:, :, columns], values[:, :, columns], 0.0, is_causal, scale=scale
            )
            if is_causal:  # the first of its queries' pieces
                out[:, :, rows], lse[:, :, rows] = piece, piece_lse
                continue
            share = torch.sigmoid(piece_lse - lse[:, :, rows])  # of the softmax, that this piece holds
            out[:, :, rows].lerp_(piece.to(merged), share[..., None])
            lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], piece_lse)
        pads = k.shape[2] - mask.tree.num_tokens
        out[:, :, size - pads :] = values[:, :, k.shape[2] - pads :]  # a pad sees itself alone
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.pads, ctx.scale = pieces, pads, scale
        return out.flatten(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        queries, keys, values = _by_kv_head(q, k, v)
        grad_out = _dense_rows(grad)[0].unflatten(0, queries.shape[:2])
        total = lse.dtype
        grad_q = torch.zeros_like(queries, dtype=total)
        grad_k, grad_v = torch.zeros_like(k[0], dtype=total), torch.zeros_like(v[0], dtype=total)
        for rows, columns, is_causal in ctx.pieces:
            piece_q, piece_k, piece_v = _flash_backward(
                grad_out[:, :, rows],
                queries[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            # Not `+=`, which would write every slice back onto itself.
            grad_q[:, :, rows].add_(piece_q)
            grad_k[:, columns].add_(piece_k.sum(1, dtype=total))
            grad_v[:, columns].add_(piece_v.sum(1, dtype=total))
        grad_v[:, k.shape[2] - ctx.pads :].add_(grad_out[:, :, q.shape[2] - ctx.pads :].sum(1, dtype=total))
        return grad_q.to(q.dtype).flatten(0, 1)[None], grad_k.to(k.dtype)[None], grad_v.to(v.dtype)[None], None, None


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each as [Hkv, Hq / Hkv, S, D], a view: a key/value head stands in the batch, its query heads share it."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    queries = q[0].unflatten(0, (k.shape[1], -1))
    keys, values = (x[0][:, None].expand(-1, queries.shape[1], -1, -1) for x in (k, v))
    return queries, keys, values


def _dense_rows(x: Tensor) -> Tensor:
    """The operators read the last dimension with stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pieces(mask: TreeBlockMask) -> list[Piece]:
    """Every segment with itself, then what hangs under each with it; tokens before the first query are keys alone."""
    first = mask.first_query
    own, below = [], []
    for start, stop, subtree_end in mask.tree.segments.tolist():
        cut = min(max(start, first), stop)  # a segment may reach over the first query
        if cut < stop:
            own.append((slice(cut - first, stop - first), slice(cut, stop), True))
        for since, until in ((start, cut), (cut, stop)):
            if since < until and subtree_end > (query := max(until, first)):
                below.append((slice(query - first, subtree_end - first), slice(since, until), False))
    return [*own, *below]
