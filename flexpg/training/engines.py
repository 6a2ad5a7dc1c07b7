"""Inference engines that sample for a recipe instead of the model in training, and the check of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexpg.rollouts import Rollouts
from flexpg.sampling import Samples, SamplingParams
from flexpg.training.distributed import World

# How far an engine's log-probabilities may be from the trainer's on average, by the dtype of the computation.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1}


class Engine(Protocol):
    """What a recipe needs of an inference engine; `flexpg.integrations.vllm.engine` creates one.

    Attributes:
        is_shared: Whether one engine, such as a server, samples for all ranks, so that only rank 0 loads weights into
            it. Otherwise every rank has its own.
        version: The version of the weights that it samples from, 0 before `load_weights`.
        max_model_len: Tokens of the longest sequence that it samples, prompt and completion; None without a limit.
    """

    is_shared: bool
    version: int
    max_model_len: int | None

    def sample(
        self,
        prompts: Sequence[Tensor],
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int] | None,
    ) -> Samples:
        """Sample completions of every prompt, as `flexpg.sample` does.

        Args:
            prompts: P tensors of token ids, 1-D int64.
            group_size: G, completions per prompt.
            params: How tokens are sampled; log-probabilities are those at its temperature, without top-k and top-p.
            seeds: One per prompt; None if the temperature is 0.
        """

    def load_weights(self, folder: Path, version: int) -> None:
        """Replace the weights, and drop everything that was computed from the old ones.

        Args:
            folder: Safetensors in the format of the checkpoint that the engine was created from.
            version: The new value of `version`.

        Raises:
            RuntimeError: If they were not loaded.
        """

    def close(self) -> None:
        """Release the engine."""


def limit_length(engine: Engine, needed: int, wanted: int) -> int:
    """Return how many tokens an episode may have with an engine: as many as wanted, or what the engine can sample.

    Args:
        engine: The engine.
        needed: Tokens of the longest sequence, prompt and completion, that it must be able to sample.
        wanted: At least `needed`.

    Raises:
        ValueError: If it cannot sample what is needed.
    """
    limit = wanted if engine.max_model_len is None else engine.max_model_len
    if needed > limit:
        raise ValueError(
            f"the sampler's max_model_len must be at least {needed}, for environment.max_length or for the longest "
            f"prompt and sampling.max_new_tokens, got {limit}"
        )
    return min(wanted, limit)


def load_into_engine(engine: Engine, folder: Path, version: int, world: World) -> None:
    """Load weights into an engine, or into each rank's own; all ranks call it.

    Args:
        engine: The engine.
        folder: As in `Engine.load_weights`.
        version: The version of these weights.
        world: The ranks.

    Raises:
        RankError: If one of them was not loaded, on all ranks.
    """
    world.barrier()  # until rank 0 has written the folder
    with world.raise_on_all_ranks(OSError, RuntimeError, ValueError):
        if world.is_first or not engine.is_shared:
            engine.load_weights(folder, version)
            if engine.version != version:
                raise RuntimeError(f"the sampler must have version {version}, got {engine.version}")


def check_engine(
    engine: Engine,
    prompt: Tensor,
    params: SamplingParams,
    logprobs_of: Callable[[Rollouts], Tensor],
    world: World,
    dtype: torch.dtype,
) -> None:
    """Compare an engine's log-probabilities with the trainer's, after weights were loaded; all ranks call it.

    Wrong weights show in them, and so do another precision, another tokenizer and another checkpoint. The same weights
    of one step before do not, if the update was small; `Engine.version` shows these.

    Args:
        engine: The engine.
        prompt: [P] int64.
        params: How tokens are sampled; the completion has at most 8.
        logprobs_of: Returns the trainer's log-probabilities of a rollout, [1, C], at the temperature of `params`.
        world: The ranks.
        dtype: The dtype of the trainer's computation.

    Raises:
        RuntimeError: If they differ by more than TOLERANCE on average; on several ranks a RankError on all of them,
            also if the engine of one does not sample.
    """
    params = replace(params, max_new_tokens=min(params.max_new_tokens, 8))
    with world.raise_together():
        samples = engine.sample([prompt], 1, params, [0])
    rollouts = Rollouts.from_groups([prompt], [samples.completions], rewards=[[0.0]])
    expected = logprobs_of(rollouts)[0].cpu().double()
    gap = (expected - samples.logprobs[0].cpu().double()).abs().mean().item()
    gap = world.all_reduce_max(gap if math.isfinite(gap) else math.inf)
    with world.raise_together():
        if gap > TOLERANCE[dtype]:
            raise RuntimeError(
                f"the sampler must sample from the weights that are trained, got log-probabilities {gap:.3g} away from "
                f"the trainer's on average with version {engine.version} (limit {TOLERANCE[dtype]}); check that its "
                "checkpoint, dtype and temperature are those of the recipe, and that it loads tied weights"
            )
