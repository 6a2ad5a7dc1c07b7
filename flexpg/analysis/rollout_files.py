"""JSONL files -> rollouts: prompts with completions, as texts or token ids, or conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from flexpg.conversations import (
    ChatTokenizer,
    Conversation,
    MaskedSequence,
    conversation_sequences,
    rollouts_from_masked,
    template_messages,
)
from flexpg.rollouts import Rollouts
from flexpg.tree import token_ids

Encode = Callable[[str], Sequence[int]]  # a text's token ids, without special tokens


def read_rollouts(
    path: Path | str,
    *,
    encode: Encode | None = None,
    chat: ChatTokenizer | None = None,
    per_turn: bool = False,
    vocab_size: int | None = None,
) -> tuple[Rollouts, list[str]]:
    """Read the rollouts of one step; those with equal prompts share a group, wherever they are in the file.

    Each line is an object: {"prompt": ..., "completions": [...]} or {"prompt": ..., "completion": ...}, each a text or
    a list of token ids, or {"messages": [...]}, optionally with "reward" and "tools". Other keys are ignored, and so
    are empty lines.

    Args:
        path: The file.
        encode: For texts; a prompt and its completion are encoded separately.
        chat: For messages: a tokenizer with a chat template.
        per_turn: Of messages, read a rollout for each assistant turn instead of one for all.
        vocab_size: Of the model; None to accept any token id.

    Returns:
        The rollouts, and for each the line that it is from, such as "line 17, completions[2]".

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is of another form, needs `encode` or `chat`, or has a token id that the model does not
            have; or there is no line.
    """
    sequences: list[MaskedSequence] = []
    rewards: list[float] = []
    names: list[str] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)  # of bytes, so a byte-order mark is skipped
            if "messages" in row:
                own = _read_messages(row, chat, per_turn)
                parts = [f", turn {n}" if per_turn else "" for n in range(len(own))]
            elif per_turn:
                raise ValueError("per-turn rollouts need `messages`")
            else:
                own = _read_prompt(row, encode)
                parts = [f", completions[{i}]" if "completions" in row else "" for i in range(len(own))]
            reward = float(row.get("reward") or 0.0)
            if not isfinite(reward):
                raise ValueError(f"reward must be finite, got {reward}")
            largest = max((int(tokens.max()) for tokens, _ in own), default=0)
            if vocab_size is not None and largest >= vocab_size:
                raise ValueError(
                    f"token ids must be below the model's vocabulary size of {vocab_size}, got {largest}; use the "
                    "tokenizer that belongs to the model"
                )
        except Exception as error:  # a chat template may raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{path}:{number}: {kind}{error}") from error
        sequences += own
        rewards += [reward] * len(own)
        names += [f"line {number}{part}" for part in parts]
    if not sequences:
        raise ValueError(f"{path} must have at least one line, a JSON object")
    return rollouts_from_masked(sequences, rewards), names


def _read_prompt(row: dict[str, Any], encode: Encode | None) -> list[MaskedSequence]:
    if "prompt" not in row or ("completion" in row) == ("completions" in row):
        raise ValueError(
            f"a line must have the keys prompt and completions, prompt and completion, or messages, got {list(row)}"
        )
    prompt = _tokens("prompt", row["prompt"], encode)
    completions = row["completions"] if "completions" in row else [row["completion"]]
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"completions must be a list of at least one, got {completions!r}")
    sequences = []
    for i, completion in enumerate(completions):
        own = _tokens(f"completions[{i}]", completion, encode)
        sequences.append((np.concatenate([prompt, own]), np.arange(len(prompt) + len(own)) >= len(prompt)))
    return sequences


def _tokens(name: str, value: str | list[int], encode: Encode | None) -> np.ndarray:
    if isinstance(value, str):
        if encode is None:
            raise ValueError(f"{name} is text, which needs a tokenizer")
        value = list(encode(value))
    return token_ids(name, value).numpy()


def _read_messages(row: dict[str, Any], chat: ChatTokenizer | None, per_turn: bool) -> list[MaskedSequence]:
    if chat is None:
        raise ValueError("messages need a tokenizer with a chat template")
    conversation = Conversation(template_messages(row["messages"]), tools=row.get("tools"))
    return conversation_sequences(conversation, chat, per_turn=per_turn)
