"""Colors and text sizes of all figures. A color has one meaning in README, docs, reports and notebooks.

Those of tokens and of implementations are from the palette of Okabe and Ito, which people with color vision deficiency
can tell apart. Figures are 8.3 inches wide: at the width of a README, 830 pixels, text of 9 points has 12 pixels.
"""

from __future__ import annotations

from typing import Any

WIDTH = 8.3  # inches

PROMPT = "#0072b2"  # tokens of prompts and other shared prefixes
COMPLETION = "#e69f00"  # tokens of completions and everything else that belongs to one sequence
BASELINE = "#999999"  # the baseline, and other implementations that flexpg is compared with
SHARED = "#009e73"  # flexpg: computed on shared prefixes
SHARED_TEXT = "#00664b"  # the same for text, dark enough on white
PARTLY_SHARED = "#8fd3bd"  # less than that: only prompts are encoded once, or a block is computed in part
REWARD = "#a65aa8"  # what a model has learned
INK, LINE, PAPER = "#222222", "#cccccc", "#ffffff"  # text, grid lines, background

# For lines and areas without a meaning above, such as metrics of a run; readable on light and dark pages.
SERIES = ("#6c7a89", "#cc6677", "#999933", "#8a6fc0", "#66aacc", "#b0a090")

SMALL = 9.0  # points
STYLE: dict[Any, Any] = {  # matplotlib's types know the names of its options
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.6,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
}
