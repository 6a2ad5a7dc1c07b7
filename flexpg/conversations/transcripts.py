"""Files of recorded conversations and completions -> rows -> conversations, in the formats of common tools.

| format | keys of a row |
| --- | --- |
| OpenAI, Anthropic, mini-SWE-agent | `messages`, with `system` and `tools` if there are any |
| OpenAI's Responses API and Agents SDK | `messages`, with the items of `to_input_list()` |
| TRL (conversational), verifiers, prime-rl | `prompt` and `completion` or `completions`, as messages |
| preference pairs | `prompt`, `chosen` and `rejected`, or the latter two as messages with the prompt in both |
| ShareGPT | `conversations`, with `from` and `value` |
| tau-bench | `traj` |
| tau2-bench | `simulations`, each with `messages` and `reward_info` |
| SWE-agent | `history` |

`flexpg.conversations.row_files` reads the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any

from flexpg.conversations.messages import Message, template_messages
from flexpg.conversations.response_items import is_item, join_items
from flexpg.conversations.rollouts import Conversation
from flexpg.conversations.row_files import Row, located, read_rows, skipped_message

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    **{role: role for role in ("system", "developer")},
}
MESSAGE_KEYS = ("messages", "traj", "conversations", "history", "completions")


def read_conversations(path: str | Path, *, skipped: dict[str, str] | None = None) -> list[Conversation]:
    """Read the conversations of a file, in order.

    Conversations with the same `task_id` or `example_id` have the same `task`: that id if all are integers, otherwise a
    number. Without ids, those that open with the same messages do. If no row has a reward, all rewards are 0.

    Args:
        path: The file; "-" for standard input.
        skipped: Receives why a row is not a conversation, by the row's name; None to raise an error at the first.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a row is not a conversation, or has no reward although others have one, with its line or number;
            or there is no conversation.
    """
    rows = list(read_rows(path, lambda row: (row, conversations_of(row)), skipped))
    if any(_reward(row) is not None for _, (row, _) in rows):  # then 0 would be a reward that nobody gave
        unrewarded = {name: row for name, (row, _) in rows if _reward(row) is None}
        for name, row in unrewarded.items():
            keys = ", ".join(key for key, value in row.items() if value is not None)
            reason = f"reward must be in every row or in none, got only {keys} here, and a reward in others"
            if skipped is None:
                raise ValueError(f"{located(path, name)}: {reason}")
            skipped[name] = reason
        rows = [row for row in rows if row[0] not in unrewarded]
    found = [each for _, (_, conversations) in rows for each in conversations]
    ids = [_task_of(row, each) for _, (row, conversations) in rows for each in conversations]
    if not found:
        raise ValueError(f"{path} must have a conversation{f'; {skipped_message(skipped)}' if skipped else ''}")
    if not all(isinstance(task, int) for task in ids):
        texts = list(map(str, ids))  # 1 and "1" are the same
        number = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        ids = [number[text] for text in texts]
    return [replace(conversation, task=task) for conversation, task in zip(found, ids, strict=True)]


def is_messages(value: Any) -> bool:
    """Return whether a value of a row is a list of messages, or JSON of one, not a text or token ids."""
    value = decoded(value)
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def decoded(value: Any) -> Any:
    """Return the messages that a text is JSON of, as in columns of Parquet files, or the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    is_list = isinstance(parsed, list) and all(
        isinstance(item, dict) and ({"role", "from"} & item.keys() or is_item(item)) for item in parsed
    )
    return parsed if is_list and parsed else value


def conversations_of(row: Row) -> list[Conversation]:
    """Return the conversations of a row, in any of the formats above.

    Raises:
        ValueError: If it has none of these formats, or a message cannot be converted.
    """
    conversations = _conversations_of({key: value for key, value in row.items() if value is not None})
    for conversation in conversations:
        if not any(is_in_loss(message) for message in template_messages(conversation.messages)):
            raise ValueError("messages must have one of role assistant in the loss; drop the conversation")
    return conversations


