"""report.html of a run: curves, what sharing saved, samples and options, in one file that needs no network."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune.training.metric_logging import flatten_dict

from flexpg.training.config import GRPOConfig
from flexpg.training.metrics import SECONDS, best_step
from flexpg.training.run_curves import History, draw_curves, values_by_step
from flexpg.training.samples_log import Sample, format_rewards, read_samples

MAX_STEPS, MAX_CHARS = 5, 3000  # samples: steps that are shown, and characters of a text
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1d2530; --dim: #667180; --line: #dfe3e8;
  --code: #f1f3f6; --good: #2c9562; --bad: #d04a57; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --text: #e4e8ee; --dim: #97a1ae;
  --line: #333a44; --code: #262b33; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.2rem; } h3 { margin: 1.6rem 0 .6rem; }
.dim { color: var(--dim); } .grid, .tiles { display: grid; gap: 1rem; margin: 1rem 0; }
.grid { grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.wide { grid-column: 1 / -1; } .tiles b { display: block; font-size: 1.4rem; }
.card svg, .card img { display: block; width: 100%; height: auto; margin: .5rem auto 0; }
img { max-width: 52rem; background: #fff; border-radius: 6px; }
svg text { font-family: system-ui, sans-serif !important; fill: currentColor; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; } td.number, th + th { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: .4rem 0 0; padding: .6rem .7rem; background: var(--code); border-radius: 6px; white-space: pre-wrap;
  max-height: 22rem; overflow: auto; }
.sample { border-left: 4px solid var(--dim); min-width: 0; }
.good { border-left-color: var(--good); } .bad { border-left-color: var(--bad); }
"""


def write_report(folder: Path, cfg: Any, history: History, accuracies: Mapping[int, float]) -> Path:
    """Write report.html of a run, and return its path.

    Args:
        folder: The run's output_dir; mask.png, savings.png and samples.jsonl are taken from it if they exist.
        cfg: The configuration.
        history: The metrics of every step, so far.
        accuracies: Held-out accuracy by completed steps.
    """
    pictures = {path.stem: path.read_bytes() for path in (folder / "mask.png", folder / "savings.png") if path.exists()}
    sections = [
        _header(folder.name, cfg, history, accuracies),
        "<h2>Training</h2>"
        + _grid([_card(curve.title, curve.svg, curve.is_wide) for curve in draw_curves(history, accuracies)]),
        "<h2>What sharing saved</h2>" + _savings(history, pictures),
        "<h2>Samples</h2>" + _samples(read_samples(folder / "samples.jsonl")),
        "<h2>Options that differ from the defaults</h2>" + _table(list(changed_options(cfg).items())),
    ]
    title = (
        f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{_escape(folder.name)}</title>"
    )
    page = f"<!doctype html><html lang=en>{title}<style>{STYLE}</style><body>{''.join(sections)}</body></html>\n"
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # lone surrogates
    return path


def changed_options(cfg: Any) -> dict[str, str]:
    """Return the options of a configuration whose values are not the defaults, by their names on the command line."""
    defaults = OmegaConf.merge(OmegaConf.structured(GRPOConfig), {"output_dir": cfg.output_dir})
    before = flatten_dict(OmegaConf.to_container(defaults, resolve=True))
    after = flatten_dict(OmegaConf.to_container(cfg, resolve=True))
    return {name: str(value) for name, value in after.items() if name not in before or before[name] != value}


def _header(name: str, cfg: Any, history: History, accuracies: Mapping[int, float]) -> str:
    """Return what ran, how far, and the numbers to see first."""
    done = "finished" if len(history) == cfg.num_steps else "stopped"
    where = f"{cfg.device}, {cfg.dtype}"
    model = next(str(cfg.model[key]) for key in ("path", "_component_") if key in cfg.model)
    tiles = {"steps": f"{len(history):,} of {cfg.num_steps:,}"}
    if accuracies:
        first, last = accuracies[min(accuracies)], accuracies[max(accuracies)]
        tiles[f"held-out accuracy, {first:.3f} at first"] = f"{last:.3f}"
        tiles[f"at best, after step {best_step(accuracies)}"] = f"{max(accuracies.values()):.3f}"
    if history:
        tiles["seconds per step"] = f"{sum(_mean(history, name) for name in SECONDS):.2f}"
        tiles["tokens sampled per second"] = f"{_mean(history, 'sampled_tokens_per_s'):,.0f}"
        tiles["fewer tokens encoded"] = f"{_ratio(history, 'tokens_encoded'):.1f}x"
        tiles["peak memory"] = f"{max(metrics['peak_memory_gib'] for metrics in history):.1f} GiB"
    cards = "".join(
        f"<div class=card><b>{_escape(v)}</b><span class=dim>{_escape(k)}</span></div>" for k, v in tiles.items()
    )
    line = f"{done} after step {len(history)} of {cfg.num_steps} · {model} · {where}"
    return f"<h1>{_escape(name)}</h1><div class=dim>{_escape(line)}</div><div class=tiles>{cards}</div>"


