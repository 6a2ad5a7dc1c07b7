"""Draw the figure at the top of README.md: `python docs/figures.py` writes docs/sharing.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from flexpg import PrefixTree, dense_mask

PROMPT, COMPLETION, EMPTY = "#1f6fb4", "#f0a04b", "#ffffff"
PROMPT_TOKENS, COMPLETION_TOKENS = 1000, (220, 140, 260, 180)


def main() -> None:
    """Draw the sequences of a group without and with sharing, and the mask of the packed sequence."""
    tree = PrefixTree.from_lengths([PROMPT_TOKENS], [COMPLETION_TOKENS])
    figure, (baseline, shared, mask) = plt.subplots(1, 3, figsize=(11, 3.3), width_ratios=(10, 10, 7))
    group_size = len(COMPLETION_TOKENS)

    for row, tokens in enumerate(COMPLETION_TOKENS):
        draw_sequence(baseline, row, [(PROMPT_TOKENS, PROMPT, "prompt"), (tokens, COMPLETION, f"{row + 1}")])
    baseline.set_title(f"Baseline: the prompt is encoded {group_size} times\n{tree.baseline_tokens:,} tokens")

    parts = [(PROMPT_TOKENS, PROMPT, "prompt")]
    parts += [(tokens, COMPLETION, f"{n + 1}") for n, tokens in enumerate(COMPLETION_TOKENS)]
    draw_sequence(shared, 1, parts)
    shared.set_title(f"flexpg: the prompt is encoded once\n{tree.num_tokens:,} tokens, the same gradients")
    shared.annotate(
        "each completion attends to\nthe prompt and to itself",
        (0.5 * tree.num_tokens, 1.75),
        ha="center",
        va="top",
        color="#444444",
    )
    for axes in (baseline, shared):
        axes.set(xlim=(-20, 1.01 * tree.num_tokens), ylim=(group_size - 0.3, -0.6))
        axes.set_axis_off()

    visible = dense_mask(tree.end[: tree.num_tokens]).numpy()
    colors = np.array([matplotlib.colors.to_rgb(c) for c in (EMPTY, PROMPT, COMPLETION)])
    is_completion = np.arange(tree.num_tokens) >= PROMPT_TOKENS  # of the key
    mask.imshow(colors[visible * (1 + is_completion[None, :])], interpolation="nearest")
    mask.set_title("Attention mask of the\npacked sequence")
    mask.set(xlabel="key", ylabel="query", xticks=[], yticks=[])

    handles = [Patch(color=PROMPT, label="prompt"), Patch(color=COMPLETION, label="completion")]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.02, -0.01), ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "sharing.png", dpi=200, bbox_inches="tight")


def draw_sequence(axes: plt.Axes, row: float, parts: list[tuple[int, str, str]]) -> None:
    """Draw a sequence as a bar of parts: (tokens, color, label)."""
    start = 0
    for tokens, color, label in parts:
        axes.barh(row, tokens, 0.62, start, color=color, edgecolor="white", linewidth=1.5)
        axes.text(start + tokens / 2, row, label, ha="center", va="center", color="white", fontweight="bold")
        start += tokens


if __name__ == "__main__":
    main()
