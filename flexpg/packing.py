"""Rollouts -> micro-batches: whole prefix trees under a token budget, balanced over the ranks.

A group stays together where it fits. What goes into one packed sequence is chosen bottom-up along the prefix tree of
all rollouts: the items with the longest common prefix are put together first, and where they exceed the budget, by
best-fit decreasing. So system prompts, few-shot examples and the turns of a conversation are encoded as seldom as the
budget allows.

A group over the budget becomes several micro-batches of one prompt, which a prefix cache encodes once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from flexpg.micro_batches import MicroBatch, causal_pairs, idle_micro_batch
from flexpg.rollouts import Rollouts
from flexpg.token_sequences import common_prefix_length, lexicographic_order
from flexpg.tree import PrefixTree

# A visible pair costs 4 E operations per layer, a token at least 24 E^2: at width E = 2048, this many pairs per token.
PAIRS_PER_TOKEN = 6 * 2048


@dataclass(eq=False)
class _Item:
    """What is packed as a whole: a group, or a part of an oversized group; later several of them in one sequence."""

    indices: list[int]
    tokens: int
    pairs: int
    prefix: np.ndarray  # the common beginning of all its sequences
    group: int = -1  # the oversized group that it is a part of
    prompt_tokens: int = 0  # of that group


def pack(
    rollouts: Rollouts,
    max_tokens: int,
    *,
    world_size: int = 1,
    sharing: bool = True,
    indices: Sequence[int] | Tensor | None = None,
) -> list[MicroBatch]:
    """Cut a step into micro-batches of at most `max_tokens` tokens, with whole groups where they fit.

    A group that does not fit is split into few parts of even size. Work is assigned largest first, to the rank with the
    least so far. All ranks get the same number of micro-batches, as FSDP needs; idle ones, whose gradient is zero, fill
    the gap.

    Args:
        rollouts: The step's rollouts.
        max_tokens: Tokens of a packed sequence, without the padding to a multiple of 128.
        world_size: Ranks that take part.
        sharing: Count shared prefixes once; False counts whole sequences, for a forward without sharing.
        indices: The rollouts to pack, such as those of one mini-batch, each at most once; None for all.

    Returns:
        Micro-batches by rank and cache id. The `indices` of those that are not idle name every rollout once.

    Raises:
        ValueError: If a rollout exceeds `max_tokens`, `indices` is empty, out of range or has duplicates, or
            `world_size` is below 1.
    """
    chosen = list(range(len(rollouts))) if indices is None else torch.as_tensor(indices).tolist()
    if not chosen:
        raise ValueError("indices must name at least one rollout, got none")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(rollouts))):
        raise ValueError(f"indices must be from 0 to {len(rollouts) - 1}, each at most once, got {chosen}")
    sequences = rollouts.sequences
    if rollouts.group_ids.device.type != "cpu":
        sequences = list(torch.cat(sequences).cpu().split(list(map(len, sequences))))  # one transfer
    arrays = [sequence.numpy() for sequence in sequences]
    images = rollouts.sequence_inputs
    # What is compared: token ids, and the identity of images.
    compared = [a if given is None else given.compared(a) for a, given in zip(arrays, images, strict=True)]
    items = _items(rollouts, compared, chosen, max_tokens, sharing)
    assigned: list[list[_Item]] = [[] for _ in range(world_size)]
    work = [0.0] * world_size
    for unit, cost in sorted(_work_units(items, max_tokens, world_size), key=lambda unit: -unit[1]):
        rank = work.index(min(work))
        assigned[rank] += unit
        work[rank] += cost
    plans = _align([_plan(items, max_tokens) for items in assigned], max_tokens)
    return [batch for rank, plan in enumerate(plans) for batch in _micro_batches(rollouts, arrays, chosen, plan, rank)]


# Items: groups that fit the budget, and parts of those that do not.


def _items(
    rollouts: Rollouts, arrays: list[np.ndarray], chosen: list[int], max_tokens: int, sharing: bool
) -> list[_Item]:
    members: list[list[int]] = [[] for _ in rollouts.prompts]
    groups = rollouts.group_ids.tolist()
    for n in chosen:
        members[groups[n]].append(n)
    items = []
    for group, indices in enumerate(members):
        if not indices:
            continue
        prompt_tokens = len(rollouts.prompts[group])
        for n in indices:
            if len(arrays[n]) > max_tokens:
                raise ValueError(
                    f"max_tokens must hold every rollout, got {max_tokens} for rollout {n} of "
                    f"{prompt_tokens} + {len(arrays[n]) - prompt_tokens} tokens; raise it or shorten the rollout"
                )
        whole = _item(indices, arrays, sharing)
        if whole.tokens <= max_tokens:
            items.append(whole)
            continue
        repeated = prompt_tokens if sharing else 0  # in every part
        for part in _split_evenly([len(arrays[n]) - repeated for n in indices], max_tokens - repeated):
            item = _item([indices[i] for i in part], arrays, sharing)
            items.append(replace(item, group=group, prompt_tokens=prompt_tokens) if sharing else item)
    return items


def _item(indices: list[int], arrays: list[np.ndarray], sharing: bool) -> _Item:
    """Return the cost of rollouts as one tree, or as separate sequences."""
    sequences = [arrays[n] for n in indices]
    if not sharing:
        return _Item(indices, sum(map(len, sequences)), sum(causal_pairs(len(a)) for a in sequences), sequences[0][:0])
    ordered = [sequences[i] for i in lexicographic_order(sequences)] if len(sequences) > 1 else sequences
    shared = [common_prefix_length(a, b) for a, b in pairwise(ordered)]
    tokens = sum(map(len, ordered)) - sum(shared)
    pairs = sum(causal_pairs(len(a)) for a in ordered) - sum(map(causal_pairs, shared))
    return _Item(indices, tokens, pairs, ordered[0][: min(shared, default=len(ordered[0]))])


def _split_evenly(sizes: list[int], room: int) -> list[list[int]]:
    """Split numbered sizes into as few parts as first-fit decreasing needs, of even sums where that fits."""
    if sum(sizes) <= room:
        return [list(range(len(sizes)))]
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted: list[list[int]] = []
    sums: list[int] = []
    for i in largest_first:
        part = next((p for p, total in enumerate(sums) if total + sizes[i] <= room), len(sums))
        if part == len(sums):
            fitted.append([])
            sums.append(0)
        fitted[part].append(i)
        sums[part] += sizes[i]
    even: list[list[int]] = [[] for _ in fitted]
    sums = [0] * len(fitted)
    for i in largest_first:
        part = sums.index(min(sums))
        even[part].append(i)
        sums[part] += sizes[i]
    return sorted(map(sorted, even if max(sums) <= room else fitted))


# Ranks: what is assigned as a whole, and what one rank's items become.


def _work_units(items: list[_Item], max_tokens: int, world_size: int) -> list[tuple[list[_Item], float]]:
    """Return what one rank is assigned as a whole, with its cost: items that share most of their tokens."""
    if world_size == 1:
        return [(items, 0.0)]
    whole, oversized = _whole_and_oversized(items)
    close = _merge(whole, max_tokens, only_close=True)
    costs = [_cost(item.tokens, item.pairs) for item in close] + [_oversized_cost(parts) for parts in oversized]
    fair = sum(costs) / world_size
    close = _merge(whole, min(max_tokens, int(fair / 4)), only_close=True)
    units = [([item], _cost(item.tokens, item.pairs)) for item in close]
    for parts in oversized:
        count = min(len(parts), max(1, round(_oversized_cost(parts) / fair)))
        chunks = [parts[len(parts) * i // count : len(parts) * (i + 1) // count] for i in range(count)]
        units += [(chunk, _oversized_cost(chunk)) for chunk in chunks]
    return units


def _plan(items: list[_Item], max_tokens: int) -> list[list[_Item]]:
    """Return one rank's packed sequences, those that share a cached prompt together, the longest such list first."""
    whole, oversized = _whole_and_oversized(items)
    merged = [[item] for item in _merge(whole, max_tokens)]
    return sorted([*oversized, *merged], key=lambda series: (-len(series), min(series[0].indices)))


