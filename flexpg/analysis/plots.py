"""Pictures of a run: what it learned, the mask of a batch, its tree, and what sharing saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flexpg.analysis.flops import dense_cost, group_cost, shared_cost
from flexpg.analysis.report import Comparison, Packed, Report, ratios, short_count
from flexpg.masks import block_mask, tree_mask_mod
from flexpg.rollouts import Rollouts
from flexpg.tree import BLOCK, PrefixTree

MAX_PIXELS = 2048
LABEL_PT = 7.0  # font size of a segment's length
DENSE, SHARED, QUIET = "#b8b8b8", "#1f6fb4", "#9ecae1"


def plot_run(folder: Path, rewards: Sequence[float], accuracies: dict[int, float], rollouts: Rollouts | None) -> None:
    """Draws reward.png, and of a step's rollouts mask.png, of two groups, and savings.png.

    In the mask equal beginnings of completions are not merged, as training does, so that all can be seen.

    Args:
        folder: where the pictures go.
        rewards: as in `plot_reward`.
        accuracies: as in `plot_reward`.
        rollouts: group by group; None draws the reward alone.
    """
    plot_reward(folder / "reward.png", rewards, accuracies)
    if rollouts is None:  # of a run that was resumed when all steps were done
        return
    groups = rollouts.group_ids.tolist()
    completions = [
        [own for own, group in zip(rollouts.completions, groups, strict=True) if group == number]
        for number in range(min(2, rollouts.num_groups))
    ]
    plot_mask(folder / "mask.png", PrefixTree.from_groups(rollouts.prompts[: len(completions)], completions))
    plot_savings(folder / "savings.png", rollouts)


def plot_reward(path: Path, rewards: Sequence[float], accuracies: dict[int, float]) -> None:
    """The training reward of every step and the held-out accuracy, over steps.

    Args:
        path: picture to write.
        rewards: mean reward of step 1, 2, ...
        accuracies: step -> held-out accuracy, step 0 being before training.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(rewards) + 1)
    axes.plot(steps, rewards, color=QUIET, linewidth=1.5, label="training reward, mean of the step's rollouts")
    axes.plot(
        list(accuracies),
        list(accuracies.values()),
        "o-",
        color=SHARED,
        clip_on=False,
        label="held-out accuracy, greedy",
    )
    axes.set(xlabel="GRPO step", ylabel="reward", xlim=(0, max(len(rewards), 1)))
    if all(0 <= value <= 1 for value in (*rewards, *accuracies.values())):
        axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    _plain(axes)
    figure.savefig(path, dpi=200)


def plot_mask(path: Path, tree: PrefixTree) -> None:
    """The mask of a packed row token by token, coloured by the segment that is seen, and as FlexAttention's blocks.

    Args:
        path: picture to write.
        tree: the packed row, of any length; beyond 2,048 tokens the picture shows that many of them.
    """
    tree = tree.to("cpu")
    figure = Figure(figsize=(10.4, 5.0), layout="constrained")
    by_token, by_block = figure.subplots(1, 2)
    _draw_tokens(by_token, tree)
    _draw_blocks(by_block, tree)
    figure.savefig(path, dpi=200)


def plot_tree(path: Path, tree: PrefixTree) -> None:
    """The tree drawn as a tree, beside its mask: every segment is a bar that stands level with its rows of the mask.

    A bar runs from the position of its segment's first token to that of its last; its length in tokens stands behind
    it, where there is room. A thin line leads from a segment's end to what continues it.

    Args:
        path: picture to write.
        tree: the packed row, of any length; beyond 2,048 tokens the mask shows that many of them.
    """
    tree = tree.to("cpu")
    figure = Figure(figsize=(10.4, 5.0), layout="constrained")
    as_tree, by_token = figure.subplots(1, 2, sharey=True)
    _draw_tokens(by_token, tree)
    by_token.set(aspect="auto", ylabel="")  # a square of its own would not stand level with the tree
    _draw_segments(as_tree, tree)
    figure.draw_without_rendering()  # the layout is known after it
    _label_segments(as_tree, tree)
    figure.savefig(path, dpi=200)


