"""Collectives of context parallelism, with their gradients.

Every rank of a group calls them in the same order, forward and backward, because it runs the same layers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
        lengths: The length of each range; twice as many as ranks.
    """
    return start_to_gather(x, dim, group, lengths)()


def start_to_gather(x: Tensor, dim: int, group: ProcessGroup, lengths: list[int]) -> Callable[[], Tensor]:
    """Start `gather_ranges` and return a function that waits for it and returns its result, to be called once.

    What is computed between the two calls overlaps with the communication. In the backward, the sum over ranks
    overlaps with the backward of the same part.
    """
    gather = _Gather(dim, group, lengths)
    token: Tensor = _StartGather.apply(x, gather)
    return partial(_FinishGather.apply, token, gather)


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
    tensors = [tensor for each in states for tensor in each.values()]
    has_grad = any(tensor.requires_grad for tensor in tensors)
    kinds = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in states]
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


def broadcast_states(
    states: Mapping[Any, Tensor] | None, group: ProcessGroup, rank: int, device: torch.device
) -> dict[Any, Tensor]:
    """Return a recurrent layer's states that one rank of a group has; their gradients are summed on that rank.

    Args:
        states: Tensors by name; None on the other ranks.
        group: The ranks.
        rank: The one that has the states, in the group.
        device: The device of the states.
    """
    message: list[Any] = [None]
    if states is not None:
        has_grad = any(state.requires_grad for state in states.values())
        message = [({key: (state.shape, state.dtype) for key, state in states.items()}, has_grad)]
    dist.broadcast_object_list(message, group=group, group_src=rank, device=device)
    kinds, has_grad = message[0]
    anchor = torch.zeros((), device=device, requires_grad=has_grad and torch.is_grad_enabled())
    sent = () if states is None else tuple(states.values())
    return dict(zip(kinds, _Broadcast.apply(anchor, group, rank, list(kinds.values()), *sent)[1:], strict=True))


def sum_over_ranks(table: Tensor, group: ProcessGroup, backward_scale: float = 1.0) -> Tensor:
    """Return a table summed over the ranks of a group, whose gradient all ranks know.

    Args:
        table: A tensor of the same shape on every rank.
        group: The ranks.
        backward_scale: Factor of the gradient.
    """
    total: Tensor = _SumOverRanks.apply(table, group, backward_scale)
    return total


def check_same_on_all_ranks(
    group: ProcessGroup, settings: object, tensors: Iterable[Tensor], weights: Iterable[Tensor]
) -> None:
    """Check that all ranks of a group have the same settings, tensors and weights.

    With different tensors they would deadlock; with different weights, gradients would mix those of several models.

    Raises:
        ValueError: On all ranks, if they have not.
    """
    digests: list[Any] = [None] * group.size()
    dist.all_gather_object(digests, (_digest(tensors, settings), _digest(weights)), group)
    for rank, (given, of_weights) in enumerate(digests):
        if given != digests[0][0]:
            raise ValueError(
                f"all ranks of context_parallel must have the same rollouts and options, but those of rank {rank} of "
                "the group are not those of rank 0"
            )
        if of_weights != digests[0][1]:
            raise ValueError(
                f"all ranks of context_parallel must have the same weights, but those of rank {rank} of the group are "
                "not those of rank 0; use one seed on all ranks before new weights, such as those of LoRA, are "
                "initialized, or broadcast the weights"
            )


