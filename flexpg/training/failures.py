"""What ends a run in the middle of training: no memory, or numbers that are none; said in one line, with what to do."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from flexpg.packing import MicroBatch
from flexpg.training.distributed import World

# A micro-batch, its log-probabilities [n, C] under the policy, the old one and the reference, and its loss.
Scored = tuple[MicroBatch, Tensor, Tensor | None, Tensor | None, float]
P = ParamSpec("P")
R = TypeVar("R")


class OutOfMemory(RuntimeError):
    """The device or the machine has no more memory; the message names the budget to lower."""


class NotFinite(FloatingPointError):
    """The loss or a gradient is no finite number; the message says where, and the model was not updated."""


def within_memory(budget: str, otherwise: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a recipe's method: where it runs out of memory, the error names the budget that decides over its memory.

    Args:
        budget: the key of the recipe's `cfg` that holds it.
        otherwise: what else may help.
    """

    def decorated(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def bounded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                recipe: Any = args[0]
                advice = f"lower {budget}, which is {recipe.cfg[budget]}{otherwise and f', or {otherwise}'}"
                raise OutOfMemory(f"out of memory in {method.__name__}; {advice}") from error

        return bounded

    return decorated


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """That of torch's CUDA allocator has a type of its own; others are known by their text alone (torch 2.13)."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA's and Triton's, a CPU's, cuBLAS's
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in signs)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of every gradient by its parameter's name, over all processes, which all call it."""
    from torch.distributed.tensor import DTensor  # at first use: it takes a second

    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms


def not_finite(
    what: str,
    folder: Path,
    world: World,
    save: Callable[[Path], None],
    seen: Sequence[Scored],
    advantages: Tensor,
    model: nn.Module,
) -> NotFinite:
    """The error of an update that must not be made; what it was computed from is kept for a look at it.

    All processes call it. What an earlier run left in the folder goes.

    Args:
        what: is not finite, in words, and in which step.
        folder: gets the model's weights, and a file of each process: `torch.load(path, weights_only=True)` has tokens,
            log-probabilities and loss of each micro-batch, and the norm of every gradient.
        world: the processes.
        save: writes the weights into a folder; its CheckpointError becomes a part of this one.
        seen: of this process's micro-batches.
        advantages: [N] of all rollouts.
        model: with its gradients.
    """
    kept, found = [], ""
    for batch, logprobs, old, ref, loss in seen:
        scores = {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref}
        scores["advantages"] = advantages[batch.indices]
        for name, values in scores.items():
            if not found and values is not None and not values.isfinite().all():
                n = int((~values.isfinite()).nonzero()[0, 0])
                found = f"{name} of rollout {batch.indices[n]}"
        rollouts = batch.rollouts
        tables = {"group_ids": rollouts.group_ids, "rewards": rollouts.rewards, "trained": rollouts.trained, **scores}
        on_cpu = {name: None if table is None else table.cpu() for name, table in tables.items()}
        tokens = {"prompts": rollouts.prompts, "completions": rollouts.completions}
        lists = {name: [row.cpu() for row in rows] for name, rows in tokens.items()}
        kept.append({"indices": batch.indices, "loss": loss, **lists, **on_cpu})
    norms = gradient_norms(model)
    wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
    found = found or (f"the gradient of {wrong[0]}, and of {len(wrong) - 1} others" if wrong else "the loss")
    path = folder / f"rank_{world.rank}.pt"
    try:
        with world.together(OSError):
            if world.is_first:
                shutil.rmtree(folder, ignore_errors=True)
        save(folder)
        with world.together(OSError, RuntimeError):
            torch.save({"micro_batches": kept, "gradient_norms": norms}, path)
        where = f"{folder} holds its weights, and {path.name} there the rollouts and log-probabilities"
    except ValueError as error:
        where = f"what it was computed from could not be saved ({error})"
    return NotFinite(f"{what}, first in {found}. The model was not updated; {where}")
