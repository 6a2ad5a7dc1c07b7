"""Activations in main memory between the forward and the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def offload_activations(device: torch.device) -> saved_tensors_hooks:
    """Return a context in which what autograd saves for the backward is copied to main memory, and back when needed.

    Weights and broadcast tensors stay where they are: they exist anyway, or FSDP gathers them again. Of layers
    that are recomputed in the backward, only the inputs are saved. It is torch's `save_on_cpu`, except that this
    one also copies weights and, to pinned memory, loses the strides that compiled backwards rely on (torch 2.13).

    Args:
        device: The device of the computation; tensors of a GPU are copied to pinned memory.
    """
    pin_memory = device.type == "cuda"

    def pack(tensor: Tensor) -> Any:
        return tensor if _stays(tensor) else (tensor.device, copy_to(torch.device("cpu"), tensor, pin_memory))

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else copy_to(*packed)

    return saved_tensors_hooks(pack, unpack)


def copy_to(device: torch.device, tensor: Tensor, pin_memory: bool = False) -> Tensor:
    """Return a copy with the same strides."""
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": device, "pin_memory": pin_memory}
    return torch.empty_strided(tensor.size(), tensor.stride(), **options).copy_(tensor, non_blocking=True)


def _stays(tensor: Tensor) -> bool:
    """Return whether a tensor is a weight, a transposed one, of a class of its own, or broadcast."""
    is_weight = type(tensor) is not Tensor or isinstance(tensor._base, nn.Parameter)
    return is_weight or any(step == 0 < size - 1 for size, step in zip(tensor.size(), tensor.stride(), strict=True))
