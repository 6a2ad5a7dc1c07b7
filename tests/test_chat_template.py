"""Assistant turns are what a sampler saw and drew, with published tokenizer rules and published chat templates."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from flexpg.conversations import Conversation, conversation_rollouts, template_messages
from flexpg.conversations.chat_template import assistant_turns, default_stop_tokens

USER = {"role": "user", "content": "What is 6 times 7?"}
CALL = {"id": "call12345", "type": "function", "function": {"name": "find", "arguments": '{"id":"X1"}'}}
PARAMETERS = {"type": "object", "properties": {"id": {"type": "string", "description": "d"}}, "required": ["id"]}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "find it", "parameters": PARAMETERS}}]
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call12345", "name": "find", "content": "RESULT"},
    {"role": "assistant", "content": "two"},
]
PHI, GEMMA = {"stop": ["<|end|>"]}, {"stop": ["<end_of_turn>"]}


def assistant(content, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def completions(family, template, messages, *, stop=None, **options) -> list[str]:
    """Return the text of every turn, after a check of the tokens of its history."""
    tokenizer = chat_tokenizer(family, template)
    if stop is not None:
        options["stop_tokens"] = tokenizer.convert_tokens_to_ids(stop)
    turns = assistant_turns(tokenizer, messages, **options)
    shown = {"tools": options.get("tools"), **(options.get("template_options") or {})}
    for turn in turns:
        history = tokenizer.apply_chat_template(
            template_messages(messages)[: turn.message],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **shown,
        )
        assert turn.history.tolist() == history
    return [tokenizer.decode(turn.completion) for turn in turns]


# What the model would have generated.


@pytest.mark.parametrize(
    ("family", "template", "text", "expected"),
    [
        ("qwen2_5", "qwen2_5", "It is 42.", "It is 42.<|im_end|>"),
        ("qwen3", "qwen3", "It is 42.", "<think>\n\n</think>\n\nIt is 42.<|im_end|>"),
        ("qwen3", "qwen3_instruct_2507", "It is 42.", "It is 42.<|im_end|>"),
        (
            "qwen3",
            "qwen3_5_nothink",
            "It is 42.",
            "It is 42.<|im_end|>",
        ),  # its generation prompt has the empty reasoning
        ("qwen3", "qwen3_5_think", "It is 42.", "\n</think>\n\nIt is 42.<|im_end|>"),
        ("qwen3", "qwen3_6", "It is 42.", "\n</think>\n\nIt is 42.<|im_end|>"),
        ("qwen3", "qwen3_8", "It is 42.", "\n</think>\n\nIt is 42.<|im_end|>"),
        ("qwen3", "qwen3_6", "<think>\nhm\n</think>\n\nok", "hm\n</think>\n\nok<|im_end|>"),
        ("qwen3", "qwen3_8", "<think>\nhm\n</think>\n\nok", "hm\n</think>\n\nok<|im_end|>"),
        ("qwen3", "nemotron_3_nano", "<think>\nhm\n</think>\n\nok", "hm\n</think>\n\nok<|im_end|>"),
        ("llama3", "llama3", "It is 42.", "It is 42.<|eot_id|>"),
        ("llama3", "llama3_1", "It is 42.", "It is 42.<|eot_id|>"),
        ("gptoss", "gptoss", "It is 42.", "<|channel|>final<|message|>It is 42.<|return|>"),
        ("deepseek", "deepseek_r1_distill", "<think>\nhm\n</think>\n\nok", "hm\n</think>\n\nok<｜end▁of▁sentence｜>"),
        ("deepseek", "deepseek_r1_distill", "hm\n</think>\n\nok", "hm\n</think>\n\nok<｜end▁of▁sentence｜>"),
        ("deepseek", "deepseek_r1_distill", "hm\n</think>", "hm\n</think><｜end▁of▁sentence｜>"),
        ("deepseek", "deepseek_r1_distill", "<think>\nhm\n</think>", "hm\n</think><｜end▁of▁sentence｜>"),
        ("deepseek", "deepseek_r1_distill", "hm</think><answer>42", "hm</think><answer>42<｜end▁of▁sentence｜>"),
        ("qwen3", "qwen3_6", "Use the <think> tag.", "\n</think>\n\nUse the <think> tag.<|im_end|>"),
    ],
)
def test_completion_is_what_a_sampler_would_draw(family, template, text, expected):
    assert completions(family, template, [USER, assistant(text)]) == [expected]


def test_reasoning_that_the_template_keeps_is_generated_once():
    tokenizer = chat_tokenizer("deepseek", "deepseekv3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant<｜Assistant｜><think>\n{% endif %}"
    )
    (turn,) = assistant_turns(tokenizer, [USER, assistant("hm\n</think>")])
    assert tokenizer.decode(turn.completion) == "hm\n</think><｜end▁of▁sentence｜>"


def test_reasoning_in_a_field_of_its_own_is_generated():
    for key in ("reasoning_content", "reasoning", "thinking"):
        turn = [USER, assistant("ok", **{key: "hm"})]
        assert completions("qwen3", "qwen3_6", turn) == ["hm\n</think>\n\nok<|im_end|>"]
        harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>ok<|return|>"
        assert completions("gptoss", "gptoss", turn) == [harmony]


@pytest.mark.parametrize(
    ("family", "template", "stop", "expected"),
    [
        (
            "qwen2_5",
            "qwen2_5",
            None,
            '<tool_call>\n{"name": "find", "arguments": {"id": "X1"}}\n</tool_call><|im_end|>',
        ),
        ("llama3", "llama3_1", None, '{"name": "find", "parameters": {"id": "X1"}}<|eot_id|>'),
        (
            "qwen3",
            "qwen3_5_nothink",
            None,
            "<tool_call>\n<function=find>\n<parameter=id>\nX1\n</parameter>\n</function>\n</tool_call><|im_end|>",
        ),
        (
            "gptoss",
            "gptoss",
            ["<|call|>", "<|return|>"],
            ' to=functions.find<|channel|>commentary json<|message|>{"id": "X1"}<|call|>',
        ),
    ],
)
def test_tool_call_is_generated_as_the_template_writes_it(family, template, stop, expected):
    assert completions(family, template, TOOL_TURNS, stop=stop, tools=TOOLS)[0] == expected


CONCATENATES = (
    "{% for m in messages %}{{ m.role + m.content }}{% for call in m.tool_calls %}"
    "{{ call.function.name + call.function.arguments }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def test_template_that_concatenates_arguments_gets_them_as_they_were():
    tokenizer = chat_tokenizer("llama3", "llama3")
    tokenizer.chat_template = CONCATENATES  # as DeepSeek's templates do
    turns = assistant_turns(tokenizer, TOOL_TURNS)
    assert [tokenizer.decode(turn.completion) for turn in turns] == ['find{"id":"X1"}<|eot_id|>', "two<|eot_id|>"]


@pytest.mark.parametrize(
    ("family", "template", "begins"), [("qwen2_5", "qwen2_5", '{"name": "find", "arguments": '), ("qwen3", "qwen3", "")]
)
def test_arguments_that_were_cut_off_are_written_as_they_are(family, template, begins):
    cut = [USER, assistant("", tool_calls=[{"function": {"name": "find", "arguments": '{"id": "ZFA0'}}])]
    (text,) = completions(family, template, cut)
    assert begins + '{"id": "ZFA0' in text and '\\"' not in text


@pytest.mark.parametrize(("family", "template"), [("qwen2_5", "qwen2_5"), ("llama3", "llama3_1")])
def test_text_between_added_tokens_is_encoded_once(family, template, monkeypatch):
    tokenizer = chat_tokenizer(family, template)
    messages = [each for n in range(30) for each in (USER | {"content": f"question {n}"}, assistant(f"answer {n}"))]
    seen = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: seen.append(len(text)) or encode(text, **options))
    turns = assistant_turns(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert sum(seen) < 4 * len(whole)  # not 30 times
    assert turns[-1].tokens.tolist() == encode(whole, add_special_tokens=False)[: len(turns[-1].tokens)]


def test_added_tokens_that_swallow_spaces_are_not_separators():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    tokenizer.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True)])
    turn = [USER, assistant("a <mark> b"), USER, assistant("it is <mark>  fine")]
    for found in assistant_turns(tokenizer, turn):
        text = tokenizer.apply_chat_template(turn[: found.message + 1], tokenize=False)
        assert found.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)[: len(found.tokens)]


@pytest.mark.parametrize("template", ["smolvlm", "idefics3", "llava_next"])
def test_template_that_takes_parts_gets_parts(template):
    tokenizer = chat_tokenizer("qwen2_5", template)
    (turn,) = assistant_turns(tokenizer, [USER, assistant("It is 42.")], stop_tokens=[])
    assert USER["content"] in tokenizer.decode(turn.history)
    assert tokenizer.decode(turn.completion).strip().startswith("It is 42.")


# Where the prompt ends: two newlines are one token.


@pytest.mark.parametrize(
    ("family", "template", "options"),
    [("qwen2_5", "qwen2_5", {}), ("phi3", "phi3_5", PHI), ("llama3", "muse_glimmer", {})],
)
def test_text_that_begins_with_newlines_is_encoded_apart(family, template, options):
    tokenizer = chat_tokenizer(family, template)
    (text,) = completions(family, template, [USER, assistant("\n\nreply")], **{"stop": None, **options})
    assert (
        text.partition("<|message|>")[2].startswith("\n\nreply") if "message" in text else text.startswith("\n\nreply")
    )
    if template != "muse_glimmer":
        history = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        merged = tokenizer.encode(history + text, add_special_tokens=False)
        assert merged[: len(tokenizer.encode(history))] != tokenizer.encode(history)  # or this test shows nothing


def test_tokenizer_that_cannot_encode_a_turn_alone_raises():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **options: encode(" " + text, **options)  # as SentencePiece with a dummy prefix
    with pytest.raises(ValueError, match=r"the tokenizer must encode .* separately, but decodes it as ' "):
        assistant_turns(tokenizer, [USER, assistant("\n\nreply")])


@pytest.mark.parametrize(
    ("template", "text", "options", "words"),
    [
        ("qwen3_5_nothink", "<think>\nhm\n</think>\n\nok", {}, "enable_thinking"),
        ("nemotron_3_nano", "It is 42.", {}, "enable_thinking"),
    ],
)
def test_unknown_beginning_shows_both_texts(template, text, options, words):
    with pytest.raises(ValueError, match=r"messages\[1\]: where it begins is unknown: .*<think>.*" + words):
        completions("qwen3", template, [USER, assistant(text)], template_options=options)
    thinks = {"enable_thinking": "think>" in text}
    (rendered,) = completions("qwen3", template, [USER, assistant(text)], template_options=thinks)
    assert rendered.endswith("ok<|im_end|>" if "ok" in text else "It is 42.<|im_end|>")


# Where a turn ends.


@pytest.mark.parametrize(
    ("family", "template", "stop"),
    [("phi3", "phi3", "<|end|>"), ("phi3", "phi3_5", "<|end|>"), ("gemma", "gemma", "<end_of_turn>")],
)
def test_turn_ends_at_the_first_stop_token_of_the_generation_config(family, template, stop, tmp_path):
    tokenizer = chat_tokenizer(family, template)
    with pytest.raises(
        ValueError, match=re.escape(f"{stop!r} is not known as a stop token; pass stop_tokens, such as [")
    ):
        assistant_turns(tokenizer, [USER, assistant("42.\n")])
    tokenizer.save_pretrained(tmp_path)
    stops = sorted(tokenizer.convert_tokens_to_ids([tokenizer.eos_token, stop]))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert default_stop_tokens(loaded) == stops
    (turn,) = assistant_turns(loaded, [USER, assistant("42.\n")])
    assert (
        loaded.decode(turn.completion) == f"42.{'' if family == 'gemma' else chr(10)}{stop}"
    )  # Gemma's template trims


def test_default_stop_tokens_without_a_generation_config(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')  # of another model
    assert default_stop_tokens(tokenizer) == [tokenizer.eos_token_id]
    for name in ("owner/not-in-the-cache", "not a name of a repository!"):
        tokenizer.name_or_path = name
        assert default_stop_tokens(tokenizer) == [tokenizer.eos_token_id]
    (tmp_path / "own").mkdir()
    tokenizer.name_or_path = "own"
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert default_stop_tokens(tokenizer) == sorted([7, tokenizer.eos_token_id])


def test_stop_tokens_inside_a_text_end_nothing():
    turn = [USER, assistant("it is <|im_end|>, see")]
    assert completions("qwen2_5", "qwen2_5", turn) == ["it is <|im_end|>, see<|im_end|>"]
    assert completions("qwen2_5", "qwen2_5", turn, stop=["<|endoftext|>"]) == ["it is <|im_end|>, see<|im_end|>\n"]
    assert completions("qwen2_5", "qwen2_5", turn, stop=[]) == ["it is <|im_end|>, see<|im_end|>\n"]


def test_special_tokens_next_to_the_stop_token_are_generated():
    tokenizer = chat_tokenizer("deepseek", "deepseekv3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + m.content }}{% if m.role == 'assistant' %}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    (turn,) = assistant_turns(tokenizer, [USER, assistant("x")])
    assert tokenizer.decode(turn.completion) == "x<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"


# What a template would leave out.


@pytest.mark.parametrize(
    ("family", "template", "messages", "words"),
    [
        ("qwen2_5", "qwen2_5", [USER, assistant("ok", reasoning="hm")], "leaves out its reasoning 'hm'"),
        ("llama3", "llama3", TOOL_TURNS, "leaves out its tool call of find"),
        (
            "gptoss",
            "gptoss",
            [USER, assistant("", tool_calls=[CALL, CALL])],
            "leaves out its tool call of find",
        ),
        ("llama3", "llama3_1", [USER, assistant("I look.", tool_calls=[CALL])], "leaves out its text 'I look.'"),
        ("llama3", "llama3_1", [USER, assistant("", tool_calls=[CALL, CALL])], "single tool-calls at once"),
        ("llama3", "llama3", [USER, assistant("I call find.", tool_calls=[CALL])], "leaves out its tool call of find"),
        ("qwen2_5", "qwen2_5", [USER, assistant("It is 42.", reasoning="42")], "leaves out its reasoning '42'"),
        (
            "gptoss",
            "gptoss",
            [USER, assistant("", tool_calls=[CALL, {"name": "fin", "arguments": {}}])],
            "leaves out its tool call of fin",
        ),
        ("qwen3", "qwen3_6", [assistant("Hello!"), {"role": "assistant", "content": "x"}], "No user query found"),
        ("qwen3", "qwen3", [USER, assistant("<think>\nstill thinking")], "messages[1] must close <think>"),
        ("gptoss", "gptoss", [USER, assistant("x", channel="analysis")], "leaves out its channel 'analysis'"),
        ("qwen2_5", "qwen2_5", [USER, assistant("x", tool_plan="y")], "leaves out its tool_plan 'y'"),
        ("qwen2_5", "qwen2_5", [USER, assistant("x<|im_end|>"), USER, assistant("y")], "ends with '<|im_end|>', which"),
        ("qwen3", "qwen3", [USER, assistant("x"), assistant("y")], "or join it with messages[1]"),
    ],
    ids=[
        *("reasoning", "call", "second-call", "text", "two-calls", "named-in-text", "reasoning-in-text"),
        *("part-of-name", "no-user", "cut-off-reasoning", "channel", "tool-plan", "stop-token-in-text", "two-in-a-row"),
    ],
)
def test_template_that_leaves_out_what_was_generated_raises(family, template, messages, words):
    with pytest.raises(Exception, match=re.escape(words)):
        completions(family, template, messages, tools=TOOLS)


@pytest.mark.parametrize(("family", "template"), [("qwen2_5", "qwen2_5"), ("qwen3", "qwen3"), ("llama3", "llama3_1")])
def test_content_as_parts_equals_text(family, template):
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "42."}]
    expected = completions(family, template, [USER, assistant("It is 42.")])
    tokenizer = chat_tokenizer(family, template)
    (turn,) = assistant_turns(
        tokenizer, [USER | {"content": [{"type": "text", "text": USER["content"]}]}, assistant(parts)]
    )
    assert [tokenizer.decode(turn.completion)] == expected and "42" in expected[0]


def test_empty_tools_and_calls_are_as_if_absent():
    plain = [USER, assistant("one")]
    for family, template in (("llama3", "llama3_1"), ("qwen3", "qwen3"), ("gptoss", "gptoss")):
        tokenizer = chat_tokenizer(family, template)
        conversations = [
            Conversation(plain),
            Conversation([USER, assistant("one", tool_calls=[])], tools=[]),
            Conversation([USER | {"name": None}, assistant("one", tool_calls=None, function_call=None)], tools="[]"),
        ]
        rollouts, _ = conversation_rollouts(conversations, tokenizer)
        assert rollouts.group_ids.tolist() == [0, 0, 0]
        assert len({tuple(tokens.tolist()) for tokens in rollouts.completions}) == 1


def test_template_that_writes_arguments_as_python_gets_them_as_json():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }} {{ c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (turn,) = assistant_turns(tokenizer, [USER, assistant(None, tool_calls=[CALL])])
    assert tokenizer.decode(turn.completion) == 'find {"id":"X1"}<|im_end|>'


def template_of(assistant_part: str, user_part: str = "{{ m.content }}") -> Any:
    """Return a tokenizer with a template that writes an assistant message as given."""
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + assistant_part
        + "{% else %}"
        + user_part
        + "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


ARGUMENTS = {"ids": ["a", "b"], "n": 1}
CALL_OF_LISTS = [{"id": "functions.f:0", "function": {"name": "f", "arguments": ARGUMENTS}}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments.ids | tojson }}", "arguments"),
        (
            "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | items | list }}{% endfor %}",
            "as JSON",
        ),
        (
            "{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k }}{{ v }}{% endfor %}f",
            "arguments of f as JSON",
        ),
    ],
    ids=["one of two", "items", "list"],
)
def test_template_that_leaves_out_or_changes_an_argument_raises(template, words):
    with pytest.raises(ValueError, match=f"leaves out its .*{words}"):
        assistant_turns(template_of(template), [USER, assistant("", tool_calls=CALL_OF_LISTS)])


def test_name_of_a_tool_call_may_be_in_its_id():
    """Kimi-K2's template writes `functions.NAME:NUMBER`, which is the id."""
    tokenizer = template_of("{{ m.tool_calls[0].id }}{{ m.tool_calls[0].function.arguments | tojson }}")
    (turn,) = assistant_turns(tokenizer, [USER, assistant("", tool_calls=CALL_OF_LISTS)])
    assert tokenizer.decode(turn.completion) == 'functions.f:0{"ids": ["a", "b"], "n": 1}<|im_end|>'
    with pytest.raises(ValueError, match="leaves out its tool call of f"):
        assistant_turns(tokenizer, [USER, assistant("", tool_calls=[CALL_OF_LISTS[0] | {"id": "1"}])])


