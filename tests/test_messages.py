"""Messages of several APIs become what chat templates read, or raise an error that names the message."""

import copy
import json
import re

import pytest

from flexpg.conversations import template_messages, template_tools

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}


def assistant(**fields) -> dict:
    return {"role": "assistant", **fields}


def call(arguments) -> dict:
    return {"function": {"name": "f"} if arguments is ... else {"name": "f", "arguments": arguments}}


# OpenAI's messages.


def test_arguments_are_parsed_and_messages_do_not_change():
    written = copy.deepcopy(CALL)
    written["function"]["arguments"] = '{"a": [1, "é"]}'
    messages = [assistant(content=None, tool_calls=[written]), {"role": "tool", "content": "x", "tool_call_id": "1"}]
    before = copy.deepcopy(messages)
    converted = template_messages(messages)
    assert converted == [assistant(content="", tool_calls=[CALL]), messages[1]]
    assert messages == before and template_messages(converted) == converted


@pytest.mark.parametrize(
    ("given", "parsed", "written"),
    [
        ("", {}, "{}"),
        (" ", {}, "{}"),
        ("null", {}, "{}"),
        (None, {}, "{}"),
        (..., {}, "{}"),
        ("{}", {}, "{}"),
        ('{"id":"X"}', {"id": "X"}, '{"id":"X"}'),
        ({"id": "é"}, {"id": "é"}, '{"id": "é"}'),
        ('{"id": "ZFA0', '{"id": "ZFA0', '{"id": "ZFA0'),  # cut off
        ("[1]", "[1]", "[1]"),
        ("rm -rf build", "rm -rf build", "rm -rf build"),
    ],
    ids=[
        *("empty", "blank", "null", "none", "missing", "empty-object", "compact", "object", "cut-off", "list", "text"),
    ],
)
def test_arguments_missing_empty_or_cut_off_raise_nothing(given, parsed, written):
    messages = [assistant(content="", tool_calls=[call(given)])]
    for parse, expected in ((True, parsed), (False, written)):
        (message,) = template_messages(messages, parse_arguments=parse)
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "content": []},
        {
            "tool_calls": ['{"id": "1", "function": {"name": "f", "arguments": "{\\"a\\": [1, \\"é\\"]}"}}']
        },  # verifiers'
        {"tool_calls": [{"id": "1", "name": "f", "arguments": {"a": [1, "é"]}}]},  # tau2-bench's
        {"content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1, "é"]}}]},  # Anthropic's
        {"tool_calls": [{"id": "1", "name": "f", "args": {"a": [1, "é"]}}]},  # LangChain's
        {"tool_calls": [{"id": "1", "name": "f", "parameters": {"a": [1, "é"]}}]},  # Llama's
    ],
)
def test_spellings_of_a_tool_call_are_converted(fields):
    assert template_messages([assistant(**fields)]) == [assistant(content="", tool_calls=[CALL])]


def test_function_call_and_its_result_are_a_tool_call():
    old = [
        assistant(content=None, function_call={"name": "f", "arguments": '{"a": 1}'}),
        {"role": "function", "content": 3},
    ]
    function = {"name": "f", "arguments": {"a": 1}}
    new = [
        assistant(content="", tool_calls=[{"type": "function", "function": function}]),
        {"role": "tool", "content": "3"},
    ]
    assert template_messages(old) == new


def test_empty_and_null_keys_are_left_out():
    empty = assistant(content="a", tool_calls=[], function_call=None, refusal=None, name=None, reasoning="")
    assert template_messages([empty]) == [assistant(content="a")]
    assert template_messages([assistant(content="")]) == [assistant(content="")]


# Content.


@pytest.mark.parametrize(
    ("role", "content", "expected"),
    [
        ("user", [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}, "c", {"text": "d"}], "a bcd"),
        ("assistant", [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}], "ano"),
        ("user", 42, "42"),
        ("assistant", 0, "0"),
        ("assistant", 2.5, "2.5"),
        ("tool", {"ok": True, "é": None}, '{"ok": true, "é": null}'),
        ("tool", [{"id": 1}, 2], '[{"id": 1}, 2]'),
        ("tool", [], "[]"),
        ("tool", False, "false"),
        ("tool", [{"type": "text", "text": "a"}], "a"),
    ],
)
def test_content_whose_meaning_is_clear_is_converted(role, content, expected):
    assert template_messages([{"role": role, "content": content}]) == [{"role": role, "content": expected}]


def test_refusal_is_what_the_assistant_wrote():
    for content in (None, ""):
        assert template_messages([assistant(content=content, refusal="I can't.")]) == [assistant(content="I can't.")]


