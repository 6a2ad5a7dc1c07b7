"""Files of completions or conversations -> rollouts: texts, token ids or messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexpg.conversations.chat_template import ChatTokenizer
from flexpg.conversations.rollouts import (
    MaskedSequence,
    by_turn_message,
    conversation_sequences,
    rollouts_from_masked,
)
from flexpg.conversations.row_files import Row, read_rows, skipped_message
from flexpg.conversations.transcripts import conversations_of, is_messages, rewards_of
from flexpg.rollouts import Rollouts
from flexpg.token_sequences import token_ids

Encode = Callable[[str], Sequence[int]]  # a text's token ids, without special tokens
TURN = ", turn "  # in the name of a rollout that is one turn of a conversation


def read_rollouts(
    paths: Path | str | Sequence[Path | str],
    *,
    encode: Encode | None = None,
    chat: ChatTokenizer | None = None,
    per_turn: bool | None = None,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    skipped: dict[str, str] | None = None,
) -> tuple[Rollouts, list[str]]:
    """Read the rollouts of one step; those with equal prompts share a group, wherever they are in the files.

    A row has `prompt` and `completion`, `completions`, or `chosen` and `rejected`, each a text or a list of token ids;
    `input` and `output`, as verl dumps them; the `nodes` of a trace of verifiers and prime-rl, with the sampled token
    ids; or messages in one of the formats of `flexpg.conversations.transcripts`. Other keys are ignored.

    Args:
        paths: A file or several; "-" for standard input.
        encode: For texts; a prompt and its completion are encoded separately.
        chat: For messages: a tokenizer with a chat template.
        per_turn: Make a rollout of each assistant turn of messages; None where one cannot hold all, with a warning.
        stop_tokens: Ids that end an assistant turn; None for those of `chat`.
        template_options: Further options of the chat template.
        vocab_size: The model's vocabulary size; None to accept any token id.
        skipped: Receives why a row is not read, by its name; None to raise an error at the first.

    Returns:
        The rollouts, and for each the row that it is from, such as "line 17, completions[2]".

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a row is of another form, needs `encode` or `chat`, or has a token id that the model does not
            have; or there is none.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    options = {"per_turn": per_turn, "stop_tokens": stop_tokens, "template_options": template_options}

    def convert(row: Row) -> list[tuple[str, MaskedSequence, float, str]]:
        found = _of_row(row, encode, chat, options)
        largest = max((int(sequence[0].max()) for _, sequence, *_ in found), default=0)
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"token ids must be below the model's vocabulary size of {vocab_size}, got {largest}; use the "
                "tokenizer that belongs to the model"
            )
        return found

    sequences: list[MaskedSequence] = []
    rewards: list[float] = []
    names: list[str] = []
    by_turn: dict[str, str] = {}
    for path in paths:
        own_skipped: dict[str, str] | None = None if skipped is None else {}
        prefix = f"{path}, " if len(paths) > 1 else ""
        for name, found in read_rows(path, convert, own_skipped):
            for part, sequence, reward, reason in found:
                sequences.append(sequence)
                rewards.append(reward)
                names.append(f"{prefix}{name}{part}")
                if reason:
                    by_turn[f"{prefix}{name}"] = reason
        if skipped is not None and own_skipped:
            skipped |= {f"{prefix}{name}": reason for name, reason in own_skipped.items()}
    if not sequences:
        why = f"; {skipped_message(skipped)}" if skipped else ""
        raise ValueError(f"{', '.join(map(str, paths))} must have at least one rollout{why}")
    if by_turn:
        warnings.warn(by_turn_message(by_turn), stacklevel=2)
    return rollouts_from_masked(sequences, rewards), names