def test_template_that_leaves_out_what_a_user_wrote_raises():
    with pytest.raises(ValueError, match=r"messages\[0\]: the template leaves out its text"):
        assistant_turns(template_of("{{ m.content }}", "{{ m.text }}"), [USER, assistant("x")])


def test_reasoning_that_the_template_drops_later_is_in_the_history():
    """gpt-oss's template drops the reasoning before a tool call once the final answer follows."""
    call = assistant("", thinking="t", tool_calls=[CALL])
    tokenizer = chat_tokenizer("gptoss", "gptoss")
    turns = [USER, call, {"role": "tool", "content": "r"}, assistant("done")]
    stop = tokenizer.convert_tokens_to_ids(["<|call|>", "<|return|>"])
    first, last = assistant_turns(tokenizer, turns, tools=TOOLS, stop_tokens=stop)
    assert "t<|end|>" in tokenizer.decode(first.completion) and "t<|end|>" in tokenizer.decode(last.history)
    assert tokenizer.decode(last.completion) == "<|channel|>final<|message|>done<|return|>"


def test_special_token_and_newline_of_the_text_are_generated():
    tokenizer = chat_tokenizer("qwen2_5", "qwen2_5")
    tokenizer.add_tokens([AddedToken("</tool_call>", special=True)], special_tokens=True)
    (turn,) = assistant_turns(tokenizer, [USER, assistant("x\n</tool_call>\n")])
    assert tokenizer.decode(turn.completion) == "x\n</tool_call>\n<|im_end|>"


