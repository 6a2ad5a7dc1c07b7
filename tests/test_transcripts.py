"""Recorded conversations are read from the formats of common tools, and a broken row is named or skipped."""

import bz2
import gzip
import io
import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexpg.conversations import Conversation, read_conversations, template_messages
from flexpg.conversations.row_files import read_rows

SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "tau_bench_sample.json"
SYSTEM = {"role": "system", "content": "P"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"role": "tool", "content": "r"}
TURNS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOOL, ASSISTANT]

ITEMS = [  # of OpenAI's Responses API
    USER,
    {"type": "function_call", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "output": "r"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
]


def context(message: dict) -> dict:
    return message | {"weight": 0}


# Each row, and the conversations that it is.
FORMATS = {
    "openai": ({"messages": TURNS, "reward": 1, "tools": []}, [Conversation(TURNS, 1.0)]),
    "responses": ({"messages": ITEMS, "reward": 1}, [Conversation(TURNS, 1.0)]),
    "responses as a completion": ({"prompt": [USER], "completion": ITEMS[1:]}, [Conversation(TURNS)]),
    "responses as JSON": ({"messages": json.dumps(ITEMS[1:] + ITEMS)}, [Conversation(TURNS[1:] + TURNS)]),
    "messages as JSON": ({"messages": json.dumps(TURNS)}, [Conversation(TURNS)]),
    "anthropic": (
        {"system": "P", "messages": [USER, ASSISTANT], "tools": [{"name": "f", "input_schema": {}}]},
        [Conversation([SYSTEM, USER, ASSISTANT], tools=[{"name": "f", "input_schema": {}}])],
    ),
    "trl": ({"prompt": [USER], "completion": [ASSISTANT]}, [Conversation([USER, ASSISTANT])]),
    "trl with a group": (
        {"prompt": [USER], "completions": [[ASSISTANT], [ASSISTANT, USER, ASSISTANT]], "rewards": [0, 0.5]},
        [Conversation([USER, ASSISTANT]), Conversation([USER, ASSISTANT, USER, ASSISTANT], 0.5)],
    ),
    "prompt with a worked example": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        [Conversation([USER, context(ASSISTANT), USER, ASSISTANT])],
    ),
    "completion as text": ({"prompt": [USER], "completions": ["b"]}, [Conversation([USER, ASSISTANT])]),
    "preference": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "c"}]},
        [Conversation([USER, ASSISTANT]), Conversation([USER, ASSISTANT | {"content": "c"}])],
    ),
    "preference with the prompt in both": (
        {
            "chosen": [USER, ASSISTANT, USER, ASSISTANT],
            "rejected": [USER, ASSISTANT, USER, ASSISTANT | {"content": "c"}],
        },
        [
            Conversation([USER, context(ASSISTANT), USER, ASSISTANT]),
            Conversation([USER, context(ASSISTANT), USER, ASSISTANT | {"content": "c"}]),
        ],
    ),
    "preference with the prompt given twice": (
        {"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "c"}]},
        [Conversation([USER, ASSISTANT]), Conversation([USER, ASSISTANT | {"content": "c"}])],
    ),
    "messages as JSON in every column": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
        [Conversation([USER, ASSISTANT])],
    ),
    "system given twice": (
        {"system": "P", "messages": [SYSTEM, USER, ASSISTANT]},
        [Conversation([SYSTEM, USER, ASSISTANT])],
    ),
    "null columns of other formats": (
        {"messages": None, "prompt": [USER], "completion": [ASSISTANT], "task_id": None, "example_id": 4},
        [Conversation([USER, ASSISTANT], task=4)],
    ),
    "mini-swe-agent": (
        {"messages": [SYSTEM, USER, ASSISTANT, {"role": "exit", "content": "done"}], "info": {}},
        [Conversation([SYSTEM, USER, ASSISTANT])],
    ),
    "sharegpt with weights": (
        {
            "conversations": [
                {"from": "Human", "value": "a"},
                {"from": "GPT", "value": "b", "weight": 0},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [Conversation([USER, context(ASSISTANT), USER, ASSISTANT])],
    ),
    "sharegpt": (
        {
            "system": "P",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "b"},
            ],
        },
        [Conversation([SYSTEM, *TURNS])],
    ),
    "verifiers": (
        {
            "example_id": 3,
            "prompt": [SYSTEM, USER],
            "completion": [TURNS[1] | {"tool_calls": [json.dumps({"id": "1", **CALL})]}, TOOL, ASSISTANT],
            "reward": 0.25,
            "metrics": {},
            "tool_defs": None,
        },
        [
            Conversation(
                [SYSTEM, USER, {**TURNS[1], "tool_calls": [{"id": "1", **CALL}]}, TOOL, ASSISTANT], 0.25, task=3
            )
        ],
    ),
    "tau-bench": (
        {"task_id": 7, "reward": 1.0, "traj": [SYSTEM, *TURNS]},
        [Conversation([SYSTEM, *TURNS], 1.0, task=7)],
    ),
    "tau2-bench": (
        {
            "info": {"environment_info": {"policy": "P"}},
            "simulations": [
                {
                    "task_id": "12",
                    "reward_info": {"reward": 1.0},
                    "messages": [
                        {"role": "assistant", "content": "Hi!", "cost": 0.0},  # written by the benchmark
                        USER,
                        TURNS[1] | {"tool_calls": [{"name": "f", "arguments": {"a": 1}, "requestor": "assistant"}]},
                        {"role": "tool", "tool_messages": [TOOL | {"requestor": "assistant"}]},
                        {"role": "user", "content": None, "tool_calls": [{"name": "look", "arguments": {}}]},
                        TOOL | {"requestor": "user"},
                        ASSISTANT,
                    ],
                },
                {"task_id": "13", "reward_info": {"reward": 0.0}, "messages": [SYSTEM, USER, ASSISTANT]},
            ],
        },
        [
            Conversation([SYSTEM, context(ASSISTANT | {"content": "Hi!"}), *TURNS], 1.0, task=0),
            Conversation([SYSTEM, USER, ASSISTANT], task=1),
        ],
    ),
    "swe-agent": (
        {
            "trajectory": [{"action": "ls"}],
            "history": [
                SYSTEM | {"message_type": "system_prompt"},
                ASSISTANT | {"is_demo": True},
                USER | {"content": [{"type": "text", "text": "a"}]},
                *TURNS[1:],
                {"role": "assistant", "content": "", "thought": "Exit due to cost limit"},
            ],
            "info": {"exit_status": "submitted"},
        },
        [Conversation([SYSTEM, context(ASSISTANT), *TURNS, context(ASSISTANT | {"content": ""})])],
    ),
    "swe-agent with the reason of its end as text": (
        {
            "history": [
                USER,
                *TURNS[1:3],
                {"role": "assistant", "content": "Exit", "thought": "Exit", "action": "", "tool_calls": None},
                USER,
                ASSISTANT | {"thought": "b", "action": "ls"},
            ]
        },
        [Conversation([*TURNS[:3], context(ASSISTANT | {"content": ""}), USER, ASSISTANT])],
    ),
    "system before a message that repeats it": (
        {"system": "P", "messages": [USER, ASSISTANT, SYSTEM, USER, ASSISTANT]},
        [Conversation([SYSTEM, USER, ASSISTANT, SYSTEM, USER, ASSISTANT])],
    ),
    "system in one of two completions": (
        {"system": "P", "completions": [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT]]},
        [Conversation([SYSTEM, USER, ASSISTANT]), Conversation([SYSTEM, USER, ASSISTANT])],
    ),
    "tau2-bench with the policy as a message": (
        {"simulations": [{"task_id": 1, "messages": [SYSTEM, ASSISTANT, USER, ASSISTANT]}]},
        [Conversation([SYSTEM, context(ASSISTANT), USER, ASSISTANT], task=1)],
    ),
}


