"""Every message that docs/errors.md quotes is in the source, so that the page cannot drift."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
VALUE = "\0"  # what an f-string fills in


@cache
def messages() -> set[str]:
    """Return the strings of all errors and warnings of flexpg and its recipes, without docstrings."""
    found = set()
    for path in chain((ROOT / "flexpg").rglob("*.py"), (ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Raise) or called in ("warnings.warn", "sys.exit", "print"):
                inside = [*ast.walk(node)]
                parts = [id(part) for node in inside if isinstance(node, ast.JoinedStr) for part in node.values]
                found |= {text_of(node) for node in inside if id(node) not in parts}
    return found


def text_of(node: ast.AST) -> str:
    """Return the text of a string or an f-string; an empty text for other nodes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_quoted(message: str) -> bool:
    """Return whether a message of the source begins like this, where … is any value."""
    pattern = re.compile(VALUE.join(map(re.escape, message.split("…"))))
    return any(map(pattern.match, messages()))


def test_page_quotes_about_as_many_messages_as_it_has_sections():
    assert len(QUOTED) > 20
    assert len(QUOTED) == len(set(QUOTED)) == len(re.findall(r"^### ", PAGE, re.MULTILINE))


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_in_the_source(message):
    assert is_quoted(message)


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens should hold every rollout, got …",  # another word
        "must hold every rollout, got …",  # not from the beginning
        " tokens; raise it or shorten the rollout",  # the end of an f-string
        "max_tokens must hold … rollout",  # a value where there is none
        "device must exist, got cuda on a machine",  # no value where there is one
        "Return the token ids",  # of a docstring
    ],
)
def test_message_that_is_not_in_the_source_is_found_missing(message):
    assert not is_quoted(message)
