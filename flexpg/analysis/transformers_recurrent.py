"""The work of transformers' recurrent layers, counted by running them on the meta device.

Each kind of recurrence has operations of its own, so none is written down here: torch counts what a layer computes and
keeps. Without the kernels of flash-linear-attention, causal-conv1d or mamba-ssm, that is transformers' implementation
in torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flexpg.integrations.transformers.recurrent import unused_arguments

LENGTH = 256  # tokens, a multiple of the usual sizes of chunks


@dataclass(frozen=True)
class RecurrentWork:
    """The work of a recurrent layer for one token, without the FLOPs of its matrices.

    Attributes:
        flops: FLOPs of the forward: products of batches of matrices, and convolutions over the sequence.
        backward_flops: FLOPs of the backward.
        kept_bytes: What the layer keeps for its backward, matrices included.
    """

    flops: int
    backward_flops: int
    kept_bytes: int


def recurrent_work(module: nn.Module, width: int) -> RecurrentWork:
    """Count the work of a recurrent module; its values do not matter.

    Args:
        module: A module without adapters, on the meta device.
        width: E, of the hidden states.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.dim() == 2)
    hidden = torch.zeros(1, LENGTH, width, device="meta", dtype=dtype, requires_grad=True)
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        unbound_forward = inspect.unwrap(type(module).forward)
        out = unbound_forward(module, hidden, **unused_arguments(unbound_forward))
        out = out[0] if isinstance(out, tuple) else out
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    products, convolutions = _counts(forward)
    # torch counts the backward of a convolution of many groups as if it had one.
    backward_products, _ = _counts(backward)
    return RecurrentWork(
        flops=(products + convolutions) // LENGTH,
        backward_flops=(backward_products + 2 * convolutions) // LENGTH,
        kept_bytes=sum(storage.nbytes() for storage in kept.values()) // LENGTH,
    )


def _counts(counter: FlopCounterMode) -> tuple[int, int]:
    """Return the FLOPs of products of batches of matrices, and of convolutions."""
    counts: Mapping[Any, int] = counter.get_flop_counts()["Global"]
    operators = torch.ops.aten
    products = counts.get(operators.bmm, 0) + counts.get(operators.baddbmm, 0)
    return products, counts.get(operators.convolution, 0)
