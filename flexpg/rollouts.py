"""Rollouts: the door between sampling and training, and the group advantages.

What a sampler hands to training is checked here, once, and trusted behind. Token ids are never asked what is padding: a
pad or eos id inside a prompt is a token like any other, and what counts follows from lengths and masks alone.

Departs from TRL: rollouts of a group need not stand together, groups may differ in size, and rewards that are all equal
give advantages of exactly 0, where TRL's mean leaves a rounding error that the division by 1e-4 blows up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Prompts and their sampled, rewarded completions, without padding.

    Errors number prompts and rollouts from 0, as Python does. All tensors stand on one device. C is the longest
    completion; [N, C] tensors are read where there is a trained token and may hold anything elsewhere.

    >>> prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    >>> completions = [torch.tensor([4]), torch.tensor([5, 6]), torch.tensor([7])]
    >>> rollouts = Rollouts(prompts, completions, torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 1.0]))
    >>> [sequence.tolist() for sequence in rollouts.sequences]
    [[1, 2, 4], [1, 2, 5, 6], [3, 7]]

    Args:
        prompts: one [P] int64 per group.
        completions: one [T] int64 per rollout, at least one token each.
        group_ids: [N] int64, each rollout's index into `prompts`; every prompt has at least one rollout.
        rewards: [N] float32, finite.
        loss_mask: [N, C] bool, True where a token is trained. None trains every completion token. Tokens that a tool
            wrote are False: they are context all the same.
        old_logprobs: [N, C] float, under the policy that the update starts from.
        ref_logprobs: [N, C] float, under the reference policy.

    Raises:
        TypeError: `prompts` or `completions` is not a list of tensors, or another field is not a tensor.
        ValueError: anything else that is wrong, with the number of the item.
    """

    prompts: list[Tensor]
    completions: list[Tensor]
    group_ids: Tensor
    rewards: Tensor
    loss_mask: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        """Check what came: types and devices, then shapes, then values."""
        _check_tokens("prompts", "prompt", self.prompts)
        _check_tokens("completions", "rollout", self.completions)
        _check_tables(self)
        _check_groups(self.group_ids, self.num_rollouts, self.num_groups)
        _check_values(self)

    def __len__(self) -> int:
        """N, the number of rollouts."""
        return self.num_rollouts

    @property
    def num_rollouts(self) -> int:
        """N."""
        return len(self.completions)

    @property
    def num_groups(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

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
        positions = torch.arange(max(map(len, self.completions)), device=self.group_ids.device)  # [C]
        return positions < self.completion_lens[:, None]  # [N, C]

    @property
    def trained(self) -> Tensor:
        """[N, C] bool, True where a completion token is trained."""
        return self.completion_mask if self.loss_mask is None else self.loss_mask

    @cached_property
    def sequences(self) -> list[Tensor]:
        """N tensors [P + T] int64, each rollout's prompt and completion."""
        groups = self.group_ids.tolist()
        return [torch.cat([self.prompts[g], tokens]) for g, tokens in zip(groups, self.completions, strict=True)]

    def select(self, indices: Sequence[int] | Tensor) -> Rollouts:
        """The rollouts at `indices`, in that order; groups are renumbered by first appearance and the others dropped.

        [N, C] tensors keep their rows and are cut to the longest completion that remains.

        Args:
            indices: at least one index, as ints or as an int64 tensor [M].

        Raises:
            ValueError: `indices` is empty, not integers (a bool mask is not taken for them), or names no rollout.
        """
        chosen = checked_indices(indices, len(self))
        rows = torch.tensor(chosen, device=self.group_ids.device)  # [M]
        completions = [self.completions[i] for i in chosen]
        old_groups = self.group_ids[rows].tolist()
        kept = list(dict.fromkeys(old_groups))
        new_group = {old: new for new, old in enumerate(kept)}
        longest = max(map(len, completions))

        def cut(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[rows, :longest]

        return Rollouts(
            prompts=[self.prompts[g] for g in kept],
            completions=completions,
            group_ids=torch.tensor([new_group[g] for g in old_groups], device=rows.device),
            rewards=self.rewards[rows],
            loss_mask=cut(self.loss_mask),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
        )


def checked_rollouts(rollouts: object) -> Rollouts:
    """The same, if they are rollouts.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts is a {type(rollouts).__name__}; make them with flexpg.Rollouts(prompts, ...)")
    return rollouts


def checked_indices(indices: Sequence[int] | Tensor, count: int) -> list[int]:
    """Indices as ints, if there are any and each names one of `count` rollouts.

    Raises:
        ValueError: anything else.
    """
    if not len(indices):
        raise ValueError("indices are empty; give the index of at least one rollout")
    rows = torch.as_tensor(indices)  # [M]
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(
            f"indices are {rows.dtype} {list(rows.shape)}; give 1-D int64 (mask.nonzero().flatten() of a bool mask)"
        )
    chosen: list[int] = rows.tolist()
    for n in chosen:
        if not 0 <= n < count:
            raise ValueError(f"indices name rollout {n}; there are 0 to {count - 1}")
    return chosen


def group_advantages(rewards: Tensor, group_ids: Tensor, scale_rewards: ScaleRewards = "group") -> Tensor:
    """Each reward's distance from the mean of its group, over a standard deviation.

    The standard deviation is TRL's: unbiased, 0 in a group of one, and 1e-4 is added to it. Groups may differ in size
    and need not stand together. Give the whole step's rewards: a group that is split over calls has other means.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; "none" is Dr. GRPO, arXiv 2503.20783; "batch" is arXiv 2508.08221.

    >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), scale_rewards="none")
    tensor([ 0.5000, -0.5000,  0.0000])

    Args:
        rewards: [N] float, finite.
        group_ids: [N] int64, equal where rollouts share a group.
        scale_rewards: divide by the standard deviation of the "group", of the "batch" (all N), or not ("none").

    Returns:
        [N] advantages in the dtype of `rewards`.

    Raises:
        TypeError: `rewards` or `group_ids` is no tensor.
        ValueError: `scale_rewards` is unknown, a reward is not finite, or the two are not [N] on one device.
    """
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"scale_rewards is {scale_rewards!r}; allowed are {', '.join(get_args(ScaleRewards))}")
    for name, table in (("rewards", rewards), ("group_ids", group_ids)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} is a {type(table).__name__}; give a tensor")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}; give floats")
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards are {list(rewards.shape)}, group_ids {list(group_ids.shape)}; both must be [N]")
    if rewards.device != group_ids.device:
        raise ValueError(f"rewards are on {rewards.device}, group_ids on {group_ids.device}; move both to one device")
    _check_finite(rewards)
    group = group_ids.unique(return_inverse=True)[1]  # [N], 0 to the number of groups
    exact = rewards.double()  # the square of a reward may be beyond its own dtype
    centred, std = _centred_and_std(exact, group)
    if scale_rewards == "none":
        return centred.to(rewards.dtype)
    if scale_rewards == "batch":
        std = _centred_and_std(exact, torch.zeros_like(group))[1]
    return (centred / (std + 1e-4)).to(rewards.dtype)


def _centred_and_std(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus the mean of its group, and the group's unbiased standard deviation, both [N]."""
    size = torch.bincount(group)  # [groups]
    zeros = rewards.new_zeros(len(size))
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    above = rewards - lowest[group]  # equal rewards become exact zeros, and stay zeros
    mean = zeros.index_add(0, group, above) / size
    centred = above - mean[group]
    variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred, variance.sqrt()[group]


