"""Curves of a run as SVG, with the colors of the page that they are put in, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flexpg.analysis.palette import REWARD, SERIES
from flexpg.training.metrics import SECONDS

History = Sequence[Mapping[str, float]]
TEXT = "#123456"  # in figures, replaced by the color of the page's text
CURVES = {  # title: metrics; those that a run does not have are left out
    "Loss": ("loss",),
    "Gradient norm": ("grad_norm",),
    "KL divergence from the reference": ("kl",),
    "Entropy, nats per token": ("entropy",),
    "Completion length, tokens": ("completion_tokens",),
    "Truncated completions, clipped tokens (fractions)": ("truncated", "clip_low", "clip_high"),
}


@dataclass(frozen=True)
class Curve:
    """One figure.

    Attributes:
        title: Plain text.
        svg: An <svg> element; text in it has the color of the page.
        is_wide: Whether it is twice as wide as others.
    """

    title: str
    svg: str
    is_wide: bool = False


def draw_curves(history: History, accuracies: Mapping[int, float]) -> list[Curve]:
    """Draw reward and accuracy, other metrics, and the time of every step.

    Args:
        history: The metrics of every step; NaN, and a metric that a step does not have, leave a gap.
        accuracies: Held-out accuracy by completed steps.
    """
    curves = [Curve("Reward and held-out accuracy", _draw_reward(history, accuracies), is_wide=True)]
    names = {name for metrics in history for name in metrics if name.startswith("reward/")}
    means = tuple(sorted(name for name in names if not name.endswith("/std")))
    has_turns = any(metrics.get("turns", 1) != 1 for metrics in history)  # only with an environment
    titles = {"Rewards before weighting": means if len(means) > 1 else (), **CURVES}
    titles["Turns of an episode"] = ("turns",) if has_turns else ()
    for title, metrics in titles.items():
        lines = {name: values_by_step(history, name) for name in metrics}
        lines = {name: values for name, values in lines.items() if any(map(math.isfinite, values))}
        if lines:
            curves.append(Curve(title, _draw_lines(lines)))
    if history:
        curves.append(Curve("Seconds of a step", _draw_seconds(history), is_wide=True))
    return curves


def values_by_step(history: History, name: str) -> list[float]:
    """Return a metric of every step, NaN where a step does not have it."""
    return [metrics.get(name, math.nan) for metrics in history]


def _draw_reward(history: History, accuracies: Mapping[int, float]) -> str:
    figure, axes = _figure(10.4, 3.2)
    rewards = values_by_step(history, "reward")
    marker = _marker(rewards)
    axes.plot(
        range(1, len(rewards) + 1),
        rewards,
        marker,
        color=REWARD,
        linewidth=1,
        label="training reward (mean of the step)",
    )
    steps = sorted(accuracies)
    held_out = [accuracies[step] for step in steps]
    axes.plot(steps, held_out, "o-", color=REWARD, linewidth=2.5, label="held-out accuracy (greedy)")
    return _svg(figure, axes, has_legend=True)


def _draw_lines(lines: Mapping[str, Sequence[float]]) -> str:
    figure, axes = _figure(5.0, 2.6)
    for n, (name, values) in enumerate(lines.items()):
        label = name.replace("$", r"\$")  # not a formula
        axes.plot(range(1, len(values) + 1), values, _marker(values), color=SERIES[n % len(SERIES)], label=label)
    return _svg(figure, axes, has_legend=len(lines) > 1)


def _draw_seconds(history: History) -> str:
    """Draw the seconds of every step, stacked; without the self-check, which runs in one step only."""
    figure, axes = _figure(10.4, 2.8)
    edges, bottom = [step + 0.5 for step in range(len(history) + 1)], [0.0] * len(history)
    for color, (name, label) in zip(SERIES, SECONDS.items(), strict=False):
        if not any(name in metrics for metrics in history):  # weights to an engine that the run does not have
            continue
        added = [value if math.isfinite(value) else 0.0 for value in values_by_step(history, name)]
        top = [low + value for low, value in zip(bottom, added, strict=True)]
        low, high = ([*values, values[-1]] for values in (bottom, top))
        axes.fill_between(edges, low, high, step="post", color=color, linewidth=0, label=label)
        bottom = top
    axes.set_ylim(0, None)
    return _svg(figure, axes, has_legend=True)


def _marker(values: Sequence[float]) -> str:
    """Return matplotlib's format of a line, with points if there are too few for a line to be seen."""
    return ".-" if sum(map(math.isfinite, values)) < 5 else "-"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, axes: Axes, *, has_legend: bool) -> str:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(TEXT)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.grid(color=TEXT, alpha=0.15)
    axes.set_xlabel("step", color=TEXT, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if has_legend:
        columns = int(figure.get_figwidth() // 2.5)
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=TEXT)
    file = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flexpg"}):  # text, and the same ids every time
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(TEXT, "currentColor")
