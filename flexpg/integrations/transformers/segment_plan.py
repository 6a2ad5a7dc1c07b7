"""In which calls a recurrent layer computes a packed sequence, or the prompts of a sampler.

Segments are batched: leaves of one depth in one call, padded on the right, where a causal layer does not see it; inner
segments of one depth and length in one call, because their children need the state after their last token. A group is
one call for the prompt and one for all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask
from flexpg.tree import PrefixTree


@dataclass(frozen=True)
class Step:
    """One call of a recurrent layer.

    Attributes:
        index: [B, L] int64, the hidden state that each token reads; padding reads any.
        parents: For each row the segment whose state it continues; None for rows that start from nothing.
        segments: For each row the segment whose final state it is, or None if nobody needs it.
    """

    index: Tensor
    parents: list[int] | None
    segments: list[int | None]


@dataclass(frozen=True)
class Plan:
    """All calls of a recurrent layer for one packed sequence.

    Attributes:
        steps: The calls, parents first.
        gather: [S'] int64, for each hidden state its place in the outputs of all calls, one after the other, or after
            them for padding.
    """

    steps: list[Step]
    gather: Tensor


@dataclass(frozen=True)
class RangePlan:
    """The calls of a recurrent layer for one range of a packed sequence.

    Attributes:
        plan: The calls.
        received: The numbers of segments, or parts of them, whose states come from the range before.
        sent: The segments whose states go to the next range.
        final: The last of them all, if it is in this range and its state is wanted.
    """

    plan: Plan
    received: list[int]
    sent: list[int]
    final: int | None


def plan_segments(mask: TreeBlockMask, size: int) -> Plan:
    """Plan the calls for a packed sequence of which `size` hidden states are computed, after those of a cached prompt.

    The cached prompt is segment 0. A segment of one token that continues a state is not called on its own, because
    layers have another kernel for it that writes into the state: a leaf is padded by a second token, and an inner
    segment is put in front of each of its children instead.
    """
    is_prompt = isinstance(mask, PrefixBlockMask) and not mask.first_query
    pieces = _pieces(mask.tree, [mask.first_query])
    wanted = {0} if is_prompt else set()
    return _plan(pieces, mask.first_query, len(mask.tree.end), size, wanted, mask.tree.end.device)


def plan_range(tree: PrefixTree, borders: Sequence[int], number: int, keeps_state: bool = False) -> RangePlan | None:
    """Plan the calls for a range of a packed sequence, which continue states of the ranges before it.

    Segments are cut at the borders of ranges. Each range hands on the states that a later one continues.

    Args:
        tree: The packed sequence.
        borders: Range i is the tokens from `borders[i]` up to `borders[i + 1]`. Those before the first border are a
            cached prompt, segment 0, whose state all ranges have.
        number: The number of the range.
        keeps_state: Whether the state after the last token is wanted.

    Returns:
        None, for all ranges, if a state after a segment of one token would be handed on or kept: such a segment is not
        called.
    """
    pieces = _pieces(tree, borders)
    parents = _parents(pieces)

    def open_at(border: int) -> list[int]:
        """Return the pieces before a border that pieces after it continue, without the cached prompt."""
        after = {parent for (start, *_), parent in zip(pieces, parents, strict=True) if start >= border}
        return sorted(n for n in after if n is not None and borders[0] <= pieces[n][0] < border)

    kept = {len(pieces) - 1} if keeps_state else set()
    handed_on = {n for border in borders[1:-1] for n in open_at(border)}
    if any(pieces[n][1] - pieces[n][0] == 1 for n in handed_on | kept):
        return None
    first, last = borders[number], borders[number + 1]
    received, sent = open_at(first) if number else [], open_at(last) if number + 2 < len(borders) else []
    final = next((n for n in kept if first <= pieces[n][0] < last), None)
    if not any(first <= start < last for start, *_ in pieces):  # only padding, which takes part for its weights' sake
        pieces.append((first, first + 2, last))
    plan = _plan(pieces, first, last, last - first, {*sent, *kept}, tree.end.device)
    return RangePlan(plan, received, sent, final)


def _pieces(tree: PrefixTree, borders: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (start, stop, end of its subtree) of each segment, cut at borders."""
    pieces = []
    for start, stop, end in tree.segments.tolist():
        cuts = [start, *(border for border in borders if start < border < stop), stop]
        pieces += [(since, until, end) for since, until in pairwise(cuts)]
    return pieces


def _plan(
    pieces: Sequence[tuple[int, int, int]],
    first: int,
    last: int,
    size: int,
    wanted: set[int],
    device: torch.device,
) -> Plan:
    """Plan the calls for segments, or parts of them, that begin in a range of the packed sequence.

    Args:
        pieces: (start, stop, end of its subtree) of each.
        first: The packed index of the first hidden state.
        last: One past that of the last.
        size: Hidden states, with padding.
        wanted: Pieces whose state is needed, besides those that have children.
        device: The device of the plan.
    """
    parents = _parents(pieces)
    own = [n for n, (start, *_) in enumerate(pieces) if first <= start < last]
    has_children = {parents[n] for n in own} | wanted
    tokens: dict[int, list[int]] = {}  # what each segment reads: its own tokens, after those of an absorbed parent
    state_of: dict[int, int | None] = {}  # the segment whose state it continues
    depth: dict[int, int] = {}
    absorbed: set[int] = set()
    for n in own:
        start, stop, _ = pieces[n]
        parent = parents[n]
        is_outside = parent is not None and pieces[parent][0] < first
        before = tokens[parent] if parent in absorbed else []
        tokens[n] = [*before, *range(start - first, stop - first)]
        state_of[n] = state_of[parent] if parent in absorbed else parent
        depth[n] = 0 if parent is None or is_outside else depth[parent] + (parent not in absorbed)
        if len(tokens[n]) == 1 and n in has_children and state_of[n] is not None:
            absorbed.add(n)
    by_call: dict[tuple[int, bool, int], list[int]] = {}
    for n in tokens:
        if n not in absorbed:
            key = (depth[n], state_of[n] is None, len(tokens[n]) if n in has_children else 0)
            by_call.setdefault(key, []).append(n)
    steps: list[Step] = []
    place: dict[int, int] = {}  # of a token's output among those of all calls
    offset = 0
    for (_, is_first, inner_length), members in sorted(by_call.items(), key=lambda item: item[0][0]):
        length = max(len(tokens[n]) for n in members)
        if not is_first:
            length = max(length, 2)
        rows = []
        for n in members:
            read = tokens[n]
            rows.append([*read, *[read[-1]] * (length - len(read))])
            for at, token in enumerate(read):
                place.setdefault(token, offset + at)  # an absorbed token is in several calls, with the same output
            offset += length
        states = [None if is_first else state_of[n] for n in members]
        steps.append(
            Step(
                torch.tensor(rows, device=device),
                None if is_first else [parent for parent in states if parent is not None],
                [n if inner_length else None for n in members],
            )
        )
    gather = torch.tensor([place.get(token, offset) for token in range(size)], device=device)
    return Plan(steps, gather)


def plan_prompts(tree: PrefixTree) -> Plan:
    """Plan the calls for a sampler's prompts: each is a segment of its own, so that its final state is known.

    Prompts of equal length are one call; what several have in common is computed for each.
    """
    by_length: dict[int, list[int]] = {}
    for n, length in enumerate(tree.lengths.tolist()):
        by_length.setdefault(length, []).append(n)
    steps = [Step(tree.node[own, :length], None, list(own)) for length, own in by_length.items()]
    index = torch.cat([step.index.flatten() for step in steps])
    gather = torch.full((tree.padded_length,), len(index), device=index.device)
    return Plan(steps, gather.scatter(0, index, torch.arange(len(index), device=index.device)))


def _parents(segments: Sequence[Sequence[int]]) -> list[int | None]:
    """Return for each segment (start, stop, end of its subtree) the number of its parent."""
    parents: list[int | None] = []
    path: list[int] = []
    for n, (start, *_) in enumerate(segments):
        while path and segments[path[-1]][2] <= start:
            path.pop()
        parents.append(path[-1] if path else None)
        path.append(n)
    return parents