def essentials(conversation: Conversation) -> Conversation:
    """Convert messages, and leave out what templates do not read."""
    keys = ("role", "content", "tool_calls", "weight")
    messages = [{key: each[key] for key in keys if key in each} for each in template_messages(conversation.messages)]
    return replace(conversation, messages=messages, tools=conversation.tools or None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("container", ["lines", "object", "array", "gzip"])
def test_formats_of_common_tools_are_read(name, container, tmp_path):
    row, expected = FORMATS[name]
    text = {"lines": json.dumps(row), "object": json.dumps(row, indent=2)}.get(container, json.dumps([row], indent=2))
    file = tmp_path / "file"
    file.write_bytes(gzip.compress(text.encode()) if container == "gzip" else text.encode())
    assert list(map(essentials, read_conversations(file))) == list(map(essentials, expected))


def test_parquet_is_read_without_the_keys_of_other_rows(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = [{"messages": [USER, message], "task_id": 5}, {"messages": [USER, other], "task_id": 6}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = map(essentials, read_conversations(tmp_path / "rows.parquet"))
    assert [first.messages, second.messages] == [template_messages([USER, message]), template_messages([USER, other])]
    assert (first.task, second.task) == (5, 6)


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"messages": TURNS}).encode())))
    assert len(read_conversations("-")) == 1


