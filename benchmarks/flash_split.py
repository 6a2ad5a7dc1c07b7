"""Attention of a prefix tree by FlashAttention-2's kernels for sequences of varying lengths: an experiment.

The scheme of flexpg/backends/split.py with as few kernel calls as the tree allows:

    own       every segment with itself, causally: one call, because segments are adjacent
    level l   everything below a segment with l ancestors attends to all of that segment: a dense rectangle. Rectangles
              of one level have no token in common, so one call computes them all

The parts of a query's softmax are merged by their logsumexp, and in the backward each part is given the merged output
and logsumexp. (`torch.nn.attention.varlen.varlen_attn` would not do: it drops the gradient of its logsumexp.)

The CUDA kernels have not been run, for lack of a GPU. Everything around them is tested on CPU with `REFERENCE` instead
of `FLASH`: `largest_difference` compares it with flexpg's dense attention, and benchmarks.kernels calls it on CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexpg import PrefixTree, attention, block_mask

Range = tuple[int, int]  # packed indices: first, and one past the last


@dataclass(frozen=True)
class Call:
    """One call of a kernel: B sequences of queries, each with its keys.

    Attributes:
        rows: Packed indices of the queries, sequence after sequence; a slice if they are one range.
        columns: Those of the keys.
        row_starts: [B + 1] int32, where each sequence begins among the queries, and their number.
        column_starts: [B + 1] int32, the same for the keys.
        longest_rows: Queries of the longest sequence.
        longest_columns: Keys of the longest sequence.
        is_causal: Whether queries and keys are the same tokens with a causal mask.
    """

    rows: slice | Tensor
    columns: slice | Tensor
    row_starts: Tensor
    column_starts: Tensor
    longest_rows: int
    longest_columns: int
    is_causal: bool


@dataclass(frozen=True)
class Kernels:
    """Two operators on q [rows, Hq, D], k and v [columns, Hkv, D]; a logsumexp is [Hq, rows].

    Attributes:
        forward: (q, k, v, call, scale) -> out [rows, Hq, D] and its logsumexp.
        backward: (gradient of out, q, k, v, out, logsumexp, call, scale) -> gradients of q, k and v.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor, Tensor]]


def plan_calls(tree: PrefixTree) -> list[Call]:
    """Return a call for the segments with themselves and one for each level of the tree; the same for all layers."""
    diagonal: list[Range] = []
    below: dict[int, list[tuple[Range, Range]]] = defaultdict(list)
    ancestors: list[int] = []  # ends of the open subtrees
    for start, stop, subtree_end in tree.segments.tolist():
        while ancestors and ancestors[-1] <= start:
            ancestors.pop()
        diagonal.append((start, stop))
        if stop < subtree_end:
            below[len(ancestors)].append(((stop, subtree_end), (start, stop)))
            ancestors.append(subtree_end)
    device = tree.end.device
    return [
        _call(diagonal, diagonal, True, device),
        *(_call(*zip(*below[level], strict=True), False, device) for level in sorted(below)),
    ]


def flash_split_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, plan: Sequence[Call], kernels: Kernels
) -> Tensor:
    """Compute what `flexpg.attention` computes.

    Args:
        q: [1, Hq, S, D].
        k: [1, Hkv, S, D].
        v: [1, Hkv, S, D].
        tree: The packed sequence.
        plan: `plan_calls(tree)`.
        kernels: FLASH on CUDA (bfloat16 or float16), REFERENCE anywhere.

    Returns:
        [1, Hq, S, D] in the dtype of q.
    """
    return _FlashSplit.apply(q, k, v, tree.num_tokens, plan, kernels)


