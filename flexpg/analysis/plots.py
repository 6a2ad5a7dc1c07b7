"""Figures: what a run learned, the mask and the tree of a packed sequence, and what sharing saves.

Every function returns a matplotlib Figure, which a notebook shows; `figure.savefig("mask.png", dpi=200)` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib
import matplotlib.figure
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from flexpg.analysis.palette import (
    BASELINE,
    COMPLETION,
    INK,
    LINE,
    PAPER,
    PARTLY_SHARED,
    PROMPT,
    REWARD,
    SHARED,
    SMALL,
    STYLE,
    WIDTH,
)
from flexpg.analysis.report_tables import Report, Row, short
from flexpg.analysis.work import prompts_once_work
from flexpg.masks import block_mask, tree_mask_mod
from flexpg.rollouts import Rollouts
from flexpg.tree import BLOCK, PrefixTree

MAX_PIXELS = 2048
TOKENS = {PROMPT: "several sequences (prompts)", COMPLETION: "one sequence (completions)"}
COLORS = {"baseline": BASELINE, "prompts_once": PARTLY_SHARED, "shared": SHARED}
LABELS = {"baseline": "baseline", "prompts_once": "prompts encoded once", "shared": "shared prefixes encoded once"}
BLOCKS = {"skipped": PAPER, "partial": PARTLY_SHARED, "full": SHARED}


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


@matplotlib.rc_context(STYLE)
def plot_reward(rewards: Sequence[float], accuracies: Mapping[int, float]) -> Figure:
    """Plot the training reward of every step and the held-out accuracy.

    Args:
        rewards: Mean reward of step 1, 2, ...
        accuracies: Held-out accuracy by step; step 0 is before training.
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    label = "training reward (mean of the step)"
    axes.plot(range(1, len(rewards) + 1), rewards, color=REWARD, linewidth=1, alpha=0.8, label=label)
    steps = sorted(accuracies)
    held_out = [accuracies[step] for step in steps]
    axes.plot(steps, held_out, "o-", color=REWARD, linewidth=2.5, clip_on=False, label="held-out accuracy (greedy)")
    axes.set(xlabel="GRPO step", ylabel="reward, accuracy", xlim=(0, max(len(rewards), 1)))
    if all(0 <= value <= 1 for value in (*rewards, *accuracies.values())):
        axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    axes.legend(loc="best")  # where it covers no line
    return figure


@matplotlib.rc_context(STYLE)
def plot_mask(tree: PrefixTree) -> Figure:
    """Plot the attention mask of a packed sequence, by token and by FlexAttention's blocks.

    Args:
        tree: The packed sequence; of more than 2,048 tokens, that many are shown.
    """
    tree = tree.to("cpu")
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    by_token, by_block = figure.subplots(1, 2)
    _draw_tokens(by_token, tree)
    by_token.set_title(f"mask: {tree.num_tokens:,} tokens,\n{tree.num_pairs:,} visible pairs")
    _draw_blocks(by_block, tree)
    _add_legend(by_token)
    return figure


@matplotlib.rc_context(STYLE)
def plot_tree(tree: PrefixTree) -> Figure:
    """Plot a prefix tree next to its mask: every segment is a bar at the height of its rows of the mask.

    A bar covers the positions of its segment, followed by its length in tokens if there is room. Lines lead to the
    segments that continue it.

    Args:
        tree: The packed sequence; of more than 2,048 tokens, the mask shows that many.
    """
    tree = tree.to("cpu")
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    as_tree, by_token = figure.subplots(1, 2, sharey=True)
    _draw_tokens(by_token, tree)
    by_token.set(aspect="auto")  # to be as high as the tree
    by_token.set_title(f"mask: {tree.num_tokens:,} tokens,\n{tree.num_pairs:,} visible pairs")
    _draw_segments(as_tree, tree)
    _add_legend(figure)
    return figure


@matplotlib.rc_context(STYLE)
def plot_savings(rollouts: Rollouts) -> Figure:
    """Plot the tokens and visible pairs of a step by the baseline, with every prompt once, and shared."""
    tree, once = rollouts.tree, prompts_once_work(rollouts)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    counts = {"tokens": (tree.baseline_tokens, once.num_tokens, tree.num_tokens)}
    counts["visible pairs"] = (tree.baseline_pairs, once.num_pairs, tree.num_pairs)
    _draw_counts(figure.subplots(), counts)
    return figure