def plot_savings(path: Path, rollouts: Rollouts) -> None:
    """Tokens and attention pairs of a step with and without sharing, and how the saving grows with the group.

    Args:
        path: picture to write.
        rollouts: a real step.
    """
    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(5, 4))
    tree = PrefixTree.from_sequences(rollouts.sequences)
    costs = (dense_cost(tree), group_cost(rollouts), shared_cost(tree))
    counts = {
        "tokens": [cost.tokens for cost in costs],
        "attention\npairs": [cost.attention_pairs for cost in costs],
    }
    _draw_costs(bars, counts, "one step of this run")
    prompt, completion = rollouts.prompt_lens.float().mean().item(), rollouts.completion_lens.float().mean().item()
    group_size = len(rollouts) / rollouts.num_groups
    sizes = np.arange(1, max(2 * group_size, 8) + 1)
    curve.plot(sizes, _token_ratio(sizes, prompt, completion), color=SHARED, label="prompts once")
    curve.plot(group_size, _token_ratio(group_size, prompt, completion), "o", color=SHARED, label=f"G = {group_size:g}")
    curve.axhline(1 + prompt / completion, color=DENSE, linestyle="--", label="limit, 1 + P / R")
    curve.set(xlabel="completions per prompt, G", ylabel="tokens, unshared / shared", ylim=(0, None))
    curve.set_title(f"prompt P = {prompt:.0f}, completion R = {completion:.0f} tokens", fontsize="medium")
    curve.grid(alpha=0.3)
    curve.legend(loc="lower right", frameon=False)
    _plain(curve)
    figure.savefig(path, dpi=200)


def plot_report(path: Path, found: Report) -> None:
    """A report in pictures: what each way of encoding needs, the saving by group size, micro-batches by token budget.

    Args:
        path: picture to write.
        found: what `flexpg.analysis.report.report` gave.
    """
    figure = Figure(figsize=(10.4, 8.0), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(9, 8))
    ways = (found.whole.unshared, found.whole.prompts_once, found.whole.tree)
    counts = {
        "tokens": [way.tokens for way in ways],
        "attention\npairs": [way.attention_pairs for way in ways],
        "FLOPs of\nan update": [way.flops for way in ways],
    }
    title = f"{found.whole.rollouts:,} completions of {found.prompts:,} prompts, as one update"
    _draw_costs(figure.add_subplot(grid[0, :]), counts, title)
    _draw_sizes(figure.add_subplot(grid[1, 0]), found.by_group_size)
    _draw_budgets(figure.add_subplot(grid[1, 1]), found.by_max_tokens)
    figure.savefig(path, dpi=200)


def _token_ratio(group_size: np.ndarray | float, prompt: float, completion: float) -> np.ndarray | float:
    return group_size * (prompt + completion) / (prompt + group_size * completion)


def _draw_costs(axes: Axes, counts: Mapping[str, Sequence[int]], title: str) -> None:
    """A bar for each way of encoding, relative to the first, for each of the named counts."""
    labels = ("every prompt once per completion", "every prompt once", "equal beginnings merged too")
    for y, ways in enumerate(counts.values()):
        for row, (count, colour, label) in enumerate(zip(ways, (DENSE, QUIET, SHARED), labels, strict=True)):
            middle = y + 0.26 * (row - 1)
            axes.barh(middle, count / ways[0], 0.24, color=colour, label=None if y else label)
            whole = f"{count:,}" if count < 1e9 else short_count(count)
            note = whole if row == 0 else f"{whole}   ({ways[0] / count:.1f} x fewer)"
            axes.text(count / ways[0] + 0.015, middle, note, va="center", fontsize="small")
    axes.set(yticks=range(len(counts)), yticklabels=list(counts), xticks=[], xlim=(0, 1.2))
    axes.set_ylim(len(counts) - 0.55, -0.85)
    axes.legend(loc="upper left", frameon=False, ncols=3, fontsize="x-small", columnspacing=1.0)
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_sizes(axes: Axes, by_group_size: Mapping[int, Comparison]) -> None:
    """What sharing saves over the group size: FLOPs and tokens of the tree, and tokens with prompts once."""
    trees = [ratios(each.unshared, each.tree) for each in by_group_size.values()]
    once = [ratios(each.unshared, each.prompts_once)["tokens_ratio"] for each in by_group_size.values()]
    sizes = list(by_group_size)
    axes.plot(sizes, [each["expected_speedup"] for each in trees], "o-", color=SHARED, label="FLOPs, tree")
    axes.plot(sizes, [each["tokens_ratio"] for each in trees], "s--", color=SHARED, label="tokens, tree")
    axes.plot(sizes, once, "s--", color=QUIET, label="tokens, prompts once")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.minorticks_off()
    axes.set(xlabel="first G completions of every prompt", ylabel="unshared / shared", ylim=(0, None))
    axes.set_title("by group size; FLOPs: the speed-up to expect", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, fontsize="small")
    _plain(axes)


