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
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from benchmarks.paper_figure import GROUPS, NAMED, PROMPTS, PUBLISHED, RATIOS
from benchmarks.record import RESULTS
from benchmarks.tables import COMPARED, lengths
from flexpg import PrefixTree, dense_mask
from flexpg.__main__ import main as flexpg_command

DOCS = Path(__file__).resolve().parent
PROMPT, COMPLETION, EMPTY = "#1f6fb4", "#f0a04b", "#ffffff"
PROMPT_TOKENS, COMPLETION_TOKENS = 1000, (220, 140, 260, 180)


def draw_sharing() -> None:
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
    figure.savefig(DOCS / "sharing.png", dpi=200, bbox_inches="tight")


def draw_sequence(axes: plt.Axes, row: float, parts: list[tuple[int, str, str]]) -> None:
    """Draw a sequence as a bar of parts: (tokens, color, label)."""
    start = 0
    for tokens, color, label in parts:
        axes.barh(row, tokens, 0.62, start, color=color, edgecolor="white", linewidth=1.5)
        axes.text(start + tokens / 2, row, label, ha="center", va="center", color="white", fontweight="bold")
        start += tokens


def draw_update() -> None:
    """Draw flexpg's speed-up over every other implementation of an update, a panel per case."""
    cases = json.loads((RESULTS / "update_cpu.json").read_text())["cases"]
    cases.sort(key=lambda case: len(set(case["completions"])) > 1)
    figure, axes = plt.subplots(2, len(cases) // 2, figsize=(13, 6.4), layout="constrained", sharey=True)
    for axis, case in zip(axes.flat, cases, strict=True):
        for n, name in enumerate(COMPARED):
            if (gain := case["speedup_over"].get(name)) is None:
                continue
            whiskers = [[gain["median"] - gain["low_quartile"]], [gain["high_quartile"] - gain["median"]]]
            axis.barh(n, gain["median"], xerr=whiskers, color=f"C{n}")
            axis.text(gain["high_quartile"], n, f"  {gain['median']:.1f}x", va="center", fontsize=8)
        axis.axvline(case["bound"], color="black", linestyle=":", linewidth=1)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_title(f"{lengths(case)} tokens", fontsize=10)
        axis.set_yticks(range(len(COMPARED)), [f"over {name}" for name in COMPARED.values()])
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()  # of all, which share it
    figure.supxlabel(
        "speed-up of an update by flexpg (dotted: the cost model's bound, over the baseline without padding)"
    )
    save_result_figure(figure, "update", dpi=110)


def draw_paper_figure() -> None:
    """Draw published points, the cost model's line and measurements, a panel per group size."""
    result = json.loads((RESULTS / "paper_figure_cpu.json").read_text())
    figure, axes = plt.subplots(1, len(GROUPS), figsize=(13, 3.6), layout="constrained")
    for axis, group in zip(axes, GROUPS, strict=True):
        cells = [cell for cell in result["cells"] if cell["group"] == group]
        lines = [[cell[f"counted_{prompt}"] for cell in cells] for prompt in PROMPTS]
        axis.fill_between(RATIOS, *lines[::2], color="tab:blue", alpha=0.25, linewidth=0)
        label = f"FLOPs, cost model ({NAMED}; line P = 4,096, band to 16,384)"
        axis.plot(RATIOS, lines[0], color="tab:blue", label=label)
        axis.plot(RATIOS, PUBLISHED[group], "o", color="black", markersize=4, label="FLOPs, the paper (P = 4,096)")
        measured = [cell["measured_seconds"] for cell in cells]
        label = f"seconds, measured (small model, one core, P = {result['measured_prompt_tokens']})"
        axis.plot(RATIOS, measured, "x", color="tab:red", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        axis.set_ylim(0, 1.07 * max(*PUBLISHED[group], *lines[0], *measured))
        axis.set_title(f"G = {group}")
        axis.set_xlabel("prompt / completion tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("baseline / shared")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_result_figure(figure, "paper_figure", dpi=130)


def save_result_figure(figure: plt.Figure, name: str, dpi: int) -> None:
    """Save a figure of a result with the result's checksum, by which a test sees whether it is up to date."""
    checksum = hashlib.sha256((RESULTS / f"{name}_cpu.json").read_bytes()).hexdigest()
    figure.savefig(DOCS / f"{name}.png", dpi=dpi, metadata={"Description": checksum})


def copy_demo_figures() -> None:
    """Copy what the demo has drawn."""
    for name in ("reward", "mask", "savings"):
        shutil.copyfile(DOCS.parent / f"runs/tiny_cpu/{name}.png", DOCS / f"{name}.png")


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
        for name in ("tree.png", "report.png"):
            shutil.copyfile(name, DOCS / name)


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
    for name in args.names:
        draw[name](*[args.solutions] if name == "report" else [])


if __name__ == "__main__":
    main()