def test_tau_bench_sample_keeps_tasks_rewards_and_calls():
    conversations = read_conversations(SAMPLE)
    assert [(each.task, each.reward) for each in conversations] == [(43, 1.0), (43, 0.0), (44, 0.0), (44, 1.0)]
    for entry, conversation in zip(json.loads(SAMPLE.read_text()), conversations, strict=True):
        assert conversation.messages == entry["traj"] and conversation.tools is None


def test_tasks_without_ids_are_conversations_with_the_same_prompt(tmp_path):
    other = [USER | {"content": "c"}, ASSISTANT]
    rows = [TURNS, other, [USER, ASSISTANT], [*other, USER, ASSISTANT]]
    (tmp_path / "rows").write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    assert [each.task for each in read_conversations(tmp_path / "rows")] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("ids", "tasks"), [([1, "1", 2], [0, 0, 1]), ([3, 3.0, 2], [3, 3, 2]), (["a", "b", "a"], [0, 1, 0])], ids=str
)
def test_equal_ids_of_different_types_are_one_task(ids, tasks, tmp_path):
    (tmp_path / "rows").write_text("\n".join(json.dumps({"messages": TURNS, "task_id": task}) for task in ids))
    assert [each.task for each in read_conversations(tmp_path / "rows")] == tasks


def test_id_that_is_nan_raises(tmp_path):
    (tmp_path / "rows").write_text(json.dumps({"messages": TURNS, "task_id": float("nan")}))
    with pytest.raises(ValueError, match="task_id or example_id must be a text or a number, got nan"):
        read_conversations(tmp_path / "rows")


# Broken rows.

