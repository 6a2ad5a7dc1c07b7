"""The tests that documentation pages name as evidence exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if re.search(r"`test_\w+`", path.read_text("utf-8"))]
OPTIONS = {"test_problems", "test_reward"}  # of the recipe
DEFINED = {
    name
    for path in (ROOT / "tests").glob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE)
}


def unknown(text: str) -> set[str]:
    """Return the tests that a text names and that do not exist."""
    return set(re.findall(r"`(test_\w+)`", text)) - DEFINED - OPTIONS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_named_in_docs_exist(path):
    assert not unknown(path.read_text("utf-8"))


def test_test_that_does_not_exist_is_found():
    assert "determinism.md" in {path.name for path in PAGES}
    assert unknown("`test_unknown_names_exist` and `test_tests_named_in_docs_exist`") == {"test_unknown_names_exist"}