class _FlashSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, num_tokens: int, plan: Sequence[Call], kernels: Kernels):
        queries, keys, values = _by_token(q, k, v)
        scale = q.shape[-1] ** -0.5
        merged = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(queries, dtype=merged, memory_format=torch.contiguous_format)  # [S, Hq, D]
        lse = out.new_empty(q.shape[1], q.shape[2])
        for call in plan:
            rows = call.rows
            part, part_lse = kernels.forward(queries[rows], keys[call.columns], values[call.columns], call, scale)
            if call.is_causal:  # the first part of its queries
                out[rows], lse[:, rows] = part.to(merged), part_lse
                continue
            weight = torch.sigmoid(part_lse - lse[:, rows])  # this part's share of the merged softmax
            out[rows] = out[rows].lerp(part.to(merged), weight.T[..., None])
            lse[:, rows] = torch.logaddexp(lse[:, rows], part_lse)
        out[num_tokens:] = _expand_heads(values[num_tokens:], q.shape[1])  # a padding token sees only itself
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.num_tokens, ctx.plan, ctx.kernels, ctx.scale = num_tokens, plan, kernels, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        queries, keys, values = _by_token(q, k, v)
        (grad_out,) = _by_token(grad)
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (queries, keys, values)]
        for call in ctx.plan:
            rows, columns = call.rows, call.columns
            parts = ctx.kernels.backward(
                grad_out[rows],
                queries[rows],
                keys[columns],
                values[columns],
                out[rows],
                lse[:, rows].contiguous(),  # CUDA kernels read [Hq, rows] by its address
                call,
                ctx.scale,
            )
            for total, part, where in zip(grads, parts, (rows, columns, columns), strict=True):
                total[where] += part
        padding = grad_out[ctx.num_tokens :].to(lse.dtype)
        grads[2][ctx.num_tokens :] += _sum_heads(padding, v.shape[1])
        grad_q, grad_k, grad_v = (x.to(q.dtype).transpose(0, 1)[None] for x in grads)
        return grad_q, grad_k, grad_v, None, None, None


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        call.row_starts,
        call.column_starts,
        call.longest_rows,
        call.longest_columns,
        0.0,  # dropout
        call.is_causal,
        False,  # return_debug_mask
        scale=scale,
    )
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        call.row_starts,
        call.column_starts,
        call.longest_rows,
        call.longest_columns,
        0.0,  # dropout: without it the state of the random numbers is not read, and varlen_attn passes the same two
        call.is_causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
        scale=scale,
    )


FLASH = Kernels(_flash_forward, _flash_backward)


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for rows, columns in _sequences(call):
        scores = _scores(q[rows], k[columns], call.is_causal, scale)  # [Hq, rows, columns]
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _expand_heads(v[columns], q.shape[1]))
    return out, lse


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    for rows, columns in _sequences(call):
        probs = (_scores(q[rows], k[columns], call.is_causal, scale) - lse[:, rows, None]).exp()
        of_probs = torch.einsum("qhd,khd->hqk", grad[rows], _expand_heads(v[columns], q.shape[1]))
        delta = (grad[rows] * out[rows]).sum(-1).T[..., None]  # [Hq, rows, 1]
        of_scores = probs * (of_probs - delta) * scale
        grad_q[rows] = torch.einsum("hqk,khd->qhd", of_scores, _expand_heads(k[columns], q.shape[1]))
        grad_k[columns] = _sum_heads(torch.einsum("hqk,qhd->khd", of_scores, q[rows]), k.shape[1])
        grad_v[columns] = _sum_heads(torch.einsum("hqk,qhd->khd", probs, grad[rows]), v.shape[1])
    return grad_q, grad_k, grad_v


REFERENCE = Kernels(_dense_forward, _dense_backward)


def largest_difference(tree: PrefixTree, heads: int, kv_heads: int, head_dim: int) -> float:
    """Compare merged `REFERENCE` with flexpg's dense attention, in float64 on CPU: output and all gradients."""
    torch.manual_seed(0)
    q, grad = torch.randn(2, 1, heads, tree.padded_length, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, tree.padded_length, head_dim, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    split = flash_split_attention(*leaves, tree, plan_calls(tree), REFERENCE)
    dense = attention(*leaves, block_mask(tree), backend="dense")
    pairs = [(split, dense)]
    pairs += zip(torch.autograd.grad(split, leaves, grad), torch.autograd.grad(dense, leaves, grad), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def _call(rows: Sequence[Range], columns: Sequence[Range], is_causal: bool, device: torch.device) -> Call:
    row_lens, column_lens = ([stop - start for start, stop in ranges] for ranges in (rows, columns))
    return Call(
        rows=_tokens(rows, device),
        columns=_tokens(columns, device),
        row_starts=_starts(row_lens, device),
        column_starts=_starts(column_lens, device),
        longest_rows=max(row_lens),
        longest_columns=max(column_lens),
        is_causal=is_causal,
    )


def _tokens(ranges: Sequence[Range], device: torch.device) -> slice | Tensor:
    if all(before[1] == after[0] for before, after in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])  # a view, not a copy
    return torch.cat([torch.arange(*each) for each in ranges]).to(device)


def _starts(lens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)


def _by_token(*heads_first: Tensor) -> list[Tensor]:
    """Return [1, H, S, D] as [S, H, D]: views whose last dimension has stride 1, as the kernels need."""
    return [x[0].transpose(0, 1) if x.stride(-1) == 1 else x[0].transpose(0, 1).contiguous() for x in heads_first]


def _sequences(call: Call) -> Iterator[tuple[slice, slice]]:
    starts = (pairwise(each.tolist()) for each in (call.row_starts, call.column_starts))
    for rows, columns in zip(*starts, strict=True):
        yield slice(*rows), slice(*columns)


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, _expand_heads(k, q.shape[1])) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")) if is_causal else scores


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Return [n, Hkv, D] as [n, heads, D]: query head h reads key/value head h // (heads / Hkv)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Sum [n, Hq, D] over the query heads of each key/value head, to [n, Hkv, D]."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)