def is_in_loss(message: Message) -> bool:
    """Return whether a message is an assistant's, and not context only."""
    return bool(message.get("role") == "assistant" and message.get("weight", 1) != 0)


def _conversations_of(row: Row) -> list[Conversation]:
    if row.get("history"):  # SWE-agent: demonstrations come first, and what ended the run is no turn
        history = _messages(row, "history")
        demos = max((j for j, message in enumerate(history) if message.get("is_demo")), default=-1)
        ended = {"weight": 0, "content": ""}
        rest = [message | ended if _is_exit(message) else message for message in history[demos + 1 :]]
        return _conversations(row, _context(history[: demos + 1]), [rest])
    for key in ("messages", "traj"):
        if row.get(key):
            messages = _messages(row, key)
            if other := {"completion", "completions", "chosen"} & row.keys():
                raise ValueError(
                    f"must not have both {key} and {', '.join(sorted(other))}; name messages before a completion prompt"
                )
            return _conversations(row, [], [[m for m in messages if m.get("role") != "exit"]])  # mini-SWE-agent's
    if row.get("conversations"):
        return _conversations(row, [], [[_sharegpt(message) for message in _messages(row, "conversations")]])
    is_pair = "chosen" in row and "rejected" in row
    if is_pair:
        completions = [row["chosen"], row["rejected"]]
    else:
        completions = row["completions"] if "completions" in row else [row["completion"]] if "completion" in row else []
    if not completions and (empty := [key for key in MESSAGE_KEYS if row.get(key) == []]):
        raise ValueError(f"{empty[0]} must not be empty; drop the conversation")
    if not completions:
        hint = "; a prompt needs a completion or completions" if row.get("prompt") else ""
        raise ValueError(
            "must have the keys of a known format, such as messages, or prompt and completion, got "
            f"{', '.join(row) or 'none'}{hint}"
        )
    prompt = _listed(row.get("prompt", []), "user")
    if not (prompt or row.get("system")) and any(isinstance(decoded(completion), str) for completion in completions):
        raise ValueError("completions that are texts need a prompt; split a transcript that is a text into messages")
    replies = [_listed(completion, "assistant") for completion in completions]
    opening = [_opening(reply) for reply in replies]
    if is_pair and not prompt:  # what both have in common is their prompt
        prompt = _shared(*replies)
    elif isinstance(row.get("prompt"), str) and all(_same(other, opening[0]) for other in opening):
        text = str(opening[0][-1].get("content")) if opening[0] else ""
        if text.strip() == row["prompt"].strip():  # in the completions, maybe after a system message
            prompt = opening[0]
    size = len(prompt)
    if size and all(_same(reply[:size], prompt) for reply in replies):  # the prompt is in the completions too
        replies = [reply[size:] for reply in replies]
    elif prompt and any(opening):
        role = next(messages[0].get("role") for messages in opening if messages)
        raise ValueError(f"completions must begin with the whole prompt or an assistant message, got role {role}")
    return _conversations(row, _context(prompt), replies)


def _opening(messages: Sequence[Message]) -> list[Message]:
    """Return the messages before the first of the assistant."""
    return [*takewhile(lambda message: message.get("role") != "assistant", messages)]


def _shared(a: list[Message], b: list[Message]) -> list[Message]:
    """Return the messages that both begin with, without the last one of either."""
    size = min(len(a), len(b)) - 1
    return a[: next((n for n, (x, y) in enumerate(zip(a[:size], b[:size], strict=True)) if x != y), size)]


