"""Rollouts -> micro-batches: whole prefix trees under a token budget."""

from __future__ import annotations

from dataclasses import dataclass

from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rollouts that go through the model in one packed row.

    Attributes:
        indices: which rollouts of the step they are; row n of a micro-batch's [n, C] tensors is rollout `indices[n]`.
        rollouts: those rollouts alone.
        tree: their packed row; sequence n is the micro-batch's rollout n.
    """

    indices: list[int]
    rollouts: Rollouts
    tree: PrefixTree


def pack(rollouts: Rollouts, max_tokens: int, sharing: bool = True) -> list[MicroBatch]:
    """Cuts a step into micro-batches of at most `max_tokens` tokens, in order, groups whole where they fit.

    A group that does not fit is split, and its prompt encoded once per part.

    Args:
        rollouts: the step's rollouts.
        max_tokens: tokens of a packed row, without the padding to a multiple of 128.
        sharing: count a group's prompt once; False counts it once per rollout, for a forward that shares nothing.

    Raises:
        ValueError: a rollout that is longer than the budget, named.
    """
    members: list[list[int]] = [[] for _ in rollouts.prompts]
    for n, group in enumerate(rollouts.group_ids.tolist()):
        members[group].append(n)
    batches: list[list[int]] = []
    room = 0  # tokens that the last batch still takes
    for group, indices in enumerate(members):
        prompt = len(rollouts.prompts[group])
        again = 0 if sharing else prompt  # what the prompt costs after the first rollout
        lengths = [len(rollouts.completions[n]) for n in indices]
        if prompt + sum(lengths) + again * (len(lengths) - 1) > room:
            room = 0  # a batch of its own, whatever is left in the last one
        for n, length in zip(indices, lengths, strict=True):
            if prompt + length > max_tokens:
                raise ValueError(
                    f"rollout {n} of {len(rollouts)} has {prompt} + {length} tokens, over max_tokens={max_tokens}; "
                    "raise max_tokens, or shorten its prompt or completion"
                )
            cost = length + (prompt if n == indices[0] else again)
            if cost > room:
                batches.append([])
                room, cost = max_tokens, prompt + length
            batches[-1].append(n)
            room -= cost
    return [_micro_batch(rollouts, indices) for indices in batches]


def _micro_batch(rollouts: Rollouts, indices: list[int]) -> MicroBatch:
    part = rollouts.select(indices)
    return MicroBatch(indices, part, PrefixTree.from_sequences(part.sequences))
