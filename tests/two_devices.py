"""A simulated CUDA device: CPU tensors that report CUDA as their device, and CUDA's rules for mixing devices.

Inside `simulated_cuda()`, whatever is created on or moved to "cuda" is a CPU tensor with a mark, and so is what is
computed from it. `tensor.device` of a marked one is cuda:0. An operation on tensors of both devices raises an error, as
it would on a GPU, except where CUDA allows it: 0-d CPU tensors, `copy_`, and CPU indices of a CUDA tensor.

Values are computed on the CPU. Not covered: kernels that run on CUDA only, streams, operations inside C++ (gradients
have no mark until they are stored in `.grad`), and functions of `torch.cuda` that are not in `REPLACED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MARK = "simulated_device"
GETTERS = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}  # of marked ones
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put, Tensor.index_put_}
ACROSS_DEVICES = {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, Tensor.grad.__get__}
ACROSS_DEVICES |= {torch._has_compatible_shallow_copy_type}  # asked by Module.to
LIKE_FIRST = {Tensor.grad.__get__, Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}
REPLACED: dict[str, Callable[..., Any]] = {  # of torch.cuda
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "get_device_capability": lambda *_: (7, 0),
    "is_bf16_supported": lambda *_: True,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
    "synchronize": lambda *_: None,
    "max_memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
}


class DeviceMismatchError(RuntimeError):
    """An operation that a GPU would refuse."""


class Generator(torch.Generator):
    """A CPU generator that reports the device it was created for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, CPU)

    def __init__(self, device: Any = "cpu") -> None:
        self.simulated = _device(device)

    @property
    def device(self) -> torch.device | None:
        return self.simulated


class TwoDevices(TorchFunctionMode):
    """Marks tensors with their simulated device, and checks that operations do not mix devices."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in GETTERS and device_of(args[0]) == CUDA:
            return GETTERS[func]
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        wanted = _device(kwargs.get("device"))
        if wanted is not None:
            kwargs = {**kwargs, "device": CPU}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _check_devices(func, args, kwargs, given, wanted)
        if func is torch.histc and not args[0].is_floating_point():  # integers on CUDA only
            args = (args[0].double(), *args[1:])
        out = func(*args, **kwargs)
        if func == Tensor.data.__set__:
            _mark(args[0], device_of(args[1]))
            return out
        if wanted is None:
            devices = [device_of(tensor) for tensor in (given[:1] if func in INDEXING | LIKE_FIRST else given)]
            wanted = CUDA if CUDA in devices else CPU if CPU in devices or not given else None
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not any(leaf is other for other in given):
                _mark(leaf, wanted)
        return out


@contextmanager
def simulated_cuda() -> Iterator[None]:
    """Simulate one CUDA device, of compute capability 7.0: transformers' grouped products for experts need 8.0."""
    create = nn.Parameter.__new__

    def new_parameter(cls: Any, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
        parameter = create(cls, data, requires_grad)
        if data is not None:
            _mark(parameter, device_of(data))
        return parameter

    with (
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(nn.Parameter, "__new__", new_parameter),
        mock.patch.multiple(torch.cuda, **REPLACED),
        TwoDevices(),
    ):
        yield


def device_of(tensor: Tensor) -> torch.device | None:
    """Return a tensor's simulated device; None if it is unknown, and fits both."""
    device: torch.device | None = tensor.__dict__.get(MARK)
    return device


def _mark(tensor: Tensor, device: torch.device | None) -> None:
    if device is not None and not tensor.is_meta:
        tensor.__dict__[MARK] = device


def _device(given: Any) -> torch.device | None:
    """Return CPU or CUDA if an argument names one of them, None for anything else."""
    kind = torch.device(given).type if isinstance(given, str | torch.device) else None
    return CUDA if kind == "cuda" else CPU if kind == "cpu" else None


def _moved(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what `to`, `cpu` or `cuda` returns: another tensor if the device changes."""
    tensor, before = args[0], device_of(args[0])
    if func is not Tensor.to:
        wanted, args = CUDA if func is Tensor.cuda else CPU, ()
    else:
        other = args[1] if len(args) > 1 else kwargs.get("device")
        wanted = device_of(other) if isinstance(other, Tensor) else _device(other)
        args = tuple(CPU if _device(arg) else arg for arg in args[1:])
        kwargs = {name: CPU if name == "device" and _device(arg) else arg for name, arg in kwargs.items()}
    out = tensor.to(*args, **kwargs) if args or kwargs else tensor
    if wanted is not None and wanted != before and out is tensor:
        out = tensor.clone()
    _mark(out, wanted or before)
    return out


def _check_devices(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], wanted: torch.device | None
) -> None:
    name, devices = resolve_name(func) or str(func), [device_of(tensor) for tensor in given]
    if func in TO_NUMPY and CUDA in devices:
        raise DeviceMismatchError(f"{name} of a CUDA tensor")
    if func in INDEXING and devices[0] == CUDA:  # indices may be on the CPU
        given = [args[0], *(leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, Tensor))]
        devices = [device_of(tensor) for tensor in given]
    elif func in ACROSS_DEVICES:
        return
    on_cpu = [tensor for tensor, device in zip(given, devices, strict=True) if device == CPU and tensor.dim()]
    if CUDA in devices and on_cpu:
        raise DeviceMismatchError(f"{name} of CUDA tensors, and CPU tensors of shapes {[*map(_shape, on_cpu)]}")
    generator = kwargs.get("generator")
    if generator is not None and wanted is not None and generator.device != wanted:
        raise DeviceMismatchError(f"{name} on {wanted} with a generator on {generator.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
