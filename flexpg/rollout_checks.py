"""What Rollouts checks when they are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from flexpg.prompt_inputs import PromptInputs, read_prompt_inputs, with_common_identities

LOGPROBS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
GivenInputs = Mapping[str, Any] | PromptInputs | None  # of a prompt: of a processor, or read from what one returned


def read_inputs(prompts: list[Tensor], given: Sequence[GivenInputs] | None) -> tuple[PromptInputs | None, ...] | None:
    """Return the prompts' inputs, read if they are not yet; None if all prompts are text."""
    if isinstance(given, Mapping):
        raise TypeError(
            f"prompt_inputs must have one entry per prompt, got a {type(given).__name__}; call the processor once per "
            "prompt, and pass a list of what it returns"
        )
    if given is None or all(each is None for each in given):
        return None
    inputs = tuple(each for each in given if each is None or isinstance(each, PromptInputs))
    if not any(isinstance(each, PromptInputs) for each in given):
        inputs = read_prompt_inputs(prompts, given)  # type: ignore[arg-type]
    elif len(inputs) < len(given):
        raise ValueError("prompt_inputs must all be what a processor returned, or all have been read by Rollouts")
    if len(inputs) != len(prompts):
        raise ValueError(f"prompt_inputs must have one entry per prompt, got {len(inputs)} for {len(prompts)} prompts")
    return None if all(each is None for each in inputs) else with_common_identities(prompts, inputs)


def check_generated(sequences: Tensor, attention_mask: Tensor, num_rewards: int) -> None:
    """Raise unless `sequences` are rows of generate(), G for each row of the prompts' mask, padded on the left."""
    batch, prompt_len = attention_mask.shape
    if not isinstance(sequences, Tensor):
        raise TypeError(
            f"sequences must be a tensor, got a {type(sequences).__name__}; if generate() returned it, pass its "
            "`sequences`"
        )
    if sequences.shape[1] <= prompt_len:
        raise ValueError(
            f"sequences must be longer than the prompts in attention_mask, got {sequences.shape[1]} columns for "
            f"{prompt_len}; pass whole rows of generate(), and the mask of the prompts only"
        )
    if len(sequences) % batch or num_rewards != len(sequences):
        raise ValueError(
            f"sequences and rewards must have G rows for each of {batch} prompts, got {len(sequences)} and "
            f"{num_rewards}"
        )
    if not attention_mask[:, -1].all():
        raise ValueError(
            "attention_mask must end with 1 in every row, got padding on the right, which generate() continues; "
            'tokenize prompts with padding_side="left"'
        )


def check_prompts_repeat(prompts: Tensor, attention_mask: Tensor, group_size: int) -> None:
    """Raise if adjacent rows [B * G, P] of a prompt differ where its attention mask [B, P] is True."""
    by_prompt = prompts.unflatten(0, (-1, group_size))  # [B, G, P]
    differs = (by_prompt != by_prompt[:, :1]) & attention_mask.to(prompts.device)[:, None]
    if differs.any():
        b, g, _ = differs.nonzero()[0].tolist()
        raise ValueError(
            f"sequences must begin with the same prompt in the {group_size} adjacent rows of each prompt, got another "
            f"in row {b * group_size + g} than in row {b * group_size}; pass whole rows of generate(), prompts "
            "included, in the order of num_return_sequences"
        )


def check_tokens(name: str, sequences: list[Tensor]) -> None:
    """Raise unless there are sequences, each a tensor of token ids."""
    if not sequences:
        raise ValueError(f"{name} must not be empty")
    for n, tokens in enumerate(sequences):
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1 or not len(tokens):
            shown = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{name}[{n}] must be a 1-D int64 tensor with at least one token, got {shown}; "
                "Rollouts.from_groups takes lists"
            )
    if (smallest := int(torch.cat(sequences).min())) < 0:
        raise ValueError(f"{name} must hold token ids >= 0, got {smallest}; leave padding out")


def check_shapes(n: int, c: int, fields: Mapping[str, Tensor | None]) -> None:
    """Raise if the tensors of `n` rollouts with completions of up to `c` tokens have other shapes or types."""
    shapes = {"group_ids": [n], "rewards": [n]} | {name: [n, c] for name in ("loss_mask", *LOGPROBS)}
    for name, shape in shapes.items():
        value = fields[name]
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{name} must be {shape} for {n} completions of up to {c} tokens, got {list(value.shape)}")
    dtypes = {name: value.dtype for name, value in fields.items() if value is not None}
    if not dtypes["rewards"].is_floating_point:  # advantages of integers would be integers
        raise ValueError(f"rewards must be floating point, got {dtypes['rewards']}; pass rewards.float()")
    if dtypes["loss_mask"] != torch.bool or dtypes["group_ids"] != torch.int64:
        raise ValueError(
            f"loss_mask must be bool and group_ids int64, got {dtypes['loss_mask']} and {dtypes['group_ids']}"
        )


def check_finite(name: str, values: Tensor, counts: Tensor) -> None:
    """Raise if a value that counts is not finite."""
    wrong = ~values.isfinite() & counts
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        where = f"rollout {index[0]}" + (f", token {index[1]}" if len(index) > 1 else "")
        raise ValueError(f"{name} must be finite, got {values[tuple(index)].item()} at {where}")


def reward_tensor(rewards: Sequence[Any] | np.ndarray | Tensor, first: int = 0) -> Tensor:
    """Return a copy of rewards, float64 if they are a tensor or an array of that dtype, else float32.

    Args:
        rewards: [N] numbers.
        first: The rollout of the first one, for the error if one is of another type.
    """
    if isinstance(rewards, np.ndarray) and rewards.dtype == np.float64:
        rewards = torch.as_tensor(rewards)
    if isinstance(rewards, Tensor):
        return rewards.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32, copy=True)
    for n, reward in enumerate(rewards):
        if not isinstance(reward, SupportsFloat):
            raise TypeError(f"rewards must be numbers, got {reward!r} at rollout {first + n}; leave the rollout out")
    return torch.tensor([float(reward) for reward in rewards], dtype=torch.float32)


def mask_tensor(mask: Any) -> Tensor:
    """Return a completion's loss mask as bool; raise if it has another value than True, False, 1 and 0."""
    tensor = torch.as_tensor(mask)
    if (other := (tensor != 0) & (tensor != 1)).any():
        raise ValueError(f"loss_mask must be True or False, or 1 or 0, for each token, got {tensor[other][0].item()}")
    return tensor.bool()
