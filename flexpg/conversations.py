"""Rollouts of chats: transcripts with roles, tool calls and tool results, through a tokenizer's chat template.

Where an assistant's turn begins and ends is found by rendering the messages before it, and those up to it, and
comparing token ids: a template needs no marks for it, and one that cannot be cut so is refused. Trained is what the
model itself would have generated, from behind the generation prompt to the token that ends the turn.

Departs from TRL, which has its templates patched with `{% generation %}`, or with a copy that keeps earlier reasoning:
here the template is the tokenizer's own, and one that rewrites earlier turns is used turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexpg.rollouts import Rollouts

ROLES = ("system", "developer", "user", "assistant", "tool")
LARGEST_REWARD = torch.finfo(torch.float32).max

Message = dict[str, Any]
Render = Callable[[list[Message], bool], np.ndarray]  # messages, with a generation prompt behind them? -> [T] token ids


class ChatTokenizer(Protocol):
    """What is used of a tokenizer; those of transformers have it."""

    eos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The token ids of the messages, a list of ints with `tokenize=True` and `return_dict=False`."""


@dataclass(frozen=True)
class Conversation:
    """One transcript and what it was worth.

    Attributes:
        messages: dicts with a "role" (system, developer, user, assistant or tool) and "content", "tool_calls" or both,
            as the chat template takes them; see `template_messages` for those of an API.
        reward: of the whole conversation; see `is_reward`.
        task: equal where conversations are trials of the same task, and so are compared with each other.
        tools: JSON schemas of the tools, which the template shows to the model; None where there are none.
    """

    messages: list[Message]
    reward: float = 0.0
    task: int = 0
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn behind its history: `tokens[start:]` are what the model would have generated."""

    message: int
    tokens: np.ndarray  # [T]
    start: int


def conversation_rollouts(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    per_turn: bool = False,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[Rollouts, Tensor]:
    """Every conversation as a rollout, or every assistant's turn, with nothing trained but what the assistant wrote.

    Whole, a rollout's prompt is all up to and including the generation prompt of the first assistant message, and its
    completion the rest, to the end of the last assistant message; what follows is cut off, as nothing trained sees it.
    The loss mask is False on users' turns, on tool results and on what the template puts between turns.

    Turn by turn, a rollout's prompt is the history as the model saw it, generation prompt included, and its completion
    that turn alone. Rollouts of a conversation all have its reward. Their histories are prefixes of one another, so a
    tree holds them in little more than the conversation itself.

    A turn ends with the last stop token in it, itself included; with no stop token in it, all its tokens count. An
    equal id in a user's text ends nothing. Rollouts of equal prompts share a group: that is what `Rollouts.group_ids`
    means. Rewards are compared within a task instead, whose trials rarely have equal prompts:

        rollouts, conversation = conversation_rollouts(conversations, tokenizer)
        task = torch.tensor([each.task for each in conversations])
        advantages = group_advantages(rollouts.rewards, task[conversation])

    Turn by turn, that counts a conversation in the mean of its task as often as it has turns; to count each once, take
    the advantages of the conversations, [len(conversations)], and of these `[conversation]`.

    Tokens are what the template and the tokenizer make of the text, not always what a sampler drew: a text has many
    tokenisations. On-policy training, with `old_logprobs` of a sampler, should keep the sampled ids and make `Rollouts`
    of them.

    Args:
        conversations: at least one, each with an assistant message.
        tokenizer: its `apply_chat_template(messages, tools=..., tokenize=True, add_generation_prompt=..., return_dict=
            False)` gives token ids.
        per_turn: one rollout for each assistant message, in order, instead of one for each conversation.
        stop_tokens: ids that end an assistant's turn; None for the tokenizer's `eos_token_id`.
        template_options: more of the template's own, such as {"enable_thinking": False}.

    Returns:
        The rollouts on the CPU, and [N] int64, the number of the conversation that each comes from.

    Raises:
        TypeError: something other than conversations with lists of messages, or a tokenizer that gives no token ids.
        ValueError: a conversation without an assistant message, a message without a known role or any content, a
            reward that is not finite, or a template that cannot be cut into turns; with the numbers of conversation
            and message.
        Exception: whatever the template itself raises, with a note that names the conversation.
    """
    if not isinstance(conversations, Sized):  # a data set has a length and no more of a Sequence
        raise TypeError(f"conversations is a {type(conversations).__name__}; give a list of them")
    if not len(conversations):
        raise ValueError("no conversation came; give at least one")
    if stop_tokens is None:
        stop_tokens = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sequences, origin = [], []
    for i, conversation in enumerate(conversations):
        where = f"conversation {i} of {len(conversations)}"
        _check(where, conversation)
        render = _renderer(where, tokenizer, conversation.tools, template_options or {})
        turns = [
            _turn(where, render, conversation.messages, j, stop_tokens)
            for j, message in enumerate(conversation.messages)
            if message["role"] == "assistant"
        ]
        own = [_trained(turn.tokens, [turn]) for turn in turns] if per_turn else [_whole(where, turns)]
        sequences += own
        origin += [i] * len(own)
    return _rollouts(sequences, [conversations[i].reward for i in origin]), torch.tensor(origin)


def template_messages(messages: list[Message]) -> list[Message]:
    """Messages as OpenAI's API writes them, in the form that most chat templates take.

    There, a tool call's arguments are JSON in a string, which a template that writes JSON would quote once more; here,
    they are what that string holds. A content of None, or none at all, becomes "". Nothing else changes, and `messages`
    stays as it was.

    >>> call = {"function": {"name": "cancel", "arguments": '{"id": "ZFA04Y"}'}}
    >>> template_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"]
    [{'function': {'name': 'cancel', 'arguments': {'id': 'ZFA04Y'}}}]

    Raises:
        TypeError: `messages` is not a list.
        ValueError: a message that is none, or arguments that are not JSON; with the message's number.
    """
    _check_messages("", messages)
    return [
        message
        | ({"content": ""} if message.get("content") is None else {})
        | ({"tool_calls": _parsed_calls(j, message["tool_calls"])} if message.get("tool_calls") else {})
        for j, message in enumerate(messages)
    ]


def is_reward(value: object) -> TypeGuard[float]:
    """Whether a value is a number that float32 holds, as rewards are kept in it: neither infinite nor NaN, and no bool.

    >>> [is_reward(value) for value in (0, -1.5, 10**400, 1e39, float("nan"), True, None)]
    [True, True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST_REWARD <= value <= LARGEST_REWARD)