def test_added_token_that_depends_on_the_text_around_it_is_encoded_with_it():
    tokenizer = chat_tokenizer("qwen3", "qwen3")
    tokenizer.add_tokens([AddedToken("cat", single_word=True)])
    turns = [USER, assistant("a", reasoning_content="concatenate"), USER, assistant("b")]  # the last does not see it
    first, _ = assistant_turns(tokenizer, turns)
    written = tokenizer.decode(first.completion)
    assert "concatenate" in written and first.completion.tolist() == tokenizer.encode(written, add_special_tokens=False)


@pytest.mark.parametrize(
    ("stop", "message"),
    [(["<|im_end|>"], "a list of token ids"), (5, "a list of"), ([999_999], "ids of the tokenizer, got 999999")],
    ids=str,
)
def test_stop_tokens_that_are_not_ids_raise(stop, message):
    with pytest.raises(ValueError, match=f"stop_tokens must be {message}"):
        assistant_turns(chat_tokenizer("qwen2_5", "qwen2_5"), [USER, assistant("x")], stop_tokens=stop)


def test_template_options_that_are_set_already_raise():
    with pytest.raises(ValueError, match="template_options must not have tools, which flexpg sets itself"):
        assistant_turns(chat_tokenizer("qwen2_5", "qwen2_5"), [USER, assistant("x")], template_options={"tools": []})