@matplotlib.rc_context(STYLE)
def plot_report(found: Report) -> Figure:
    """Plot a report: the work of each implementation, the ratios by group size, and memory by token budget."""
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(9, 8))
    labels = {"tokens": "tokens", "pairs": "visible pairs", "flops": "FLOPs"}
    counts = {label: tuple(found.total[way][name] for way in COLORS) for name, label in labels.items()}
    _draw_counts(figure.add_subplot(grid[0, :]), counts)
    if len(found.by_group_size) > 1:
        _draw_group_sizes(figure.add_subplot(grid[1, 0]), found.by_group_size)
        _draw_budgets(figure.add_subplot(grid[1, 1]), found.by_max_tokens)
    else:
        _draw_budgets(figure.add_subplot(grid[1, :]), found.by_max_tokens)
    return figure


def _draw_counts(axes: Axes, counts: Mapping[str, Sequence[int]]) -> None:
    """Draw a bar for each implementation, relative to the baseline, for each of the named counts."""
    for y, values in enumerate(counts.values()):
        for n, (count, name) in enumerate(zip(values, COLORS, strict=True)):
            middle, length = y + 0.26 * (n - 1), count / values[0]
            axes.barh(middle, length, 0.24, color=COLORS[name], label=None if y else LABELS[name])
            note = f"{short(count)}   ({1 / length:.1f}x fewer)" if n else short(count)
            axes.text(length + 0.015, middle, note, va="center", fontsize=SMALL)
    axes.set(yticks=range(len(counts)), yticklabels=list(counts), xticks=[], xlim=(0, 1.13))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize="medium")
    axes.figure.legend(loc="outside upper center", ncols=3)
    axes.spines["bottom"].set_visible(False)