def _parsed_calls(j: int, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parsed = []
    for call in calls:
        try:
            function = call["function"]
            arguments = function["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"message {j} has the tool call {str(call)[:80]!r}; one is {{'function': {{'name', 'arguments'}}}}"
            ) from error
        except ValueError as error:
            raise ValueError(f"message {j} calls a tool with arguments that are not JSON: {error}") from error
        parsed.append(call | {"function": function | {"arguments": arguments}})
    return parsed


def _renderer(
    where: str, tokenizer: ChatTokenizer, tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
) -> Render:
    def render(messages: list[Message], add_generation_prompt: bool) -> np.ndarray:
        try:
            ids = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
                **options,
            )
        except Exception as error:
            error.add_note(f"{where}: the tokenizer's chat template was given its messages 0 to {len(messages) - 1}")
            raise
        tokens = np.asarray(ids if len(ids) else np.empty(0, dtype=np.int64))
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise TypeError(f"{where}: the tokenizer's apply_chat_template gave {str(ids)[:40]!r}; give a list of ints")
        return tokens.astype(np.int64)

    return render


def _turn(where: str, render: Render, messages: list[Message], j: int, stop_tokens: Sequence[int]) -> _Turn:
    """Message j behind the messages before it, cut behind its last stop token."""
    through = render(messages[: j + 1], False)
    history = render(messages[:j], True) if j else _first_prompt(render, messages, through)
    if not _begins_with(through, history):
        raise ValueError(
            f"{where}, message {j}: the template does not render it as its generation prompt and what follows, token "
            f"by token{'' if j else ' and once'}, so where it begins is unknown; use a template that writes both "
            "alike, or other template_options"
        )
    start = len(history)
    if not start:
        raise ValueError(f"{where}, message {j}: no token stands before it; put a system or user message in front")
    if start == len(through):
        raise ValueError(f"{where}, message {j} has no token, as the template renders it; drop the message")
    stops = np.flatnonzero(np.isin(through[start:], stop_tokens))
    return _Turn(j, through[: start + stops[-1] + 1] if len(stops) else through, start)


