"""What sharing saves of an update, before anything is trained: tokens, attention pairs, FLOPs and activations.

Everything here is counted, nothing measured. A speed-up is a ratio of FLOPs: what hardware makes of it depends on how
well its kernels run at either size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexpg.analysis.flops import (
    Cost,
    ModelShape,
    activation_bytes,
    dense_cost,
    group_cost,
    shared_cost,
    update_flops,
)
from flexpg.packing import MicroBatch, pack, run_cost, runs
from flexpg.rollouts import Rollouts
from flexpg.scalars import is_whole
from flexpg.tree import PrefixTree

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MAX_TOKENS = (4096, 8192, 16384, 32768)

WorkOf = Callable[[Cost, int], "Work"]  # a forward's cost, how many tokens it predicts


@dataclass(frozen=True)
class Work:
    """An update in one way of encoding its rollouts.

    Attributes:
        tokens: encoded.
        attention_pairs: query-key pairs that are visible, in every layer and head.
        flops: of forward and backward, logits of trained tokens included.
        activation_bytes: kept for the backward at most, if all of it is one packed row.
    """

    tokens: int
    attention_pairs: int
    flops: int
    activation_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The same rollouts, encoded in three ways.

    Attributes:
        rollouts: how many.
        unshared: every prompt once for each of its completions.
        prompts_once: every prompt once, every completion in full.
        tree: whatever begins alike once.
    """

    rollouts: int
    unshared: Work
    prompts_once: Work
    tree: Work

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the ratios to the unshared way."""
        ways = {name: asdict(getattr(self, name)) for name in ("unshared", "prompts_once", "tree")}
        for name in ("prompts_once", "tree"):
            ways[name] |= ratios(self.unshared, getattr(self, name))
        return {"rollouts": self.rollouts, **ways}


@dataclass(frozen=True)
class Packed:
    """Micro-batches under a token budget.

    Attributes:
        micro_batches: of the shared update.
        tokens: encoded in all of them; where a group is over the budget, its prompt once (`flexpg.prefix_cache`).
        recomputed_tokens: of those, what one packed row of everything would not encode again.
        flops: of all of them.
        peak_activation_bytes: of the micro-batch that needs most.
        unshared_micro_batches: under the same budget, with every prompt once for each of its completions.
        unshared_peak_activation_bytes: of the one of those that needs most.
        expected_speedup: unshared FLOPs / shared FLOPs.
    """

    micro_batches: int
    tokens: int
    recomputed_tokens: int
    flops: int
    peak_activation_bytes: int
    unshared_micro_batches: int
    unshared_peak_activation_bytes: int
    expected_speedup: float


@dataclass(frozen=True)
class Report:
    """What sharing saves of one update over all the rollouts. Made by `report`.

    Attributes:
        prompts: different prompts.
        prompt_tokens: of the different prompts.
        completion_tokens: of all completions.
        trained_tokens: of those, what is trained.
        shape: of the model.
        itemsize: bytes of an activation.
        activation_checkpointing: whether layers are computed again in the backward.
        whole: all rollouts.
        by_group_size: g -> the first g completions of every prompt, or as many as it has.
        by_max_tokens: budget -> its micro-batches, or a sentence that says why there are none.
    """

    prompts: int
    prompt_tokens: int
    completion_tokens: int
    trained_tokens: int
    shape: ModelShape
    itemsize: int
    activation_checkpointing: bool
    whole: Comparison
    by_group_size: dict[int, Comparison]
    by_max_tokens: dict[int, Packed | str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return {
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "trained_tokens": self.trained_tokens,
            "model": asdict(self.shape),
            "itemsize": self.itemsize,
            "activation_checkpointing": self.activation_checkpointing,
            **self.whole.as_dict(),
            "by_group_size": [{"group_size": g, **each.as_dict()} for g, each in self.by_group_size.items()],
            "by_max_tokens": [
                {"max_tokens": budget, **({"not_possible": packed} if isinstance(packed, str) else asdict(packed))}
                for budget, packed in self.by_max_tokens.items()
            ],
        }

    def table(self) -> RenderableType:
        """The same for a terminal of 100 columns, as `rich.print` takes it.

        Raises:
            ImportError: `rich` is not installed.
        """
        from rich.console import Group
        from rich.text import Text

        kept = "; activation checkpointing" if self.activation_checkpointing else ""
        head = (
            f"{self.whole.rollouts:,} rollouts of {self.prompts:,} prompts: {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens, {self.trained_tokens:,} of them trained\n"
            f"model: {self.shape.num_layers} layers of width {self.shape.embed_dim:,}, vocabulary "
            f"{self.shape.vocab_size:,}; {self.itemsize} bytes per activation{kept}\n"
        )
        foot = "x: times less than unshared; for FLOPs, the speed-up to expect. Counted, not measured."
        return Group(Text(head), _whole_table(self), _size_table(self), _budget_table(self), Text(foot))


def report(
    rollouts: Rollouts | PrefixTree,
    shape: ModelShape,
    *,
    prompt_lens: Tensor | None = None,
    max_tokens: Sequence[int] = MAX_TOKENS,
    itemsize: int = 2,
    activation_checkpointing: bool = False,
    names: Sequence[str] | None = None,
) -> Report:
    """Counts an update over the rollouts: unshared, with every prompt once, and as a tree.

    All three compute logits of trained tokens alone; a trainer that computes those of every token has more to save.

    Args:
        rollouts: one step; or a tree of its N sequences, all of whose completion tokens are trained.
        shape: of the model.
        prompt_lens: [N] int, for a tree: where each sequence's completion begins.
        max_tokens: budgets of a micro-batch, in packed tokens.
        itemsize: bytes of an activation; 2 for bf16.
        activation_checkpointing: layers are computed again in the backward.
        names: what to call each rollout where it does not fit a budget; None for its number.

    Raises:
        TypeError: neither rollouts nor a tree, no shape, or budgets that are no list.
        ValueError: a tree without fitting prompt lengths, prompt lengths beside rollouts, or a budget below 1.

    >>> rollouts = Rollouts(
    ...     [torch.arange(9)], [torch.tensor([1]), torch.tensor([2])], torch.tensor([0, 0]), torch.ones(2)
    ... )
    >>> found = report(rollouts, ModelShape(2, 8, 2, 1, 4, 16, 50, 576), max_tokens=[16])
    >>> found.whole.unshared.tokens, found.whole.tree.tokens, found.by_max_tokens[16].micro_batches
    (20, 11, 1)
    """
    if not isinstance(shape, ModelShape):
        raise TypeError(f"shape is a {type(shape).__name__}; give a ModelShape, as flexpg.integrations.*_shape read it")
    if isinstance(rollouts, PrefixTree):
        rollouts = _rollouts_of(rollouts, prompt_lens)
    elif not isinstance(rollouts, Rollouts):
        raise TypeError(f"a report is made of Rollouts or a PrefixTree; {type(rollouts).__name__} came")
    elif prompt_lens is not None:
        raise ValueError("prompt_lens came beside Rollouts, which have their own; leave it out")

    if not isinstance(max_tokens, Collection):
        raise TypeError(f"max_tokens is {max_tokens!r}; give a list of budgets")
    for budget in max_tokens:
        if not is_whole(budget):
            raise ValueError(f"max_tokens has {budget!r}; give budgets of at least one token")
    work = partial(_work, shape=shape, itemsize=itemsize, activation_checkpointing=activation_checkpointing)
    whole, called = _comparison(rollouts, work), names or [f"rollout {n}" for n in range(len(rollouts))]
    return Report(
        prompts=rollouts.num_groups,
        prompt_tokens=sum(map(len, rollouts.prompts)),
        completion_tokens=sum(map(len, rollouts.completions)),
        trained_tokens=int(rollouts.trained.sum()),
        shape=shape,
        itemsize=itemsize,
        activation_checkpointing=activation_checkpointing,
        whole=whole,
        by_group_size={size: _comparison(part, work) for size, part in _first_completions(rollouts)},
        by_max_tokens={budget: _packed(rollouts, budget, whole, work, called) for budget in sorted(set(max_tokens))},
    )


def ratios(unshared: Work, way: Work) -> dict[str, float]:
    """How much less a way of encoding needs."""
    return {
        "tokens_ratio": unshared.tokens / way.tokens,
        "attention_pairs_ratio": unshared.attention_pairs / way.attention_pairs,
        "activation_bytes_ratio": unshared.activation_bytes / way.activation_bytes,
        "expected_speedup": unshared.flops / way.flops,
    }


def short_count(count: int) -> str:
    """A count in at most six characters.

    >>> [short_count(count) for count in (999, 12345, 6750596, 3 * 10**15)]
    ['999', '12.3 k', '6.75 M', '3.00 P']
    """
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P", "E"))


def short_bytes(count: int) -> str:
    """A size in binary units.

    >>> [short_bytes(count) for count in (999, 1024**2, 5 * 2**29)]
    ['999 B', '1.00 MiB', '2.50 GiB']
    """
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(count: int, base: int, units: Sequence[str]) -> str:
    value, power = float(count), 0
    while value >= 999.5 and power < len(units) - 1:  # 999.5 would be written 1000
        value, power = value / base, power + 1
    digits = 0 if not power or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".strip()


def _work(cost: Cost, predicted: int, *, shape: ModelShape, itemsize: int, activation_checkpointing: bool) -> Work:
    return Work(
        tokens=cost.tokens,
        attention_pairs=cost.attention_pairs,
        flops=update_flops(cost, predicted, shape, activation_checkpointing=activation_checkpointing).total,
        activation_bytes=activation_bytes(
            cost, predicted, shape, itemsize=itemsize, activation_checkpointing=activation_checkpointing
        ),
    )


def _comparison(rollouts: Rollouts, work: WorkOf) -> Comparison:
    tree, predicted = PrefixTree.from_sequences(rollouts.sequences), int(rollouts.trained.sum())
    costs = (dense_cost(tree), group_cost(rollouts), shared_cost(tree))
    return Comparison(len(rollouts), *(work(cost, predicted) for cost in costs))


def _packed(rollouts: Rollouts, budget: int, whole: Comparison, work: WorkOf, names: Sequence[str]) -> Packed | str:
    """Micro-batches under one budget, or which rollout does not fit it."""
    lengths = rollouts.prompt_lens + rollouts.completion_lens  # [N]
    longest = int(lengths.argmax())
    if lengths[longest] > budget:
        return f"{names[longest]} has {lengths[longest]:,} tokens"

    def works(batches: list[MicroBatch], cost: Callable[[PrefixTree], Cost]) -> list[Work]:
        return [work(cost(batch.tree), int(batch.rollouts.trained.sum())) for batch in batches]

    batches = pack(rollouts, budget)
    shared, unshared = works(batches, shared_cost), works(pack(rollouts, budget, sharing=False), dense_cost)
    together = [work(run_cost(run), sum(int(batch.rollouts.trained.sum()) for batch in run)) for run in runs(batches)]
    tokens, flops = (sum(getattr(each, name) for each in together) for name in ("tokens", "flops"))
    return Packed(
        micro_batches=len(shared),
        tokens=tokens,
        recomputed_tokens=tokens - whole.tree.tokens,
        flops=flops,
        peak_activation_bytes=max(each.activation_bytes for each in shared),
        unshared_micro_batches=len(unshared),
        unshared_peak_activation_bytes=max(each.activation_bytes for each in unshared),
        expected_speedup=whole.unshared.flops / flops,
    )


def _first_completions(rollouts: Rollouts) -> list[tuple[int, Rollouts]]:
    """The first 1, 2, 4, ... completions of every prompt, and all of the largest group."""
    seen = [0] * rollouts.num_groups
    place = []  # [N] the number of each rollout in its group
    for group in rollouts.group_ids.tolist():
        place.append(seen[group])
        seen[group] += 1
    sizes = [2**power for power in range(max(seen).bit_length())]
    sizes += [max(seen)] * (sizes[-1] != max(seen))
    return [(size, rollouts.select([n for n, p in enumerate(place) if p < size])) for size in sizes]


def _rollouts_of(tree: PrefixTree, prompt_lens: Tensor | None) -> Rollouts:
    """Rollouts that have this tree: a token's id is its packed index, and prompts that end at one index are one."""
    if prompt_lens is not None and (not isinstance(prompt_lens, Tensor) or prompt_lens.is_floating_point()):
        raise TypeError(f"prompt_lens is {prompt_lens}; give an int64 tensor [N]")
    if prompt_lens is None or tuple(prompt_lens.shape) != (len(tree.lengths),):
        came = "none came" if prompt_lens is None else f"{list(prompt_lens.shape)} came"
        raise ValueError(f"a tree of {len(tree.lengths)} sequences needs prompt_lens [{len(tree.lengths)}]; {came}")
    node, groups = tree.node.cpu(), dict[int, int]()
    prompts, completions, group_ids = list[Tensor](), list[Tensor](), list[int]()
    for n, (length, prompt) in enumerate(zip(tree.lengths.tolist(), prompt_lens.tolist(), strict=True)):
        if not 1 <= prompt < length:
            raise ValueError(
                f"sequence {n} of {len(node)} has {length} tokens, {prompt} of them prompt; both need a token"
            )
        last = int(node[n, prompt - 1])
        if last not in groups:
            groups[last] = len(prompts)
            prompts.append(node[n, :prompt])
        group_ids.append(groups[last])
        completions.append(node[n, prompt:length])
    return Rollouts(prompts, completions, torch.tensor(group_ids), torch.zeros(len(node)))


