"""The output layer of a transformers model: its own forward, around given hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexpg.integrations.transformers.checks import unwrap
from flexpg.integrations.transformers.composite import backbone
from flexpg.logprobs import OutputLayer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def output(model: nn.Module) -> OutputLayer:
    """Return the model's output layer: [M, E] -> logits [M, V], tied or not, with its scale and softcap.

    It is the model's own forward around its decoder, so nothing that an architecture does to its logits is missed. It
    runs on shallow copies, so the model does not change, and hooks on its decoder run in the packed forward only.

    Raises:
        TypeError: If the model has no output layer, has hooks that would be missed, or has a forward that was replaced
            by a function of another kind than a method; when called, if its forward does not call its decoder.
    """
    base = unwrap(model)
    base_model = backbone(base)
    if base_model is base:
        raise TypeError(f"{type(base).__name__} has no output layer; load it with AutoModelForCausalLM")
    _check_hooks(base)
    parts = base_model, base.get_decoder()  # OPT calls the inner one itself
    decoders = {part for part in parts if isinstance(part, PreTrainedModel) and part is not base}
    paths = [path.split(".") for path, module in base.named_modules() if module in decoders]
    copied = {base.get_submodule(".".join(path[:n])) for path in paths for n in range(len(path) + 1)}

    def logits(rows: Tensor) -> Tensor:
        calls = []

        def decoder_forward(*args: Any, **kwargs: Any) -> _HiddenStates:
            calls.append(True)
            return _HiddenStates(last_hidden_state=rows[None])

        shallow: Any = _shallow_copy(base, copied, dict.fromkeys(decoders, decoder_forward))
        input_ids = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
        # Not own(...): no compiled forward of the whole model.
        out = shallow.forward(input_ids=input_ids, use_cache=False, return_dict=True)
        if not calls:
            raise TypeError(
                f"the forward of {type(base).__name__} does not call its {type(base_model).__name__}; pass an output "
                "layer of your own to token_logprobs"
            )
        return out.logits[0]

    return logits


def _check_hooks(base: PreTrainedModel) -> None:
    """Refuse hooks that ordinary calls of a model run, but its output layer on a few rows cannot; FSDP2's own may."""
    for hook in (*base._forward_pre_hooks.values(), *base._forward_hooks.values()):
        if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
            raise TypeError(
                f"{type(base).__name__} must have no forward hooks, because its logits are computed for rows of hidden "
                f"states instead of whole sequences, got {hook}; register it on a layer or on the output layer instead"
            )


def _shallow_copy(
    module: nn.Module, copied: set[nn.Module], forwards: dict[nn.Module, Callable[..., Any]]
) -> nn.Module:
    """Return a copy of a module that shares its parameters, without hooks.

    Args:
        module: The module to copy.
        copied: The submodules to copy too, with all above them; the others are shared.
        forwards: The copies that have another forward.
    """
    shallow = object.__new__(type(module))  # copy.copy() would construct a module of FSDP2 again
    state = {key: _rebound(value, module, shallow) for key, value in vars(module).items()}
    forward = forwards.get(module) or state.get("forward")
    if forward is not None and forward is vars(module).get("forward"):
        raise TypeError(
            f"the forward of {type(module).__name__} was replaced by {forward}, which cannot be called with given "
            "hidden states; replace it by a method: model.forward = types.MethodType(function, model)"
        )
    parts = {
        name: part if part not in copied else _shallow_copy(part, copied, forwards)
        for name, part in module._modules.items()
    }
    vars(shallow).update(state, _modules=parts, _compiled_call_impl=None, **{name: {} for name in HOOKS})
    if forward is not None:
        vars(shallow)["forward"] = forward
    return shallow


def _rebound(value: Any, module: nn.Module, shallow: nn.Module, inside: tuple[Any, ...] = ()) -> Any:
    """Return a method, a partial function or a function whose closure has the module, with its copy in the place of it.

    Everything else is returned as it is. Accelerate keeps the forward of a module in `_old_forward`, and replaces it by
    a partial function; TRL replaces it by a method that has the original one in its closure.

    Args:
        value: An attribute of the module.
        module: The module.
        shallow: Its copy.
        inside: The functions that have the value in their closure.
    """
    value = getattr(value, "_torchdynamo_orig_callable", value)  # not compiled
    again = partial(_rebound, module=module, shallow=shallow, inside=(*inside, value))
    if value is module:
        return shallow
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(again(value.__func__), shallow)
    if isinstance(value, partial) and any(given is module for given in value.args):
        return partial(value.func, *map(again, value.args), **value.keywords)
    if isinstance(value, FunctionType) and value.__closure__ and not any(value is outer for outer in inside):
        cells = tuple(_rebound_cell(cell, again) for cell in value.__closure__)
        if any(new is not cell for new, cell in zip(cells, value.__closure__, strict=True)):
            copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            copied.__kwdefaults__ = value.__kwdefaults__
            return copied
    return value


def _rebound_cell(cell: CellType, again: Callable[[Any], Any]) -> CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # empty
        return cell
    new = again(value)
    return cell if new is value else CellType(new)


class _HiddenStates(BaseModelOutputWithPast):
    """A decoder's output of hidden states only: every other field that the model around it reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