def _draw_budgets(axes: Axes, by_max_tokens: Mapping[int, Packed | str]) -> None:
    """Peak activations of a micro-batch over its token budget, with the number of micro-batches on the bars."""
    ways = (
        ("unshared", -0.2, DENSE, "unshared_micro_batches", "unshared_peak_activation_bytes"),
        ("tree", 0.2, SHARED, "micro_batches", "peak_activation_bytes"),
    )
    possible = {x: packed for x, packed in enumerate(by_max_tokens.values()) if not isinstance(packed, str)}
    tallest = max((getattr(packed, peak) for packed in possible.values() for *_, peak in ways), default=1)
    unit, scale = ("GiB", 2**30) if tallest >= 2**30 else ("MiB", 2**20)
    for label, shift, colour, count, peak in ways:
        heights = {x + shift: getattr(packed, peak) / scale for x, packed in possible.items()}
        axes.bar(list(heights), list(heights.values()), 0.38, color=colour, label=label)
        for (x, height), packed in zip(heights.items(), possible.values(), strict=True):
            axes.text(x, height, f"{getattr(packed, count):,}", ha="center", va="bottom", fontsize="small")
    for x in set(range(len(by_max_tokens))) - set(possible):
        axes.text(x, 0, "not\npossible", ha="center", va="bottom", fontsize="small")
    axes.set_xticks(range(len(by_max_tokens)), [f"{budget:,}" for budget in by_max_tokens])
    axes.set(xlabel="max_tokens of a micro-batch", ylabel=f"activations at their peak, {unit}")
    axes.set(xlim=(-0.6, len(by_max_tokens) - 0.4), ylim=(0, 1.2 * tallest / scale))
    axes.set_title("by token budget; on the bars: micro-batches", fontsize="medium")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    _plain(axes)


def _draw_tokens(axes: Axes, tree: PrefixTree) -> None:
    size, pairs = tree.num_tokens, shared_cost(tree).attention_pairs
    axes.imshow(_token_colours(tree), interpolation="nearest", extent=(0, size, size, 0))
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(f"{size:,} tokens, {pairs:,} pairs, coloured by the segment seen", fontsize="medium")


def _draw_segments(axes: Axes, tree: PrefixTree) -> None:
    """A bar for each segment, x its positions and y its packed rows, and lines from parents to children."""
    boxes = _segment_boxes(tree)
    left, right, top, bottom = boxes.T
    colours = _segment_colours(tree)
    axes.barh((top + bottom) / 2, right - left, bottom - top, left, color=colours, edgecolor=colours, linewidth=0.5)
    parent = _segment_parents(tree)
    middle = (top + bottom) / 2
    last_child = middle.copy()
    np.maximum.at(last_child, parent[parent >= 0], middle[parent >= 0])
    axes.vlines(right, middle, last_child, color=colours, linewidth=0.8)
    axes.set(xlabel="position", ylabel="packed token", xlim=(0, 1.1 * right.max()), ylim=(tree.num_tokens, 0))
    axes.set_title(f"{len(boxes):,} segments, their lengths in tokens", fontsize="medium")
    _plain(axes)


def _label_segments(axes: Axes, tree: PrefixTree) -> None:
    """Writes lengths behind the bars, the longest first, and leaves out those that would lie on a bar or a label."""
    left, right, top, bottom = _segment_boxes(tree).T
    points_per_pixel = 72 / axes.figure.dpi
    to_points = axes.transData.transform
    corner, opposite = (
        to_points(np.stack(xy, 1)) * points_per_pixel for xy in ((left, bottom), (right, top))
    )  # [K, 2] each, y upwards
    taken = np.concatenate([corner, opposite], 1)  # [K, 4] left, lower, right, upper
    lengths = np.diff(tree.segments[:, :2].numpy(), axis=1)[:, 0]
    for k in np.argsort(-lengths, kind="stable"):
        note, middle = f"{lengths[k]:,}", (corner[k, 1] + opposite[k, 1]) / 2
        start = opposite[k, 0] + 2
        reach = np.array([0.65 * len(note), 0.4]) * LABEL_PT  # digits are 0.64 wide and 0.73 high
        box = np.array([start, middle - reach[1], start + reach[0], middle + reach[1]])
        if not ((taken[:, :2] < box[2:]) & (box[:2] < taken[:, 2:])).all(1).any():
            axes.annotate(
                note,
                (right[k], (top[k] + bottom[k]) / 2),
                (2, 0),
                textcoords="offset points",
                va="center",
                size=LABEL_PT,
            )
            taken = np.concatenate([taken, box[None]])