def _of_row(
    row: Row, encode: Encode | None, chat: ChatTokenizer | None, options: dict[str, Any]
) -> list[tuple[str, MaskedSequence, float, str]]:
    """Return the sequences of a row, each with its name in the row, reward, and why it is a turn only."""
    if "nodes" in row:
        return _of_trace(row)
    keys = [key for key in ("completions", "chosen", "completion", "output") if key in row]
    if "chosen" in keys and "rejected" not in row:
        keys.remove("chosen")
    prompt = row.get("prompt", None if "instruction" in row else row.get("input"))
    parts = [prompt, *(part for key in keys for part in (row[key] if isinstance(row[key], list) else [row[key]]))]
    parts += [row.get(key) for key in ("messages", "traj", "conversations", "history")]
    has_messages = any(is_messages(part) or isinstance(part, dict) for part in parts)
    if prompt is None or not keys or has_messages or row.get("system"):
        return _of_messages(row, chat, options)
    if options["per_turn"]:
        raise ValueError("per-turn rollouts need `messages`")
    key = keys[0]
    many = row[key] if key == "completions" else [row["chosen"], row["rejected"]] if key == "chosen" else [row[key]]
    if not isinstance(many, list) or not many:
        raise ValueError(f"completions must be a list of at least one, got {many!r}")
    names = ["chosen", "rejected"] if key == "chosen" else [key]
    if key == "completions":
        names = [f"completions[{i}]" for i in range(len(many))]
    first = _tokens("prompt", prompt, encode)
    sequences = []
    for name, completion in zip(names, many, strict=True):
        tokens = _tokens(name, completion, encode)
        sequences.append((np.concatenate([first, tokens]), np.arange(len(first) + len(tokens)) >= len(first)))
    suffixes = [f", {name}" if len(many) > 1 or key == "completions" else "" for name in names]
    return list(zip(suffixes, sequences, rewards_of(row, len(many)), [""] * len(many), strict=True))


def _tokens(name: str, value: str | list[int], encode: Encode | None) -> np.ndarray:
    if isinstance(value, str):
        if encode is None:
            raise ValueError(f"{name} is text, which needs a tokenizer")
        value = list(encode(value))
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a text or a list of token ids, got a list of texts")
    return token_ids(name, value).numpy()


def _of_messages(
    row: Row, chat: ChatTokenizer | None, options: dict[str, Any]
) -> list[tuple[str, MaskedSequence, float, str]]:
    conversations = conversations_of(row)
    if chat is None:
        raise ValueError("messages need a tokenizer with a chat template")
    found = []
    for i, conversation in enumerate(conversations):
        name = f", completions[{i}]" if len(conversations) > 1 else ""
        try:
            sequences, reason = conversation_sequences(conversation, chat, **options)
        except ValueError as error:
            raise ValueError(f"{name[2:]}: {error}" if name else str(error)) from error
        turns = [f"{TURN}{n}" if options["per_turn"] or reason else "" for n in range(len(sequences))]
        found += [(name + turn, each, conversation.reward, reason) for turn, each in zip(turns, sequences, strict=True)]
    return found


def _of_trace(row: Row) -> list[tuple[str, MaskedSequence, float, str]]:
    """Return a sequence for each branch of a trace: the messages from a root to a leaf, with the sampled token ids."""
    nodes = row["nodes"]
    if not nodes:
        raise ValueError("nodes must have at least one, got []")
    parents = {node.get("parent") for node in nodes}
    if isinstance(rewards := row.get("rewards"), Mapping):
        given = [entry for entry in rewards.values() if entry is not None]
        reward = sum(float(entry["score"]) * float(entry.get("weight", 1.0)) for entry in given)
    else:
        (reward,) = rewards_of(row, 1)
    found = []
    for leaf in (n for n in range(len(nodes)) if n not in parents):
        path: list[Any] = []
        n: int | None = leaf
        while n is not None:
            if len(path) == len(nodes):
                raise ValueError(f"nodes must be a tree, got a cycle through node {n}")
            path.insert(0, nodes[n])
            n = nodes[n].get("parent")
        tokens = token_ids("token_ids", [token for node in path for token in node["token_ids"]]).numpy()
        trained = np.array([in_loss for node in path for in_loss in node["mask"]], dtype=bool)
        if len(trained) != len(tokens) or not trained.any() or trained[0]:
            raise ValueError(
                f"nodes must have a mask for each token, with a sampled token that has one before it, got "
                f"{len(trained)} for {len(tokens)} tokens, {int(trained.sum())} sampled"
            )
        last = len(trained) - int(trained[::-1].argmax())
        found.append((f", node {leaf}", (tokens[:last], trained[:last]), reward, ""))
    return found
