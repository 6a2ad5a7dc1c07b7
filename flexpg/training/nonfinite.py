"""What a run leaves when a loss or a gradient is NaN or Inf: its weights, micro-batches, and where it was first."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flexpg.micro_batches import MicroBatch
from flexpg.training.checkpoints import CheckpointError
from flexpg.training.distributed import World
from flexpg.training.errors import one_line
from flexpg.verify import gradient_norms

Seen = tuple[MicroBatch, Tensor, float]  # a micro-batch, its log-probabilities [n, C] and its loss


def abort_nonfinite(
    what: str,
    model: nn.Module,
    seen: Sequence[Seen],
    advantages: Tensor,
    folder: Path,
    save_progress: Callable[[Path], None],
    world: World,
) -> NoReturn:
    """Save the weights and this rank's micro-batches, and raise; all ranks call it before the optimizer step.

    Args:
        what: What is NaN or Inf, for the error.
        model: With gradients.
        seen: The micro-batches of this rank.
        advantages: [N] float, of the step's rollouts.
        folder: What an earlier run left in it is deleted.
        save_progress: Writes a checkpoint into the folder; all ranks call it.
        world: The ranks.

    Raises:
        FloatingPointError: It names the first rollout or parameter of this rank that is not finite.
    """
    norms = gradient_norms(model)
    if world.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    try:
        save_progress(folder)
        dump = {"micro_batches": [_record(*each, advantages) for each in seen], "gradient_norms": norms}
        torch.save(dump, folder / f"rank_{world.rank}.pt")
        saved = f"its weights and the micro-batches of each rank are in {folder}"
    except (CheckpointError, OSError, RuntimeError) as error:  # RuntimeError is torch.save's for a full disk
        saved = f"its weights and micro-batches could not be saved: {one_line(error)}"
    raise FloatingPointError(
        f"{what}, first in {_first_nonfinite(seen, advantages, norms)}. The model was not updated; {saved}"
    )


def _first_nonfinite(seen: Sequence[Seen], advantages: Tensor, norms: Mapping[str, float]) -> str:
    for batch, logprobs, _ in seen:
        for name, values in (("the log-probabilities", logprobs), ("the advantage", advantages[batch.indices])):
            if not values.isfinite().all():
                return f"{name} of rollout {int(batch.indices[(~values.isfinite()).nonzero()[0, 0]])}"
    culprits = (f"the gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm))
    return next(culprits, "the loss")


def _record(batch: MicroBatch, logprobs: Tensor, loss: float, advantages: Tensor) -> dict[str, Any]:
    return {
        "indices": batch.indices.tolist(),
        "prompts": batch.rollouts.prompts,
        "completions": batch.rollouts.completions,
        "advantages": advantages[batch.indices],
        "logprobs": logprobs,
        "old_logprobs": batch.old_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "loss": loss,
    }