def _draw_group_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = [row["group_size"] for row in rows]
    for count, line in (("flops", "o-"), ("tokens", "s--")):
        for name in ("prompts_once", "shared"):
            axes.plot(sizes, [row[name][f"{count}_ratio"] for row in rows], line, color=COLORS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(
        xlabel="group size G\n(first G completions of every prompt)",
        ylabel="baseline / shared, or prompts once",
        ylim=(0, None),
    )
    axes.grid()
    handles = [Line2D([], [], color=INK, marker="s", linestyle="--", label="tokens")]
    handles += [Line2D([], [], color=INK, marker="o", label="FLOPs")]
    axes.legend(handles=handles, loc="best", handlelength=2.4)


def _draw_budgets(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the peak activations of a micro-batch by token budget, with the number of micro-batches on the bars."""
    fitting = [(x, row) for x, row in enumerate(rows) if "tokens" in row]
    tallest = max((max(row["baseline_activation_bytes"], row["activation_bytes"]) for _, row in fitting), default=1)
    unit, scale = ("GiB", 2**30) if tallest >= 2**30 else ("MiB", 2**20)
    for shift, name, prefix in ((-0.2, "baseline", "baseline_"), (0.2, "shared", "")):
        heights = [row[f"{prefix}activation_bytes"] / scale for _, row in fitting]
        bars = axes.bar([x + shift for x, _ in fitting], heights, 0.38, color=COLORS[name])
        axes.bar_label(bars, [short(row[f"{prefix}micro_batches"]) for _, row in fitting], fontsize=SMALL)
    for x, row in enumerate(rows):
        if "tokens" not in row:
            axes.text(x, 0, "does\nnot fit", ha="center", va="bottom", fontsize=SMALL)
    axes.set_xticks(range(len(rows)), [f"{row['max_tokens']:,}" for row in rows])
    axes.set(xlabel="token budget\n(on the bars: micro-batches)", ylabel=f"peak activations, {unit}")
    axes.set(xlim=(-0.6, len(rows) - 0.4), ylim=(0, 1.1 * tallest / scale))


def _draw_tokens(axes: Axes, tree: PrefixTree) -> None:
    """Draw the mask by token, and in the keys of every large shared prefix how many sequences see it."""
    size = tree.num_tokens
    axes.imshow(_token_colors(tree), interpolation="nearest", extent=(0, size, size, 0))
    start, stop, subtree_end = tree.segments.numpy().T
    is_wide = stop - start > size / 100
    axes.vlines(start[is_wide], start[is_wide], subtree_end[is_wide], color=PAPER, linewidth=0.8)
    sequences = _sequences(tree)[start]
    width, height = stop - start, subtree_end - stop
    for k in ((sequences > 1) & (width > size / 6) & (height > size / 4)).nonzero()[0]:
        text = f"{width[k]:,} tokens of\n{sequences[k]:,} sequences"
        center = (start[k] + stop[k]) / 2, (stop[k] + subtree_end[k]) / 2
        axes.text(*center, text, rotation=90, color=PAPER, ha="center", va="center", fontsize=SMALL)
    _show_thousands(axes)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set(xlabel="key (packed index)", ylabel="query (packed index)")


def _draw_segments(axes: Axes, tree: PrefixTree) -> None:
    """Draw a bar for each segment, x its positions and y its packed indices, and lines to its children."""
    start, stop, _ = tree.segments.numpy().T
    left, middle, length = tree.position_ids.numpy()[start], (start + stop) / 2, stop - start
    right, colors = left + length, _colors(tree)[start]
    height = np.minimum(0.8 * length, tree.num_tokens / 32)
    axes.barh(middle, length, height, left, color=colors, edgecolor=colors, linewidth=0.5)
    parent = tree.parent.numpy()[start]
    parent = np.searchsorted(start, parent, side="right") - 1  # the segment of the parent; -1 for roots
    last_child = middle.copy()
    np.maximum.at(last_child, parent[parent >= 0], middle[parent >= 0])
    axes.vlines(right, middle, last_child, color=colors, linewidth=0.8)
    for k in (length >= tree.num_tokens / 36).nonzero()[0]:  # high enough for a line of text
        axes.annotate(
            f"{length[k]:,}",
            (right[k], middle[k]),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    _show_thousands(axes)
    axes.set(xlabel="position in the sequence", ylabel="packed index")
    axes.set(xlim=(0, 1.18 * right.max()), ylim=(tree.num_tokens, 0))
    axes.set_title(f"prefix tree: {len(start):,} segments\nwith their lengths in tokens")


def _draw_blocks(axes: Axes, tree: PrefixTree) -> None:
    kinds = _block_kinds(tree)
    n, palette = len(kinds), np.array([to_rgb(color) for color in BLOCKS.values()])
    axes.imshow(palette[kinds], interpolation="nearest", extent=(0, n, n, 0))
    axes.set(xlabel="key block", ylabel="query block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, n + 1, -(-n // 12)))
        axis.set_ticks(range(n + 1) if n <= 32 else [], minor=True)
        axis.set_tick_params(which="minor", length=0)
    axes.grid(which="both", color=LINE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(True)
    handles = [
        Patch(facecolor=color, edgecolor=BASELINE, label=f"{name}: {int((kinds == k).sum()):,}")
        for k, (name, color) in enumerate(BLOCKS.items())
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, columnspacing=1.0)
    axes.set_title(f"block mask: {n:,} x {n:,} blocks\nof {BLOCK} x {BLOCK} tokens")


def _show_thousands(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _add_legend(place: Figure | Axes) -> None:
    handles = [Patch(color=color, label=f"tokens of {name}") for color, name in TOKENS.items()]
    if isinstance(place, Axes):
        place.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    else:
        place.legend(handles=handles, loc="outside lower center", ncols=2)


def _token_colors(tree: PrefixTree) -> np.ndarray:
    """Return [n, n, 3] RGB of at most 2,048 evenly spaced tokens; white where a query (row) does not see a key."""
    shown = torch.linspace(0, tree.num_tokens - 1, min(tree.num_tokens, MAX_PIXELS)).round().long()
    mask_mod, nothing = tree_mask_mod(tree.end), shown.new_zeros(())
    visible = mask_mod(nothing, nothing, shown[:, None], shown[None, :])
    return np.where(visible[..., None], _colors(tree)[shown][None], 1.0)


def _sequences(tree: PrefixTree) -> np.ndarray:
    """Return [tokens] int, the number of sequences that each token belongs to."""
    return torch.bincount(tree.node[tree.node >= 0], minlength=tree.num_tokens).numpy()


def _colors(tree: PrefixTree) -> np.ndarray:
    """Return [tokens, 3] RGB by whether a token belongs to several sequences."""
    return np.where(_sequences(tree)[:, None] > 1, to_rgb(PROMPT), to_rgb(COMPLETION))


def _block_kinds(tree: PrefixTree) -> np.ndarray:
    """Return [n, n] int from the tables of the block mask: 0 for skipped blocks, 1 partial, 2 full."""
    mask = block_mask(tree)
    kinds = np.zeros((tree.padded_length // BLOCK,) * 2, dtype=int)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    tables = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for value, (counts, columns) in enumerate(tables, 1):
        rows, ranks = (torch.arange(len(kinds)) < counts[0, 0, :, None]).nonzero(as_tuple=True)
        kinds[rows, columns[0, 0, rows, ranks]] = value
    return kinds
