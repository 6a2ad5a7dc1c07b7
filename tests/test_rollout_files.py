"""JSONL files become rollouts, and a broken line is reported with its number."""

import json
from functools import partial

import pytest
import torch

from flexpg.analysis.rollout_files import read_rollouts
from flexpg.conversations import Conversation, conversation_rollouts

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, ASSISTANT, USER, ASSISTANT], "reward": 1}
PROMPT = {"prompt": [1, 2], "completions": [[3]]}


class ByteChat:
    """A tokenizer of bytes whose chat template is `<role>content` and a zero."""

    eos_token_id = 0

    def apply_chat_template(self, messages, *, add_generation_prompt, **options):
        text = "".join(f"<{message['role']}>{message['content']}\0" for message in messages)
        return list((text + "<assistant>" * add_generation_prompt).encode())


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
    rollouts, names = read_rollouts(write(CHAT, {"messages": other}), chat=ByteChat(), per_turn=per_turn)
    conversations = [Conversation(CHAT["messages"], 1.0), Conversation([USER, {"role": "assistant", "content": ""}])]
    expected, _ = conversation_rollouts(conversations, ByteChat(), per_turn=per_turn)
    assert all(map(torch.equal, rollouts.sequences, expected.sequences))
    assert torch.equal(rollouts.loss_mask, expected.loss_mask) and torch.equal(rollouts.group_ids, expected.group_ids)
    assert torch.equal(rollouts.rewards, expected.rewards)
    assert names == (["line 1, turn 0", "line 1, turn 1", "line 2, turn 0"] if per_turn else ["line 1", "line 2"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": [1],', "Expecting property name"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ({"prompt": [1]}, "must have the keys prompt and completions, .* got \\['prompt'\\]"),
        (PROMPT | {"completion": [1]}, "must have the keys prompt and completions"),
        (PROMPT | {"prompt": []}, "prompt must be 1-D with at least one token id"),
        (PROMPT | {"completions": [[1], []]}, r"completions\[1\] must be 1-D with at least one token id"),
        (PROMPT | {"completions": []}, r"completions must be a list of at least one, got \[\]"),
        (PROMPT | {"completions": "12"}, "completions must be a list of at least one, got '12'"),
        (PROMPT | {"prompt": "text"}, "prompt is text, which needs a tokenizer"),
        (PROMPT | {"prompt": [1, -1]}, "prompt must hold token ids >= 0, got -1"),
        (PROMPT | {"prompt": [1.5]}, "TypeError: prompt must hold integer token ids"),
        (PROMPT | {"completions": [[200]]}, "below the model's vocabulary size of 200, got 200"),
        (CHAT, "messages need a tokenizer with a chat template"),
    ],
)
def test_read_rollouts_of_broken_line_raises_with_its_number(row, message, write):
    with pytest.raises(ValueError, match=f"rollouts.jsonl:2: .*{message}"):
        read_rollouts(write(PROMPT, row), vocab_size=200)


def test_read_rollouts_of_broken_messages_raises_with_line_number(write):
    read = partial(read_rollouts, chat=ByteChat(), per_turn=True)
    with pytest.raises(ValueError, match=r"rollouts.jsonl:2: messages must have one of role assistant"):
        read(write(CHAT, {"messages": [USER]}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: messages\[1\] must have a role of .* got 'assistnat'"):
        read(write({"messages": [USER, {"role": "assistnat", "content": "b"}]}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: KeyError: 'function'"):
        read(write({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: reward must be finite, got nan"):
        read(write(CHAT | {"reward": float("nan")}))
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: per-turn rollouts need `messages`"):
        read(write(PROMPT))
    with pytest.raises(ValueError, match="must have at least one line"):
        read(write(b" "))
