"""Messages as APIs and files write them -> messages as chat templates read them.

Chat templates of transformers expect a text as content, and OpenAI's tool calls with parsed arguments. What else is
common is converted where its meaning is clear: content as parts, blocks of Anthropic's API, `function_call`, reasoning
under its several names, numbers, arguments as JSON. Anything else raises an error, because most templates would leave
it out silently or write Python's repr of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexpg.conversations.response_items import ITEM_TYPES, join_items

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]

# The key of the text in a part, by its type.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # Qwen and others; OpenRouter and vLLM; gpt-oss
REASONING_BLOCKS = ("thinking_blocks", "reasoning_details")  # LiteLLM and SWE-agent; OpenRouter
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # OpenAI; Llama; LangChain; Anthropic
MEDIA_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


def template_messages(messages: Sequence[Mapping[str, Any]], *, parse_arguments: bool = True) -> list[Message]:
    """Convert messages to the form that most chat templates take; `messages` do not change.

    - Text parts are joined. Anthropic's `tool_use` becomes a tool call, `tool_result` a message of its own with the
      role tool, `thinking` the reasoning; OpenAI's `function_call` becomes a tool call.
    - Items of OpenAI's Responses API are joined: `reasoning`, `message` and `function_call` to one message,
      `function_call_output` to one of the role tool.
    - Reasoning is given under all names that templates read: `reasoning_content`, `reasoning` and `thinking`.
    - A content of None, or none at all, becomes "" next to tool calls or reasoning.
    - Arguments of tool calls that are a JSON object are parsed, as a template that writes JSON would quote them again.
      Missing or empty ones, and null, become {}. Other text, such as JSON that was cut off, stays text.
    - Empty `tool_calls` are left out, and so are all values of None.

    Args:
        messages: Dicts with a "role" and "content", "tool_calls" or reasoning, or items of the Responses API.
        parse_arguments: False to write the arguments of tool calls as JSON, for templates that concatenate them.

    Raises:
        ValueError: If a message has no known role or nothing to render, or content whose meaning is not clear.

    >>> call = {"function": {"name": "cancel", "arguments": '{"id": "ZFA04Y"}'}}
    >>> template_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"]
    [{'type': 'function', 'function': {'name': 'cancel', 'arguments': {'id': 'ZFA04Y'}}}]
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, got {_short(messages)}")
    converted: list[Message] = []
    for j, message in join_items(messages):
        try:
            if not isinstance(message, Mapping):
                raise ValueError(f"must be an object with role and content, got {_short(message)}")
            converted += _convert({key: value for key, value in message.items() if value is not None}, parse_arguments)
        except ValueError as error:
            raise ValueError(f"messages[{j}] {error}") from error
    return converted


def template_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Convert schemas of tools to OpenAI's form, which chat templates take; None if there are none.

    Args:
        tools: OpenAI's or Anthropic's schemas, bare functions `{"name", "description", "parameters"}`, or JSON of
            these.

    Raises:
        ValueError: If they are anything else.

    >>> template_tools([{"name": "find", "input_schema": {"type": "object"}}])
    [{'type': 'function', 'function': {'name': 'find', 'parameters': {'type': 'object'}}}]
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools must be JSON, got {_short(tools)}: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"tools must be a list of schemas, got {_short(tools)}")
    return [_tool(json.loads(tool) if isinstance(tool, str) else tool) for tool in tools]


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        return dict(tool)
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        hint = "; transformers.utils.get_json_schema returns that of a function" if callable(tool) else ""
        raise ValueError(f"tools must be schemas with a name, got {_short(tool)}{hint}")
    parameters = tool.get("parameters", tool.get("input_schema"))
    function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