def _segment_boxes(tree: PrefixTree) -> np.ndarray:
    """[K, 4] left, right, top, bottom of the bars: positions, and packed tokens around the middle of the segment's."""
    start, stop, _ = tree.segments.numpy().T
    left, middle = tree.position_ids.numpy()[start], (start + stop) / 2
    half = np.minimum(0.8 * (stop - start), tree.num_tokens / 40) / 2
    return np.stack([left, left + stop - start, middle - half, middle + half], 1)


def _segment_parents(tree: PrefixTree) -> np.ndarray:
    """[K] the segment that each one continues, -1 for roots."""
    start = tree.segments[:, 0].numpy()
    parent = tree.parent.numpy()[start]
    return np.where(parent < 0, -1, np.searchsorted(start, parent, side="right") - 1)


def _draw_blocks(axes: Axes, tree: PrefixTree) -> None:
    kind = _block_kinds(tree)
    n = len(kind)
    palette = np.array([[1.0, 1.0, 1.0], [0.62, 0.79, 0.88], [0.12, 0.44, 0.71]])
    axes.imshow(palette[kind], interpolation="nearest", extent=(0, n, n, 0))
    axes.set(xlabel=f"key block of {BLOCK}", ylabel=f"query block of {BLOCK}", xticks=range(n + 1), yticks=range(n + 1))
    axes.tick_params(labelbottom=n <= 24, labelleft=n <= 24)
    axes.grid(color="#dddddd", linewidth=0.5)
    names = ("skipped", "masked within", "full, no mask evaluated")
    axes.legend(
        handles=[
            Patch(facecolor=palette[k], edgecolor="#999999", label=f"{name}: {int((kind == k).sum())}")
            for k, name in enumerate(names)
        ],
        loc="upper right",
        fontsize="small",
    )
    axes.set_title(f"FlexAttention's {n} x {n} blocks of {BLOCK}", fontsize="medium")


def _token_colours(tree: PrefixTree) -> np.ndarray:
    """[n, n, 3] RGB of at most 2,048 tokens, evenly spaced; white where a query (row) does not see a key (column)."""
    size = tree.num_tokens
    is_start = torch.zeros(size, dtype=torch.long)
    is_start[tree.segments[1:, 0]] = 1
    shown = torch.linspace(0, size - 1, min(size, MAX_PIXELS)).round().long()
    by_key = _segment_colours(tree)[is_start.cumsum(0)[shown]]
    mask_mod, nothing = tree_mask_mod(tree.end), shown.new_zeros(())
    visible = mask_mod(nothing, nothing, shown[:, None], shown[None, :])
    return np.where(visible[..., None], by_key[None], 1.0)


def _block_kinds(tree: PrefixTree) -> np.ndarray:
    """[n, n] int: 0 for blocks that are skipped, 1 masked, 2 full; read off the tables of the block mask."""
    mask = block_mask(tree)
    kind = np.zeros((len(tree) // BLOCK,) * 2, dtype=int)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    tables = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for value, (counts, columns) in enumerate(tables, 1):
        rows, ranks = (torch.arange(len(kind)) < counts[0, 0, :, None]).nonzero(as_tuple=True)
        kind[rows, columns[0, 0, rows, ranks]] = value
    return kind


def _segment_colours(tree: PrefixTree) -> np.ndarray:
    """[K, 3] RGB: segments with something under them dark, leaves in light hues that tell neighbours apart."""
    _, stop, subtree_end = tree.segments.numpy().T
    has_children = subtree_end > stop
    leaf_hues = colormaps["tab20"](np.arange(len(stop)) * 2 % 20 + 1)[:, :3]
    trunk_hues = colormaps["tab10"](np.cumsum(has_children) % 10)[:, :3] * 0.75
    return np.where(has_children[:, None], trunk_hues, leaf_hues)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
