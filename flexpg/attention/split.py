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

from flexpg.tree import PrefixTree

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.compiler.disable  # the loop over segments would be unrolled, and compiled anew for every tree
def split_attention(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float) -> Tensor:
    """Attention of a packed row in causal and rectangular pieces, merged by logsumexp.

    Args:
        q: [1, Hq, S, D] on the CPU.
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        tree: the packed row.
        scale: factor of the scores.

    Returns:
        [1, Hq, S, D] in q's dtype.
    """
    return _SplitAttention.apply(q, k, v, tree, scale)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, scale: float) -> Tensor:
        queries, keys, values = _by_kv_head(q, k, v)
        merged = torch.promote_types(q.dtype, torch.float32)
        heads, group, size, width = queries.shape
        # In memory [S, Hkv, group, D], which is what the output projection reads.
        out = q.new_empty(size, heads, group, width, dtype=merged).permute(1, 2, 0, 3)
        lse = q.new_empty(heads, group, size, dtype=merged)
        segments = tree.segments.tolist()
        for start, stop, _ in segments:
            rows = slice(start, stop)
            out[:, :, rows], lse[:, :, rows] = _attend(queries, keys, values, rows, rows, scale)
        for start, stop, subtree_end in segments:
            if subtree_end > stop:
                below, above = slice(stop, subtree_end), slice(start, stop)
                piece, piece_lse = _attend(queries, keys, values, below, above, scale)
                share = torch.sigmoid(piece_lse - lse[:, :, below])  # of the softmax, that this piece holds
                out[:, :, below].lerp_(piece.to(merged), share[..., None])
                lse[:, :, below] = torch.logaddexp(lse[:, :, below], piece_lse)
        pads = slice(tree.num_tokens, None)
        out[:, :, pads] = values[:, :, pads]  # a pad sees itself alone
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.num_tokens, ctx.scale = segments, tree.num_tokens, scale
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

        def add(rows: slice, columns: slice) -> None:
            piece_q, piece_k, piece_v = _flash_backward(
                grad_out[:, :, rows],
                queries[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                rows == columns,
                scale=ctx.scale,
            )
            grad_q[:, :, rows] += piece_q
            grad_k[:, columns] += piece_k.sum(1, dtype=total)
            grad_v[:, columns] += piece_v.sum(1, dtype=total)

        for start, stop, subtree_end in ctx.segments:
            add(slice(start, stop), slice(start, stop))
            if subtree_end > stop:
                add(slice(stop, subtree_end), slice(start, stop))
        grad_v[:, ctx.num_tokens :] += grad_out[:, :, ctx.num_tokens :].sum(1, dtype=total)
        return grad_q.to(q.dtype).flatten(0, 1)[None], grad_k.to(k.dtype)[None], grad_v.to(v.dtype)[None], None, None


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each as [Hkv, Hq / Hkv, S, D], a view: a key/value head stands in the batch, its query heads share it."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    heads = k.shape[1]
    queries = q[0].unflatten(0, (heads, -1))
    return queries, k[0][:, None].expand_as(queries), v[0][:, None].expand(*queries.shape[:3], -1)


def _dense_rows(x: Tensor) -> Tensor:
    """The operators read the last dimension with stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: slice, columns: slice, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of queries `rows` over keys `columns`: causal where the two are the same, full otherwise."""
    return _flash(q[:, :, rows], k[:, :, columns], v[:, :, columns], 0.0, rows == columns, scale=scale)