def _digest(tensors: Iterable[Tensor], settings: object = None) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(repr(tensor.shape).encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def summed_gradients(model: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """Sum over the ranks of a group, at the end, the gradients that parameters get inside.

    Gradients from before are left as they are, and added. A parameter that has no gradient on any rank gets none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        yield
        return
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        yield
        has_grad = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
        has_grad = has_grad.to(trained[0].device)
        dist.all_reduce(has_grad, group=group)
        for parameter, count in zip(trained, has_grad.tolist(), strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                dist.all_reduce(parameter.grad, group=group)
    except GeneratorExit:
        warnings.warn(
            "the loop over packed_logprobs did not run to its end: gradients are not summed over context_parallel",
            RuntimeWarning,
            stacklevel=3,
        )
        raise
    finally:
        for parameter, earlier in zip(trained, before, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)


class _Gather:
    """An all-gather of parts of different lengths, and the reduce-scatter of its gradient, while they run."""

    def __init__(self, dim: int, group: ProcessGroup, lengths: list[int]) -> None:
        self.dim, self.group, self.lengths = dim, group, lengths
        self.pairs = [*zip(lengths, reversed(lengths), strict=True)][: group.size()]
        self.longest = max(map(sum, self.pairs))
        self.work: Any = None
        self.parts: list[Tensor] = []
        self.tensor: Tensor | None = None  # kept until the work is done

    def start(self, x: Tensor) -> None:
        self.tensor = _padded(_first(x, self.dim), self.longest)
        self.parts = [torch.empty_like(self.tensor) for _ in self.pairs]
        self.work = dist.all_gather(self.parts, self.tensor, group=self.group, async_op=True)

    def finish(self) -> Tensor:
        self.work.wait()
        ranges = [part[: sum(pair)].split(pair) for part, pair in zip(self.parts, self.pairs, strict=True)]
        self.work, self.parts, self.tensor = None, [], None
        whole = torch.cat([first for first, _ in ranges] + [second for _, second in reversed(ranges)])
        return whole.movedim(0, self.dim)

    def start_sum(self, grad: Tensor) -> None:
        ranges = _first(grad, self.dim).split(self.lengths)
        parts = [torch.cat(pair) for pair in zip(ranges, reversed(ranges), strict=True)][: self.group.size()]
        # In float32 or better: bfloat16 would lose small gradients among large ones.
        wide = torch.promote_types(grad.dtype, torch.float32)
        self.parts = [_padded(part, self.longest).to(wide) for part in parts]
        self.tensor = torch.empty_like(self.parts[0])
        self.work = dist.reduce_scatter(self.tensor, self.parts, group=self.group, async_op=True)

    def finish_sum(self) -> Tensor:
        self.work.wait()
        assert self.tensor is not None
        total = self.tensor[: sum(self.pairs[self.group.rank()])].movedim(0, self.dim)
        self.work, self.parts, self.tensor = None, [], None
        return total


class _StartGather(torch.autograd.Function):
    """Start an all-gather; the backward waits for the sum of gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: _Gather) -> Tensor:
        ctx.gather, ctx.dtype = gather, x.dtype
        gather.start(x)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, token: Tensor):
        return ctx.gather.finish_sum().to(ctx.dtype), None


class _FinishGather(torch.autograd.Function):
    """Wait for an all-gather; the backward starts to sum the gradient over ranks."""

    @staticmethod
    def forward(ctx, token: Tensor, gather: _Gather) -> Tensor:
        ctx.gather = gather
        return gather.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.gather.start_sum(grad)
        return grad.new_zeros(()), None


# Activation checkpointing stops the recomputation of a layer at the last tensor that it saved. A layer may end in the
# following two, so each saves a tensor after its communication, which ranks then repeat. The backward reads that tensor
# before it waits for gradients: the rank that sends them may need this one's recomputation first.


class _Send(torch.autograd.Function):
    """Send to another rank; the backward receives."""

    @staticmethod
    def forward(ctx, group: ProcessGroup, rank: int, *states: Tensor) -> Tensor:
        ctx.group, ctx.rank, ctx.kinds = group, rank, [(state.shape, state.dtype) for state in states]
        for state in states:
            dist.send(state.contiguous(), group=group, group_dst=rank)
        token = states[0].new_zeros(())
        ctx.save_for_backward(token)
        return token

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        _ = ctx.saved_tensors
        grads = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds]
        for received in grads:
            dist.recv(received, group=ctx.group, group_src=ctx.rank)
        return None, None, *grads


class _Receive(torch.autograd.Function):
    """Receive from another rank; the backward sends."""

    @staticmethod
    def forward(ctx, anchor: Tensor, group: ProcessGroup, rank: int, kinds: list[Kind]) -> tuple[Tensor, ...]:
        ctx.group, ctx.rank = group, rank
        states = [torch.empty(shape, dtype=dtype, device=anchor.device) for shape, dtype in kinds]
        for state in states:
            dist.recv(state, group=group, group_src=rank)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        for grad in grads:
            dist.send(grad.contiguous(), group=ctx.group, group_dst=ctx.rank)
        return None, None, None, None


class _Broadcast(torch.autograd.Function):
    """Broadcast from one rank; the backward sums there."""

    @staticmethod
    def forward(
        ctx, anchor: Tensor, group: ProcessGroup, rank: int, kinds: list[Kind], *states: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.rank, ctx.has_states = group, rank, bool(states)
        if states:
            copies = [state.clone(memory_format=torch.contiguous_format) for state in states]
        else:
            copies = [torch.empty(shape, dtype=dtype, device=anchor.device) for shape, dtype in kinds]
        for copied in copies:
            dist.broadcast(copied, group=group, group_src=rank)
        token = anchor.new_zeros(())
        ctx.save_for_backward(token)
        return token, *copies

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor, *grads: Tensor):
        _ = ctx.saved_tensors
        # In float32 or better: bfloat16 would lose small gradients among large ones.
        sums = [grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous() for grad in grads]
        for summed in sums:
            dist.reduce(summed, group=ctx.group, group_dst=ctx.rank)
        totals = [summed.to(grad.dtype) for summed, grad in zip(sums, grads, strict=True)]
        return None, None, None, None, *(totals if ctx.has_states else ())


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