def test_reasoning_is_given_under_all_names():
    expected = [assistant(content="ok", reasoning_content="hm", reasoning="hm", thinking="hm")]
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert template_messages([assistant(content="ok", **{key: "hm"})]) == expected
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "ok"}]
    assert template_messages([assistant(content=blocks)]) == expected
    assert template_messages([assistant(content="ok", reasoning_content="", reasoning="hm")]) == expected
    assert template_messages([assistant(content="ok", thinking_blocks=blocks[:1])]) == expected  # LiteLLM's
    details = [{"type": "reasoning.text", "text": "hm"}]
    assert template_messages([assistant(content="ok", reasoning_details=details)]) == expected  # OpenRouter's
    assert template_messages([assistant(content="ok", reasoning="hm", reasoning_details=details)]) == expected


def test_tool_results_in_a_user_message_are_messages_of_their_own():
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "1",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"type": "tool_result", "tool_use_id": "2", "content": "c", "is_error": True},
        {"type": "tool_result", "tool_use_id": "3"},
        {"type": "text", "text": "go on"},
    ]
    tools = [{"role": "tool", "tool_call_id": str(n), "content": text} for n, text in ((1, "ab"), (2, "c"), (3, ""))]
    assert template_messages([{"role": "user", "content": results}]) == [*tools, {"role": "user", "content": "go on"}]
    assert template_messages([{"role": "user", "content": results[:3]}]) == tools


# Items of OpenAI's Responses API.

THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CALL_ITEM = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": [1, "é"]}'}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "r"}
REASONED = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "hm")


def text_item(text: str, **fields) -> dict:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "content": content, **fields}


def converted_items(*items: dict) -> list[dict]:
    """Convert items, and leave out what templates do not read."""
    unread = ("type", "id", "status")
    return [{k: v for k, v in message.items() if k not in unread} for message in template_messages(list(items))]


