"""Sampling from the models of every framework."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from flexpg.integrations.framework import accelerator_of, autocast, integration_for
from flexpg.integrations.fsdp import unsharded
from flexpg.layer_hooks import uncompiled
from flexpg.sampling import Samples, SamplingParams, sample_completions
from flexpg.token_sequences import Tokens, token_ids


def sample(
    model: nn.Module,
    prompts: Sequence[Tokens],
    group_size: int,
    params: SamplingParams,
    *,
    seed: int | Sequence[int] | None = None,
    max_cache_tokens: int | None = None,
    compiled: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Samples:
    """Sample G completions of every prompt, whose keys and values are stored once for all of them.

    Args:
        model: A torchtune decoder, or a transformers model, plain or with PEFT adapters. It is enabled.
        prompts: P token sequences of any lengths, without padding. Those on the CPU are moved to the model's device.
        group_size: G, completions per prompt.
        params: How tokens are sampled.
        seed: An int seeds all random numbers. A sequence of P ints seeds those of each prompt, whose completions then
            do not depend on what else is sampled. None takes them from torch's default generator.
        max_cache_tokens: Tokens whose keys and values are stored at a time, padding and unused slots included. As many
            whole prompts as fit are decoded together, the longest first; of a prompt whose group does not fit, as many
            samples as fit. None for no limit.
        compiled: Compile the decoding step of a torchtune model, once per shape of the cache; on CUDA it becomes a CUDA
            graph.
        autocast_dtype: Run the model under torch.autocast with this dtype.

    Raises:
        ValueError: If a prompt is empty, does not fit the model, or exceeds `max_cache_tokens` with one sample; or
            `group_size` is below 1.
        TypeError: If the model is not supported.
        FloatingPointError: If logits are not finite.
    """
    integration = integration_for(model)
    device = accelerator_of(model) or "cpu"
    prompts = [token_ids(f"prompts[{p}]", prompt).to(device) for p, prompt in enumerate(prompts)]
    with autocast(model, autocast_dtype), unsharded(model), uncompiled(model):
        return sample_completions(
            integration.decoder(model),
            integration.output(model),
            prompts,
            group_size,
            params,
            seed=seed,
            max_cache_tokens=max_cache_tokens,
            compiled=compiled,
        )
