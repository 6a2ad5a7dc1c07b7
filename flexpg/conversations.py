"""Transcripts of chats -> rollouts, with roles, tool calls and tool results, through a tokenizer's chat template.

The begin and end of an assistant turn are found by rendering the messages before it, and those up to it, and comparing
token ids. So the template needs no {% generation %} markers, and a template that cannot be cut in this way is refused.
The loss covers what the model itself would have generated: from the end of the generation prompt to the token that ends
the turn.

Departs from TRL, which patches templates with {% generation %} or replaces them by a copy that keeps earlier reasoning:
here the template is the tokenizer's own, and one that rewrites earlier turns is used turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexpg.rollouts import Rollouts

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]
Render = Callable[[list[Message], bool], np.ndarray]  # messages, whether to add a generation prompt -> [T] token ids
MaskedSequence = tuple[np.ndarray, np.ndarray]  # [T] int64 token ids, [T] bool, True for tokens in the loss


class ChatTokenizer(Protocol):
    """The part of a tokenizer of transformers that is used."""

    eos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the token ids of messages, a list of ints with `tokenize=True` and `return_dict=False`."""


@dataclass(frozen=True)
class Conversation:
    """A transcript and its reward.

    Attributes:
        messages: Dicts with a "role" (system, developer, user, assistant or tool) and "content", "tool_calls" or both,
            as the chat template takes them; see `template_messages` for those of an API.
        reward: Of the whole conversation.
        task: Equal for trials of the same task, which are compared with each other.
        tools: JSON schemas of the tools, which the template shows to the model; None if there are none.
    """

    messages: list[Message]
    reward: float = 0.0
    task: int = 0
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Turn:
    """An assistant turn after its history; the model would have generated `tokens[start:]`."""

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
    """Turn every conversation, or every assistant turn, into a rollout whose loss covers only assistant tokens.

    One per conversation: the prompt ends with the generation prompt of the first assistant message, the completion with
    the last assistant message; what follows is cut off. The loss mask is False for user messages, tool results and what
    the template writes between turns.

    One per turn: the prompt is the history as the model saw it, generation prompt included, and the completion is that
    turn. All turns of a conversation have its reward. Their histories are prefixes of one another, so a prefix tree
    stores them in little more than the conversation itself.

    A turn ends with its last stop token, which is in the loss; without a stop token, all its tokens are. The same id in
    a user's text ends nothing. Rollouts with equal prompts share a group. Trials of a task rarely have equal prompts,
    so compare rewards within a task instead:

        rollouts, conversation = conversation_rollouts(conversations, tokenizer)
        task = torch.tensor([each.task for each in conversations])
        advantages = group_advantages(rollouts, group_ids=task[conversation])

    Turn by turn, a conversation then counts in the mean of its task once per turn.

    Token ids are what the template and the tokenizer make of the text, which may differ from what a sampler drew. For
    on-policy training with the sampler's log-probabilities, keep the sampled ids and build `Rollouts` from them.

    Args:
        conversations: Each with at least one assistant message.
        tokenizer: Its `apply_chat_template(messages, tools=..., tokenize=True, add_generation_prompt=...,
            return_dict=False)` returns token ids.
        per_turn: Return one rollout per assistant message, in order, instead of one per conversation.
        stop_tokens: Ids that end an assistant turn; None for the tokenizer's `eos_token_id`.
        template_options: Further options of the template, such as {"enable_thinking": False}.

    Returns:
        The rollouts on the CPU, and [N] int64, the index of the conversation that each is from.

    Raises:
        ValueError: If a conversation has no assistant message, a message has an unknown role or no content, a reward is
            not finite, or the template cannot be cut into turns.
        Exception: What the template raises, with a note that names the conversation.
    """
    sequences: list[MaskedSequence] = []
    origin: list[int] = []
    for i, conversation in enumerate(conversations):
        try:
            own = conversation_sequences(
                conversation, tokenizer, per_turn=per_turn, stop_tokens=stop_tokens, template_options=template_options
            )
        except Exception as error:
            error.add_note(f"in conversation {i} of {len(conversations)}")
            raise
        sequences += own
        origin += [i] * len(own)
    return rollouts_from_masked(sequences, [conversations[i].reward for i in origin]), torch.tensor(origin)


