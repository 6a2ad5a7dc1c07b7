"""JSONL files become rollouts, and a broken line is reported with its number."""

import json
from functools import partial

import pytest
import torch
from chat_tokenizers import chat_tokenizer

from flexpg.analysis.rollout_files import read_rollouts
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.conversations.row_files import skipped_message

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, ASSISTANT, USER, ASSISTANT], "reward": 1}
PROMPT = {"prompt": [1, 2], "completions": [[3]]}


TOKENIZER = chat_tokenizer("qwen2_5", "qwen2_5")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes lines, bytes as they are and anything else as JSON, and returns the path."""

    def write(*rows):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "rollouts.jsonl").write_bytes(b"\n".join([*lines, b""]))
        return tmp_path / "rollouts.jsonl"

    return write


def test_read_rollouts_groups_equal_prompts_across_lines(write):
    rows = [
        {"prompt": [1, 2], "completions": [[3], [4, 5]]},
        b"",
        {"prompt": [9], "completion": [3], "id": "ignored"},
        {"prompt": [1, 2], "completion": [6]},
    ]
    rollouts, names = read_rollouts(write(*rows))
    assert [prompt.tolist() for prompt in rollouts.prompts] == [[1, 2], [9]]
    assert [completion.tolist() for completion in rollouts.completions] == [[3], [4, 5], [3], [6]]
    assert rollouts.group_ids.tolist() == [0, 0, 1, 0]
    assert rollouts.loss_mask.sum(1).tolist() == [1, 2, 1, 1]
    assert names == ["line 1, completions[0]", "line 1, completions[1]", "line 3", "line 4"]


def test_read_rollouts_encodes_texts_separately_without_byte_order_mark(write):
    row = {"prompt": "é\u2028", "completion": "b"}
    rollouts, _ = read_rollouts(write(b"\xef\xbb\xbf" + json.dumps(row).encode()), encode=lambda text: text.encode())
    assert bytes(rollouts.prompts[0].tolist()).decode() == "é\u2028"
    assert bytes(rollouts.completions[0].tolist()) == b"b"


@pytest.mark.parametrize("per_turn", [False, True])
def test_read_rollouts_of_messages_equal_conversation_rollouts(per_turn, write):
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    other = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rollouts, names = read_rollouts(write(CHAT, {"messages": other}), chat=TOKENIZER, per_turn=per_turn)
    conversations = [Conversation(CHAT["messages"], 1.0), Conversation(other)]
    expected, _ = conversation_rollouts(conversations, TOKENIZER, per_turn=per_turn)
    assert all(map(torch.equal, rollouts.sequences, expected.sequences))
    assert torch.equal(rollouts.loss_mask, expected.loss_mask) and torch.equal(rollouts.group_ids, expected.group_ids)
    assert torch.equal(rollouts.rewards, expected.rewards)
    assert names == (["line 1, turn 0", "line 1, turn 1", "line 2, turn 0"] if per_turn else ["line 1", "line 2"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": [1],', "must be JSON: Expecting property name"),
        (b'{"a": "\xff"}', "must be UTF-8: .*can't decode byte 0xff"),
        ({"prompt": [1]}, "got prompt; a prompt needs a completion or completions"),
        (PROMPT | {"prompt": []}, "prompt must be 1-D with at least one token id"),
        (PROMPT | {"completions": [[1], []]}, r"completions\[1\] must be 1-D with at least one token id"),
        (PROMPT | {"completions": []}, r"completions must be a list of at least one, got \[\]"),
        (PROMPT | {"completions": "12"}, "completions must be a list of at least one, got '12'"),
        (PROMPT | {"prompt": "text"}, "prompt is text, which needs a tokenizer"),
        (PROMPT | {"prompt": [1, -1]}, "prompt must hold token ids >= 0, got -1"),
        (PROMPT | {"prompt": [1.5]}, "TypeError: prompt must hold integer token ids"),
        (PROMPT | {"completions": [[200]]}, "below the model's vocabulary size of 200, got 200"),
        (CHAT, "messages need a tokenizer with a chat template"),
        (CHAT | {"input": "x", "output": "y"}, "messages need a tokenizer with a chat template"),
        ({"system": "P", "prompt": "a", "completion": "b"}, "messages need a tokenizer with a chat template"),
        ({"prompt": [1], "chosen": [2]}, "must have the keys of a known format"),
        ({"prompt": ["a"], "completion": [2]}, "prompt must be a text or a list of token ids, got a list of texts"),
        ({"nodes": [{"parent": 1}, {"parent": 0}, {"parent": 1}]}, "nodes must be a tree, got a cycle through node"),
    ],
)
def test_read_rollouts_of_broken_line_raises_with_its_number(row, message, write):
    with pytest.raises(ValueError, match=f"rollouts.jsonl:2: .*{message}"):
        read_rollouts(write(PROMPT, row), vocab_size=200)


def test_read_rollouts_of_broken_messages_raises_with_line_number(write):
    read = partial(read_rollouts, chat=TOKENIZER, per_turn=True)
    with pytest.raises(ValueError, match=r"rollouts.jsonl:2: messages must have one of role assistant"):
        read(write(CHAT, {"messages": [USER]}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: messages\[1\] must have a role of .* got 'assistnat'"):
        read(write({"messages": [USER, {"role": "assistnat", "content": "b"}]}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: per-turn rollouts need `messages`"):
        read(write(PROMPT))
    with pytest.raises(ValueError, match=r"must have at least one rollout$"):
        read(write(b" "))


# Options and other forms of rows.


def test_read_rollouts_skips_broken_lines_and_counts_them(write):
    skipped = {}
    rows = [b"{", PROMPT, PROMPT | {"completions": [[200]]}, CHAT]
    rollouts, names = read_rollouts(write(*rows), vocab_size=200, skipped=skipped)
    assert len(rollouts) == 1 and names == ["line 2, completions[0]"]
    assert list(skipped) == ["line 1", "line 3", "line 4"]
    assert skipped_message(skipped).startswith("skipped 3 rows: line 1, line 3, line 4; line 1: must be JSON: ")
    with pytest.raises(ValueError, match="must have at least one rollout; skipped 1 row: line 1; line 1: must be JSON"):
        read_rollouts(write(b"{"), skipped={})


def test_read_rollouts_of_several_files_names_them(tmp_path):
    for name, row in (("a", PROMPT), ("b", b"3"), ("c", PROMPT)):
        (tmp_path / name).write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    files = [tmp_path / name for name in "abc"]
    skipped = {}
    rollouts, names = read_rollouts(files, skipped=skipped)
    assert rollouts.group_ids.tolist() == [0, 0]
    assert names == [f"{tmp_path / name}, line 1, completions[0]" for name in "ac"]
    assert list(skipped) == [f"{tmp_path / 'b'}, line 1"]


def test_read_rollouts_stores_rewritten_conversations_turn_by_turn(write):
    forgetful = chat_tokenizer("qwen3", "qwen3")
    with pytest.warns(UserWarning, match=r"1 conversation stored turn by turn, .*; line 2: messages\[1\] is generated"):
        _, names = read_rollouts(write(CHAT | {"messages": [USER, ASSISTANT]}, CHAT), chat=forgetful)
    assert names == ["line 1", "line 2, turn 0", "line 2, turn 1"]
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: .* per_turn=True"):
        read_rollouts(write(CHAT), chat=forgetful, per_turn=False)


def test_read_rollouts_passes_stop_tokens_and_template_options_on(write):
    tokenizer = chat_tokenizer("qwen3", "qwen3_6")
    row = {"messages": [USER, ASSISTANT]}
    rollouts, _ = read_rollouts(write(row), chat=tokenizer, stop_tokens=[], template_options={"enable_thinking": False})
    assert tokenizer.decode(rollouts.completions[0]) == "b<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "names", "rewards"),
    [
        ({"input": "q", "output": "a", "score": 0.5, "gts": "a", "step": 1}, ["line 1"], [0.5]),  # verl
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["line 1, chosen", "line 1, rejected"], [0, 0]),
        (
            {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 2]},
            ["line 1, completions[0]", "line 1, completions[1]"],
            [1, 2],
        ),
        ({"prompt": "q", "completion": "a", "reward": None}, ["line 1"], [0]),
    ],
)
def test_read_rollouts_of_texts_of_other_tools(row, names, rewards, write):
    rollouts, found = read_rollouts(write(row), encode=lambda text: list(text.encode()))
    assert found == names and rollouts.rewards.tolist() == rewards
    assert [bytes(tokens.tolist()) for tokens in rollouts.completions] == [b"a", b"b"][: len(names)]


def test_read_rollouts_of_a_trace_has_its_sampled_tokens(write):
    def node(parent, token_ids, mask):
        return {"parent": parent, "message": USER, "token_ids": token_ids, "mask": mask}

    nodes = [
        node(None, [1, 2], [False, False]),
        node(0, [3, 4, 5], [False, True, True]),
        node(1, [6], [False]),
        node(2, [7, 8, 9], [True, True, False]),  # what follows the last sampled token is cut off
        node(0, [3, 10], [False, True]),
    ]
    row = {"nodes": nodes, "rewards": {"a": {"score": 1.0, "weight": 0.5}, "b": None, "c": {"score": 2.0}}}
    rollouts, names = read_rollouts(write(row))
    assert names == ["line 1, node 3", "line 1, node 4"]
    assert [sequence.tolist() for sequence in rollouts.sequences] == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 10]]
    assert rollouts.loss_mask.tolist() == [[True, True, False, True, True], [True, False, False, False, False]]
    assert rollouts.rewards.tolist() == [2.5, 2.5]
    rollouts, _ = read_rollouts(write({"nodes": nodes, "reward": 3.0}))
    assert rollouts.rewards.tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="a sampled token that has one before it, got 2 for 2 tokens, 0 sampled"):
        read_rollouts(write({"nodes": nodes[:1]}))
