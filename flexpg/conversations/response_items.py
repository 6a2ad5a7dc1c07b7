"""Items of OpenAI's Responses API -> messages.

There, an assistant's reasoning, text and tool calls are items of their own, and so is the result of a tool. Chat
templates read messages, in which they are together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REASONING, TEXT, CALL = range(3)  # the order of items in one message
ITEM_TYPES = ("reasoning", "function_call", "function_call_output")  # and "message", which has a role


def is_item(value: Any) -> bool:
    """Return whether a value is an item without a role."""
    return isinstance(value, Mapping) and value.get("role") is None and value.get("type") in ITEM_TYPES


def join_items(messages: Sequence[Any]) -> list[tuple[int, Any]]:
    """Join consecutive items of an assistant to messages, each of reasoning, one text and tool calls.

    Args:
        messages: Messages, items, or both, which do not change.

    Returns:
        Each message after the index of its first item. What is not an item is returned as it is.

    Raises:
        ValueError: If reasoning has no text, the assistant goes on after a tool call without a result, or items of one
            message have different weights.
    """
    joined: list[tuple[int, Any]] = []
    last: int | None = None  # of the item before, if others may join its message
    for j, item in enumerate(messages):
        try:
            kind, message = _as_message(item)
            if last == CALL and kind in (REASONING, TEXT):
                raise ValueError(
                    "must not be of the assistant: the tool call before it has no function_call_output; add it, or "
                    "leave the call out"
                )
            if last is None or kind is None or kind < last or kind == last == TEXT:
                joined.append((j, message))
            else:
                joined[-1] = (joined[-1][0], _join(joined[-1][1], message))
        except ValueError as error:
            raise ValueError(f"messages[{j}] {error}") from error
        last = kind
    return joined


def _as_message(item: Any) -> tuple[int | None, Any]:
    """Return an item as a message, with its kind if it is of an assistant."""
    if not is_item(item):
        return (TEXT if isinstance(item, Mapping) and item.get("role") == "assistant" else None), item
    if item["type"] == "function_call_output":
        return None, {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    weight = {"weight": item.get("weight")}
    if item["type"] == "function_call":
        part = {"type": "tool_use", "id": item.get("call_id"), "name": item.get("name"), "input": item.get("arguments")}
        return CALL, {"role": "assistant", "content": [part], **weight}
    content = item.get("content") or []
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content]
    if not texts or None in texts:
        raise ValueError("is reasoning without text (a summary, or encrypted), which cannot be rendered; leave it out")
    return REASONING, {"role": "assistant", "content": [{"type": "thinking", "thinking": "".join(texts)}], **weight}


def _join(message: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the content of both; values of None are those of columns that other rows have."""
    message, other = ({key: value for key, value in item.items() if value is not None} for item in (message, other))
    if message.get("weight", 1) != other.get("weight", 1):
        raise ValueError(f"must have the weight of the items before, got {other.get('weight', 1)}")
    return {**message, **other, "content": [*_parts(message.get("content")), *_parts(other.get("content"))]}


def _parts(content: Any) -> list[Any]:
    return list(content) if isinstance(content, Sequence) and not isinstance(content, str) else [content or ""]
