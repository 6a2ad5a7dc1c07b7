"""Draw the figures of README and docs into docs/.

python -m docs.figures sharing                 # sharing.png
python -m docs.figures update paper_figure     # from benchmarks/results; `make bench` does this too
python -m docs.figures demo                    # reward.png, mask.png and savings.png of a finished `make demo`
python -m docs.figures report --solutions FILE # tree.png and report.png, by the snippets of docs/report.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.paper_figure import GROUPS, NAMED, PROMPTS, PUBLISHED, RATIOS
from benchmarks.record import RESULTS
from benchmarks.tables import COMPARED, lengths
from flexpg import PrefixTree, dense_mask
from flexpg.__main__ import main as flexpg_command
from flexpg.analysis.palette import (
    BASELINE,
    COMPLETION,
    INK,
    LINE,
    PAPER,
    PROMPT,
    SHARED,
    SHARED_TEXT,
    SMALL,
    STYLE,
    WIDTH,
)

DOCS = Path(__file__).resolve().parent
DPI = 200
PROMPT_TOKENS, COMPLETION_TOKENS = 1000, (220, 140, 260, 180)

Part = tuple[int, str, str, str]  # tokens, color, label, color of the label


def draw_sharing() -> None:
    """Draw the sequences of a group, which become one packed sequence, and its mask."""
    tree = PrefixTree.from_lengths([PROMPT_TOKENS], [COMPLETION_TOKENS])
    figure = plt.figure(figsize=(WIDTH, 4.1), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(11, 10))
    draw_packing(figure.add_subplot(grid[0]), tree)
    draw_mask(figure.add_subplot(grid[1]), tree)
    save_figure(figure, "sharing")


def draw_packing(axes: plt.Axes, tree: PrefixTree) -> None:
    """Draw the sequences of the baseline, and below them the packed sequence, on one scale of tokens."""
    prompt = (PROMPT_TOKENS, PROMPT, f"prompt {PROMPT_TOKENS:,}", PAPER)
    completions = [(tokens, COMPLETION, f"{tokens}", INK) for tokens in COMPLETION_TOKENS]
    group_size, middle = len(completions), tree.num_tokens / 2
    axes.text(0, -0.75, f"Baseline: the prompt is encoded {group_size} times", fontweight="bold")
    for row, completion in enumerate(completions):
        draw_sequence(axes, row, [prompt, completion])
        axes.text(PROMPT_TOKENS + completion[0] + 25, row, f"completion {row + 1}", va="center", fontsize=SMALL + 0.5)
    axes.text(0, 4.05, f"{tree.baseline_tokens:,} tokens", fontweight="bold")
    arrow = dict(arrowstyle="-|>,head_width=0.5,head_length=0.7", color=SHARED, linewidth=4)
    axes.annotate("", (middle, 5.0), (middle, 3.75), arrowprops=arrow)
    axes.text(0, 5.35, "flexpg: the prompt is encoded once", fontweight="bold")
    draw_sequence(axes, 6.1, [prompt, *completions])
    ratio = tree.baseline_tokens / tree.num_tokens
    count = f"{tree.num_tokens:,} tokens ({ratio:.1f}x fewer), the same gradients"
    axes.text(0, 7.15, count, fontweight="bold", color=SHARED_TEXT)
    axes.set(xlim=(-10, 1.005 * tree.num_tokens), ylim=(7.3, -1.2))
    axes.set_axis_off()


def draw_sequence(axes: plt.Axes, row: float, parts: list[Part]) -> None:
    """Draw a sequence as a bar of parts."""
    start = 0
    for tokens, color, label, label_color in parts:
        axes.barh(row, tokens, 0.8, start, color=color, edgecolor=PAPER, linewidth=1.5)
        axes.text(start + tokens / 2, row, label, ha="center", va="center", color=label_color, fontsize=SMALL + 0.5)
        start += tokens


def draw_mask(axes: plt.Axes, tree: PrefixTree) -> None:
    """Draw the mask of the packed sequence; its axes name the prompt and the completions."""
    visible = dense_mask(tree.end[: tree.num_tokens]).numpy()
    colors = np.array([to_rgb(c) for c in (PAPER, PROMPT, COMPLETION)])
    is_completion = np.arange(tree.num_tokens) >= PROMPT_TOKENS  # of the key
    extent = (0, tree.num_tokens, tree.num_tokens, 0)
    axes.imshow(colors[visible * (1 + is_completion[None, :])], interpolation="nearest", extent=extent)
    edges = np.cumsum((0, PROMPT_TOKENS, *COMPLETION_TOKENS))
    names = ["prompt", *map(str, range(1, len(COMPLETION_TOKENS) + 1))]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks((edges[1:] + edges[:-1]) / 2, names)
        axis.set_tick_params(length=0)
    axes.set_yticks(axes.get_yticks(), names, rotation=90, va="center")
    axes.hlines(edges[1:-1], 0, tree.num_tokens, color=LINE, linewidth=0.8)
    axes.vlines(edges[1:-1], 0, tree.num_tokens, color=LINE, linewidth=0.8)
    third = (edges[3] + edges[4]) / 2
    axes.text(PROMPT_TOKENS / 2, third, "every completion\nsees the prompt", color=PAPER, ha="center", va="center")
    axes.text(1400, 500, "white: not visible", ha="center", va="center", backgroundcolor=PAPER)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="keys", ylabel="queries")
    axes.set_title("Attention mask of the packed sequence", fontweight="bold", fontsize=10.5)


def draw_update() -> None:
    """Draw the time of an update by every other implementation, relative to flexpg's, a panel per case."""
    result = json.loads((RESULTS / "update_cpu.json").read_text())
    cases = sorted(result["cases"], key=lambda case: (case["prompt"], len(set(case["completions"])) > 1))
    figure, axes = plt.subplots(
        len(cases) // 2, 2, figsize=(WIDTH, 8.6), layout="constrained", sharex=True, sharey=True
    )
    longest = max(gain["median"] for case in cases for gain in case["speedup_over"].values())
    for axis, case in zip(axes.flat, cases, strict=True):
        for n, name in enumerate(COMPARED):
            gain = case["speedup_over"].get(name)
            if gain is None:
                axis.text(1.15, n, "not measured", va="center", fontsize=SMALL, style="italic")
                continue
            axis.barh(n, gain["median"], 0.72, color=BASELINE)
            axis.text(gain["median"] + 0.15, n, f"{gain['median']:.1f}x", va="center", fontsize=SMALL)
        axis.barh(len(COMPARED), 1, 0.72, color=SHARED)
        axis.text(
            1.15,
            len(COMPARED),
            f"1x = {case['update_ms']['flexpg']['median'] / 1000:.2f} s",
            va="center",
            fontsize=SMALL,
        )
        axis.axvline(1, color=SHARED, linewidth=1)
        axis.set_title(f"{lengths(case)} tokens", fontweight="bold", loc="left")
        axis.set_yticks(range(len(COMPARED) + 1), [*COMPARED.values(), "flexpg"])
        axis.set(xlim=(0, 1.1 * longest), xticks=[])
        axis.tick_params(length=0)
        axis.spines["bottom"].set_visible(False)
    axes[0, 0].invert_yaxis()  # of all, which share it
    figure.suptitle("Time of a GRPO update, relative to flexpg (1x)", fontsize=12.5, fontweight="bold")
    figure.supxlabel(f"Medians of {result['repeats']} repeats, float32. {machine(result)}", fontsize=SMALL)
    save_result_figure(figure, "update")


