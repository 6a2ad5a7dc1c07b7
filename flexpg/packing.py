"""Rollouts -> micro-batches: whole prefix trees under a token budget, shared out so that processes finish together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

# A visible pair costs 4 E operations per layer, a token 24 E^2 and more: at a width E of 2,048 this many pairs a token.
PAIRS_PER_TOKEN = 6 * 2048


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rollouts that go through the model in one packed row.

    Attributes:
        indices: which rollouts of the step they are; row n of a micro-batch's [n, C] tensors is rollout `indices[n]`.
        rollouts: those rollouts alone.
        tree: their packed row; sequence n is the micro-batch's rollout n.
        rank: the process that it is meant for.
    """

    indices: list[int]
    rollouts: Rollouts
    tree: PrefixTree
    rank: int = 0


@dataclass(frozen=True)
class _Part:
    """A group, or as much of one as fits the budget."""

    indices: list[int]
    tokens: int
    cost: float


def pack(rollouts: Rollouts, max_tokens: int, world_size: int = 1, sharing: bool = True) -> list[MicroBatch]:
    """Cuts a step into micro-batches of at most `max_tokens` tokens, groups whole where they fit.

    A group that does not fit is split into few and evenly loaded parts, and its prompt encoded once per part. Parts are
    given out largest first, to the process with the least work so far. Processes get equally many micro-batches, as
    FSDP needs: where one would have fewer, it repeats one of its rollouts with nothing trained, which adds zeros to the
    gradient.

    Args:
        rollouts: the step's rollouts.
        max_tokens: tokens of a packed row, without the padding to a multiple of 128.
        world_size: processes that take part.
        sharing: count a group's prompt once; False counts it once per rollout, for a forward that shares nothing.

    Raises:
        ValueError: a rollout that is longer than the budget, named.
    """
    parts = _parts(rollouts, max_tokens, sharing)
    loads = [0.0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for number in sorted(range(len(parts)), key=lambda n: -parts[n].cost):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += parts[number].cost
    batches = [_filled([parts[n] for n in sorted(share)], max_tokens) for share in shares]
    most = max(map(len, batches))
    packed = []
    for rank, own in enumerate(batches):
        packed += [_micro_batch(rollouts, indices, rank) for indices in own]
        shortest = min(own[0] if own else range(len(rollouts)), key=lambda n: len(rollouts.sequences[n]))
        packed += [_idle(_micro_batch(rollouts, [shortest], rank))] * (most - len(own))
    return packed


def _parts(rollouts: Rollouts, max_tokens: int, sharing: bool) -> list[_Part]:
    members: list[list[int]] = [[] for _ in rollouts.prompts]
    for n, group in enumerate(rollouts.group_ids.tolist()):
        members[group].append(n)
    parts = []
    for group, indices in enumerate(members):
        prompt = len(rollouts.prompts[group])
        again = 0 if sharing else prompt  # what the prompt costs after the first rollout
        lengths = [len(rollouts.completions[n]) for n in indices]
        for n, length in zip(indices, lengths, strict=True):
            if prompt + length > max_tokens:
                raise ValueError(
                    f"rollout {n} of {len(rollouts)} has {prompt} + {length} tokens, over max_tokens={max_tokens}; "
                    "raise max_tokens, or shorten its prompt or completion"
                )
        pieces = _pieces([again + length for length in lengths], max_tokens - prompt + again)
        parts += [_part(prompt, again, [(indices[i], lengths[i]) for i in piece]) for piece in pieces]
    return parts


def _pieces(sizes: list[int], room: int) -> list[list[int]]:
    """Numbers of the sizes, in as few pieces as the largest first into the first that has room, but evenly loaded."""
    if sum(sizes) <= room:
        return [list(range(len(sizes)))]
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted: list[list[int]] = []
    loads: list[int] = []
    for i in largest_first:
        piece = next((p for p, load in enumerate(loads) if load + sizes[i] <= room), len(loads))
        if piece == len(loads):
            fitted.append([])
            loads.append(0)
        fitted[piece].append(i)
        loads[piece] += sizes[i]
    even: list[list[int]] = [[] for _ in fitted]
    loads = [0] * len(fitted)
    for i in largest_first:
        piece = loads.index(min(loads))
        even[piece].append(i)
        loads[piece] += sizes[i]
    return sorted(map(sorted, even if max(loads) <= room else fitted))


def _part(prompt: int, again: int, completions: list[tuple[int, int]]) -> _Part:
    """The cost of rollouts (number, completion length) of one prompt, in tokens."""
    prompts = 1 + (len(completions) - 1 if again else 0)
    tokens = prompt * prompts + sum(length for _, length in completions)
    pairs = prompt * (prompt + 1) // 2 * prompts
    pairs += sum(length * prompt + length * (length + 1) // 2 for _, length in completions)
    return _Part([n for n, _ in completions], tokens, tokens + pairs / PAIRS_PER_TOKEN)


def _filled(parts: list[_Part], max_tokens: int) -> list[list[int]]:
    """The parts in order, as many to a micro-batch as fit."""
    batches: list[list[int]] = []
    room = 0
    for part in parts:
        if part.tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1] += part.indices
        room -= part.tokens
    return batches


def _micro_batch(rollouts: Rollouts, indices: list[int], rank: int) -> MicroBatch:
    part = rollouts.select(indices)
    return MicroBatch(indices, part, PrefixTree.from_sequences(part.sequences), rank)


def _idle(batch: MicroBatch) -> MicroBatch:
    """The same with nothing trained."""
    return replace(batch, rollouts=replace(batch.rollouts, loss_mask=torch.zeros_like(batch.rollouts.trained)))
