"""Rollouts, the container that is passed from the sampler to training.

Inputs are validated once, at construction. Padding is never inferred from token ids: a padding or end-of-sequence id
inside a prompt is an ordinary token, and what counts follows from lengths and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexpg.prompt_inputs import PromptInputs
from flexpg.rollout_checks import (
    LOGPROBS,
    GivenInputs,
    check_finite,
    check_generated,
    check_prompts_repeat,
    check_shapes,
    check_tokens,
    mask_tensor,
    read_inputs,
    reward_tensor,
)
from flexpg.token_sequences import Tokens, token_ids
from flexpg.tree import PrefixTree


@dataclass(frozen=True, eq=False, repr=False)
class Rollouts:
    """Prompts with their sampled completions and rewards, without padding. `from_groups` is the usual constructor.

    [N, C] tensors are read where the loss mask is True and may hold anything elsewhere.

    Args:
        prompts: One [P] int64 per group.
        completions: One [T] int64 per rollout, at least one token each.
        group_ids: [N] int64, the index into `prompts` of each rollout; every prompt has at least one rollout.
        rewards: [N] float, finite.
        loss_mask: [N, C] bool, True where a completion token counts in the loss; None for every completion token.
            Tokens that a tool wrote are False: they remain context.
        old_logprobs: [N, C] float, log-probabilities under the policy at the start of the update.
        ref_logprobs: [N, C] float, log-probabilities under the reference policy.
        sampler_logprobs: [N, C] float, log-probabilities that the sampler reported, of other weights or another engine.
        prompt_inputs: Per prompt what a processor returned beside the token ids, for this prompt alone: `pixel_values`,
            `image_grid_thw`, `image_sizes`, `pixel_values_videos` and so on, with `mm_token_type_ids` or
            `token_type_ids`; None for a text prompt. None if all are text.
        is_split: Whether these are of a micro-batch that holds a part of a group; set by `pack`, read by
            `group_advantages`.

    Raises:
        ValueError: If shapes, group ids or masks are inconsistent, or a reward or log-probability is not finite.

    >>> rollouts = Rollouts.from_groups([[1, 2], [3]], [[[4], [5, 6]], [[7]]], rewards=[[1.0, 0.0], [1.0]])
    >>> rollouts
    Rollouts(3 rollouts of 2 prompts, 3 prompt tokens, 4 completion tokens, 4 in the loss, device=cpu)
    >>> [sequence.tolist() for sequence in rollouts.sequences]
    [[1, 2, 4], [1, 2, 5, 6], [3, 7]]
    """

    prompts: list[Tensor]
    completions: list[Tensor]
    group_ids: Tensor
    rewards: Tensor
    loss_mask: Tensor = None  # type: ignore[assignment]  # a tensor after __post_init__
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    prompt_inputs: tuple[PromptInputs | None, ...] | None = None  # Sequence[GivenInputs] | None before __post_init__
    is_split: bool = False

    def __post_init__(self) -> None:
        """Validate the fields, fill the loss mask in and read the prompts' inputs."""
        check_tokens("prompts", self.prompts)
        check_tokens("completions", self.completions)
        object.__setattr__(self, "prompt_inputs", read_inputs(self.prompts, self.prompt_inputs))
        if self.loss_mask is None:
            object.__setattr__(self, "loss_mask", self.completion_mask.clone())
        fields = ("group_ids", "rewards", "loss_mask", *LOGPROBS)
        n, c = self.completion_mask.shape
        check_shapes(n, c, {name: getattr(self, name) for name in fields})
        used = torch.bincount(self.group_ids, minlength=self.num_groups)
        if len(used) > self.num_groups or not bool(used.all()):
            raise ValueError(
                f"group_ids must name each of {self.num_groups} prompts, and no other, got {self.group_ids.tolist()}"
            )
        beyond = self.loss_mask & ~self.completion_mask
        if beyond.any():
            n, c = beyond.nonzero()[0].tolist()
            raise ValueError(
                f"loss_mask must be False past a completion's end, got True at token {c} of rollout {n}, whose "
                f"completion has {len(self.completions[n])} tokens"
            )
        check_finite("rewards", self.rewards, torch.ones_like(self.rewards, dtype=torch.bool))
        for name in LOGPROBS:
            if (logprobs := getattr(self, name)) is not None:
                check_finite(name, logprobs, self.loss_mask)

    @classmethod
    def from_groups(
        cls,
        prompts: Sequence[Tokens],
        completions: Sequence[Sequence[Tokens]],
        rewards: Sequence[Sequence[float]] | Tensor,
        *,
        loss_mask: Sequence[Sequence[Sequence[bool]]] | None = None,
        prompt_inputs: Sequence[GivenInputs] | None = None,
    ) -> Rollouts:
        """Build rollouts from nested lists, one entry per prompt.

        Args:
            prompts: Token ids of each prompt: lists, tuples, arrays or 1-D tensors.
            completions: For each prompt, the token ids of its completions.
            rewards: For each prompt, the rewards of its completions; or a tensor [prompts, G]. Tensors
                and arrays of float64 stay float64, lists become float32.
            loss_mask: For each prompt and completion, True or 1 for tokens that count in the loss, False or 0 for the
                others; None to count all of them.
            prompt_inputs: For each prompt what a processor returned beside the token ids; None for text.

        Returns:
            Rollouts in the order of the prompts, with copies of all tensors: on the GPU if a prompt or completion is on
            one, otherwise on the CPU.

        Raises:
            ValueError: If the lists do not match, a prompt or completion has no token, a reward is not finite, or
                `loss_mask` has another value.
            TypeError: If token ids are not integers.
        """
        if any(np.ndim(group) == 0 for group in rewards):
            raise ValueError("rewards must have one list per prompt, got numbers")
        sizes = [len(group) for group in completions]
        if not len(prompts) == len(sizes) == len(rewards) or sizes != [len(group) for group in rewards]:
            raise ValueError(
                f"completions and rewards must have one list per prompt, of equal lengths, got {len(prompts)} prompts, "
                f"{sizes} completions and {[len(group) for group in rewards]} rewards"
            )
        prompt_ids = [token_ids(f"prompts[{g}]", prompt) for g, prompt in enumerate(prompts)]
        completion_ids = [
            token_ids(f"completions[{g}][{i}]", completion)
            for g, group in enumerate(completions)
            for i, completion in enumerate(group)
        ]
        devices = (tokens.device for tokens in (*prompt_ids, *completion_ids))
        device = next((candidate for candidate in devices if candidate.type != "cpu"), torch.device("cpu"))
        starts = accumulate(sizes, initial=0)
        reward_groups = [reward_tensor(group, n).to(device) for group, n in zip(rewards, starts, strict=False)]
        masks = None
        if loss_mask is not None:
            masks = [mask_tensor(mask) for group in loss_mask for mask in group]
            if any(mask.dim() != 1 for mask in masks):
                raise ValueError("loss_mask must have one list per completion, got one value")
            if [len(mask) for mask in masks] != [len(tokens) for tokens in completion_ids]:
                raise ValueError("loss_mask must have one value per completion token")
        return cls(
            prompts=[prompt.to(device) for prompt in prompt_ids],
            completions=[completion.to(device) for completion in completion_ids],
            group_ids=torch.arange(len(prompts)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64)).to(device),
            rewards=torch.cat([torch.zeros(0, device=device), *reward_groups]),
            prompt_inputs=prompt_inputs,  # type: ignore[arg-type]
            loss_mask=None if masks is None else pad_sequence(masks, batch_first=True).to(device),  # type: ignore[arg-type]
        )

    @classmethod
    def from_generate(
        cls,
        sequences: Tensor,
        attention_mask: Tensor,
        rewards: Sequence[float] | Tensor,
        *,
        eos_token_id: int | Sequence[int] | Tensor | None,
        completion_lens: Sequence[int] | Tensor | None = None,
        prompt_inputs: Sequence[GivenInputs] | None = None,
    ) -> Rollouts:
        """Build rollouts from the padded output of transformers' `model.generate`.

        A completion ends with its first end-of-sequence token, which belongs to it, or at the end of its row. Prompts
        are cut by their attention mask, so padding and end-of-sequence ids inside them are kept. What else may end a
        completion, such as stop strings, cannot be read off the tokens: pass `completion_lens` then.

        Args:
            sequences: [B * G, P + T] int64, what `generate(..., num_return_sequences=G)` returned: whole rows, prompts
                included, those of a prompt next to one another.
            attention_mask: [B, P], 1 for prompt tokens: the mask that `generate` was given. If it has a row for every
                completion, [B * G, P], adjacent rows with the same prompt are a group.
            rewards: [B * G] float; a tensor or array of float64 stays float64.
            eos_token_id: Ids that end a completion: `model.generation_config.eos_token_id`; None if none does.
            completion_lens: [B * G] int64, the length of each completion without padding; `eos_token_id` is ignored.
            prompt_inputs: For each row of `attention_mask` what a processor returned for this prompt alone, token types
                without padding; None for text.

        Raises:
            TypeError: If `sequences` is not a tensor.
            ValueError: If there are not G sequences and rewards per prompt, the G rows of a prompt do not begin with
                the same tokens, the rows are not longer than the attention mask, prompts are padded on the right, or
                `completion_lens` are out of range.

        >>> sequences = torch.tensor([[0, 5, 6, 7, 2, 0], [0, 5, 6, 8, 9, 9]])
        >>> rollouts = Rollouts.from_generate(sequences, torch.tensor([[0, 1, 1]]), [1.0, 0.0], eos_token_id=2)
        >>> [completion.tolist() for completion in rollouts.completions]
        [[7, 2], [8, 9, 9]]
        """
        batch, prompt_len = attention_mask.shape
        check_generated(sequences, attention_mask, len(rewards))
        generated = sequences[:, prompt_len:]  # [B * G, T]
        if completion_lens is None:
            stops = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=torch.int64)
            is_stop = torch.isin(generated, stops.to(sequences.device))
            before = is_stop.cumsum(1) - is_stop.long()  # stop tokens before each token
            completion_lens = (before == 0).sum(1)
        lengths = torch.as_tensor(completion_lens).tolist()
        if len(lengths) != len(generated) or not all(1 <= length <= generated.shape[1] for length in lengths):
            raise ValueError(
                f"completion_lens must be {len(generated)} numbers from 1 to {generated.shape[1]}, without prompts, "
                f"got {lengths}"
            )
        group_size = len(sequences) // batch
        check_prompts_repeat(sequences[:, :prompt_len], attention_mask.bool(), group_size)
        prompts = [sequences[b * group_size, :prompt_len][attention_mask[b].bool()] for b in range(batch)]
        inputs = read_inputs(prompts, prompt_inputs) or (None,) * batch

        def compared(b: int) -> np.ndarray:
            prompt_inputs, tokens = inputs[b], prompts[b].cpu().numpy()
            return tokens if prompt_inputs is None else prompt_inputs.compared(tokens)

        is_new = [b == 0 or group_size > 1 or not np.array_equal(compared(b), compared(b - 1)) for b in range(batch)]
        group_ids = (torch.tensor(is_new, device=sequences.device).cumsum(0) - 1).repeat_interleave(group_size)
        return cls(
            prompts=[prompt for prompt, is_first in zip(prompts, is_new, strict=True) if is_first],
            completions=[row[:length].clone() for row, length in zip(generated, lengths, strict=True)],
            group_ids=group_ids,
            rewards=reward_tensor(rewards).to(sequences.device),
            prompt_inputs=tuple(given for given, is_first in zip(inputs, is_new, strict=True) if is_first),
        )

    def __len__(self) -> int:
        """N, the number of rollouts."""
        return len(self.completions)

    def __repr__(self) -> str:
        prompt_tokens, completion_tokens = (sum(map(len, sequences)) for sequences in (self.prompts, self.completions))
        return (
            f"Rollouts({len(self)} rollouts of {self.num_groups} prompts, {prompt_tokens:,} prompt tokens, "
            f"{completion_tokens:,} completion tokens, {self.num_loss_tokens:,} in the loss, "
            f"device={self.group_ids.device})"
        )

    @property
    def num_groups(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    @property
    def num_loss_tokens(self) -> int:
        """Completion tokens that count in the loss."""
        return int(self.loss_mask.sum())

    @cached_property
    def prompt_lens(self) -> Tensor:
        """[N] int64, the length of each rollout's prompt."""
        return torch.tensor([len(prompt) for prompt in self.prompts], device=self.group_ids.device)[self.group_ids]

    @cached_property
    def completion_lens(self) -> Tensor:
        """[N] int64, the length of each rollout's completion."""
        return torch.tensor([len(completion) for completion in self.completions], device=self.group_ids.device)

    @cached_property
    def completion_mask(self) -> Tensor:
        """[N, C] bool, True where there is a completion token."""
        index = torch.arange(max(map(len, self.completions)), device=self.group_ids.device)  # [C]
        return index < self.completion_lens[:, None]  # [N, C]

    @cached_property
    def sequences(self) -> list[Tensor]:
        """N tensors [P + T] int64, each rollout's prompt and completion."""
        groups = self.group_ids.tolist()
        return [torch.cat([self.prompts[g], tokens]) for g, tokens in zip(groups, self.completions, strict=True)]

    @cached_property
    def sequence_inputs(self) -> list[PromptInputs | None]:
        """For each of N rollouts the images of its prompt; None for a text prompt."""
        inputs = self.prompt_inputs or (None,) * self.num_groups
        return [inputs[g] for g in self.group_ids.tolist()]

    @cached_property
    def tree(self) -> PrefixTree:
        """The prefix tree of all sequences; sequence n is rollout n."""
        return PrefixTree.from_sequences(self.sequences, self.sequence_inputs)

    def to(self, device: torch.device | str) -> Rollouts:
        """Return the rollouts with their tensors on `device`; images are moved to the model when they are encoded."""
        given = {name: getattr(self, name) for name in ("group_ids", "rewards", "loss_mask", *LOGPROBS)}
        return replace(
            self,
            prompts=[prompt.to(device) for prompt in self.prompts],
            completions=[completion.to(device) for completion in self.completions],
            **{name: value.to(device) for name, value in given.items() if value is not None},
        )

    def select(self, indices: Sequence[int] | Tensor) -> Rollouts:
        """Return the rollouts at `indices`, in that order; groups are renumbered and unused prompts dropped.

        [N, C] tensors keep their rows and are cut to the longest completion that remains.

        Args:
            indices: At least one index, as ints or as an int64 tensor [M]; a bool mask is not accepted.

        Raises:
            ValueError: If `indices` is empty or not int64.
        """
        rows = torch.as_tensor(indices, device=self.group_ids.device)  # [M]
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows):
            raise ValueError(f"indices must be 1-D int64 and not empty, got {rows.dtype} {list(rows.shape)}")
        completions = [self.completions[n] for n in rows.tolist()]
        old_groups = self.group_ids[rows].tolist()
        new_group = {old: new for new, old in enumerate(dict.fromkeys(old_groups))}
        longest = max(map(len, completions))

        def cut(table: Tensor | None) -> Any:
            return None if table is None else table[rows, :longest]

        return Rollouts(
            prompts=[self.prompts[group] for group in new_group],
            completions=completions,
            group_ids=torch.tensor([new_group[group] for group in old_groups], device=rows.device),
            rewards=self.rewards[rows],
            loss_mask=cut(self.loss_mask),
            **{name: cut(getattr(self, name)) for name in LOGPROBS},
            prompt_inputs=None if self.prompt_inputs is None else tuple(self.prompt_inputs[g] for g in new_group),
            is_split=self.is_split,
        )

    def keep_in_loss(self, counts: Tensor) -> Rollouts:
        """Return the rollouts with loss tokens only where `counts` is True.

        The rewards of the others still count in the advantages of their groups. With the sampler's `is_finished` this
        is TRL's `mask_truncated_completions`, the overlong filtering of DAPO, arXiv 2503.14476, section 3.4.

        >>> rollouts = Rollouts.from_groups([[1]], [[[2], [3, 4]]], rewards=[[1.0, 0.0]])
        >>> rollouts.keep_in_loss(torch.tensor([True, False]))
        Rollouts(2 rollouts of 1 prompts, 1 prompt tokens, 3 completion tokens, 1 in the loss, device=cpu)

        Args:
            counts: [N] bool, True for rollouts whose loss mask is kept.

        Raises:
            ValueError: If `counts` is not [N] bool.
        """
        if counts.dtype != torch.bool or list(counts.shape) != [len(self)]:
            raise ValueError(f"counts must be bool [{len(self)}], got {counts.dtype} {list(counts.shape)}")
        return replace(self, loss_mask=self.loss_mask & counts.to(self.loss_mask.device)[:, None])