def draw_paper_figure() -> None:
    """Draw published points, the cost model's line and measurements, a panel per group size."""
    result = json.loads((RESULTS / "paper_figure_cpu.json").read_text())
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), layout="constrained")
    for axis, group in zip(axes.flat, GROUPS, strict=True):
        cells = [cell for cell in result["cells"] if cell["group"] == group]
        lines = [[cell[f"counted_{prompt}"] for cell in cells] for prompt in PROMPTS]
        axis.fill_between(RATIOS, *lines[::2], color=SHARED, alpha=0.25, linewidth=0)
        label = f"FLOPs, cost model of {NAMED}: line P = 4,096, band to 16,384"
        axis.plot(RATIOS, lines[0], color=SHARED, label=label)
        label = "FLOPs, Prefix Grouper paper: P = 4,096"
        axis.plot(RATIOS, PUBLISHED[group], "o", color=BASELINE, markeredgecolor=INK, markersize=6, label=label)
        measured = [cell["measured_seconds"] for cell in cells]
        label = f"seconds, measured with a small model: P = {result['measured_prompt_tokens']}"
        axis.plot(RATIOS, measured, "x", color=SHARED, markeredgewidth=2, markersize=7, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        axis.minorticks_off()
        axis.set_ylim(0, 1.07 * max(*PUBLISHED[group], *lines[0], *measured))
        axis.set_title(f"G = {group}", fontweight="bold")
        axis.grid()
    for axis in axes[1]:
        axis.set_xlabel("prompt tokens P / completion tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("baseline / shared")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=1)
    figure.supxlabel(f"Measured: float32. {machine(result)}", fontsize=SMALL)
    save_result_figure(figure, "paper_figure")


def machine(result: dict) -> str:
    """Return on what a result was measured."""
    name = re.sub(r"\((R|TM)\)", "", result["machine"]).replace(", 1 threads", ", 1 thread")
    return f"{name}, torch {result['versions']['torch'].partition('+')[0]}"


def save_figure(figure: plt.Figure, name: str, description: str = "") -> None:
    """Save a figure into docs/ as PNG."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    save_png(file, name, description)


def save_png(file: BytesIO | Path, name: str, description: str = "") -> None:
    """Save a PNG into docs/ with 96 colors, which makes it several times smaller, and no transparency."""
    info = PngInfo()
    if description:
        info.add_text("Description", description)
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    small.save(DOCS / f"{name}.png", optimize=True, pnginfo=info)


def save_result_figure(figure: plt.Figure, name: str) -> None:
    """Save a figure of a result with the result's checksum, by which a test sees whether it is up to date."""
    checksum = hashlib.sha256((RESULTS / f"{name}_cpu.json").read_bytes()).hexdigest()
    save_figure(figure, name, checksum)


def copy_demo_figures() -> None:
    """Save what the demo has drawn."""
    for name in ("reward", "mask", "savings"):
        save_png(DOCS.parent / f"runs/tiny_cpu/{name}.png", name)


def draw_report(solutions: Path) -> None:
    """Run the example of docs/report.md: its two snippets and its command.

    Args:
        solutions: example_model_solutions.jsonl of openai/grade-school-math.
    """
    page, solutions = (DOCS / "report.md").read_text(), solutions.resolve()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    command = re.search(r"^\$ flexpg (report .*?)\n\n", page, re.DOTALL | re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.symlink(DOCS.parent / "recipes", "recipes")
        os.symlink(solutions, "example_model_solutions.jsonl")
        for snippet in snippets:
            exec(snippet, {})
        flexpg_command(command.replace("\\\n", " ").split())
        for name in ("tree", "report"):
            save_png(Path(f"{name}.png"), name)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the named figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    draw = {"sharing": draw_sharing, "update": draw_update, "paper_figure": draw_paper_figure}
    draw |= {"demo": copy_demo_figures, "report": draw_report}
    parser.add_argument("names", nargs="+", metavar="NAME", choices=draw)
    parser.add_argument("--solutions", metavar="FILE", type=Path, help="example_model_solutions.jsonl of GSM8K")
    args = parser.parse_args(argv)
    if "report" in args.names and args.solutions is None:
        parser.error("report needs --solutions FILE")
    plt.rcParams.update(STYLE)
    for name in args.names:
        draw[name](*[args.solutions] if name == "report" else [])


if __name__ == "__main__":
    main()
