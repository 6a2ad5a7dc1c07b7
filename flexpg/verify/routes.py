"""Tokens that a mixture of experts routes otherwise when prefixes are shared: rounding decides close choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexpg.micro_batches import MicroBatch
from flexpg.verify.checked_model import CheckedModel


def count_rerouted_tokens(checked: CheckedModel, compared: Sequence[tuple[MicroBatch, int]]) -> int | None:
    """Count tokens that some layer sends to other experts than in the baseline.

    Args:
        checked: A model that shares prefixes exactly: nothing but rounding may change a choice.
        compared: Micro-batches, and one of their rollouts each.

    Returns:
        The number of tokens of the rollouts, each with its prompt; None if no module of the name `experts` is called
        with the indices [T, K] of experts, as transformers' are.
    """
    if not checked.has_experts:
        return None
    rerouted: dict[tuple[int, int], int] = {}
    for batch, n in compared:  # forwards for all, although some may be equal: FSDP needs the same number on all ranks
        shared = _routes(checked.model, partial(checked.hidden, batch.tree))
        alone = _routes(checked.model, partial(checked.baseline, batch, n))
        if not alone:
            return None
        nodes = batch.tree.node[n][batch.tree.node[n] >= 0]
        differs = torch.stack([(shared[name][nodes] != experts).any(-1) for name, experts in alone.items()])
        rerouted[id(batch), n] = int(differs.any(0).sum())
    return sum(rerouted.values())


@torch.no_grad()
def _routes(model: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """Call a model once and return the chosen experts [T, K], ascending, by the experts' path in the model."""
    routes: dict[str, Tensor] = {}

    def record(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not value.is_floating_point():
                routes[path] = value.flatten(0, -2).sort(-1).values

    handles = [
        module.register_forward_pre_hook(partial(record, path), with_kwargs=True)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "experts"
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return routes
