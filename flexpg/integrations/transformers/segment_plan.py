"""In which calls a recurrent layer computes a packed sequence, or the prompts of a sampler.

Segments are batched: leaves of one depth in one call, padded on the right, where a causal layer does not see it; inner
segments of one depth and length in one call, because their children need the state after their last token. A group is
one call for the prompt and one for all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask
from flexpg.tree import PrefixTree

PROMPT = -1  # the segment number of a cached prompt


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


def plan_segments(mask: TreeBlockMask, size: int) -> Plan:
    """Plan the calls for a packed sequence of which `size` hidden states are computed.

    A segment of one token that continues a state is not called on its own, because layers have another kernel for it
    that writes into the state: a leaf is padded by a second token, and an inner segment is put in front of each of its
    children instead.
    """
    tree, first = mask.tree, mask.first_query
    segments = tree.segments.tolist()
    parents = _parents(segments)
    has_children = {parent for (start, *_), parent in zip(segments, parents, strict=True) if start >= first}
    is_prompt = isinstance(mask, PrefixBlockMask) and not first
    tokens: dict[int, list[int]] = {}  # what each segment reads: its own tokens, after those of an absorbed parent
    state_of: dict[int, int | None] = {}  # the segment whose state it continues
    depth: dict[int, int] = {}
    absorbed: set[int] = set()
    for n, (start, stop, _) in enumerate(segments):
        if start < first:
            continue
        parent = parents[n]
        outside = parent is not None and segments[parent][0] < first
        before = tokens[parent] if parent in absorbed else []
        tokens[n] = [*before, *range(start - first, stop - first)]
        state_of[n] = PROMPT if outside else state_of[parent] if parent in absorbed else parent
        depth[n] = 0 if parent is None or outside else depth[parent] + (parent not in absorbed)
        if len(tokens[n]) == 1 and n in has_children and state_of[n] is not None:
            absorbed.add(n)
    by_call: dict[tuple[int, bool, int], list[int]] = {}
    for n in tokens:
        if n not in absorbed:
            needs_state = n in has_children or (is_prompt and n == 0)
            key = (depth[n], state_of[n] is None, len(tokens[n]) if needs_state else 0)
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
            own = tokens[n]
            rows.append([*own, *[own[-1]] * (length - len(own))])
            for at, token in enumerate(own):
                place.setdefault(token, offset + at)  # an absorbed token is in several calls, with the same output
            offset += length
        states = [None if is_first else state_of[n] for n in members]
        steps.append(
            Step(
                torch.tensor(rows, device=tree.end.device),
                None if is_first else [own for own in states if own is not None],
                [n if inner_length else None for n in members],
            )
        )
    gather = torch.tensor([place.get(token, offset) for token in range(size)], device=tree.end.device)
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