def _check_tokens(name: str, what: str, items: list[Tensor]) -> None:
    if not isinstance(items, list):
        raise TypeError(f"{name} is a {type(items).__name__}; give a list of 1-D int64 tensors, without padding")
    if not items:
        raise ValueError(f"{name} is empty; give at least one {what}")
    for i, item in enumerate(items):
        where = f"{what} {i} of {len(items)}"
        if not isinstance(item, Tensor):
            raise TypeError(f"{where} is a {type(item).__name__}; give a 1-D int64 tensor")
        if item.dtype != torch.int64 or item.dim() != 1:
            raise ValueError(f"{where} is {_kind(item)}; token ids are 1-D torch.int64")
        if item.device != items[0].device:
            raise ValueError(f"{where} is on {item.device}, {what} 0 on {items[0].device}; move all to one device")
        if len(item) == 0 and what == "prompt":
            raise ValueError(f"{where} has no token; its last token predicts the completions' first, so give it one")
        if len(item) == 0:
            raise ValueError(f"{where} has no completion token; drop it before packing")


def _check_tables(rollouts: Rollouts) -> None:
    n, c = len(rollouts), max(map(len, rollouts.completions))
    device = rollouts.prompts[0].device
    if rollouts.completions[0].device != device:
        raise ValueError(f"completions are on {rollouts.completions[0].device}, prompts on {device}; move all to one")
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name, dtypes, shape in (
        ("group_ids", (torch.int64,), [n]),
        ("rewards", floats, [n]),
        ("loss_mask", (torch.bool,), [n, c]),
        ("old_logprobs", floats, [n, c]),
        ("ref_logprobs", floats, [n, c]),
    ):
        table = getattr(rollouts, name)
        if table is None and len(shape) == 2:
            continue
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} is a {type(table).__name__}; give a tensor")
        if table.device != device:
            raise ValueError(f"{name} is on {table.device}, prompts on {device}; move all to one device")
        if table.dtype not in dtypes or list(table.shape) != shape:
            raise ValueError(
                f"{name} is {_kind(table)}; {n} rollouts, the longest of {c} tokens, need {dtypes[0]} {shape}"
            )


