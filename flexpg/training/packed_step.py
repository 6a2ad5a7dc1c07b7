"""A step's rollouts, cut into mini-batches and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexpg.analysis.flops import ModelShape
from flexpg.micro_batches import MicroBatch
from flexpg.packing import pack
from flexpg.rollouts import Rollouts
from flexpg.training.distributed import World
from flexpg.training.episodes import StepRollouts
from flexpg.training.metrics import cost_metrics, flop_ratio

# Sharing that saves less than this is not used: packed sequences have costs of their own (masks, merging).
MIN_SPEEDUP = 1.05


CHECKED = 4  # rollouts that the self-check takes with context parallelism


@dataclass
class PackedStep:
    """A step's rollouts as micro-batches.

    Attributes:
        minibatches: For each mini-batch, the micro-batches of this rank.
        rows: For each mini-batch, the numbers of its rollouts.
        is_shared: Whether shared prefixes are encoded once.
        cost: Metrics of all ranks.
    """

    minibatches: list[list[MicroBatch]]
    rows: list[Tensor]
    is_shared: bool
    cost: dict[str, float]


def check_minibatches(cfg: Any, world: World) -> None:
    """Check that every mini-batch has equally many prompts, at least one for each rank, or group of ranks.

    Raises:
        ValueError: If not, or if ranks would share sequences of the baseline.
    """
    per_minibatch, remainder = divmod(cfg.prompts_per_step, cfg.minibatches)
    if remainder or per_minibatch < world.data_size:
        groups = f" in groups of {world.context_size}" if world.context else ""
        raise ValueError(
            f"prompts_per_step must be a multiple of minibatches, with at least one prompt per rank in each, got "
            f"{cfg.prompts_per_step} in {cfg.minibatches} on {world.size} ranks{groups}"
        )
    if world.context and cfg.sharing is False:
        raise ValueError("sharing must be auto or true with context_parallel, got false")


def batches_to_check(batches: list[MicroBatch], max_tokens: int, context_size: int) -> list[MicroBatch]:
    """Return the micro-batches that the self-check compares with the baseline, each on one rank.

    With context parallelism, one rank cannot hold a whole sequence. So some rollouts of one prompt are shortened to
    what a rank holds of a packed sequence: the last tokens of the prompt, and the first of the completions.

    Args:
        batches: A mini-batch of this rank.
        max_tokens: Tokens of a packed sequence, on all of its ranks together.
        context_size: How many those are.
    """
    if context_size == 1:
        return batches
    most, rollouts = max_tokens // context_size, batches[0].rollouts
    group = int(rollouts.group_ids[0])
    same = (rollouts.group_ids == group).nonzero()[:CHECKED, 0].tolist()
    completions = [rollouts.completions[n][: most // (2 * CHECKED)] for n in same]
    shortened = Rollouts.from_groups([rollouts.prompts[group][-(most // 2) :]], [completions], [[0.0] * len(same)])
    return pack(shortened, most)


def pack_step(step: StepRollouts, cfg: Any, world: World, shape: ModelShape) -> PackedStep:
    """Cut a step into mini-batches, and these into micro-batches for every rank.

    Args:
        step: The rollouts.
        cfg: The configuration: `prompts_per_step`, `minibatches`, `max_tokens`, `sharing` and `compile`.
        world: The ranks.
        shape: The model's shape; with `sharing: auto` it decides whether sharing pays.
    """
    rollouts, minibatch = step.rollouts, step.problem // (cfg.prompts_per_step // cfg.minibatches)  # [N]
    rows = [(minibatch == n).nonzero()[:, 0] for n in range(cfg.minibatches)]
    ranks = world.data_size
    packed = [pack(rollouts, cfg.max_tokens, world_size=ranks, indices=indices) for indices in rows]
    is_shared = bool(cfg.sharing)
    if cfg.sharing == "auto" and not world.context:
        is_shared = flop_ratio(packed, shape) >= MIN_SPEEDUP
    if not is_shared:
        packed = [pack(rollouts, cfg.max_tokens, world_size=ranks, sharing=False, indices=indices) for indices in rows]
    keep_padding = cfg.compile or world.device.type != "cpu"
    cost = cost_metrics(packed, is_shared, shape, keep_padding)
    minibatches = [[batch for batch in batches if batch.rank == world.data_rank] for batches in packed]
    return PackedStep(minibatches, rows, is_shared, cost)
