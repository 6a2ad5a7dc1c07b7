"""The snippets of README and docs/correctness.md run, and README's numbers are those of the committed benchmark."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CORRECTNESS = (ROOT / "docs/correctness.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README + CORRECTNESS, re.DOTALL)


@pytest.mark.parametrize(
    "snippet", SNIPPETS, ids=["mask", "torchtune", "transformers", "trl", "large group", "self-check"]
)
def test_snippets_run(snippet, monkeypatch, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # which they name, and runs/ is made beside it
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


def test_the_demos_savings_quote_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks/results/sharing_cpu.json").read_text())
    for quoted in (
        f"Training is {result['train_speedup']:.1f} times as fast",
        f"accounts for {result['token_ratio_prompts_once']:.1f} of the {result['token_ratio']:.1f}",
    ):
        assert quoted in README, quoted


def test_trls_update_quotes_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks/results/trl_update_cpu.json").read_text())
    largest = max(result[name]["gradient_difference"] for name in ("even", "uneven"))
    assert f"The gradients are {largest:.0e} apart" in README
    for case in (result["even"], result["uneven"]):
        assert case["prompt_tokens"] == 1024 and max(case["completion_tokens"]) == 128


def test_the_ratios_of_conversations_quote_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks/results/conversations_cpu.json").read_text())
    ratios = [result[way]["tokens"] / result[way]["one_tree"]["tokens"] for way in ("per_turn", "whole")]
    quoted = (
        f"one tree holds the turns in {ratios[0]:.1f} times fewer tokens than each on its own, and whole conversations"
    )
    assert f"{quoted} in {ratios[1]:.1f} times fewer" in " ".join(README.split())


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_and_section_that_is_named_exists(path):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", path.read_text()):
        name, _, section = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", own).lower().replace(" ", "-") for own in headings}, target
