"""The report of what sharing prefixes saves in an update: its numbers, and its tables for a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from flexpg.analysis.flops import ModelShape

if TYPE_CHECKING:
    from rich.console import RenderableType

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
