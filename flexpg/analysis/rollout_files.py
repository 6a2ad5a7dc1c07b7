"""Rollouts of a JSONL file: prompts with completions, as text or token ids, or whole conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from flexpg.conversations import ChatTokenizer, Conversation, conversation_rollouts, is_reward, template_messages
from flexpg.rollouts import Rollouts

Encode = Callable[[str], Sequence[int]]  # a text's token ids, no token added

_LARGEST_ID = 2**31 - 1
_KINDS = "give it prompt and completions, prompt and completion, or messages"


@dataclass(frozen=True)
class _Sample:
    """One rollout of a line; `place` says which of the line's."""

    prompt: list[int]
    completion: list[int]
    trained: list[bool]
    reward: float
    place: str


def read_rollouts(
    path: Path | str,
    *,
    encode: Encode | None = None,
    chat: ChatTokenizer | None = None,
    per_turn: bool = False,
    vocab_size: int | None = None,
) -> tuple[Rollouts, list[str]]:
    """Reads the rollouts of one step; those of equal prompts share a group, wherever they stand in the file.

    Each line is an object: {"prompt": ..., "completions": [...]}, {"prompt": ..., "completion": ...}, each a text or a
    list of token ids, or {"messages": [...]} with "reward" and "tools" where there are any. Other keys are not looked
    at, empty lines are passed over.

    Args:
        path: of the file.
        encode: for texts; a prompt and its completion are encoded apart.
        chat: for messages: a tokenizer with a chat template.
        per_turn: of a conversation, a rollout for each assistant's turn instead of one for all.
        vocab_size: of the model, whose token ids are below it; None for any.

    Returns:
        The rollouts, and for each the line that it comes from, as "line 17, completions[2]".

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is none of these, with its number; text without `encode`, messages without `chat`, a
            prompt with `per_turn`; a token id that the model has not; a file of both kinds, or of no line.
    """
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # without a byte-order mark
    samples, names, first = [], [], None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            has_messages = "messages" in row
            first = first or (number, has_messages)
            if has_messages != first[1]:
                kinds = ("a prompt", "messages")
                raise ValueError(
                    f"it has {kinds[has_messages]}, and line {first[0]} has {kinds[first[1]]}; give each a file"
                )
            if per_turn and not has_messages:
                raise ValueError("it has a prompt and no messages, so no turns; leave --per-turn out")
            own = _of_messages(row, chat, per_turn) if has_messages else _of_prompt(row, encode)
            _check_vocabulary(own, vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        samples += own
        names += [f"line {number}{sample.place}" for sample in own]
    if not samples:
        raise ValueError(f"{path} is empty; give one JSON object on each line")
    return _grouped(samples), names


def _check_vocabulary(samples: list[_Sample], vocab_size: int | None) -> None:
    largest = max(max(max(sample.prompt), max(sample.completion)) for sample in samples)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"its token id {largest} is beyond the model's vocabulary of {vocab_size}; give the tokenizer that belongs "
            "to the model, or the model that belongs to the token ids"
        )


def _grouped(samples: list[_Sample]) -> Rollouts:
    group_of: dict[tuple[int, ...], int] = {}
    group_ids = [group_of.setdefault(tuple(sample.prompt), len(group_of)) for sample in samples]
    masks = [torch.tensor(sample.trained) for sample in samples]
    return Rollouts(
        prompts=[torch.tensor(prompt) for prompt in group_of],
        completions=[torch.tensor(sample.completion) for sample in samples],
        group_ids=torch.tensor(group_ids),
        rewards=torch.tensor([sample.reward for sample in samples]),
        loss_mask=pad_sequence(masks, batch_first=True),  # [N, C], False beyond a completion
    )


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:  # its own count of lines begins anew at each line
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"{_shown(row)} is no object; {_KINDS}")
    return row


def _of_prompt(row: dict[str, Any], encode: Encode | None) -> list[_Sample]:
    if "prompt" not in row or ("completion" in row) == ("completions" in row):
        named = ", ".join(row).encode(errors="backslashreplace").decode()  # JSON can write half of a surrogate pair
        raise ValueError(f"an object with the keys {named or '(none)'}; {_KINDS}")
    prompt = _tokens("prompt", row["prompt"], encode)
    if "completion" in row:
        pairs = [("", "completion", row["completion"])]
    elif not isinstance(row["completions"], list) or not row["completions"]:
        raise ValueError(f"completions is {_shown(row['completions'])}; give a list of at least one")
    else:
        keys = [f"completions[{i}]" for i in range(len(row["completions"]))]
        pairs = [(f", {key}", key, value) for key, value in zip(keys, row["completions"], strict=True)]
    encoded = [(place, _tokens(key, value, encode)) for place, key, value in pairs]
    return [_Sample(prompt, tokens, [True] * len(tokens), 0.0, place) for place, tokens in encoded]


def _tokens(key: str, value: object, encode: Encode | None) -> list[int]:
    if not isinstance(value, str | list):
        raise ValueError(f"{key} is {_shown(value)}; give a text or a list of token ids")
    if isinstance(value, str) and value and encode is None:
        raise ValueError(
            f"{key} is text, and there is no tokenizer; give --tokenizer PATH, a folder that holds one, or "
            "--tokenizer bytes, one token per byte, for a rough picture"
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise ValueError(
                f"{key} has {value[error.start]!a} at character {error.start + 1}, which is no character on its own"
            ) from error
    tokens = list(encode(value)) if isinstance(value, str) and encode is not None else list(value)
    if not tokens:
        raise ValueError(f"{key} has no token; drop it, or give it at least one")
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token <= _LARGEST_ID:
            raise ValueError(f"{key}[{i}] is {_shown(token)}; a token id is a whole number from 0 to {_LARGEST_ID}")
    return tokens


def _of_messages(row: dict[str, Any], chat: ChatTokenizer | None, per_turn: bool) -> list[_Sample]:
    if chat is None:
        raise ValueError(
            "messages need a tokenizer with a chat template; give --tokenizer PATH, a folder that holds one"
        )
    reward, tools = row.get("reward"), row.get("tools")
    if reward is not None and not is_reward(reward):
        raise ValueError(f"reward is {_shown(reward)}; give a finite number")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools is {_shown(tools)}; give a list of JSON schemas")
    try:
        conversation = Conversation(template_messages(row["messages"]), float(reward or 0), tools=tools)
        rollouts, _ = conversation_rollouts([conversation], chat, per_turn=per_turn)
    except Exception as error:  # a chat template is a program of its own, which may raise anything
        raise ValueError(
            str(error).removeprefix("conversation 0 of 1").lstrip(",: ") or type(error).__name__
        ) from error
    prompts = [rollouts.prompts[group].tolist() for group in rollouts.group_ids.tolist()]
    turns = [f", turn {n}" if per_turn else "" for n in range(len(prompts))]
    trained = [row[: len(tokens)].tolist() for row, tokens in zip(rollouts.trained, rollouts.completions, strict=True)]
    return [
        _Sample(prompt, tokens.tolist(), mask, reward, turn)
        for prompt, tokens, mask, reward, turn in zip(
            prompts, rollouts.completions, trained, rollouts.rewards.tolist(), turns, strict=True
        )
    ]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