def _align(plans: list[list[list[_Item]]], max_tokens: int) -> list[list[list[_Item | None]]]:
    """Give every rank's plan the same number of lists of the same lengths; None becomes an idle micro-batch.

    Where another rank has several micro-batches on one cached prompt, a rank without them puts complete micro-batches
    in their place, if they fit the budget next to its cached prompt, whose activations are kept meanwhile.
    """
    long = [[series for series in plan if len(series) > 1] for plan in plans]
    singles = [[series[0] for series in plan if len(series) == 1] for plan in plans]
    aligned: list[list[list[_Item | None]]] = [[] for _ in plans]
    for i in range(max(map(len, long))):
        size = max(len(of_rank[i]) for of_rank in long if i < len(of_rank))
        for rank, of_rank in enumerate(long):
            series: list[_Item | None] = list(of_rank[i]) if i < len(of_rank) else []
            room = max_tokens - (of_rank[i][0].prompt_tokens if i < len(of_rank) else 0)
            fitting = [item for item in singles[rank] if item.tokens <= room][: size - len(series)]
            singles[rank] = [item for item in singles[rank] if item not in fitting]
            series += fitting
            aligned[rank].append(series + [None] * (size - len(series)))
    most = max(map(len, singles))
    for rank, own_singles in enumerate(singles):
        aligned[rank] += [[item] for item in [*own_singles, *[None] * (most - len(own_singles))]]
    return aligned


