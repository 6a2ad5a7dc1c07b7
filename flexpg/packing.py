"""Rollouts -> micro-batches: whole prefix trees under a token budget, shared out so that processes finish together.

A group stays together where it fits. What goes into one row is chosen bottom-up along the prefix tree of all rollouts:
whatever has most in common is put together first, and where it does not fit one row, the fullest row that has room
takes the next largest (best fit, decreasing). So system prompts, few-shot blocks and the turns of a conversation are
encoded as seldom as the budget allows.

A group over the budget becomes a run: several micro-batches of one prompt, which `flexpg.prefix_cache` encodes once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import torch

from flexpg.analysis.flops import Cost, causal_cost, shared_cost
from flexpg.rollouts import Rollouts, checked_indices, checked_rollouts
from flexpg.scalars import is_whole
from flexpg.tree import PrefixTree, common_prefix, sorted_order

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
        run: number of its run; the runs of all processes are alike in their number and their numbers of micro-batches.
        prefix_tokens: of the prompt that the micro-batches of its run have in common, and that needs to be encoded but
            once (`flexpg.prefix_cache`); 0 where the group is whole. A micro-batch can do without the others all the same.
        is_idle: it keeps a process in step with the others: two tokens of rollout `indices[0]`, and none is trained.
    """

    indices: list[int]
    rollouts: Rollouts
    tree: PrefixTree
    rank: int = 0
    run: int = 0
    prefix_tokens: int = 0
    is_idle: bool = False


@dataclass(eq=False)
class _Load:
    """Groups, or one part of a group, that stand in one row: their rollouts, and what they cost as one tree."""

    indices: list[int]
    tokens: int
    pairs: int
    prefix: np.ndarray  # what all its sequences begin with
    group: int = -1  # of which it is a part, where the whole is over the budget
    prompt: int = 0  # tokens of that group's prompt


