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


@dataclass
class _Row:
    """A segment as a row of a call.

    Attributes:
        segment: Its number.
        state_of: The number of the segment whose state it continues, or None.
        depth: Calls that have to come before.
        tokens: The hidden states that it reads: those of the segment, after those of the segments put in front of it.
        keeps_state: Whether its final state is needed.
    """

    segment: int
    state_of: int | None
    depth: int
    tokens: list[int]
    keeps_state: bool

    @property
    def call(self) -> tuple[int, bool, int]:
        """Rows in which this is equal are one call: those that keep a state must not be padded."""
        return self.depth, self.state_of is None, len(self.tokens) if self.keeps_state else 0

    def padded(self, length: int) -> list[int]:
        """Return the tokens, padded on the right by the last of them."""
        return self.tokens + self.tokens[-1:] * (length - len(self.tokens))


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
    calls: dict[tuple[int, bool, int], list[_Row]] = {}
    for row in _rows(pieces, first, last, wanted):
        calls.setdefault(row.call, []).append(row)
    steps: list[Step] = []
    place: dict[int, int] = {}  # of a token's output among those of all calls
    offset = 0
    for _, rows in sorted(calls.items(), key=lambda call: call[0][0]):
        length = max(len(row.tokens) for row in rows)
        if rows[0].state_of is not None:
            length = max(length, 2)
        for row in rows:
            for at, token in enumerate(row.tokens, offset):
                place.setdefault(token, at)  # a token that was put in front of several segments has equal outputs
            offset += length
        steps.append(
            Step(
                torch.tensor([row.padded(length) for row in rows], device=device),
                [row.state_of for row in rows if row.state_of is not None] or None,
                [row.segment if row.keeps_state else None for row in rows],
            )
        )
    gather = torch.tensor([place.get(token, offset) for token in range(size)], device=device)
    return Plan(steps, gather)


def _rows(pieces: Sequence[tuple[int, int, int]], first: int, last: int, wanted: set[int]) -> list[_Row]:
    """Return the rows of all calls; a segment of one token that is put in front of its children has none."""
    parents = _parents(pieces)
    inside = [n for n, (start, *_) in enumerate(pieces) if first <= start < last]
    kept = {parents[n] for n in inside} | wanted
    rows: dict[int, _Row] = {}
    in_front: dict[int, _Row] = {}
    for n in inside:
        start, stop, _ = pieces[n]
        parent = parents[n]
        row = _Row(n, parent, 0, list(range(start - first, stop - first)), n in kept)
        if parent in in_front:
            before = in_front[parent]
            row.state_of, row.depth, row.tokens = before.state_of, before.depth, before.tokens + row.tokens
        elif parent in rows:
            row.depth = rows[parent].depth + 1
        is_in_front = len(row.tokens) == 1 and row.keeps_state and row.state_of is not None
        (in_front if is_in_front else rows)[n] = row
    return list(rows.values())


def plan_prompts(tree: PrefixTree) -> Plan:
    """Plan the calls for a sampler's prompts: each is a segment of its own, so that its final state is known.

    Prompts of equal length are one call; what several have in common is computed for each.
    """
    by_length: dict[int, list[int]] = {}
    for n, length in enumerate(tree.lengths.tolist()):
        by_length.setdefault(length, []).append(n)
    steps = [Step(tree.node[members, :length], None, list(members)) for length, members in by_length.items()]
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
