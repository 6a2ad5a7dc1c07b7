"""What sharing prefixes saves in an update, before any training: tokens, visible pairs, FLOPs and activation memory.

All numbers are counted, none is measured. The ratio of FLOPs is the speed-up to expect; what hardware achieves depends
on how efficient its kernels are at either size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from flexpg.analysis.flops import ModelShape, activation_bytes, update_flops
from flexpg.analysis.ranks import context_parallel_bytes, largest_prompt
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

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_TOKENS = (4096, 8192, 16384, 32768)

Row = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, names of the columns, rows


@dataclass(frozen=True)
class Report:
    """What sharing saves in one update over all rollouts. Created by `report`.

    A comparison is a dict with "rollouts" and three dicts: "baseline" (every sequence is encoded on its own),
    "prompts_once" (every prompt is encoded once, every completion in full) and "shared" (every shared prefix is encoded
    once, which is what flexpg does). Each has "tokens", "images" (that are encoded), "pairs", "flops" and
    "activation_bytes" (of all rollouts in one packed sequence, without the vision encoder's); the latter two also have
    the ratio of the baseline to each of them, such as "flops_ratio".

    Attributes:
        prompts: Number of prompts.
        prompt_tokens: Tokens of the prompts, each counted once.
        completion_tokens: Tokens of all completions.
        loss_tokens: Completion tokens that count in the loss.
        longest: Name of the longest rollout.
        longest_tokens: Its tokens.
        shape: The model.
        itemsize: Bytes per activation.
        activation_checkpointing: Whether layers are recomputed in the backward.
        total: The comparison of all rollouts.
        by_group_size: Comparisons of the first "group_size" completions of every prompt, or as many as it has; none if
            rollouts are turns of conversations, of which only the first have a prompt in common.
        by_max_tokens: A dict for each "max_tokens". If the longest rollout fits, it has "baseline_micro_batches",
            "baseline_activation_bytes" (of the largest), "micro_batches", "activation_bytes", "tokens",
            "recomputed_tokens" (prefix tokens that several micro-batches encode), "flops" and "flops_ratio".
        by_ranks: A dict for 1, 2, 4 ... "ranks" of context parallelism, up to the given number: "activation_bytes" of
            one rank for the group with the most tokens, and "largest_prompt", the most prompt tokens with which its
            completions fit into "budget_bytes".
    """

    prompts: int
    prompt_tokens: int
    completion_tokens: int
    loss_tokens: int
    longest: str
    longest_tokens: int
    shape: ModelShape
    itemsize: int
    activation_checkpointing: bool
    total: Row
    by_group_size: list[Row]
    by_max_tokens: list[Row]
    by_ranks: list[Row]

    def as_dict(self) -> Row:
        """Return plain values, for `json.dumps`."""
        return asdict(self)

    def table(self) -> RenderableType:
        """Return the report for a terminal of 100 columns; `rich.print` prints it.

        Raises:
            ImportError: If rich is not installed.
        """
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [Text("\n".join([*self._head(), ""]))]
        for title, columns, rows in self._tables():
            table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
            for n, name in enumerate(columns):
                table.add_column(name, justify="right" if n else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            parts.append(table)
        return Group(*parts, Text("\n".join(self._foot())))

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        parts = [f"<p>{'<br>'.join(map(escape, self._head()))}</p>"]
        for title, columns, rows in self._tables():
            parts.append(f"<h4>{escape(title)}</h4><table>{_html_row('th', columns)}")
            parts += [_html_row("td", row) for row in rows]
            parts.append("</table>")
        return "\n".join([*parts, f"<p>{'<br>'.join(map(escape, self._foot()))}</p>"])

    def _head(self) -> list[str]:
        shape, count = self.shape, self.total["rollouts"]
        options = [f"{self.itemsize} bytes per activation"]
        options += ["activation checkpointing"] if self.activation_checkpointing else []
        if shape.frozen_weights:
            options.append(f"{1 - shape.frozen_weights / shape.layer_weights:.1%} of weights trained")
        return [
            f"{plural(count, 'rollout')} of {plural(self.prompts, 'prompt')}: {short(self.prompt_tokens)} prompt "
            f"tokens, {short(self.completion_tokens)} completion tokens, {short(self.loss_tokens)} in the loss",
            f"model: {_layers(shape)} of width {shape.embed_dim:,}, vocabulary {shape.vocab_size:,}; "
            + ", ".join(options),
        ]

    def _foot(self) -> list[str]:
        foot = ["x: baseline / shared (or prompts once); of FLOPs, the speed-up to expect. Counted, not measured."]
        if any("tokens" not in row for row in self.by_max_tokens):
            foot.append(f"does not fit: {self.longest} has {self.longest_tokens:,} tokens.")
        return foot

    def _tables(self) -> list[Table]:
        counts = {"tokens": "tokens", "pairs": "visible pairs", "flops": "FLOPs", "activation_bytes": "activations *"}
        counts |= {"images": "images encoded"} if self.total["baseline"]["images"] else {}
        total = [
            [label, *(_cell(self.total[name], count) for name in ("baseline", "prompts_once", "shared"))]
            for count, label in counts.items()
        ]
        tables: list[Table] = [
            (
                "One update over all rollouts (* in one packed sequence)",
                ["", "baseline", "prompts once", "shared"],
                total,
            )
        ]
        if len(self.by_group_size) > 1:
            columns = ["G", "rollouts", "tokens,\nbaseline", "tokens,\nprompts once", "tokens,\nshared"]
            columns += ["visible\npairs", "activations", "FLOPs"]
            rows = [
                [f"{row['group_size']:,}", short(row["rollouts"])]
                + [_cell(row[name], "tokens") for name in ("baseline", "prompts_once", "shared")]
                + [_ratio(row["shared"][f"{name}_ratio"]) for name in ("pairs", "activation_bytes", "flops")]
                for row in self.by_group_size
            ]
            tables.append(("By group size: the first G completions of every prompt", columns, rows))
        columns = ["max_tokens", "micro-batches,\nbaseline", "micro-batches,\nshared", "tokens", "recomputed\ntokens"]
        rows = [
            [f"{row['max_tokens']:,}"]
            + [short(row[name]) for name in ("baseline_micro_batches", "micro_batches", "tokens", "recomputed_tokens")]
            + [short_bytes(row["activation_bytes"]), _ratio(row["flops_ratio"])]
            if "tokens" in row
            else [f"{row['max_tokens']:,}", "does not fit"]
            for row in self.by_max_tokens
        ]
        tables.append(("By token budget of a micro-batch", [*columns, "peak\nactivations", "FLOPs"], rows))
        if self.by_ranks:
            rows = [
                [f"{row['ranks']:,}", short_bytes(row["activation_bytes"]), f"{row['largest_prompt']:,}"]
                for row in self.by_ranks
            ]
            within = short_bytes(self.by_ranks[0]["budget_bytes"])
            columns = ["ranks", "activations of a rank,\nlargest group", f"longest prompt,\nwithin {within}"]
            tables.append(("By ranks that share a packed sequence", columns, rows))
        return tables


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
        names: What to call each rollout, as `read_rollouts` returns them; None for its number.
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
        completions=[[torch.full((length,), next(ids)) for length in own] for own in completion_lens],
        rewards=[[0.0] * len(own) for own in completion_lens],
    )


def short(count: int) -> str:
    """Return a count in at most six characters.

    >>> [short(count) for count in (9999, 12345, 6750596, 3 * 10**15)]
    ['9,999', '12.3 k', '6.75 M', '3.00 P']
    """
    return f"{count:,}" if count < 10_000 else _scaled(count, 1000, ("k", "M", "G", "T", "P", "E"))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "prompt"), plural(2345, "prompt")
    ('1 prompt', '2,345 prompts')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def short_bytes(count: int) -> str:
    """Return a size in binary units.

    >>> [short_bytes(count) for count in (1500, 1024**2, 5 * 2**29)]
    ['1.46 KiB', '1.00 MiB', '2.50 GiB']
    """
    return _scaled(count, 1024, ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def _scaled(count: int, base: int, units: Sequence[str]) -> str:
    value, power = count / base, 0
    while value >= 999.5 and power < len(units) - 1:  # 999.5 would be rounded to four digits
        value, power = value / base, power + 1
    return f"{f'{value:#.3g}'.rstrip('.')} {units[power]}"


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
    for own in others.values():
        own |= {f"{name}_ratio": value / own[name] for name, value in baseline.items() if own[name]}
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
    return [(size, rollouts.select([n for n, own in enumerate(rank) if own < size])) for size in sorted(sizes)]


def _layers(shape: ModelShape) -> str:
    """Return the number of layers, and how many have recurrence or a window."""
    kinds = [f"{shape.recurrent_layers} recurrent"] if shape.recurrent_layers else []
    if shape.windowed_layers:
        kinds.append(f"{shape.windowed_layers} with {'chunks' if shape.is_chunked else 'a window'} of {shape.window:,}")
    return plural(shape.num_layers, "layer") + (f" ({', '.join(kinds)})" if kinds else "")


def _cell(work: Row, name: str) -> str:
    """Return a count, with its ratio to the baseline if it has one."""
    value = short_bytes(work[name]) if name == "activation_bytes" else short(work[name])
    return f"{value} ({_ratio(work[f'{name}_ratio'])})" if f"{name}_ratio" in work else value


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