def conversation_sequences(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    *,
    per_turn: bool = False,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[MaskedSequence]:
    """Return the sequences of one conversation and their loss masks; see `conversation_rollouts`."""
    messages = conversation.messages
    _check_messages(messages)
    if stop_tokens is None:
        stop_tokens = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def render(part: list[Message], add_generation_prompt: bool) -> np.ndarray:
        ids = tokenizer.apply_chat_template(
            part,
            tools=conversation.tools,
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            **(template_options or {}),
        )
        return np.asarray(ids, dtype=np.int64)

    turns = [_turn(render, messages, j, stop_tokens) for j, own in enumerate(messages) if own["role"] == "assistant"]
    if not turns:
        raise ValueError("messages must have one of role assistant, or nothing is in the loss; drop the conversation")
    if per_turn:
        return [_masked(turn.tokens, [turn]) for turn in turns]
    _check_history(turns)
    return [_masked(turns[-1].tokens, turns)]


def rollouts_from_masked(sequences: Sequence[MaskedSequence], rewards: Sequence[float]) -> Rollouts:
    """Build rollouts from sequences whose prompt is what precedes the first token in the loss.

    Rollouts with equal prompts share a group.

    Args:
        sequences: N pairs of token ids [T] and loss mask [T].
        rewards: N rewards.
    """
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
        loss_mask=pad_sequence(masks, batch_first=True),  # [N, C]
    )


def template_messages(messages: list[Message]) -> list[Message]:
    """Convert messages of OpenAI's API to the form that most chat templates take; `messages` do not change.

    In the API, the arguments of a tool call are a string of JSON, which a template that writes JSON would quote again;
    they are parsed. A content of None, or none at all, becomes "".

    >>> call = {"function": {"name": "cancel", "arguments": '{"id": "ZFA04Y"}'}}
    >>> template_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["tool_calls"]
    [{'function': {'name': 'cancel', 'arguments': {'id': 'ZFA04Y'}}}]

    Raises:
        ValueError: If arguments are not JSON.
    """
    _check_messages(messages)
    return [
        message
        | ({"content": ""} if message.get("content") is None else {})
        | (
            {"tool_calls": [_parse_call(j, call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else {}
        )
        for j, message in enumerate(messages)
    ]


def _parse_call(j: int, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"messages[{j}]: the arguments of a tool call must be JSON: {error}") from error
    return call | {"function": function | {"arguments": arguments}}


def _turn(render: Render, messages: list[Message], j: int, stop_tokens: Sequence[int]) -> _Turn:
    """Return message j after the messages before it, cut after its last stop token."""
    through = render(messages[: j + 1], False)
    history = render(messages[:j], True) if j else _first_prompt(render, messages, through)
    if not _begins_with(through, history):
        raise ValueError(
            f"messages[{j}]: the template does not render it as its generation prompt and what follows, token by "
            f"token{'' if j else ' and once'}, so where it begins is unknown; use a template that writes both alike, "
            "or other template_options"
        )
    start = len(history)
    if not start:
        raise ValueError(f"messages[{j}] must have a token before it; put a system or user message in front")
    if start == len(through):
        raise ValueError(f"messages[{j}] must have a token as the template renders it; drop the message")
    stops = np.flatnonzero(np.isin(through[start:], stop_tokens))
    return _Turn(j, through[: start + stops[-1] + 1] if len(stops) else through, start)


def _first_prompt(render: Render, messages: list[Message], through: np.ndarray) -> np.ndarray:
    """Return what precedes an assistant message that opens the conversation, its generation prompt included.

    Templates cannot render an empty list of messages. But what a generation prompt adds after the message also precedes
    it, possibly after a default system prompt. If it occurs more than once, where the message begins is unknown.
    """
    added = render(messages[:1], True)[len(through) :]
    if not len(added):
        return added
    stops = [
        stop for stop in range(len(added), len(through) + 1) if np.array_equal(through[stop - len(added) : stop], added)
    ]
    return through[: stops[0]] if len(stops) == 1 else np.append(through, -1)  # -1: `through` does not begin with it


def _check_history(turns: Sequence[_Turn]) -> None:
    """Refuse turns whose tokens change once a later message follows."""
    for earlier, later in pairwise(turns):
        if not _begins_with(later.tokens[: later.start], earlier.tokens):
            raise ValueError(
                f"messages[{earlier.message}]: its tokens, or those before them, change once messages[{later.message}] "
                "follows, as with templates that drop the reasoning of earlier turns; one sequence cannot hold both, "
                "but per_turn=True returns a rollout of each turn with the history that it saw"
            )


def _masked(tokens: np.ndarray, turns: Sequence[_Turn]) -> MaskedSequence:
    trained = np.zeros(len(tokens), dtype=bool)
    for turn in turns:
        trained[turn.start : len(turn.tokens)] = True
    return tokens, trained


def _begins_with(tokens: np.ndarray, prefix: np.ndarray) -> bool:
    return np.array_equal(tokens[: len(prefix)], prefix)


def _check_messages(messages: list[Message]) -> None:
    """Refuse messages that a template would silently leave out."""
    for j, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{j}] must have a role of {', '.join(ROLES)}, got {message.get('role')!r}")
        if "content" not in message and not message.get("tool_calls"):
            raise ValueError(f"messages[{j}] must have content or tool_calls, got {list(message)}")