def _check_groups(group_ids: Tensor, num_rollouts: int, num_groups: int) -> None:
    ids = group_ids.tolist()
    for i, group in enumerate(ids):
        if not 0 <= group < num_groups:
            raise ValueError(
                f"rollout {i} of {num_rollouts} names group {group}; with {num_groups} prompts, "
                f"groups are 0 to {num_groups - 1}"
            )
    unused = sorted(set(range(num_groups)) - set(ids))
    if unused:
        raise ValueError(f"prompt {unused[0]} of {num_groups} has no rollout; drop it and renumber group_ids")


def _check_values(rollouts: Rollouts) -> None:
    n = len(rollouts)
    for what, items in (("prompt", rollouts.prompts), ("rollout", rollouts.completions)):
        negative = torch.stack([tokens.min() for tokens in items]) < 0
        if negative.any():
            i = _first(negative)[0]
            raise ValueError(f"{what} {i} of {len(items)} has token id {int(items[i].min())}; ids start at 0")
    _check_finite(rollouts.rewards)
    beyond = rollouts.trained & ~rollouts.completion_mask
    if beyond.any():
        i, t = _first(beyond)
        length = len(rollouts.completions[i])
        raise ValueError(f"loss_mask of rollout {i} of {n} is True at {t}; its completion ends after {length} tokens")
    for name, table in (("old_logprobs", rollouts.old_logprobs), ("ref_logprobs", rollouts.ref_logprobs)):
        if table is not None and (unusable := ~table.isfinite() & rollouts.trained).any():
            i, t = _first(unusable)
            raise ValueError(f"{name} of rollout {i} of {n} is {table[i, t].item()} at trained token {t}")


def _check_finite(rewards: Tensor) -> None:
    infinite = ~rewards.isfinite()
    if infinite.any():
        i = _first(infinite)[0]
        raise ValueError(f"rollout {i} of {len(rewards)} has reward {rewards[i].item()}; drop it or give a finite one")


def _first(flags: Tensor) -> list[int]:
    return flags.nonzero()[0].tolist()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