def _savings(history: History, pictures: Mapping[str, bytes]) -> str:
    """Return a table of the tokens of the run, and the figures of its first step."""
    table = ""
    if history:
        counts = {
            "every prompt once per completion (baseline)": "tokens_baseline",
            "every prompt once": "tokens_prompts_once",
            "encoded in this run": "tokens_encoded",
        }
        rows = [
            (label, f"{_mean(history, name):,.0f}", f"{_total(history, name):,.0f}", f"{_ratio(history, name):.1f}x")
            for label, name in counts.items()
        ]
        rows.append(("FLOPs of the layers (cost model, mean)", "", "", f"{_mean(history, 'flop_ratio'):.1f}x"))
        table = _table(rows, ("tokens of an update's forward", "per step", "of the run", "fewer than the baseline"))
    captions = {"savings": "Step 1: tokens and visible pairs", "mask": "Step 1: attention mask of the first groups"}
    images = [
        f"<img alt='{captions[name]}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        for name, data in pictures.items()
    ]
    cards = [_card(captions[name], image, True) for name, image in zip(pictures, images, strict=True)]
    return table + _grid(cards)


def _samples(samples: Sequence[Sample]) -> str:
    """Return the samples of a few steps, from the first to the last that has some."""
    by_step = {step: list(group) for step, group in groupby(samples, key=lambda sample: sample.step)}
    if not by_step:
        return "<p class=dim>None: log_samples_every_n_steps is 0, or no step was taken.</p>"
    steps = sorted(by_step)
    spaced = {round(n * (len(steps) - 1) / (MAX_STEPS - 1)) for n in range(MAX_STEPS)}
    parts = ["<p class=dim>The best and the worst completion of two problems. All samples are in samples.jsonl.</p>"]
    for step in (steps[n] for n in sorted(spaced)):
        parts.append(f"<h3>Step {step}</h3>")
        for (prompt, answer), group in groupby(by_step[step], key=lambda sample: (sample.prompt, sample.answer)):
            answer = f"<span class=dim>answer</span> <code>{_escape(answer)}</code>"
            parts.append(f"<div class=card><span class=dim>prompt</span>{_text(prompt)}{answer}</div>")
            parts.append(_grid([_sample_card(sample) for sample in group]))
    return "".join(parts)


def _sample_card(sample: Sample) -> str:
    kind = "good" if sample.advantage > 0 else "bad" if sample.advantage < 0 else ""
    line = _escape(format_rewards(sample).replace("  ", " · "))
    return f"<div class='card sample {kind}'><span class=dim>{line}</span>{_text(sample.completion)}</div>"


def _text(text: str) -> str:
    """Return a text as it is, the middle of a long one left out."""
    half = MAX_CHARS // 2
    if len(text) > MAX_CHARS:
        text = f"{text[:half]}\n\n[... {len(text) - MAX_CHARS:,} characters ...]\n\n{text[-half:]}"
    return f"<pre>\n{_escape(text)}</pre>"  # HTML drops one newline there


def _escape(text: object) -> str:
    """Escape a text for HTML; control characters become their Unicode pictures, because HTML has none."""
    visible = str(text).translate({n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"})
    return html.escape(visible)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return a table whose first column are names; with a head the others are numbers."""
    left, right = ("<td class=number>", "</td>") if head else ("<td><code>", "</code></td>")
    lines = [f"<tr>{''.join(f'<th>{_escape(title)}</th>' for title in head)}</tr>"] if head else []
    lines += [
        f"<tr><td>{_escape(name)}</td>{''.join(f'{left}{_escape(value)}{right}' for value in values)}</tr>"
        for name, *values in rows
    ]
    return f"<div class=card><table>{''.join(lines)}</table></div>"


def _card(title: str, content: str, is_wide: bool) -> str:
    return f"<div class='card {'wide' if is_wide else ''}'><b>{_escape(title)}</b>{content}</div>"


def _grid(cards: Sequence[str]) -> str:
    return f"<div class=grid>{''.join(cards)}</div>"


def _total(history: History, name: str) -> float:
    return sum(value for value in values_by_step(history, name) if math.isfinite(value))


def _mean(history: History, name: str) -> float:
    return _total(history, name) / max(sum(map(math.isfinite, values_by_step(history, name))), 1)


def _ratio(history: History, name: str) -> float:
    """Return how many times fewer tokens this is than the baseline's."""
    return _total(history, "tokens_baseline") / max(_total(history, name), 1)