def pack(
    rollouts: Rollouts,
    max_tokens: int,
    world_size: int = 1,
    sharing: bool = True,
    indices: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Cuts a step into micro-batches of at most `max_tokens` tokens, groups whole where they fit.

    A group that does not fit is split into few and evenly loaded parts. Work is given out largest first, to the process
    with the least so far. Processes get equally many runs and micro-batches, as FSDP needs: where one would have fewer,
    it gets idle ones, in which nothing is trained and which add zeros to the gradient.

    Args:
        rollouts: the step's rollouts.
        max_tokens: tokens of a packed row, without the padding to a multiple of 128.
        world_size: processes that take part.
        sharing: count what sequences have in common once; False counts every sequence whole, for a forward that shares
            nothing.
        indices: the rollouts to pack, as of one mini-batch; None for all.

    Returns:
        Micro-batches in the order of ranks and runs. The `indices` of those that are not idle hold every rollout once,
        and so restore their order.

    Raises:
        ValueError: a rollout that is longer than the budget, named; indices that are none, or twice the same; a budget
            or a number of processes that is no whole number, or below 1.
        TypeError: something other than rollouts.
    """
    chosen = _chosen(indices, len(checked_rollouts(rollouts)))
    for name, value, what in (("max_tokens", max_tokens, "tokens"), ("world_size", world_size, "processes")):
        if not is_whole(value):
            raise ValueError(f"{name} is {value!r}; give the number of {what}, 1 or more")
    rows = rollouts.sequences
    if rollouts.group_ids.device.type != "cpu":
        rows = list(torch.cat(rows).cpu().split(list(map(len, rows))))  # one transfer
    sequences = [row.numpy() for row in rows]
    loads = _loads(rollouts, sequences, chosen, max_tokens, sharing)
    ranks: list[list[_Load]] = [[] for _ in range(world_size)]
    work = [0.0] * world_size
    for unit, cost in sorted(_units(loads, max_tokens, world_size), key=lambda item: -item[1]):
        rank = work.index(min(work))
        ranks[rank] += unit
        work[rank] += cost
    plans = _aligned([_runs(share, max_tokens) for share in ranks], max_tokens)
    return [
        batch for rank, plan in enumerate(plans) for batch in _micro_batches(rollouts, sequences, chosen, plan, rank)
    ]


def runs(batches: Iterable[MicroBatch]) -> list[list[MicroBatch]]:
    """Micro-batches by process and run: those of a run stand together, and can share one encoded prompt."""
    return [list(run) for _, run in groupby(batches, key=lambda batch: (batch.rank, batch.run))]


def run_cost(run: Sequence[MicroBatch]) -> Cost:
    """What goes through the model for a run, pads left out: its prompt once."""
    whole = sum((shared_cost(batch.tree) for batch in run), Cost(0, 0))
    prefixes = [causal_cost(batch.prefix_tokens) for batch in run if batch.prefix_tokens]
    return whole - sum(prefixes[1:], Cost(0, 0))


def encoded_tokens(batches: Iterable[MicroBatch]) -> int:
    """Tokens that go through the model, pads left out and a run's prompt counted once."""
    return sum(run_cost(run).tokens for run in runs(batches))


def recomputed_tokens(batches: Sequence[MicroBatch]) -> int:
    """Tokens that are encoded again, as rows or processes have prefixes in common; 0 where one row holds everything.

    Args:
        batches: what `pack` gave, of all processes.
    """
    busy = [batch for batch in batches if not batch.is_idle]
    everything = PrefixTree.from_sequences([row for batch in busy for row in batch.rollouts.sequences])
    return encoded_tokens(busy) - everything.num_tokens


def _chosen(indices: Sequence[int] | None, count: int) -> list[int]:
    """Indices as ints, if each names a rollout of its own."""
    if indices is None:
        return list(range(count))
    chosen = checked_indices(indices, count)
    if len(set(chosen)) < len(chosen):
        twice = next(n for n in chosen if chosen.count(n) > 1)
        raise ValueError(f"indices name rollout {twice} more than once, and it would be trained as often; give it once")
    return chosen


def _loads(
    rollouts: Rollouts, sequences: list[np.ndarray], chosen: list[int], max_tokens: int, sharing: bool
) -> list[_Load]:
    """Every group that fits the budget, and the parts of every other."""
    lengths = list(map(len, sequences))
    members: list[list[int]] = [[] for _ in rollouts.prompts]
    groups = rollouts.group_ids.tolist()
    for n in chosen:
        members[groups[n]].append(n)
    loads = []
    for group, indices in enumerate(members):
        if not indices:
            continue
        prompt = len(rollouts.prompts[group])
        for n in indices:
            if lengths[n] > max_tokens:
                raise ValueError(
                    f"rollout {n} of {len(rollouts)} has {prompt} + {lengths[n] - prompt} tokens, over "
                    f"max_tokens={max_tokens}; raise max_tokens, or shorten its prompt or completion"
                )
        whole = _load(indices, sequences, sharing)
        if whole.tokens <= max_tokens:
            loads.append(whole)
            continue
        again = prompt if sharing else 0  # in every part
        pieces = _pieces([lengths[n] - again for n in indices], max_tokens - again)
        for piece in pieces:
            part = _load([indices[i] for i in piece], sequences, sharing)
            loads.append(replace(part, group=group, prompt=prompt) if sharing else part)
    return loads


def _load(indices: list[int], sequences: list[np.ndarray], sharing: bool) -> _Load:
    """Rollouts as one tree, or each on its own."""
    own = [sequences[n] for n in indices]
    if not sharing:
        return _Load(indices, sum(map(len, own)), sum(_triangle(len(row)) for row in own), own[0][:0])
    rows = [own[i] for i in sorted_order(own)] if len(own) > 1 else own
    shared = [common_prefix(a, b) for a, b in pairwise(rows)]
    tokens = sum(map(len, rows)) - sum(shared)
    pairs = sum(_triangle(len(row)) for row in rows) - sum(map(_triangle, shared))
    return _Load(indices, tokens, pairs, rows[0][: min(shared, default=len(rows[0]))])


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


def _units(loads: list[_Load], max_tokens: int, world_size: int) -> list[tuple[list[_Load], float]]:
    """What is given to one process in one go, and its cost: loads that share more than they add, parts of a group."""
    if world_size == 1:
        return [(loads, 0.0)]
    whole, parts = [load for load in loads if load.group < 0], [load for load in loads if load.group >= 0]
    groups = [list(own) for _, own in groupby(parts, key=lambda load: load.group)]
    close = _joined(whole, max_tokens, only_close=True)
    fair = (sum(_cost(row.tokens, row.pairs) for row in close) + sum(map(_run_cost, groups))) / world_size
    close = _joined(whole, min(max_tokens, int(fair / 4)), only_close=True)
    units = [([row], _cost(row.tokens, row.pairs)) for row in close]
    for group in groups:
        count = min(len(group), max(1, round(_run_cost(group) / fair)))
        chunks = [group[len(group) * i // count : len(group) * (i + 1) // count] for i in range(count)]
        units += [(chunk, _run_cost(chunk)) for chunk in chunks]
    return units


def _run_cost(parts: list[_Load]) -> float:
    """Parts of a group whose prompt is encoded once."""
    prompt = parts[0].prompt
    return sum(_cost(part.tokens, part.pairs) for part in parts) - (len(parts) - 1) * _cost(prompt, _triangle(prompt))


def _runs(loads: list[_Load], max_tokens: int) -> list[list[_Load]]:
    """One process's loads as runs, the longest first: the parts of a group, and each row of whole groups."""
    rows = _joined([load for load in loads if load.group < 0], max_tokens)
    parts = sorted((load for load in loads if load.group >= 0), key=lambda load: (load.group, load.indices[0]))
    groups = [list(own) for _, own in groupby(parts, key=lambda load: load.group)]
    return sorted([*groups, *([row] for row in rows)], key=lambda run: (-len(run), min(run[0].indices)))


def _joined(loads: list[_Load], max_tokens: int, only_close: bool = False) -> list[_Load]:
    """Rows of loads, under the budget: what stands deepest in the tree of their prefixes is joined first.

    Only close ones: those that have more than half of their tokens in common.
    """
    if not loads:
        return []
    ordered = [loads[i] for i in sorted_order([load.prefix for load in loads])]
    open_nodes: list[tuple[int, list[_Load]]] = []  # depth of a branching point, and the rows under it so far
    for n, load in enumerate(ordered):
        carried = [load]
        depth = common_prefix(load.prefix, ordered[n + 1].prefix) if n + 1 < len(ordered) else -1
        while open_nodes and open_nodes[-1][0] > depth:
            node, rows = open_nodes.pop()
            rows += carried
            far = [row for row in rows if only_close and row.tokens >= 2 * node]
            close = [row for row in rows if not only_close or row.tokens < 2 * node]
            carried = far + _filled(close, node, max_tokens)
        if depth < 0:
            return carried
        if open_nodes and open_nodes[-1][0] == depth:
            open_nodes[-1][1].extend(carried)
        else:
            open_nodes.append((depth, carried))
    raise AssertionError("the last load closes every node")


def _filled(loads: list[_Load], shared: int, max_tokens: int) -> list[_Load]:
    """Loads that begin with the same `shared` tokens, the largest first into the fullest row that has room."""
    if len(loads) < 2:
        return loads
    if sum(load.tokens - shared for load in loads) + shared <= max_tokens:
        return [_row(loads, shared)]
    rows: list[list[_Load]] = []
    rooms: list[tuple[int, int]] = []  # of each row, ascending
    for load in sorted(loads, key=lambda load: -load.tokens):
        i = bisect_left(rooms, (load.tokens - shared, -1))
        if i < len(rooms):
            room, number = rooms.pop(i)
            rows[number].append(load)
            insort(rooms, (room - load.tokens + shared, number))
        else:
            insort(rooms, (max_tokens - load.tokens, len(rows)))
            rows.append([load])
    return [_row(row, shared) for row in rows]


def _row(loads: list[_Load], shared: int) -> _Load:
    """Loads that have their first `shared` tokens in common, as one."""
    if len(loads) == 1:
        return loads[0]
    again = len(loads) - 1
    return _Load(
        indices=[n for load in loads for n in load.indices],
        tokens=sum(load.tokens for load in loads) - again * shared,
        pairs=sum(load.pairs for load in loads) - again * _triangle(shared),
        prefix=loads[0].prefix[:shared],
    )


def _aligned(ranks: list[list[list[_Load]]], max_tokens: int) -> list[list[list[_Load | None]]]:
    """The runs of every rank, alike in number and length: filled up with runs of one row, then with None.

    Runs stand in the order of their length; a rank without a long one puts rows of its own into its place. Into one
    with a prompt go rows that fit the budget beside that, whose activations wait for the end of the run.
    """
    long = [[run for run in plan if len(run) > 1] for plan in ranks]
    singles = [[run[0] for run in plan if len(run) == 1] for plan in ranks]
    plans: list[list[list[_Load | None]]] = [[] for _ in ranks]
    for i in range(max(map(len, long))):
        size = max(len(own[i]) for own in long if i < len(own))
        for rank, own in enumerate(long):
            run: list[_Load | None] = list(own[i]) if i < len(own) else []
            room = max_tokens - (own[i][0].prompt if i < len(own) else 0)
            fitting = [row for row in singles[rank] if row.tokens <= room][: size - len(run)]
            singles[rank] = [row for row in singles[rank] if row not in fitting]
            run += fitting
            plans[rank].append(run + [None] * (size - len(run)))
    most = max(map(len, singles))
    for rank, rows in enumerate(singles):
        plans[rank] += [[row] for row in [*rows, *[None] * (most - len(rows))]]
    return plans


def _micro_batches(
    rollouts: Rollouts, sequences: list[np.ndarray], chosen: list[int], plan: list[list[_Load | None]], rank: int
) -> list[MicroBatch]:
    """A rank's micro-batches, idle where it has nothing left to do."""
    batches = []
    for number, run in enumerate(plan):
        groups = [load.group for load in run if load is not None]
        for load in run:
            if load is None:
                batches.append(_idle(rollouts, chosen[0], rank, number))
                continue
            indices = sorted(load.indices)
            tree = PrefixTree.from_sequences([torch.from_numpy(sequences[n]) for n in indices])
            tree = tree.to(rollouts.group_ids.device)
            prefix = load.prompt if groups.count(load.group) > 1 else 0
            batches.append(MicroBatch(indices, rollouts.select(indices), tree, rank, number, prefix))
    return batches


def _idle(rollouts: Rollouts, index: int, rank: int, run: int) -> MicroBatch:
    """The last token of a rollout's prompt and the first of its completion, and nothing trained."""
    whole = rollouts.select([index])
    part = Rollouts(
        prompts=[whole.prompts[0][-1:]],
        completions=[whole.completions[0][:1]],
        group_ids=whole.group_ids,
        rewards=whole.rewards,
        loss_mask=torch.zeros_like(whole.trained[:, :1]),
        old_logprobs=None if whole.old_logprobs is None else whole.old_logprobs[:, :1],
        ref_logprobs=None if whole.ref_logprobs is None else whole.ref_logprobs[:, :1],
    )
    return MicroBatch([index], part, PrefixTree.from_sequences(part.sequences), rank, run, is_idle=True)


def _cost(tokens: int, pairs: int) -> float:
    """In tokens."""
    return tokens + pairs / PAIRS_PER_TOKEN


def _triangle(length: int) -> int:
    """Pairs of a causal mask."""
    return length * (length + 1) // 2