def _convert(message: Message, parse_arguments: bool) -> list[Message]:
    """Return one message, or several: tool results inside a user message are messages of their own."""
    role = {"function": "tool"}.get(message.get("role", ""), message.get("role"))
    if role not in ROLES:
        if role is None and "type" in message:
            raise ValueError(f"must have a role, or be {' or '.join(ITEM_TYPES)}, got the type {message['type']!r}")
        got = f"{role!r}" if role is not None else f"none; its keys are {', '.join(message) or 'none'}"
        raise ValueError(f"must have a role of {', '.join(ROLES)}, got {got}")
    if message.get("content") and message.get("refusal"):
        raise ValueError("must have content or a refusal, got both; join them")
    if not isinstance(message.get("weight", 1), int | float):
        raise ValueError(f"weight must be a number, got {message['weight']!r}")
    content: Any = message.get("content") or message.get("refusal", message.get("content"))
    content = None if content == [] and role != "tool" else content
    parts = [_part(part, role) for part in content] if _is_parts(content, role) else [{"type": "text", "text": content}]
    texts: list[str | None] = []
    results: list[Message] = []
    calls: list[Any] = []
    reasoning: list[str] = []
    for part in parts:
        kind = part["type"]
        if kind == "tool_result" and texts:
            raise ValueError("must not have text before a tool_result: templates write results first")
        if kind == "tool_result":
            results.append(_tool_result(part))
        elif kind == "tool_use":
            function = {"name": part.get("name"), "arguments": part.get("input")}
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif calls and role == "assistant":
            raise ValueError(f"must not have {kind} after a tool call: templates write tool calls last")
        elif kind == "thinking" and texts:
            raise ValueError("must not have reasoning after text: templates write reasoning first")
        elif kind == "thinking":
            reasoning.append(_text("thinking", part.get("thinking"), role))
        else:
            texts.append(_text("content", part["text"], role) if part["text"] is not None else None)
    converted = ("function_call", "refusal", *REASONING_KEYS, *REASONING_BLOCKS)
    out = {key: value for key, value in message.items() if key not in converted}
    if thought := _reasoning(message, "".join(reasoning)):
        if "".join(text or "" for text in texts).lstrip().startswith("<think>"):
            raise ValueError("must not have reasoning and <think> in its content; keep the one that the model wrote")
        out |= dict.fromkeys(REASONING_KEYS, thought)
    if calls := [*_listed(message.get("tool_calls")), *calls, *_listed(message.get("function_call"))]:
        out["tool_calls"] = [_call(call, parse_arguments) for call in calls]
    else:
        out.pop("tool_calls", None)
    has_text = any(text is not None for text in texts)
    if not (has_text or results or calls or thought):
        raise ValueError("must have content, tool_calls or reasoning, got none")
    if results and not any(texts):
        return results
    return [*results, out | {"role": role, "content": "".join(text or "" for text in texts)}]


def _reasoning(message: Message, in_parts: str) -> str:
    """Return the reasoning of a message: in parts of its content, or under another name."""
    found = {"content": in_parts} if in_parts else {}
    found |= {key: _text(key, message[key], "assistant") for key in REASONING_KEYS if message.get(key)}
    key = next((key for key in REASONING_BLOCKS if message.get(key)), None)
    if key and not found:
        texts = [block.get("thinking", block.get("text")) for block in message[key]]
        if None in texts:
            raise ValueError(f"{key} has a block without text, which cannot be rendered: {_short(message[key])}")
        found = {key: "".join(_text(key, text, "assistant") for text in texts)}
    if len({"".join(text.split()) for text in found.values()}) > 1:  # but for whitespace between blocks
        raise ValueError(f"must have the same reasoning under all names, got different ones in {', '.join(found)}")
    return next(reversed(found.values()), "")


def _is_parts(content: Any, role: str) -> bool:
    """Return whether a content is a list of parts; a tool's result may be a list of its own."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return False
    kinds = [str(part.get("type")) for part in content if isinstance(part, Mapping)]
    return role != "tool" or any(kind in TEXT_PARTS or kind in MEDIA_PARTS for kind in kinds)


def _part(part: Any, role: str) -> Message:
    """Return a part of a content as one of text, thinking, tool_use and tool_result."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"content must be a text or a list of parts, got a list with {_short(part)}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind in TEXT_PARTS and isinstance(part.get(TEXT_PARTS[kind]), str):
        return {"type": "text", "text": part[TEXT_PARTS[kind]]}
    allowed = {"assistant": ("thinking", "tool_use"), "user": ("tool_result",)}.get(role, ())
    if kind in allowed:
        return dict(part)
    if kind in MEDIA_PARTS:
        raise ValueError(
            f"has a part of type {kind!r}: conversations with images, video or audio are not supported, only text"
        )
    raise ValueError(f"has a part of type {kind!r} for {role}, expected text{''.join(f' or {one}' for one in allowed)}")


def _text(name: str, value: Any, role: str) -> str:
    """Return a value as text: numbers, and structured results of tools as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if role == "tool" and isinstance(value, Mapping | Sequence | bool):
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{name} must be a text or a list of parts, got {_short(value)}")


def _tool_result(part: Message) -> Message:
    content = part.get("content") or ""
    texts = [_part(part, "tool")["text"] for part in content] if _is_parts(content, "tool") else [content]
    joined = "".join(_text("tool_result", text, "tool") for text in texts)
    return {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": joined}


def _listed(calls: Any) -> list[Any]:
    return [] if not calls else list(calls) if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]


def _call(call: Any, parse_arguments: bool) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, from that form, a bare function, or JSON of one."""
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError as error:
            raise ValueError(f"tool_calls must be objects or JSON, got {_short(call)}: {error}") from error
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool_calls must have a function with a name, got {_short(call)}")
    given = next((function[key] for key in ARGUMENT_KEYS if function.get(key) is not None), None)
    arguments = _arguments(given)
    if not parse_arguments and not isinstance(arguments, str):
        arguments = given if arguments and isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    call_id = {"id": call["id"]} if call.get("id") is not None else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(given: Any) -> dict[str, Any] | str:
    if isinstance(given, str) and given.strip():
        try:
            parsed = json.loads(given)
        except ValueError:  # cut off, or never JSON
            return given
        return given if not isinstance(parsed, Mapping | None) else dict(parsed or {})
    if given is None or isinstance(given, str):
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"tool_calls must have arguments that are an object or JSON, got {_short(given)}")
    return dict(given)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
