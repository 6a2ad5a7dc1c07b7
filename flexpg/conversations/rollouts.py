"""Conversations -> rollouts, with roles, tool calls and tool results, through a tokenizer's chat template.

Departs from TRL, which patches templates with {% generation %} or replaces them by a copy that keeps earlier reasoning:
here the template is the tokenizer's own, and conversations whose earlier turns it rewrites are stored turn by turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexpg.conversations.chat_template import ChatTokenizer, Turn, assistant_turns
from flexpg.conversations.messages import Message
from flexpg.rollouts import Rollouts

MaskedSequence = tuple[np.ndarray, np.ndarray]  # [T] int64 token ids, [T] bool, True for tokens in the loss


@dataclass(frozen=True)
class Conversation:
    """A conversation and its reward.

    Attributes:
        messages: Dicts with a "role" (system, developer, user, assistant or tool) and "content", "tool_calls" or both,
            as chat templates or the APIs of OpenAI and Anthropic write them; see `template_messages`.
            An assistant message with a "weight" of 0, such as a worked example, is context and not in the loss.
        reward: The reward of the whole conversation.
        task: Equal for trials of the same task, which are compared with each other.
        tools: Schemas of the tools, which the template shows to the model; None if there are none.
    """

    messages: list[Message]
    reward: float = 0.0
    task: int = 0
    tools: list[dict[str, Any]] | None = None


def conversation_rollouts(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    per_turn: bool | None = None,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[Rollouts, Tensor]:
    """Turn conversations into rollouts whose loss covers only assistant tokens.

    One rollout per conversation: the prompt ends with the generation prompt of the first assistant message, the
    completion with the last assistant message; what follows is cut off. The loss mask is False for user messages, tool
    results and what the template writes between turns.

    One rollout per turn: the prompt is the history as the model saw it, generation prompt included, and the completion
    is that turn. All turns of a conversation have its reward. Their histories are prefixes of one another, so a prefix
    tree stores them in little more than the conversation itself.

    A turn ends with the first stop token after its text, which is in the loss. The same token in a user's text ends
    nothing. Rollouts with equal prompts share a group. Trials of a task rarely have equal prompts, so compare rewards
    within a task instead:

        rollouts, conversation = conversation_rollouts(conversations, tokenizer)
        task = torch.tensor([each.task for each in conversations])
        advantages = group_advantages(rollouts, group_ids=task[conversation])

    A conversation that is stored turn by turn then counts in the mean of its task once per turn.

    Token ids are what the template and the tokenizer make of the text, which may differ from what a sampler drew. For
    on-policy training with the sampler's log-probabilities, keep the sampled ids and build `Rollouts` from them.

    Args:
        conversations: Each with at least one assistant message.
        tokenizer: A tokenizer of transformers with a chat template.
        per_turn: True for one rollout per assistant message, in order; False for one per conversation; None for one
            per conversation where the template allows it and one per turn otherwise, with a warning that says which and
            why.
        stop_tokens: Ids that end an assistant turn; None for the tokenizer's `eos_token_id` and those in the
            generation_config.json of its folder.
        template_options: Further options of the template, such as {"enable_thinking": False}.

    Returns:
        The rollouts on the CPU, and [N] int64, the index of the conversation that each is from.

    Raises:
        TypeError: If a conversation is anything else.
        ValueError: If there is no conversation, one has no assistant message, a message cannot be converted, a reward
            is not finite, the template leaves out what an assistant wrote, or where a turn begins or ends is unknown;
            with `per_turn=False`, if the tokens of a turn change once a later message follows.
        Exception: What the template raises. All errors have a note that names the conversation, by its index.
    """
    if isinstance(conversations, Conversation):
        raise TypeError("conversations must be a list of Conversation, got one; pass [conversation]")
    if not conversations:
        raise ValueError("conversations must not be empty")
    sequences: list[MaskedSequence] = []
    origin: list[int] = []
    by_turn: dict[int, str] = {}  # conversation: why
    for i, conversation in enumerate(conversations):
        try:
            if not isinstance(conversation, Conversation):
                raise TypeError(f"must be Conversation(messages, reward), got {type(conversation).__name__}")
            if not isinstance(conversation.reward, SupportsFloat):
                raise ValueError(f"reward must be a number, got {conversation.reward!r}")
            added, reason = conversation_sequences(
                conversation, tokenizer, per_turn=per_turn, stop_tokens=stop_tokens, template_options=template_options
            )
        except Exception as error:
            error.add_note(f"in conversations[{i}]")
            raise
        if reason:
            by_turn[i] = reason
        sequences += added
        origin += [i] * len(added)
    if by_turn:
        warnings.warn(by_turn_message({f"conversation {i}": reason for i, reason in by_turn.items()}), stacklevel=2)
    return rollouts_from_masked(sequences, [conversations[i].reward for i in origin]), torch.tensor(origin)


def by_turn_message(reasons: Mapping[str, str]) -> str:
    """Return a sentence on the conversations that are stored turn by turn.

    Args:
        reasons: The name of each such conversation, and why.
    """
    name, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} conversation{'s' * (len(reasons) > 1)} stored turn by turn, because one sequence cannot hold "
        f"what the model saw at every turn; {name}: {reason}"
    )


def conversation_sequences(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    *,
    per_turn: bool | None = None,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[MaskedSequence], str]:
    """Return the sequences of one conversation and their loss masks; see `conversation_rollouts`.

    Returns:
        The sequences, and with `per_turn=None` why they are stored turn by turn, "" if they are not.
    """
    turns = assistant_turns(
        tokenizer,
        conversation.messages,
        tools=conversation.tools,
        stop_tokens=stop_tokens,
        template_options=template_options,
    )
    reason = "" if per_turn else _rewritten(turns, tokenizer)
    if reason and per_turn is False:
        raise ValueError(f"{reason}; per_turn=True returns a rollout of each turn with the history that it saw")
    if per_turn or reason:
        return [_masked(turn.tokens, [turn]) for turn in turns], reason
    return [_masked(turns[-1].tokens, turns)], ""


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


def _rewritten(turns: Sequence[Turn], tokenizer: ChatTokenizer) -> str:
    """Return which turn's tokens, or those before them, change once a later message follows; "" if none."""
    for earlier, later in pairwise(turns):
        size = len(earlier.tokens)
        if np.array_equal(later.history[:size], earlier.tokens):
            continue
        common = min(size, len(later.history))
        differs = np.flatnonzero(later.history[:common] != earlier.tokens[:common])
        at = int(differs[0]) if len(differs) else common
        before, after = (
            tokenizer.decode(tokens[max(0, at - 4) : at + 6]) for tokens in (earlier.tokens, later.history)
        )
        return (
            f"messages[{earlier.message}] is generated as {before!r}, and becomes {after!r} once "
            f"messages[{later.message}] follows"
        )
    return ""


def _masked(tokens: np.ndarray, turns: Sequence[Turn]) -> MaskedSequence:
    trained = np.zeros(len(tokens), dtype=bool)
    for turn in turns:
        trained[len(turn.history) : len(turn.history) + len(turn.completion)] = True
    return tokens, trained