def _same(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    pairs = zip(messages, others, strict=False)
    return len(messages) == len(others) and all(
        (a.get("role"), a.get("content")) == (b.get("role"), b.get("content")) for a, b in pairs
    )


def _is_exit(message: Message) -> bool:
    """Return whether SWE-agent wrote an assistant message because it ended the run, without a call of the model."""
    if message.get("role") != "assistant" or message.get("tool_calls"):
        return False
    # Of a step, `content` is what the model wrote, and `thought` and `action` are its parts.
    ended = not message.get("action", True) and message.get("content") == message.get("thought")
    return ended or not message.get("content")


def rewards_of(row: Row, count: int) -> list[float]:
    """Return the rewards of a row's completions: `reward`, `rewards` or `score`, one for all or one each; 0 without.

    Raises:
        ValueError: If one is not a finite number, there are fewer or more, or there are both `reward` and `rewards`.
    """
    if row.get("reward") is not None and row.get("rewards") is not None:
        raise ValueError("must have reward or rewards, got both; leave one of them out")
    reward = _reward(row)
    reward = 0.0 if reward is None else reward
    rewards = reward if isinstance(reward, list) else [reward] * count
    if len(rewards) != count:
        raise ValueError(f"rewards must be one for each of {count} completions, got {len(rewards)}")
    for value in rewards:
        if not isinstance(value, int | float | Decimal) or not isfinite(value):
            raise ValueError(f"reward must be a finite number, got {value!r}")
    return [float(value) for value in rewards]


def _reward(row: Row) -> Any:
    """Return what a row has as its reward, None if it has none."""
    info = row.get("reward_info")
    nested = info.get("reward") if isinstance(info, Mapping) else None
    given = (row.get("reward"), row.get("rewards"), row.get("score"), nested)
    return next((value for value in given if value is not None), None)


def _conversations(row: Row, prompt: list[Message], completions: Sequence[Any]) -> list[Conversation]:
    tools = row.get("tools") or row.get("tool_defs") or row.get("functions") or None
    return [
        Conversation(_with_system(row.get("system"), [*prompt, *_listed(completion, "assistant")]), reward, tools=tools)
        for completion, reward in zip(completions, rewards_of(row, len(completions)), strict=True)
    ]


def _with_system(system: Any, messages: list[Message]) -> list[Message]:
    """Return messages that begin with a row's system prompt."""
    if not system:
        return messages
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content") != system:
        raise ValueError("system must be given once, got another one among the messages")
    return messages


def _messages(row: Row, key: str) -> list[Message]:
    if isinstance(decoded(row[key]), str):
        raise ValueError(f"{key} must be a list of messages, got {row[key][:60]!r}")
    return _listed(row[key], "user")


def _listed(messages: Any, role: str) -> list[Message]:
    messages = decoded(messages)
    if isinstance(messages, str):
        return [{"role": role, "content": messages}]
    if not isinstance(messages, Sequence):
        messages = [messages]
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"messages must be objects with role and content, got {message!r:.60}")
    return [message for _, message in join_items(messages)]


def _context(messages: Iterable[Message]) -> list[Message]:
    """Return messages whose assistant turns are not in the loss."""
    return [message | {"weight": 0} if message.get("role") == "assistant" else message for message in messages]


def _sharegpt(message: Message) -> Message:
    if "from" not in message:
        return message
    role, text = message["from"], message.get("value")
    other = {key: value for key, value in message.items() if key not in ("from", "value")}
    if role == "function_call":
        try:
            return other | {"role": "assistant", "tool_calls": json.loads(text or "null")}
        except (TypeError, ValueError) as error:
            raise ValueError(f"the value of function_call must be JSON, got {text!r:.60}: {error}") from error
    if str(role).lower() not in SHAREGPT_ROLES:
        raise ValueError(f"from must be one of {', '.join(SHAREGPT_ROLES)}, function_call, got {role!r}")
    return other | {"role": SHAREGPT_ROLES[role.lower()], "content": text}


def _task_of(row: Row, conversation: Conversation) -> Any:
    given = row.get("task_id") if row.get("task_id") is not None else row.get("example_id")
    if given is not None and isinstance(row.get("task"), str):  # verifiers: examples of several environments
        return json.dumps([row["task"], given], default=str)
    if isinstance(given, float) and not isfinite(given):  # what pandas writes for a missing id
        raise ValueError(f"task_id or example_id must be a text or a number, got {given}")
    if given is not None:
        return int(given) if isinstance(given, float) and given.is_integer() else given
    messages = conversation.messages
    is_turn = list(map(is_in_loss, messages))
    return json.dumps(messages[: is_turn.index(True) if True in is_turn else None], default=str)
