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


def gather_parts(x: Tensor, dim: int, group: ProcessGroup, lengths: list[int]) -> Tensor:
    """Return the parts of all ranks, one after the other; gradients are summed over ranks and scattered back.

    Args:
        x: This rank's part.
        dim: The dimension in which parts follow one another.
        group: The ranks.
        lengths: Of the part of each rank.
    """
    gathered: Tensor = _GatherParts.apply(x, dim, group, lengths)
    return gathered


def send_states(states: Sequence[Mapping[Any, Tensor]], out: Tensor, group: ProcessGroup) -> Tensor:
    """Send a recurrent layer's states to the next rank; their gradients come back in the backward.

    Args:
        states: Tensors by name, of each segment.
        out: The layer's output, whose backward waits for the gradients.
        group: The ranks.

    Returns:
        `out`.
    """
    tensors = [own for each in states for own in each.values()]
    has_grad = any(own.requires_grad for own in tensors)
    kinds = [{key: (own.shape, own.dtype) for key, own in each.items()} for each in states]
    dist.send_object_list([(kinds, has_grad)], group=group, group_dst=group.rank() + 1, device=out.device)
    zero: Tensor = _SendToNext.apply(group, *tensors)
    return out + zero.to(out)


def receive_states(group: ProcessGroup, device: torch.device) -> list[dict[Any, Tensor]]:
    """Return the states that the rank before this one sends."""
    message: list[Any] = [None]
    dist.recv_object_list(message, group=group, group_src=group.rank() - 1, device=device)
    kinds, has_grad = message[0]
    anchor = torch.zeros((), device=device, requires_grad=has_grad and torch.is_grad_enabled())
    tensors = iter(_ReceiveFromPrevious.apply(anchor, group, [kind for each in kinds for kind in each.values()]))
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


class _GatherParts(torch.autograd.Function):
    """All-gather of parts of different lengths; the backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup, lengths: list[int]) -> Tensor:
        ctx.dim, ctx.group, ctx.lengths = dim, group, lengths
        own = _padded(_first(x, dim), max(lengths))
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own, group)
        whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return whole.movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        parts = _first(grad, ctx.dim).split(ctx.lengths)
        longest, own = max(ctx.lengths), ctx.lengths[dist.get_rank(ctx.group)]
        # In float32 or better: bfloat16 would lose small gradients among large ones.
        wide = torch.promote_types(grad.dtype, torch.float32)
        padded = [_padded(part, longest).to(wide) for part in parts]
        total = torch.empty_like(padded[0])
        dist.reduce_scatter(total, padded, group=ctx.group)
        return total[:own].movedim(0, ctx.dim).to(grad.dtype), None, None, None


class _SendToNext(torch.autograd.Function):
    """Send to the next rank; the backward receives."""

    @staticmethod
    def forward(ctx, group: ProcessGroup, *states: Tensor) -> Tensor:
        ctx.group, ctx.kinds = group, [(own.shape, own.dtype) for own in states]
        for own in states:
            dist.send(own.contiguous(), group=group, group_dst=group.rank() + 1)
        return states[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds]
        for own in grads:
            dist.recv(own, group=ctx.group, group_src=ctx.group.rank() + 1)
        return None, *grads


class _ReceiveFromPrevious(torch.autograd.Function):
    """Receive from the rank before; the backward sends."""

    @staticmethod
    def forward(ctx, anchor: Tensor, group: ProcessGroup, kinds: list[Kind]) -> tuple[Tensor, ...]:
        ctx.group = group
        states = [torch.empty(shape, dtype=dtype, device=anchor.device) for shape, dtype in kinds]
        for own in states:
            dist.recv(own, group=group, group_src=group.rank() - 1)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        for own in grads:
            dist.send(own.contiguous(), group=ctx.group, group_dst=ctx.group.rank() - 1)
        return None, None, None


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
