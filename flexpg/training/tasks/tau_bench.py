"""Recorded conversations of tau-bench: a customer, an agent, and the agent's tools (arXiv 2406.12045)."""

from __future__ import annotations

import json
from pathlib import Path

from flexpg.conversations import Conversation, is_reward, template_messages


def tau_bench(path: str | Path) -> list[Conversation]:
    """Each entry of a tau-bench results file as a conversation, in the file's order; trials of a task share `task`.

    The file is a JSON list of {"task_id", "reward", "traj"}, with `traj` as OpenAI's API writes messages. Tool calls'
    arguments, JSON in strings, are parsed, and a content of null becomes "", as chat templates want them. The schemas
    of the tools are not in the file: `tools` is None. Where the model is to see them, add them with
    `dataclasses.replace(conversation, tools=...)`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is no such list, or an entry that is not as above; with its number, from 0.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r} (working directory {Path.cwd()})")
    try:
        entries = json.loads(Path(path).read_bytes())
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds {str(entries)[:40]!r}; tau-bench's results are a list of conversations")
    return [_conversation(f"{path} entry {i} of {len(entries)}", entry) for i, entry in enumerate(entries)]


def _conversation(where: str, entry: object) -> Conversation:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {str(entry)[:40]!r}; it needs an object with task_id, reward and traj")
    task, reward, messages = entry.get("task_id"), entry.get("reward"), entry.get("traj")
    if isinstance(task, bool) or not isinstance(task, int):
        raise ValueError(f"{where} has task_id {task!r}; it needs a whole number")
    if not is_reward(reward):
        raise ValueError(f"{where} has reward {repr(reward)[:40]}; it needs a finite number")
    if not isinstance(messages, list):
        raise ValueError(f"{where} has traj {str(messages)[:40]!r}; it needs a list of messages")
    try:
        return Conversation(template_messages(messages), float(reward), task)
    except ValueError as error:
        raise ValueError(f"{where}, traj: {error}") from error
