"""A model's layers for a while: uncompiled, or with their outputs looked at, or moved."""

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
    """Inside, modules that `nn.Module.compile` has compiled, as `torchtune.training.compile_model`, are as they were.

    For what has other shapes or masks than training: it would use up the recompilations that training needs.
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
def layer_outputs(layers: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, Tensor]:
    """[T, E] of every layer, on the CPU, from one call of the model, by name, the first first.

    Args:
        layers: decoder layers by name, which put out [1, T, E], or a tuple that begins with it.
        call: runs the model once.
    """
    outputs: dict[str, Tensor] = {}

    def keep(number: int, name: str, hidden: Tensor) -> None:
        outputs[name] = hidden[0].cpu()

    with _hooked(layers, keep):
        call()
    return outputs


def layers_moved(layers: Mapping[str, nn.Module], unit: float) -> AbstractContextManager[None]:
    """A context in which all that a layer and its parts put out is a relative `unit` more or less, at random.

    The same elements move the same way each time, as activation checkpointing calls a layer again, and no state of
    random numbers is touched.

    Args:
        layers: as in `layer_outputs`.
        unit: say, `torch.finfo(dtype).eps`.
    """

    def move(number: int, name: str, hidden: Tensor) -> Tensor | None:
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():  # of a part; say, a router's choice
            return None
        generator = torch.Generator(hidden.device).manual_seed(number)
        is_up = torch.randint(0, 2, hidden.shape, generator=generator, device=hidden.device)
        return hidden * torch.tensor([1 - unit, 1 + unit], dtype=hidden.dtype, device=hidden.device)[is_up]

    parts = {
        module: f"{name}.{path}"  # by module, as layers may share one
        for name, layer in layers.items()
        for path, module in layer.named_modules()
        if module is layer or not list(module.children())
    }
    return _hooked({name: module for module, name in parts.items()}, move)


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Inside, the hook sees every layer's output, and may give another in its place; no layer is compiled."""

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
