"""Inputs and options of `grpo_loss` for its tests."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch

from flexpg.losses import BY_TOKENS, ImportanceSamplingLevel, LossType, grpo_loss

LOSS_TYPES = get_args(LossType)
LEVELS = get_args(ImportanceSamplingLevel)
MAX_COMPLETION_LENGTH = 9
# Both clips are hit on both sides, and differ, so that mixing them up shows.
OPTIONS = {"beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.25, "max_completion_length": MAX_COMPLETION_LENGTH}
VESPO = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.25}
NO_SEQUENCE_LEVEL = {"vespo"}
NOT_IN_TRL: set[str] = set()  # loss types that TRL and liger-kernel cannot be compared with
TYPES_AND_LEVELS = [
    pair for pair in product(LOSS_TYPES, LEVELS) if pair[1] == "token" or pair[0] not in NO_SEQUENCE_LEVEL
]
each_level = pytest.mark.parametrize("level", LEVELS)
each_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
each_loss_type_and_level = pytest.mark.parametrize(("loss_type", "level"), TYPES_AND_LEVELS)
each_trl_loss_type = pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in NOT_IN_TRL])
each_trl_loss_type_and_level = pytest.mark.parametrize(
    ("loss_type", "level"), [pair for pair in TYPES_AND_LEVELS if pair[0] not in NOT_IN_TRL]
)


def random_batch(num_rollouts=6, longest=7, dtype=torch.float64, seed=0):
    """Return off-policy inputs; every rollout has a loss token, and tool tokens make holes in the mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    lengths = torch.randint(1, longest + 1, (num_rollouts, 1), generator=generator)
    loss_mask = torch.arange(longest) < lengths
    loss_mask &= torch.rand(loss_mask.shape, generator=generator) < 0.8
    loss_mask[:, 0] = True
    logprobs = -draw(num_rollouts, longest).abs()
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "ref_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "advantages": draw(num_rollouts),
        "loss_mask": loss_mask,
    }


def rows(batch, start, stop):
    """Return rollouts `start` to `stop`, with a leaf of their own for the gradient."""
    part = {name: values if values is None else values[start:stop] for name, values in batch.items()}
    return part | {"logprobs": part["logprobs"].detach().requires_grad_()}


def loss_and_grad(batch, **options):
    batch = rows(batch, 0, len(batch["loss_mask"]))
    loss = grpo_loss(**batch, **options)
    loss.backward()
    return loss.detach(), batch["logprobs"].grad


def loss_and_metrics(batch, **options):
    metrics = {}
    return grpo_loss(**batch, **options, metrics=metrics), metrics


def with_entropies(batch, seed=7):
    """Return the batch with entropies, a leaf."""
    generator = torch.Generator().manual_seed(seed)
    entropies = torch.rand(batch["loss_mask"].shape, generator=generator, dtype=torch.float64)
    return batch | {"entropies": entropies.requires_grad_()}


def totals(batch, loss_type):
    """Return the total of a whole step that a loss type needs."""
    if loss_type in BY_TOKENS:
        return {"total_tokens": batch["loss_mask"].sum()}
    return {"total_rollouts": len(batch["loss_mask"])}


def options_of(loss_type, level="token"):
    """Return options with which the limits of a loss are hit on both sides."""
    changed = {"cispo": {"epsilon_high": 1.25}, "vespo": VESPO}.get(loss_type, {})
    return OPTIONS | changed | {"loss_type": loss_type, "importance_sampling_level": level}
