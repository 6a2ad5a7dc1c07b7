"""Forwards of models that FSDP2 has sharded; a model that is not sharded is called as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")
_running: ContextVar[nn.Module | None] = ContextVar("_running", default=None)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules of a model that FSDP2 has sharded, the root first."""
    if "torch.distributed.fsdp" not in sys.modules:  # nothing is sharded; the import would take a second
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sums_over(model: nn.Module, group: ProcessGroup) -> bool:
    """Return whether FSDP2 sums the gradients of a model over the ranks of a group.

    Raises:
        ValueError: If it shards the model over other ranks.
    """
    if not sharded_modules(model):
        return False
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    ranks = {*dist.get_process_group_ranks(group)}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and not ranks <= {*parameter.device_mesh.mesh.flatten().tolist()}:
            raise ValueError(
                "FSDP2 must shard the model over a mesh that contains the ranks of context_parallel, such as the "
                'flattened mesh of ("data", "context")'
            )
    return True


def first_weights(model: nn.Module) -> Tensor:
    """Return the first weights of every trained parameter that is not sharded, float64, to compare ranks by."""
    from torch.distributed.tensor import DTensor  # here, because it takes a second

    trained = [p.detach() for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    first = [p.reshape(-1)[:8].double() for p in trained]
    return torch.cat([part.to(first[0].device) for part in first]) if first else torch.zeros(0)


def run_as_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function as a forward of the model: FSDP2 gathers the weights of its root for it and frees them after.

    Args:
        model: The model, sharded or not.
        function: Calls modules of the model.
    """
    shards = sharded_modules(model)
    if not shards or _running.get() is model:  # in this order: dynamo cannot trace a ContextVar
        return function()
    root: Any = shards[0]  # a PEFT model may be a wrapper around it
    if len(sharded_modules(root)) < len(shards):  # every layer is a root of its own
        return function()
    if "_flexpg_call" not in vars(root):
        from torch.distributed.fsdp import register_fsdp_forward_method

        vars(root)["_flexpg_call"] = MethodType(_call, root)
        register_fsdp_forward_method(root, "_flexpg_call")
    outer = _running.set(model)
    try:
        result: T = vars(root)["_flexpg_call"](function)
        return result
    finally:
        _running.reset(outer)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights on every rank inside, so that ranks may call the model independently of one another.

    For sampling, where ranks take different numbers of steps.
    """
    shards: list[Any] = sharded_modules(model)
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)  # FSDP2's default: the root stays whole
            shard.reshard()


def _call(model: nn.Module, function: Callable[[], T]) -> T:
    return function()