def _whole_table(found: Report) -> Table:
    whole = found.whole
    table = _table("one update over all rollouts", "", "unshared", "prompts once", "", "tree", "")
    once, tree = ratios(whole.unshared, whole.prompts_once), ratios(whole.unshared, whole.tree)
    for label, name, written in (
        ("tokens", "tokens", _tokens),
        ("attention pairs", "attention_pairs", short_count),
        ("FLOPs", "flops", short_count),
        ("activations, if it were one packed row", "activation_bytes", short_bytes),
    ):
        unshared, *ways = (written(getattr(way, name)) for way in (whole.unshared, whole.prompts_once, whole.tree))
        of = "expected_speedup" if name == "flops" else f"{name}_ratio"
        table.add_row(label, unshared, ways[0], f"{once[of]:.1f} x", ways[1], f"{tree[of]:.1f} x")
    return table


def _size_table(found: Report) -> Table:
    table = _table(
        "the first G completions of every prompt",
        *("G", "rollouts", "tokens\nunshared", "tokens\nprompts once", "", "tokens\ntree", ""),
        *("pairs\ntree", "activations\ntree", "FLOPs\ntree"),
    )
    for size, each in found.by_group_size.items():
        once, tree = ratios(each.unshared, each.prompts_once), ratios(each.unshared, each.tree)
        table.add_row(
            *(_tokens(count) for count in (size, each.rollouts, each.unshared.tokens, each.prompts_once.tokens)),
            f"{once['tokens_ratio']:.1f} x",
            _tokens(each.tree.tokens),
            *(f"{tree[f'{name}_ratio']:.1f} x" for name in ("tokens", "attention_pairs", "activation_bytes")),
            f"{tree['expected_speedup']:.1f} x",
        )
    return table


def _budget_table(found: Report) -> Table:
    table = _table(
        "micro-batches of at most max_tokens",
        *("max_tokens", "micro-batches\nunshared", "micro-batches\ntree", "tokens\ntree", "encoded\nagain"),
        *("peak\nactivations", "FLOPs\ntree"),
    )
    for budget, packed in found.by_max_tokens.items():
        if isinstance(packed, str):
            table.add_row(f"{budget:,}", "not possible")
            continue
        counts = (budget, packed.unshared_micro_batches, packed.micro_batches, packed.tokens, packed.recomputed_tokens)
        table.add_row(
            *(_tokens(count) for count in counts),
            short_bytes(packed.peak_activation_bytes),
            f"{packed.expected_speedup:.1f} x",
        )
    reasons = dict.fromkeys(why for why in found.by_max_tokens.values() if isinstance(why, str))
    table.caption = "\n".join(f"not possible: {why}" for why in reasons) or None
    return table


def _tokens(count: int) -> str:
    """In full as long as a terminal of 100 columns has room for it."""
    return f"{count:,}" if count < 10**7 else short_count(count)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number or name else "left", no_wrap=True)
    return table
