"""report.html of a run is valid, escapes all data, loads nothing, and is written for runs of any length."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import TINY, load

from flexpg.analysis.palette import SERIES
from flexpg.analysis.plots import plot_reward
from flexpg.training.run_curves import TEXT, draw_curves
from flexpg.training.run_report import changed_options, write_report
from flexpg.training.samples_log import Sample, SamplesLog

VOID = {"meta", "img", "!doctype"}
EVIL = """</pre><script>alert("x")</script><img src=http://evil/ onerror='f()'>&amp;\x00\ud800"""
STEP = {
    **{"reward": 0.5, "reward/correct": 0.4, "reward/correct/std": 0.1, "loss": -0.25, "entropy": 1.5},
    **{"completion_tokens": 20.0, "truncated": 0.125, "sampled_tokens_per_s": 1234.0, "peak_memory_gib": 1.5},
    **{"sample_s": 2.0, "reward_s": 0.5, "logprobs_s": 0.25, "train_s": 1.0, "self_check_s": 0.0},
    **{"tokens_baseline": 4000, "tokens_prompts_once": 1000, "tokens_encoded": 500, "flop_ratio": 7.0},
}


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(folder: Path, history: list[dict[str, float]], accuracies: dict[int, float], *options: str) -> str:
    path = write_report(folder, load(TINY, folder, *options), history, accuracies)
    return path.read_text(encoding="utf-8")


def assert_loads_nothing(page: Page) -> None:
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith(("data:image/png;base64,", "#"))


def sample(step: int, text: str) -> Sample:
    return Sample(step, text, text, text, {text: 1.0, "other": None}, 1.0, -0.5, 7, True)


def test_report_escapes_samples_and_options_and_loads_nothing(tmp_path):
    SamplesLog(tmp_path / "samples.jsonl", 0).write([sample(1, EVIL)], None)
    plot_reward([0.5], {}).savefig(tmp_path / "mask.png")
    page = Page(write(tmp_path, [STEP | {"reward/<i>$": 0.5}], {0: 0.1, 1: 0.2}, "model.path='</td><b>x</b>'"))
    assert_loads_nothing(page)
    visible = EVIL.replace("\x00", "\u2400").replace("\ud800", "\\ud800")
    assert page.text.count(visible) == 4  # prompt, answer, completion, name of a reward
    assert "</td><b>x</b>" in page.text and "reward/<i>$" in page.text
    assert page.tags.count("img") == 1


def test_report_of_an_empty_history_has_the_first_accuracy_and_no_samples(tmp_path):
    page = Page(write(tmp_path / "new", [], {0: 0.125}))
    assert "stopped after step 0 of 40" in page.text and "0.125" in page.text
    assert "None: log_samples_every_n_steps is 0, or no step was taken." in page.text
    assert "Seconds of a step" not in page.text
    assert "finished after step 1 of 1" in Page(write(tmp_path, [STEP], {}, "num_steps=1")).text


def test_report_has_means_and_totals_of_tokens_and_leaves_out_nan(tmp_path):
    other = STEP | {"loss": math.nan, "tokens_baseline": 6000, "tokens_encoded": 300, "sampled_tokens_per_s": math.nan}
    text = Page(write(tmp_path, [STEP, other, STEP | {"kl": math.inf}], {0: 0.1, 2: 0.75, 3: 0.5})).text
    for words in (
        *("4,66714,0001.0x", "encoded in this run4331,30010.8x", "1,234tokens sampled per second"),
        *("0.500held-out accuracy, 0.100 at first", "0.750at best, after step 2", "3.75seconds per step"),
    ):
        assert words in text, words
    assert "nan" not in text and "KL divergence" not in text  # without a finite value


def test_curves_are_valid_svg_with_gaps_where_a_value_is_nan():
    history = [STEP | {"loss": value} for value in (1.0, math.nan, 2.0, 3.0)] + [{"reward": 0.1}]
    curves = {curve.title: curve.svg for curve in draw_curves(history, {0: 0.5})}
    for svg in curves.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "nan" not in svg and TEXT not in svg and "currentColor" in svg
    assert set(curves) == {
        *("Reward and held-out accuracy", "Seconds of a step", "Loss", "Entropy, nats per token"),
        *("Completion length, tokens", "Truncated completions, clipped tokens (fractions)"),
    }
    paths = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {SERIES[0]}', curves["Loss"])
    assert len(paths) == 1 and paths[0].count("M") == 2  # a line is interrupted


def test_curves_have_turns_only_if_episodes_have_several():
    one, two = ([STEP | {"turns": value} for value in (1.0, other)] for other in (1.0, 2.5))
    assert "Turns of an episode" not in {curve.title for curve in draw_curves(one, {})}
    assert "Turns of an episode" in {curve.title for curve in draw_curves(two, {})}


def heights(svg: str) -> list[tuple[float, float]]:
    """Return the lowest and the highest y of each filled area."""
    found = []
    for path in re.findall(r'id="FillBetweenPolyCollection_\d+">\s*<defs>\s*<path id="\w+" d="([^"]*)"', svg):
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        found.append((min(ys), max(ys)))
    return found


def test_seconds_are_stacked_in_proportion():
    (svg,) = (curve.svg for curve in draw_curves([STEP], {}) if curve.title == "Seconds of a step")
    areas = heights(svg)
    assert [top for top, _ in areas[:-1]] == pytest.approx([bottom for _, bottom in areas[1:]])
    lengths = [bottom - top for top, bottom in areas]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 0.25, 0.125, 0.5], abs=1e-3)
    assert "weights to the engine" not in svg
    engine: dict[str, Any] = STEP | {"sync_s": 1.0}
    assert any("weights to the engine" in curve.svg for curve in draw_curves([engine], {}))


def test_report_shows_samples_of_five_steps_with_long_texts_cut(tmp_path):
    log = SamplesLog(tmp_path / "samples.jsonl", 0)
    for step in range(1, 31):
        log.write([sample(step, f"\nstart{'x' * 9000}end")], None)
    text = write(tmp_path, [STEP], {})
    assert re.findall(r"<h3>Step (\d+)</h3>", text) == ["1", "8", "15", "23", "30"]
    assert "<pre>\n\nstart" in text  # HTML ignores one newline after <pre>
    assert "[... 6,009 characters ...]" in text and len(re.findall("x{9000}", text)) == 10  # answer, name of the reward


def test_changed_options_are_those_that_differ_from_the_defaults(tmp_path):
    options = changed_options(load(TINY, tmp_path, "loss.beta=0.5", "group_size=16", "seed=1"))
    assert options["loss.beta"] == "0.5" and options["seed"] == "1" and options["optimizer.lr"] == "0.0002"
    assert options["rewards.correct._component_"] == "flexpg.training.tasks.arithmetic_reward"
    for default in ("group_size", "loss.epsilon", "optimizer._component_", "metric_logger.log_dir", "profiler.enabled"):
        assert default not in options