def test_items_of_one_turn_are_one_message():
    other = CALL_ITEM | {"call_id": "2", "arguments": ""}
    calls = [CALL, {"id": "2", "type": "function", "function": {"name": "f", "arguments": {}}}]
    user, tool = {"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "1", "content": "r"}
    items = [user, THOUGHT, text_item("I look."), CALL_ITEM, other, OUTPUT, OUTPUT | {"call_id": "2", "output": "s"}]
    before = copy.deepcopy(items)
    assert converted_items(*items, CALL_ITEM, OUTPUT, THOUGHT, THOUGHT, text_item("b")) == [
        user,
        assistant(content="I look.", tool_calls=calls, **REASONED),
        tool,
        tool | {"tool_call_id": "2", "content": "s"},
        assistant(content="", tool_calls=[CALL]),
        tool,
        assistant(content="b", **dict.fromkeys(REASONED, "hmhm")),
    ]
    assert items == before
    assert converted_items(THOUGHT | {"content": "hm"}, CALL_ITEM) == converted_items(THOUGHT, CALL_ITEM)


def test_texts_one_after_another_and_reasoning_after_text_begin_messages():
    message = assistant(content="b")
    assert converted_items(text_item("a"), text_item("b"), message) == [assistant(content="a"), message, message]
    assert converted_items(text_item("a"), THOUGHT, CALL_ITEM) == [
        assistant(content="a"),
        assistant(content="", tool_calls=[CALL], **REASONED),
    ]


def test_items_of_a_message_have_its_weight():
    context = {"weight": 0}
    thought, written, call = THOUGHT | context, text_item("a", **context), CALL_ITEM | context
    expected = assistant(content="a", tool_calls=[CALL], weight=0, **REASONED)
    assert converted_items(thought, written, call) == [expected]
    assert converted_items(THOUGHT | {"weight": None}, text_item("a", weight=None)) == [
        assistant(content="a", **REASONED)
    ]
    with pytest.raises(ValueError, match=r"messages\[1\] must have the weight of the items before, got 1"):
        template_messages([thought, CALL_ITEM])


def test_result_of_parts_in_an_item_is_text():
    parts = [{"type": "input_text", "text": "r"}, {"type": "input_text", "text": "s"}]
    assert template_messages([CALL_ITEM, OUTPUT | {"output": parts}])[1]["content"] == "rs"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [THOUGHT | {"content": None, "summary": [{"type": "summary_text", "text": "x"}]}],
            "messages[0] is reasoning without text (a summary, or encrypted), which cannot be rendered; leave it out",
        ),
        ([CALL_ITEM, text_item("a")], "messages[1] must not be of the assistant: the tool call before it has no"),
        ([CALL_ITEM, THOUGHT], "messages[1] must not be of the assistant: the tool call before it has no"),
        (
            [CALL_ITEM, OUTPUT, {"type": "web_search_call", "id": "ws_1"}],
            "messages[2] must have a role, or be reasoning or function_call or function_call_output, got the type "
            "'web_search_call'",
        ),
    ],
    ids=["a summary", "text after a call", "reasoning after a call", "a tool of the API"],
)
def test_item_that_cannot_be_rendered_raises_with_its_number(items, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        template_messages(items)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("text", "must be an object with role and content, got 'text'"),
        (
            {"content": "a"},
            "must have a role of system, developer, user, assistant, tool, got none; its keys are content",
        ),
        ({"from": "gpt", "value": "a"}, "got none; its keys are from, value"),
        ({"role": "assistnat", "content": "a"}, "must have a role of system, "),
        (assistant(), "must have content, tool_calls or reasoning, got none"),
        (assistant(content=None), "must have content, tool_calls or reasoning, got none"),
        ({"role": "user", "content": []}, "must have content"),
        (assistant(content=True), "content must be a text or a list of parts, got True"),
        (assistant(content={"answer": 5}), "content must be a text or a list of parts, got {'answer': 5}"),
        ({"role": "user", "content": [3]}, "content must be a text or a list of parts, got a list with 3"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "has a part of type 'image_url': conversations with images, video or audio are not supported, only text",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
            "has a part of type 'input_audio': conversations with images, video or audio are not supported, only text",
        ),
        (
            {"role": "user", "content": [{"type": "file"}]},
            "has a part of type 'file' for user, expected text or tool_result",
        ),
        (
            assistant(content=[{"type": "tool_result"}]),
            "'tool_result' for assistant, expected text or thinking or tool_use",
        ),
        (assistant(content=[{"type": "text", "text": None}]), "has a part of type 'text'"),
        (assistant(content=[{"type": "redacted_thinking", "data": "x"}]), "has a part of type 'redacted_thinking'"),
        (
            assistant(content=[{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}]),
            "must not have text after a tool call",
        ),
        (
            assistant(content=[{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]),
            "must not have reasoning after text",
        ),
        (assistant(content="", tool_calls=[{}]), "tool_calls must have a function with a name, got {}"),
        (assistant(content="", tool_calls="f("), "tool_calls must be objects or JSON, got 'f('"),
        (assistant(content="", tool_calls=[call(3)]), "arguments that are an object or JSON, got 3"),
        (assistant(content="a", reasoning={"summary": "x"}), "reasoning must be a text"),
        (assistant(content="a", refusal="b"), "must have content or a refusal, got both; join them"),
        (assistant(content="a", weight="0"), "weight must be a number, got '0'"),
        (
            assistant(content="a", reasoning_content="b", reasoning="c"),
            "got different ones in reasoning_content, reasoning",
        ),
        (
            assistant(content=[{"type": "thinking", "thinking": "b"}], thinking="c"),
            "must have the same reasoning under all names",
        ),
        (assistant(content="<think>b</think>a", reasoning="b"), "must not have reasoning and <think> in its content"),
        (
            assistant(content="a", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
            "reasoning_details has a block without text, which cannot be rendered",
        ),
        (
            {"role": "user", "content": ["a", {"type": "tool_result", "content": "b"}]},
            "must not have text before a tool_result",
        ),
    ],
)
def test_message_whose_meaning_is_not_clear_raises_with_its_number(message, words):
    with pytest.raises(ValueError, match=r"^messages\[1\] .*" + re.escape(words)):
        template_messages([{"role": "user", "content": "a"}, message])


def test_messages_that_are_not_a_list_raise():
    for messages in ("text", {"role": "user"}, None):
        with pytest.raises(ValueError, match=r"^messages must be a list, got "):
            template_messages(messages)


# Tools.


def test_spellings_of_tools_are_converted():
    schema = {"type": "object", "properties": {}}
    expected = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}]
    bare = {"name": "f", "description": "d", "parameters": schema}
    for tools in (
        expected,
        [bare],
        [{"type": "function", **bare}],
        [{"name": "f", "description": "d", "input_schema": schema}],
        '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]',
        ['{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}'],
    ):
        assert template_tools(tools) == expected
    for tools in (None, [], "", "[]", "null", {}):
        assert template_tools(tools) is None


@pytest.mark.parametrize("tools", ["[{", {"name": "f"}, [{"parameters": {}}], [3], "3"])
def test_tools_that_are_not_schemas_raise(tools):
    with pytest.raises(ValueError, match="tools must be "):
        template_tools(tools)


def test_reasoning_under_two_names_is_there_once():
    blocks = [{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "t"}]
    (message,) = template_messages([{"role": "assistant", "content": blocks, "reasoning_content": "R"}])
    assert message["reasoning_content"] == "R"
    (message,) = template_messages([{"role": "assistant", "content": blocks[:1] * 2, "reasoning": "R\nR"}])
    assert message["reasoning_content"] == "R\nR"


def test_tool_result_of_objects_with_a_type_is_json():
    flights = [{"type": "flight", "id": 1}]
    (message,) = template_messages([{"role": "tool", "content": flights}])
    assert json.loads(message["content"]) == flights