def _micro_batches(
    rollouts: Rollouts, arrays: list[np.ndarray], chosen: list[int], plan: list[list[_Item | None]], rank: int
) -> list[MicroBatch]:
    batches = []
    images, groups = rollouts.sequence_inputs, rollouts.group_ids.tolist()
    sizes = Counter(groups[n] for n in chosen)
    present = {n for series in plan for item in series if item is not None for n in item.indices}
    # The scores of an idle micro-batch overwrite none of this rank's.
    of_another_rank = next((n for n in chosen if n not in present), chosen[0])
    for cache_id, series in enumerate(plan):
        oversized = [item.group for item in series if item is not None]
        for item in series:
            if item is None:
                batches.append(idle_micro_batch(rollouts, of_another_rank, rank, cache_id))
                continue
            indices = torch.tensor(sorted(item.indices), device=rollouts.group_ids.device)
            own_sequences = [torch.from_numpy(arrays[n]) for n in sorted(item.indices)]
            tree = PrefixTree.from_sequences(own_sequences, [images[n] for n in sorted(item.indices)])
            cached_tokens = item.prompt_tokens if oversized.count(item.group) > 1 else 0
            part = rollouts.select(indices)
            if any(count < sizes[group] for group, count in Counter(groups[n] for n in item.indices).items()):
                part = replace(part, is_split=True)
            batches.append(
                MicroBatch(
                    indices,
                    part,
                    tree.to(indices.device),
                    rank,
                    cache_id,
                    cached_tokens,
                    step_has_images=rollouts.prompt_inputs is not None,
                )
            )
    return batches


# Merging: which items share a packed sequence.


def _merge(items: list[_Item], max_tokens: int, only_close: bool = False) -> list[_Item]:
    """Merge items into packed sequences under the budget, those with the longest common prefix first.

    Args:
        items: Groups, or parts of one.
        max_tokens: The budget.
        only_close: Merge only items that have more than half of their tokens in common.
    """
    if not items:
        return []
    ordered = [items[i] for i in lexicographic_order([item.prefix for item in items])]
    branches: list[tuple[int, list[_Item]]] = []  # depth of an open branching point, and the items below it so far
    for n, item in enumerate(ordered):
        carried = [item]
        following = ordered[n + 1].prefix if n + 1 < len(ordered) else None
        depth = -1 if following is None else common_prefix_length(item.prefix, following)
        while branches and branches[-1][0] > depth:
            branch, below = branches.pop()
            below += carried
            far = [item for item in below if only_close and item.tokens >= 2 * branch]
            close = [item for item in below if not only_close or item.tokens < 2 * branch]
            carried = far + _best_fit(close, branch, max_tokens)
        if depth < 0:
            return carried
        if branches and branches[-1][0] == depth:
            branches[-1][1].extend(carried)
        else:
            branches.append((depth, carried))
    raise AssertionError("the last item closes every branch")


def _best_fit(items: list[_Item], shared: int, max_tokens: int) -> list[_Item]:
    """Merge items that have their first `shared` tokens in common by best-fit decreasing."""
    if len(items) < 2:
        return items
    if sum(item.tokens - shared for item in items) + shared <= max_tokens:
        return [_merged(items, shared)]
    bins: list[list[_Item]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for item in sorted(items, key=lambda item: -item.tokens):
        i = bisect_left(rooms, (item.tokens - shared, -1))
        if i < len(rooms):
            room, number = rooms.pop(i)
            bins[number].append(item)
            insort(rooms, (room - item.tokens + shared, number))
        else:
            insort(rooms, (max_tokens - item.tokens, len(bins)))
            bins.append([item])
    return [_merged(items, shared) for items in bins]


def _merged(items: list[_Item], shared: int) -> _Item:
    """Return one item for several that have their first `shared` tokens in common."""
    if len(items) == 1:
        return items[0]
    again = len(items) - 1
    return _Item(
        indices=[n for item in items for n in item.indices],
        tokens=sum(item.tokens for item in items) - again * shared,
        pairs=sum(item.pairs for item in items) - again * causal_pairs(shared),
        prefix=items[0].prefix[:shared],
    )


def _whole_and_oversized(items: list[_Item]) -> tuple[list[_Item], list[list[_Item]]]:
    """Return the items that are whole groups, and the parts of each oversized group."""
    parts = sorted((item for item in items if item.group >= 0), key=lambda item: (item.group, item.indices[0]))
    oversized = [list(pieces) for _, pieces in groupby(parts, key=lambda item: item.group)]
    return [item for item in items if item.group < 0], oversized


def _oversized_cost(parts: list[_Item]) -> float:
    """Return the cost of parts of a group whose prompt is encoded once, in tokens."""
    prompt = parts[0].prompt_tokens
    repeated = (len(parts) - 1) * _cost(prompt, causal_pairs(prompt))
    return sum(_cost(part.tokens, part.pairs) for part in parts) - repeated


def _cost(tokens: int, pairs: int) -> float:
    return tokens + pairs / PAIRS_PER_TOKEN
