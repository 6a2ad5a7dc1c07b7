"""What sharing prefixes saves in an update, before any training: tokens, visible pairs, FLOPs and activation memory.

All numbers are counted, none is measured. The ratio of FLOPs is the speed-up to expect; what hardware achieves depends
on how efficient its kernels are at either size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from flexpg.analysis.flops import ModelShape, activation_bytes, update_flops
from flexpg.analysis.ranks import context_parallel_bytes, largest_prompt
from flexpg.analysis.report_tables import Report, Row
from flexpg.analysis.rollout_files import TURN
from flexpg.analysis.work import (
    Work,
    baseline_images,
    baseline_work,
    encoded_images,
    encoded_work,
    packed_images,
    packed_work,
    prompts_once_images,
    prompts_once_work,
)
from flexpg.micro_batches import MicroBatch
from flexpg.packing import pack
from flexpg.prompt_inputs import Item
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

MAX_TOKENS = (4096, 8192, 16384, 32768)


def report(
    rollouts: Rollouts,
    shape: ModelShape,
    *,
    max_tokens: Iterable[int] = MAX_TOKENS,
    itemsize: int = 2,
    activation_checkpointing: bool = False,
    names: Sequence[str] | None = None,
    image_flops: Mapping[int, int] | None = None,
    context_parallel: int = 1,
    budget_bytes: int = 40 * 2**30,
) -> Report:
    """Count the work of one update over all rollouts: by the baseline, with every prompt once, and shared.

    All three compute logits only of tokens in the loss; a trainer that computes all of them has more to save.

    Args:
        rollouts: One step; `rollouts_from_lengths` creates some of which only the lengths are known.
        shape: The model.
        max_tokens: Token budgets of a micro-batch.
        itemsize: Bytes per activation; 2 for bfloat16.
        activation_checkpointing: Layers are recomputed in the backward.
        names: The name of each rollout, as `read_rollouts` returns them; None for its number.
        image_flops: FLOPs of the vision encoder by `Item.identity`, from
            `flexpg.analysis.transformers_images.image_flops`; None for text.
        context_parallel: Ranks over which a packed sequence is divided; 1 for no table of them.
        budget_bytes: Memory of one rank for activations, in that table.

    Raises:
        ValueError: If prompts have images and `image_flops` is None.

    >>> rollouts = rollouts_from_lengths([9], [[1, 1]])
    >>> found = report(rollouts, ModelShape(2, 8, 2, 1, 4, 16, 50, 576), max_tokens=[16])
    >>> found.total["baseline"]["tokens"], found.total["shared"]["tokens"], found.by_max_tokens[0]["micro_batches"]
    (20, 11, 1)
    """
    if image_flops is None and prompts_once_images(rollouts):
        raise ValueError("prompts have images, so pass image_flops=image_flops(model, rollouts) of the vision encoder")
    count = partial(
        _count,
        shape=shape,
        itemsize=itemsize,
        activation_checkpointing=activation_checkpointing,
        image_flops=image_flops or {},
    )
    lengths = rollouts.prompt_lens + rollouts.completion_lens  # [N]
    longest = int(lengths.argmax())
    total = _comparison(rollouts, count)
    return Report(
        prompts=rollouts.num_groups,
        prompt_tokens=sum(map(len, rollouts.prompts)),
        completion_tokens=sum(map(len, rollouts.completions)),
        loss_tokens=rollouts.num_loss_tokens,
        longest=f"rollout {longest}" if names is None else names[longest],
        longest_tokens=int(lengths[longest]),
        shape=shape,
        itemsize=itemsize,
        activation_checkpointing=activation_checkpointing,
        total=total,
        by_group_size=[
            {"group_size": size, **_comparison(part, count)}
            for size, part in ([] if any(TURN in name for name in names or ()) else _first_completions(rollouts))
        ],
        by_max_tokens=[
            {"max_tokens": budget} | (_packed(rollouts, budget, total, count) if lengths[longest] <= budget else {})
            for budget in sorted(set(max_tokens))
        ],
        by_ranks=_by_ranks(rollouts, shape, context_parallel, budget_bytes, itemsize, activation_checkpointing),
    )


def rollouts_from_lengths(prompt_lens: Sequence[int], completion_lens: Sequence[Sequence[int]]) -> Rollouts:
    """Create rollouts of given lengths that share nothing but their prompts.

    Args:
        prompt_lens: Tokens of each prompt.
        completion_lens: For each prompt, the tokens of its completions.

    >>> rollouts_from_lengths([3], [[2, 1]]).completions
    [tensor([1, 1]), tensor([2])]
    """
    ids = iter(range(len(prompt_lens) + sum(map(len, completion_lens))))  # every prompt and completion has its own
    return Rollouts.from_groups(
        prompts=[torch.full((length,), next(ids)) for length in prompt_lens],
        completions=[[torch.full((length,), next(ids)) for length in lens] for lens in completion_lens],
        rewards=[[0.0] * len(lens) for lens in completion_lens],
    )


def _count(
    work: Work,
    images: Sequence[Item],
    loss_tokens: int,
    *,
    shape: ModelShape,
    itemsize: int,
    activation_checkpointing: bool,
    image_flops: Mapping[int, int],
) -> dict[str, int]:
    checkpointing = {"activation_checkpointing": activation_checkpointing}
    of_images = sum(image_flops[item.identity] for item in images)
    return {
        "tokens": work.num_tokens,
        "images": len(images),
        "pairs": work.num_pairs,
        "flops": update_flops(work, loss_tokens, shape, **checkpointing).total + of_images,
        "activation_bytes": activation_bytes(work.num_tokens, loss_tokens, shape, itemsize=itemsize, **checkpointing),
    }


def _comparison(rollouts: Rollouts, count: Callable[[Work, Sequence[Item], int], Row]) -> Row:
    loss_tokens = rollouts.num_loss_tokens
    baseline = count(baseline_work(rollouts.tree), baseline_images(rollouts), loss_tokens)
    others = {
        "prompts_once": count(prompts_once_work(rollouts), prompts_once_images(rollouts), loss_tokens),
        "shared": count(packed_work(rollouts.tree), packed_images(rollouts), loss_tokens),
    }
    for other in others.values():
        other |= {f"{name}_ratio": value / other[name] for name, value in baseline.items() if other[name]}
    return {"rollouts": len(rollouts), "baseline": baseline, **others}


def _packed(rollouts: Rollouts, budget: int, total: Row, count: Callable[[Work, Sequence[Item], int], Row]) -> Row:
    def peak_bytes(batches: list[MicroBatch], work: Callable[[PrefixTree], Work]) -> int:
        return max(count(work(each.tree), [], int(each.loss_mask.sum()))["activation_bytes"] for each in batches)

    batches, baseline = pack(rollouts, budget), pack(rollouts, budget, sharing=False)
    work = count(encoded_work(batches), encoded_images(batches), rollouts.num_loss_tokens)
    return {
        "baseline_micro_batches": len(baseline),
        "baseline_activation_bytes": peak_bytes(baseline, baseline_work),
        "micro_batches": len(batches),
        "activation_bytes": peak_bytes(batches, packed_work),
        "tokens": work["tokens"],
        "recomputed_tokens": work["tokens"] - total["shared"]["tokens"],
        "flops": work["flops"],
        "flops_ratio": total["baseline"]["flops"] / work["flops"],
    }


def _by_ranks(
    rollouts: Rollouts, shape: ModelShape, most: int, budget: int, itemsize: int, activation_checkpointing: bool
) -> list[Row]:
    if most == 1:
        return []
    groups = [rollouts.select((rollouts.group_ids == n).nonzero()[:, 0]) for n in range(rollouts.num_groups)]
    largest = max(groups, key=lambda group: group.tree.num_tokens)
    tokens, loss_tokens = largest.tree.num_tokens, largest.num_loss_tokens
    completions = largest.completion_lens.tolist()
    options: Row = {"itemsize": itemsize, "activation_checkpointing": activation_checkpointing}
    return [
        {
            "ranks": ranks,
            "budget_bytes": budget,
            "activation_bytes": context_parallel_bytes(tokens, loss_tokens, shape, ranks, **options),
            "largest_prompt": largest_prompt(completions, shape, ranks, budget, **options),
        }
        for ranks in sorted({2**power for power in range(most.bit_length())} | {most})
    ]


def _first_completions(rollouts: Rollouts) -> list[tuple[int, Rollouts]]:
    """Return the first 1, 2, 4, ... completions of every prompt, and all of the largest group."""
    seen = [0] * rollouts.num_groups
    rank = []  # [N] the number of each rollout in its group
    for group in rollouts.group_ids.tolist():
        rank.append(seen[group])
        seen[group] += 1
    sizes = {2**power for power in range(max(seen).bit_length())} | {max(seen)}
    return [(size, rollouts.select([n for n, place in enumerate(rank) if place < size])) for size in sorted(sizes)]
