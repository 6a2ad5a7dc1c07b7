"""Layers of a model: run them uncompiled, record their outputs, or perturb these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[int, str, Tensor], Tensor | None]  # a layer's number, its name and its output [1, T, E]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run modules that `nn.Module.compile` compiled, as `torchtune.training.compile_model` does, without compilation.

    For calls with other shapes or masks than training has: they would use up the recompilations of training.
    """
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@torch.no_grad()
def record_layer_outputs(layers: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, Tensor]:
    """Call a model once and return the output [T, E] of every layer on the CPU, by name, in order.

    Args:
        layers: Decoder layers by name, which return [1, T, E] or a tuple that begins with it.
        call: Runs the model once.
    """
    outputs: dict[str, Tensor] = {}

    def keep(number: int, name: str, hidden: Tensor) -> None:
        outputs[name] = hidden[0].cpu()

    with _hooked(layers, keep):
        call()
    return outputs


def perturb_layer_outputs(layers: Mapping[str, nn.Module], unit: float) -> AbstractContextManager[None]:
    """Return a context in which every output of a layer and its submodules is multiplied by 1 + unit or 1 - unit.

    The signs are random but the same at every call, because activation checkpointing calls a layer twice. The global
    random number generators are not used.

    Args:
        layers: As in `record_layer_outputs`.
        unit: For instance `torch.finfo(dtype).eps`.
    """

    def perturb(number: int, name: str, hidden: Tensor) -> Tensor | None:
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():  # such as a router's choice of experts
            return None
        generator = torch.Generator(hidden.device).manual_seed(number)
        is_up = torch.randint(0, 2, hidden.shape, generator=generator, device=hidden.device)
        return hidden * torch.tensor([1 - unit, 1 + unit], dtype=hidden.dtype, device=hidden.device)[is_up]

    parts = {
        module: f"{name}.{path}"  # by module, because layers may share one
        for name, layer in layers.items()
        for path, module in layer.named_modules()
        if module is layer or not list(module.children())
    }
    return _hooked({name: module for module, name in parts.items()}, perturb)


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call a hook with every layer's output, which it may replace; layers must not be compiled."""

    def seen(number: int, name: str, module: nn.Module, args: Any, out: Any) -> Any:
        hidden = hook(number, name, out[0] if isinstance(out, tuple) else out)
        return (hidden, *out[1:]) if isinstance(out, tuple) and hidden is not None else hidden

    handles = [
        layer.register_forward_hook(partial(seen, number, name)) for number, (name, layer) in enumerate(layers.items())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