GOOD = json.dumps({"messages": [USER, ASSISTANT]}).encode()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b'{"messages": [', "must be JSON: "),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"a": "\xff"}', "must be UTF-8: "),
        (rb'{"messages": "\ud800"}', r"text must not contain lone surrogates, .* got \\ud800"),
        (b'{"text": "a", "id": 3}', "must have the keys of a known format, .*, or prompt and completion, got text, id"),
        (b"{}", "must have the keys of a known format, .*, or prompt and completion, got none"),
        (b'{"prompt": [], "completions": []}', "completions must not be empty; drop the conversation"),
        (b'{"messages": [3]}', "messages must be objects with role and content, got 3"),
        (b'{"messages": "["}', r"messages must be a list of messages, got '\['"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\] must have content, tool_calls or reasoning"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', r"messages\[0\] must have a role of "),
        (b'{"conversations": [{"from": "robot", "value": "a"}]}', "from must be one of human, .* got 'robot'"),
        (GOOD[:-1] + b', "reward": "high"}', "reward must be a finite number, got 'high'"),
        (GOOD[:-1] + b', "reward": NaN}', "reward must be a finite number, got nan"),
        (GOOD[:-1] + b', "rewards": [1, 2]}', "rewards must be one for each of 1 completions, got 2"),
        (b'{"history": [3]}', "messages must be objects with role and content, got 3"),
        (b'{"history": [["' + b"x" * 200 + b'"]]}', r"messages must be objects with role and content, got \['x{58}$"),
        (GOOD[:-1] + b', "reward": 1, "rewards": [0]}', "must have reward or rewards, got both"),
        (
            b'{"system": "P", "completions": [[{"role": "assistant", "content": "a"}], '
            b'[{"role": "system", "content": "Q"}, {"role": "assistant", "content": "a"}]]}',
            "system must be given once",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "messages must have one of role assistant in the loss"),
        (b'{"task_id": 1, "traj": [], "info": {"error": "x"}}', "traj must not be empty; drop the conversation"),
        (
            b'{"system": "Q", "messages": [{"role": "system", "content": "P"}, {"role": "assistant", "content": "a"}]}',
            "system must be given once",
        ),
    ],
)
def test_first_broken_row_raises_with_its_line(row, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"", row, b"{"]))
    with pytest.raises(ValueError, match=f"rows.jsonl:3: {words}"):
        read_conversations(file)
    skipped = {}
    assert len(read_conversations(file, skipped=skipped)) == 1
    assert list(skipped) == ["line 3", "line 4"]


def test_broken_entry_of_an_array_raises_with_its_number(tmp_path):
    (tmp_path / "rows.json").write_text(f"[{GOOD.decode()}, 3]")
    with pytest.raises(ValueError, match=r"rows.json, entry 1: must be a JSON object, got int"):
        read_conversations(tmp_path / "rows.json")
    (tmp_path / "tau2.json").write_text('{"simulations": [{"messages": [3]}]}')
    with pytest.raises(
        ValueError, match=r"tau2.json:1, simulations\[0\]: must have messages with roles: AttributeError"
    ):
        read_conversations(tmp_path / "tau2.json")
    failed = {"simulations": [{"messages": []}, {"messages": [USER, ASSISTANT]}]}
    (tmp_path / "tau2.jsonl").write_text(f"{json.dumps(failed)}\n{json.dumps(failed)}")
    skipped = {}
    assert len(read_conversations(tmp_path / "tau2.jsonl", skipped=skipped)) == 2
    assert list(skipped) == ["line 1, simulations[0]", "line 2, simulations[0]"]


@pytest.mark.parametrize("other", [b', "return": 1}', b', "reward": null}', b', "reward_info": null}'])
def test_row_without_reward_among_rows_with_one_raises_with_its_line(other, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD[:-1] + b', "reward": 1}', GOOD[:-1] + other, GOOD[:-1] + b', "score": 0}']))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: reward must be in every row or in none, got only messages"):
        read_conversations(file)
    skipped = {}
    assert [each.reward for each in read_conversations(file, skipped=skipped)] == [1.0, 0.0]
    assert list(skipped) == ["line 2"]
    file.write_bytes(b"\n".join([GOOD, GOOD[:-1] + b', "return": 1}']))
    assert [each.reward for each in read_conversations(file)] == [0.0, 0.0]


