"""Exact attention on CPU, forward and backward, segment by segment, without any [S, S] tensor.

Each segment attends causally to itself, and everything below a segment, one contiguous range of queries, attends fully
to it: one dense rectangle whose keys and values are neither copied nor gathered. The partial results of a query are
merged by their logsumexp. In the backward each part is given the merged output and logsumexp, so that it recomputes the
probabilities of the whole softmax and its gradients add up (the two-part attention of arXiv 2506.05433, generalized to
trees). A sink is one more part, of one logit without a value: it scales the merged output and adds to the logsumexp.

The two aten operators are private; no other file names them. They accept keys and values whose heads are expanded with
stride 0, so grouped-query attention costs no copy either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexpg.masks import TreeBlockMask

Part = tuple[slice, slice, bool, bool]  # queries, keys, whether it is causal, whether the keys are the queries' own

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.compiler.disable  # the loop over segments would be unrolled and recompiled for every tree
def split_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention of a packed sequence in causal and rectangular parts, merged by logsumexp.

    Args:
        q: [1, Hq, S, D] on the CPU, from the mask's first query on, with or without padding.
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        mask: The mask of the packed sequence; its tree and first query are read.
        scale: Factor of the scores.
        sinks: [Hq] one more logit of each head's softmax, which has no value; None for no sinks. Padding tokens have
            none.

    Returns:
        [1, Hq, S, D] in the dtype of q.

    Raises:
        ValueError: If the lengths are not those of the tree.
    """
    mask.check_lengths(q, k, padded=False)
    return _SplitAttention.apply(q, k, v, sinks, mask, scale)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: TreeBlockMask, scale: float
    ) -> Tensor:
        queries, keys, values = _by_kv_head(q, k, v)
        merged = torch.promote_types(q.dtype, torch.float32)
        heads, group, size, width = queries.shape
        # In memory [S, Hkv, group, D], which is what the output projection reads.
        out = q.new_empty(size, heads, group, width, dtype=merged).permute(1, 2, 0, 3)
        lse = q.new_empty(heads, group, size, dtype=merged)
        parts = _parts(mask)
        for rows, columns, is_causal, is_own in parts:
            part, part_lse = _flash(
                queries[:, :, rows], keys[:, :, columns], values[:, :, columns], 0.0, is_causal, scale=scale
            )
            if is_own:  # the first part of its queries
                out[:, :, rows], lse[:, :, rows] = part, part_lse
                continue
            weight = torch.sigmoid(part_lse - lse[:, :, rows])  # this part's share of the merged softmax
            out[:, :, rows].lerp_(part.to(merged), weight[..., None])
            lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
        if sinks is not None:
            logits = sinks.to(merged).view(heads, group, 1)
            out.mul_(torch.sigmoid(lse - logits)[..., None])
            lse = torch.logaddexp(lse, logits)
        padding = min(k.shape[2] - mask.tree.num_tokens, size)
        out[:, :, size - padding :] = values[:, :, k.shape[2] - padding :]  # a padding token sees only itself
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.parts, ctx.padding, ctx.scale = parts, padding, scale
        return out.flatten(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        queries, keys, values = _by_kv_head(q, k, v)
        grad_out = _unit_stride(grad)[0].unflatten(0, queries.shape[:2])
        total = lse.dtype
        grad_q = torch.zeros_like(queries, dtype=total)
        grad_k, grad_v = torch.zeros_like(k[0], dtype=total), torch.zeros_like(v[0], dtype=total)
        for rows, columns, is_causal, _ in ctx.parts:
            part_q, part_k, part_v = _flash_backward(
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
            # Not `+=`, which would copy every slice back onto itself.
            grad_q[:, :, rows].add_(part_q)
            grad_k[:, columns].add_(part_k.sum(1, dtype=total))
            grad_v[:, columns].add_(part_v.sum(1, dtype=total))
        grad_v[:, k.shape[2] - ctx.padding :].add_(grad_out[:, :, q.shape[2] - ctx.padding :].sum(1, dtype=total))
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            used = slice(0, q.shape[2] - ctx.padding)
            share = torch.exp(sinks.to(total).view(*lse.shape[:2], 1) - lse[:, :, used])  # of the sink in the softmax
            along_out = (grad_out[:, :, used].to(total) * out[:, :, used]).sum(-1)  # [Hkv, Hq / Hkv, S]
            grad_sinks = -(share * along_out).sum(-1).flatten().to(sinks.dtype)
        return (
            grad_q.to(q.dtype).flatten(0, 1)[None],
            grad_k.to(k.dtype)[None],
            grad_v.to(v.dtype)[None],
            grad_sinks,
            None,
            None,
        )


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views [Hkv, Hq / Hkv, S, D] of all three: key/value heads as the batch, shared by their query heads."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    queries = q[0].unflatten(0, (k.shape[1], -1))
    keys, values = (x[0][:, None].expand(-1, queries.shape[1], -1, -1) for x in (k, v))
    return queries, keys, values


def _unit_stride(x: Tensor) -> Tensor:
    """Return `x` with stride 1 in its last dimension, which the operators need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(mask: TreeBlockMask) -> list[Part]:
    """Return each segment with itself, then each with the queries below it; tokens before first_query are keys only.

    A bidirectional image block is a segment of its own, in which every token attends to every other.
    """
    first = mask.first_query
    inner: list[Part] = []
    below: list[Part] = []
    for start, stop, subtree_end, is_causal in _segments(mask):
        cut = min(max(start, first), stop)  # the first query may be inside a segment
        if cut < stop:
            inner.append((slice(cut - first, stop - first), slice(cut if is_causal else start, stop), is_causal, True))
        for since, until in ((start, cut), (cut, stop)) if is_causal else ((start, stop),):
            if since < until and subtree_end > (query := max(until, first)):
                below.append((slice(query - first, subtree_end - first), slice(since, until), False, False))
    return [*inner, *below]


def _segments(mask: TreeBlockMask) -> list[tuple[int, int, int, bool]]:
    """Return (start, stop, end of the subtree, whether it is causal) of segments, cut at bidirectional image blocks."""
    blocks = mask.tree.blocks.tolist() if mask.bidirectional else []
    cut = []
    for start, stop, subtree_end in mask.tree.segments.tolist():
        while blocks and blocks[0][0] < stop:  # a block is inside of one segment
            since, until = blocks.pop(0)
            if start < since:
                cut.append((start, since, subtree_end, True))
            cut.append((since, until, subtree_end, False))
            start = until
        if start < stop:
            cut.append((start, stop, subtree_end, True))
    return cut
