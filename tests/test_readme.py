"""The snippets of README and docs run as typed, and links resolve.

Those of cost.md, conversations.md, rewards.md and scaling.md run in test_flops.py, test_conversations.py,
test_rewards.py and test_context_parallel.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import flexpg

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [path for path in sorted(ROOT.glob("*.md")) if path.name != "README.md"]
ELSEWHERE = ("cost.md", "conversations.md", "rewards.md", "scaling.md")
ELSEWHERE += ("recipes.md",)  # which loads what a run has trained
SNIPPETS = {path.name: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for path in PAGES}
SOLUTIONS = "example_model_solutions.jsonl"  # four models' solutions of a problem on each line, which report.md reads


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what the snippets of a page find in a clone."""
    for name in ("recipes", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    row = {"question": "1+1?", "answer": "2"} | {f"model {n}": {"solution": f"so {n}"} for n in range(4)}
    (tmp_path / SOLUTIONS).write_text(f"{json.dumps(row)}\n" * 3)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets and page not in ELSEWHERE])
def test_snippets_run(page, clone):
    names: dict[str, object] = {}
    for snippet in SNIPPETS[page]:
        if "init_process_group" not in snippet:  # that of own_loop.md runs on ranks, in test_context_parallel.py
            exec(snippet, names)


@pytest.mark.parametrize("path", [*PAGES, *OTHER_PAGES], ids=lambda path: path.name)
def test_links_resolve(path):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", path.read_text()):
        name, _, section = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, target


def test_api_reference_has_every_public_name():
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    assert {name for name in flexpg.__all__ if pages.count(f"::: flexpg.{name}\n") != 1} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pictures_have_alt_texts_and_are_opaque_and_small(path):
    for alt_text, name in re.findall(r"!\[(.*?)\]\((.+?\.png)\)", path.read_text()):
        file = path.parent / name
        assert len(alt_text) > 80, name
        assert file.stat().st_size < 150_000, name
        with Image.open(file) as image:
            assert image.width >= 1200 and not image.has_transparency_data, name
