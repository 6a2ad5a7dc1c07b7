"""Pictures of a run: what it learned, the mask of a batch, and what sharing saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flexpg.cost import Cost, dense_cost, group_cost, shared_cost
from flexpg.masks import block_mask, tree_mask_mod
from flexpg.rollouts import Rollouts
from flexpg.tree import BLOCK, PrefixTree

MAX_PIXELS = 2048
DENSE, SHARED, QUIET = "#b8b8b8", "#1f6fb4", "#9ecae1"


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


def plot_savings(path: Path, rollouts: Rollouts) -> None:
    """Tokens and attention pairs of a step with and without sharing, and how the saving grows with the group.

    Args:
        path: picture to write.
        rollouts: a real step.
    """
    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(5, 4))
    tree = PrefixTree.from_sequences(rollouts.sequences)
    _draw_costs(bars, {"unshared": dense_cost(tree), "prompts once": group_cost(rollouts), "tree": shared_cost(tree)})
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


def _token_ratio(group_size: np.ndarray | float, prompt: float, completion: float) -> np.ndarray | float:
    return group_size * (prompt + completion) / (prompt + group_size * completion)


def _draw_costs(axes: Axes, costs: dict[str, Cost]) -> None:
    """A bar for each way of encoding, relative to the first, for tokens and for attention pairs."""
    labels = ("every prompt once per completion", "every prompt once", "equal beginnings merged too")
    for y, unit in enumerate(("tokens", "attention_pairs")):
        counts = [getattr(cost, unit) for cost in costs.values()]
        for row, (count, colour, label) in enumerate(zip(counts, (DENSE, QUIET, SHARED), labels, strict=True)):
            middle = y + 0.26 * (row - 1)
            axes.barh(middle, count / counts[0], 0.24, color=colour, label=None if y else label)
            note = f"{count:,}" if row == 0 else f"{count:,}   ({counts[0] / count:.1f} x fewer)"
            axes.text(count / counts[0] + 0.015, middle, note, va="center", fontsize="small")
    axes.set(yticks=(0, 1), yticklabels=("tokens", "attention\npairs"), xticks=[], ylim=(1.45, -0.85), xlim=(0, 1.2))
    axes.legend(loc="upper left", frameon=False, ncols=3, fontsize="x-small", columnspacing=1.0)
    axes.set_title("one step of this run", fontsize="medium")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_tokens(axes: Axes, tree: PrefixTree) -> None:
    size, pairs = tree.num_tokens, shared_cost(tree).attention_pairs
    axes.imshow(_token_colours(tree), interpolation="nearest", extent=(0, size, size, 0))
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(f"{size:,} tokens, {pairs:,} pairs, coloured by the segment seen", fontsize="medium")


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
