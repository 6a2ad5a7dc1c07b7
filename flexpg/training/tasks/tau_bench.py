"""Recorded conversations of tau-bench: a customer, an agent, and the agent's tools (arXiv 2406.12045)."""

from __future__ import annotations

import json
from pathlib import Path

from flexpg.conversations import Conversation, template_messages


def tau_bench(path: str | Path) -> list[Conversation]:
    """Return the entries of a tau-bench results file as conversations, in order; trials of a task share `task`.

    The file is a JSON list of {"task_id", "reward", "traj"}, with `traj` as OpenAI's API writes messages. The schemas
    of the tools are not in the file: `tools` is None, and can be set with `dataclasses.replace`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If an entry is not as above; with its number.
    """
    conversations = []
    for n, entry in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        try:
            messages, reward, task = template_messages(entry["traj"]), float(entry["reward"]), int(entry["task_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, entry {n}: {type(error).__name__}: {error}") from error
        conversations.append(Conversation(messages, reward, task))
    return conversations