def test_file_without_a_conversation_raises(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"rows must have a conversation$"):
        read_conversations(file)
    file.write_bytes(b"{}\n3")
    with pytest.raises(
        ValueError, match="must have a conversation; skipped 2 rows: line 1, line 2; line 1: must have the"
    ):
        read_conversations(file, skipped={})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{}".encode("utf-16"), "must be UTF-8, got UTF-16; convert it"),
        (b"\x28\xb5\x2f\xfd\x04", "must be uncompressed or gzip, got Zstandard; decompress it, as with `zstd -d`"),
        (bz2.compress(GOOD), "must be uncompressed or gzip, got bzip2; decompress it, as with `bzip2 -d`"),
        (lzma.compress(GOOD), "must be uncompressed or gzip, got xz; decompress it, as with `xz -d`"),
        (b"[1, 2", "must be a JSON array: "),
        (gzip.compress(GOOD * 99)[:-9], "must be a complete gzip file: "),
        (gzip.compress(GOOD * 99)[:20] + b"\0\1\2" + gzip.compress(GOOD * 99)[23:], "must be a complete gzip file: "),
        (b"[" * 200_000, "must be a JSON array: "),
        (b"[[]]\n[[]]", "must be a JSON array: .*; a line of JSON lines must be an object"),
        (b"PAR1" * 9, "must be a complete Parquet file: "),
    ],
)
def test_broken_file_raises_even_if_rows_are_skipped(data, words, tmp_path):
    (tmp_path / "rows").write_bytes(data)
    with pytest.raises(ValueError, match=f"rows {words}"):
        read_conversations(tmp_path / "rows", skipped={})


def test_file_of_another_format_raises(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    with pytest.raises(ValueError, match=r"rows.csv must be a file of JSON lines, JSON or Parquet, got .csv"):
        read_conversations(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="must be a file of JSON lines, JSON or Parquet, got a folder"):
        read_conversations(tmp_path)


def test_read_rows_skips_what_convert_refuses(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n{"b": 2}\n{"a": 3}')
    skipped = {}
    assert list(read_rows(tmp_path / "rows", lambda row: row["a"], skipped)) == [("line 1", 1), ("line 3", 3)]
    assert skipped == {"line 2": "KeyError: 'a'"}


def test_examples_of_several_environments_are_different_tasks(tmp_path):
    rows = [{"example_id": 0, "task": name, "prompt": [USER], "completion": [ASSISTANT]} for name in ("a", "b", "a")]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    assert [each.task for each in read_conversations(tmp_path / "rows")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
            "completions that are texts need a prompt",
        ),
        ({"completion": "b"}, "completions that are texts need a prompt; split a transcript"),
        ({"prompt": "a", "completion": [SYSTEM, {"role": "user", "content": "c"}, ASSISTANT]}, "got role system"),
        ({"messages": TURNS, "completion": [ASSISTANT]}, "must not have both messages and completion"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "the value of function_call must be JSON"),
    ],
    ids=["texts", "text", "another prompt", "messages and completion", "function_call"],
)
def test_row_whose_prompt_is_unknown_raises(row, message, tmp_path):
    (tmp_path / "rows").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_conversations(tmp_path / "rows")


@pytest.mark.parametrize("prompt", ["a", " a\n"])
def test_prompt_that_completions_have_after_a_system_message_is_there_once(prompt, tmp_path):
    pair = {
        "prompt": prompt,
        "chosen": [SYSTEM, USER, ASSISTANT],
        "rejected": [SYSTEM, USER, context(ASSISTANT), ASSISTANT],
    }
    (tmp_path / "rows").write_text(json.dumps(pair))
    found = read_conversations(tmp_path / "rows")
    assert [conversation.messages for conversation in found] == [pair["chosen"], pair["rejected"]]


def test_two_completions_are_not_a_pair_so_all_their_turns_are_in_the_loss(tmp_path):
    both = [[USER, ASSISTANT, USER, {"role": "assistant", "content": text}] for text in "cd"]
    (tmp_path / "rows").write_text(json.dumps({"completions": both}))
    assert [conversation.messages for conversation in read_conversations(tmp_path / "rows")] == both
