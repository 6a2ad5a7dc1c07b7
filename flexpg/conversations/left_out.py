"""What a chat template leaves out of an assistant turn, or changes: text, reasoning, tool calls, channels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from flexpg.conversations.messages import REASONING_KEYS, Message

GENERATED_KEYS = ("channel", "recipient", "tool_plan")  # what models write besides content: Harmony, Command R
REASONING_PROBE, NAME_PROBE, ARGUMENT_PROBE = "flexpg-reasoning", "flexpg-name-", "flexpg-argument-"
Render = Callable[[Message], str]


def left_out(render: Render, message: Message, written: str) -> str | None:
    """Return what a template leaves out or changes of what an assistant wrote, in words for an error, or None.

    Args:
        render: Returns the text of the conversation, up to the message that it is given.
        message: What the assistant wrote.
        written: The text of `message` in that of the conversation.
    """
    return next(
        chain(
            _generated_keys(render, message),
            _text(message, written),
            _reasoning(render, message, written),
            _tool_calls(render, message, written),
        ),
        None,
    )


def text_of(message: Message) -> str:
    """Return the text of a message, whose content is a text or a list of one text part."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"] if content else ""


def _generated_keys(render: Render, message: Message) -> Iterator[str]:
    for key in GENERATED_KEYS:
        if (value := message.get(key)) and value != "final":
            without = {name: other for name, other in message.items() if name != key}
            if render(without) == render(message):
                yield f"{key} {value!r:.40}"


def _text(message: Message, written: str) -> Iterator[str]:
    text = text_of(message)
    yield from (f"text {piece!r}" for piece in _missing(text, written))
    if "{'type': 'text'" in written and "{'type': 'text'" not in text:  # Python's repr
        yield "text"


def _reasoning(render: Render, message: Message, written: str) -> Iterator[str]:
    reasoning = message.get("reasoning_content", "")
    yield from (f"reasoning {piece!r}" for piece in _missing(reasoning, written))
    if reasoning.strip() and REASONING_PROBE not in render(_probe(message)):
        yield f"reasoning {reasoning.strip()[:40]!r}"


def _tool_calls(render: Render, message: Message, written: str) -> Iterator[str]:
    calls = message.get("tool_calls") or ()
    probe = render(_probe(message)) if calls else ""
    for n, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if any(form in written and form not in text_of(message) for form in _reprs(arguments)):
            yield f"arguments of {name} as JSON"
        if f"{NAME_PROBE}{n}." not in probe:
            yield f"tool call of {name}"
        marks = range(1 if isinstance(arguments, str) else len(arguments))
        if arguments and not all(f"{ARGUMENT_PROBE}{n}.{i}." in probe for i in marks):
            yield f"arguments {arguments} of {name}"


def _missing(text: str, written: str) -> Iterator[str]:
    """Yield the beginning of each part of a text that was not written; what separates parts are <think> tags."""
    for piece in re.split(r"</?think>", text):
        if piece.strip() not in written:
            yield piece.strip()[:40]


def _probe(message: Message) -> Message:
    """Return the message with words as reasoning, names and arguments of tool calls that occur nowhere else."""
    probe = dict(message)
    if message.get("reasoning_content"):
        probe |= dict.fromkeys(REASONING_KEYS, REASONING_PROBE)
    calls = []
    for n, call in enumerate(message.get("tool_calls") or ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        marks = [f"{ARGUMENT_PROBE}{n}.{i}." for i in range(1 if isinstance(arguments, str) else len(arguments))]
        values: Any = marks[0] if isinstance(arguments, str) else dict(zip(arguments, marks, strict=True))
        ids = {"id": str(call["id"]).replace(name, f"{NAME_PROBE}{n}.")} if "id" in call else {}  # Kimi's have names
        calls.append(call | ids | {"function": {"name": f"{NAME_PROBE}{n}.", "arguments": values}})
    return probe | ({"tool_calls": calls} if calls else {})


def _reprs(value: Any) -> Iterator[str]:
    """Yield how Python writes the objects in arguments, where JSON is another text."""
    if isinstance(value, dict | list):
        if str(value) != json.dumps(value, ensure_ascii=False):
            yield str(value)
        for item in value.values() if isinstance(value, dict) else value:
            yield from _reprs(item)