def _first_prompt(render: Render, messages: list[Message], through: np.ndarray) -> np.ndarray:
    """What stands before an assistant message that opens the conversation, its generation prompt included.

    Templates cannot render no message. But what a generation prompt adds behind the message stands before it as well,
    maybe behind a default system prompt. Where it stands more than once, which of them begins the message is unknown.
    """
    added = render(messages[:1], True)[len(through) :]
    if not len(added):
        return added
    stops = [
        stop for stop in range(len(added), len(through) + 1) if np.array_equal(through[stop - len(added) : stop], added)
    ]
    return through[: stops[0]] if len(stops) == 1 else np.append(through, -1)  # -1: no beginning of `through`


def _whole(where: str, turns: list[_Turn]) -> tuple[np.ndarray, np.ndarray]:
    """[T] tokens of the last turn and its history, and [T] bool, True in every turn.

    Raises:
        ValueError: a turn's tokens are no beginning of the next one's history.
    """
    for earlier, later in pairwise(turns):
        if not _begins_with(later.tokens[: later.start], earlier.tokens):
            raise ValueError(
                f"{where}, message {earlier.message}: its tokens, or those before them, are others once message "
                f"{later.message} follows, as with templates that drop the reasoning of earlier turns; one sequence "
                "cannot hold both, but per_turn=True makes a rollout of each turn with the history that it saw"
            )
    return _trained(turns[-1].tokens, turns)


def _trained(tokens: np.ndarray, turns: list[_Turn]) -> tuple[np.ndarray, np.ndarray]:
    trained = np.zeros(len(tokens), dtype=bool)
    for turn in turns:
        trained[turn.start : len(turn.tokens)] = True
    return tokens, trained


def _begins_with(tokens: np.ndarray, prefix: np.ndarray) -> bool:
    return np.array_equal(tokens[: len(prefix)], prefix)


def _rollouts(sequences: list[tuple[np.ndarray, np.ndarray]], rewards: list[float]) -> Rollouts:
    """Rollouts of (tokens, trained) sequences: the prompt is what stands before the first trained token."""
    group_of: dict[bytes, int] = {}  # by the prompt's tokens
    prompts: list[Tensor] = []
    completions, masks, group_ids = [], [], []
    for tokens, trained in sequences:
        start = int(trained.argmax())
        key = tokens[:start].tobytes()
        if key not in group_of:
            group_of[key] = len(prompts)
            prompts.append(torch.from_numpy(tokens[:start].copy()))
        group_ids.append(group_of[key])
        completions.append(torch.from_numpy(tokens[start:].copy()))
        masks.append(torch.from_numpy(trained[start:]))
    return Rollouts(
        prompts=prompts,
        completions=completions,
        group_ids=torch.tensor(group_ids),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        loss_mask=pad_sequence(masks, batch_first=True),  # [N, C], False beyond a completion
    )


def _check(where: str, conversation: object) -> None:
    if not isinstance(conversation, Conversation):
        raise TypeError(f"{where} is a {type(conversation).__name__}; make it Conversation(messages, reward, task)")
    _check_messages(f"{where}, ", conversation.messages)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise ValueError(f"{where} has no assistant message, so nothing to train; drop it")
    if not is_reward(conversation.reward):
        raise ValueError(f"{where} has reward {repr(conversation.reward)[:40]}; drop it or give a finite number")


def _check_messages(where: str, messages: object) -> None:
    if not isinstance(messages, list):
        raise TypeError(f"{where}messages: a {type(messages).__name__} came; give a list of dicts")
    for j, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}message {j} is a {type(message).__name__}; give a dict with role and content")
        if "role" not in message:
            raise ValueError(f"{where}message {j} has no role but {list(message)}; give it one of {', '.join(ROLES)}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}message {j} has role {message['role']!r}; known are {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list | tuple):
            raise ValueError(f"{where}message {j} has tool_calls {str(calls)[:40]!r}; give a list of calls")
        if "content" not in message and not calls:
            raise ValueError(f"{where}message {j} has neither content nor tool_calls; give it one, or drop it")
