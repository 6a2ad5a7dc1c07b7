"""Collectives of context parallelism, with their gradients.

Every rank of a group calls them in the same order, forward and backward, because it runs the same layers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

Kind = tuple[torch.Size, torch.dtype]


def gather_ranges(x: Tensor, dim: int, group: ProcessGroup, lengths: list[int]) -> Tensor:
    """Return the ranges of all ranks, one after the other; gradients are summed over ranks and scattered back.

    Args:
        x: This rank's ranges: the one of its own number, then the one as far from the end.
        dim: The dimension in which ranges follow one another.
        group: The ranks.
        lengths: Of each range; twice as many as ranks.
    """
    gathered: Tensor = _GatherRanges.apply(x, dim, group, lengths)
    return gathered


def send_states(states: Sequence[Mapping[Any, Tensor]], out: Tensor, group: ProcessGroup, rank: int) -> Tensor:
    """Send a recurrent layer's states to another rank; their gradients come back in the backward.

    Args:
        states: Tensors by name, of each segment.
        out: The layer's output, whose backward waits for the gradients.
        group: The ranks.
        rank: The receiver, in the group.

    Returns:
        `out`.
    """
    tensors = [own for each in states for own in each.values()]
    has_grad = any(own.requires_grad for own in tensors)
    kinds = [{key: (own.shape, own.dtype) for key, own in each.items()} for each in states]
    dist.send_object_list([(kinds, has_grad)], group=group, group_dst=rank, device=out.device)
    zero: Tensor = _Send.apply(group, rank, *tensors)
    return out + zero.to(out)


def receive_states(group: ProcessGroup, rank: int, device: torch.device) -> list[dict[Any, Tensor]]:
    """Return the states that another rank of a group sends."""
    message: list[Any] = [None]
    dist.recv_object_list(message, group=group, group_src=rank, device=device)
    kinds, has_grad = message[0]
    anchor = torch.zeros((), device=device, requires_grad=has_grad and torch.is_grad_enabled())
    tensors = iter(_Receive.apply(anchor, group, rank, [kind for each in kinds for kind in each.values()]))
    return [{key: next(tensors) for key in each} for each in kinds]


def sum_over_ranks(table: Tensor, group: ProcessGroup, backward_scale: float = 1.0) -> Tensor:
    """Return a table summed over the ranks of a group, whose gradient all ranks know.

    Args:
        table: A tensor of the same shape on every rank.
        group: The ranks.
        backward_scale: Factor of the gradient.
    """
    total: Tensor = _SumOverRanks.apply(table, group, backward_scale)
    return total


def check_same_on_all_ranks(group: ProcessGroup, settings: object, tensors: Iterable[Tensor]) -> None:
    """Check that all ranks of a group have the same settings and tensors, or they would wait for one another.

    Raises:
        ValueError: On all ranks, if they have not.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(repr(tensor.shape).encode() + tensor.cpu().numpy().tobytes())
    digests: list[Any] = [None] * group.size()
    dist.all_gather_object(digests, digest.hexdigest(), group)
    others = [rank for rank, own in enumerate(digests) if own != digests[0]]
    if others:
        raise ValueError(
            "all ranks of context_parallel must have the same rollouts and options, but those of rank "
            f"{others[0]} of the group are not those of rank 0"
        )


@contextmanager
def summed_gradients(model: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """Sum over the ranks of a group, at the end, the gradients that parameters get inside.

    Gradients from before are left as they are, and added. A parameter that has no gradient on any rank gets none.
    """
    trained = [own for own in model.parameters() if own.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        yield
        return
    before = [own.grad for own in trained]
    for own in trained:
        own.grad = None
    try:
        yield
        has_grad = torch.tensor([own.grad is not None for own in trained], dtype=torch.int32)
        has_grad = has_grad.to(trained[0].device)
        dist.all_reduce(has_grad, group=group)
        for own, count in zip(trained, has_grad.tolist(), strict=True):
            if count:
                own.grad = torch.zeros_like(own) if own.grad is None else own.grad.contiguous()
                dist.all_reduce(own.grad, group=group)
    except GeneratorExit:
        warnings.warn(
            "the loop over packed_logprobs did not run to its end: gradients are not summed over context_parallel",
            RuntimeWarning,
            stacklevel=3,
        )
        raise
    finally:
        for own, earlier in zip(trained, before, strict=True):
            if earlier is not None:
                own.grad = earlier if own.grad is None else earlier.add_(own.grad)


class _GatherRanges(torch.autograd.Function):
    """All-gather of parts of different lengths; the backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup, lengths: list[int]) -> Tensor:
        ctx.dim, ctx.group, ctx.lengths = dim, group, lengths
        pairs = [*zip(lengths, reversed(lengths), strict=True)][: group.size()]
        own = _padded(_first(x, dim), max(map(sum, pairs)))
        parts = [torch.empty_like(own) for _ in pairs]
        dist.all_gather(parts, own, group)
        ranges = [part[: sum(pair)].split(pair) for part, pair in zip(parts, pairs, strict=True)]
        whole = torch.cat([first for first, _ in ranges] + [second for _, second in reversed(ranges)])
        return whole.movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ranges = _first(grad, ctx.dim).split(ctx.lengths)
        parts = [torch.cat(pair) for pair in zip(ranges, reversed(ranges), strict=True)][: ctx.group.size()]
        longest, own = max(map(len, parts)), len(parts[ctx.group.rank()])
        # In float32 or better: bfloat16 would lose small gradients among large ones.
        wide = torch.promote_types(grad.dtype, torch.float32)
        padded = [_padded(part, longest).to(wide) for part in parts]
        total = torch.empty_like(padded[0])
        dist.reduce_scatter(total, padded, group=ctx.group)
        return total[:own].movedim(0, ctx.dim).to(grad.dtype), None, None, None


class _Send(torch.autograd.Function):
    """Send to another rank; the backward receives."""

    @staticmethod
    def forward(ctx, group: ProcessGroup, rank: int, *states: Tensor) -> Tensor:
        ctx.group, ctx.rank, ctx.kinds = group, rank, [(own.shape, own.dtype) for own in states]
        for own in states:
            dist.send(own.contiguous(), group=group, group_dst=rank)
        return states[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds]
        for own in grads:
            dist.recv(own, group=ctx.group, group_src=ctx.rank)
        return None, None, *grads


class _Receive(torch.autograd.Function):
    """Receive from another rank; the backward sends."""

    @staticmethod
    def forward(ctx, anchor: Tensor, group: ProcessGroup, rank: int, kinds: list[Kind]) -> tuple[Tensor, ...]:
        ctx.group, ctx.rank = group, rank
        states = [torch.empty(shape, dtype=dtype, device=anchor.device) for shape, dtype in kinds]
        for own in states:
            dist.recv(own, group=group, group_src=rank)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        for own in grads:
            dist.send(own.contiguous(), group=ctx.group, group_dst=ctx.rank)
        return None, None, None, None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the same on all ranks, so that each keeps it for its own part."""

    @staticmethod
    def forward(ctx, table: Tensor, group: ProcessGroup, backward_scale: float) -> Tensor:
        ctx.backward_scale = backward_scale
        total = table.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * ctx.backward_scale, None, None


def _first(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).contiguous()


def _padded(x: Tensor, length: int) -> Tensor:
    """Return `x` with zeros up to `length` in its first dimension."""
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x)))
