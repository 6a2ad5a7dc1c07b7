"""The README's snippets run, and its numbers are those of the committed benchmark."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["mask", "torchtune", "transformers", "trl", "large group"])
def test_snippets_run(snippet, monkeypatch, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # which they name, and runs/ is made beside it
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


def test_the_table_quotes_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks/results/sharing_cpu.json").read_text())
    for quoted in (
        f"| {result['token_ratio']:.1f} x | 1 |",
        f"| {result['train_s_unshared']:.2f} | {result['train_s_shared']:.2f} |",
        f"| {result['largest_loss_difference']:.0e} |",
        f"| {result['parameter_difference']:.0e} |",
        f"Training is {result['train_speedup']:.1f} times as fast",
        f"accounts for {result['token_ratio_prompts_once']:.1f} of the {result['token_ratio']:.1f}",
    ):
        assert quoted in README, quoted
    assert {"command", "machine", "versions", "commit"} <= set(result)


@pytest.mark.parametrize("lengths", ["even", "uneven"])
def test_the_table_of_trls_update_quotes_the_committed_benchmark(lengths):
    result = json.loads((ROOT / "benchmarks/results/trl_update_cpu.json").read_text())
    case = result[lengths]
    quoted = f"{case['token_ratio']:.1f} | {case['attention_pair_ratio']:.1f} | {case['update_s_trl']:.2f} | "
    quoted += f"{case['update_s_shared']:.2f} | **{case['speedup']:.1f} x** |"
    assert quoted in README, quoted
    largest = max(result[name]["gradient_difference"] for name in ("even", "uneven"))
    assert f"The gradients are {largest:.0e} apart" in README
    assert case["prompt_tokens"] == 1024 and max(case["completion_tokens"]) == 128
    assert {"command", "machine", "versions", "commit"} <= set(result)


def test_the_ratios_of_conversations_quote_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks/results/conversations_cpu.json").read_text())
    ratios = [result[way]["tokens"] / result[way]["one_tree"]["tokens"] for way in ("per_turn", "whole")]
    quoted = (
        f"one tree holds the turns in {ratios[0]:.1f} times fewer tokens than each on its own, and whole conversations"
    )
    assert f"{quoted} in {ratios[1]:.1f} times fewer" in " ".join(README.split())


def test_every_file_that_is_named_exists():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
