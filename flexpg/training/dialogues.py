"""Episodes of several turns: the model samples, its environment answers, until one of them ends the episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from flexpg.sampling import Samples
from flexpg.training.distributed import World
from flexpg.training.environments import EnvironmentConfig, Message, Step, answers
from flexpg.training.episodes import Episode, Turn, sampled_turns
from flexpg.training.problem_order import derive_seed
from flexpg.training.prompts import assistant_message, completion_text
from flexpg.training.tasks.problem import Problem

Sampler = Callable[[list[Tensor], int, list[int]], Samples]


@dataclass(eq=False)
class Dialogue:
    """An episode while it is sampled.

    Attributes:
        prompt: [P] int64, what the model sees next.
        messages: The conversation so far, with the model's turns as text.
        parsed: The same, with tool calls apart from the content if the tokenizer can tell them; for the environment.
        step: The environment of this episode.
        turns: The model's turns so far.
        reward: The environment's reward so far.
        is_over: Whether it has ended.
        is_cut: Whether a limit ended it.
    """

    prompt: Tensor
    messages: list[Message]
    parsed: list[Message]
    step: Step
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    is_over: bool = False
    is_cut: bool = False


def sample_dialogues(
    environment: EnvironmentConfig,
    sample: Sampler,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: Sequence[Tensor],
    group_size: int,
    seeds: Sequence[int],
    *,
    prompt_format: Literal["plain", "bos", "chat"],
    max_prompt: int,
    world: World | None,
) -> list[list[Episode]]:
    """Sample episodes of some problems.

    An episode ends if the environment answers with no message, after its `max_turns`, if a turn is truncated, or if the
    next prompt would be too long; the last two are not finished.

    Args:
        environment: What answers.
        sample: (prompts, group size, a seed per prompt) -> samples.
        tokenizer: The tokenizer of the prompts.
        problems: P problems.
        prompts: Their tokens.
        group_size: G episodes of each.
        seeds: One per problem.
        prompt_format: How messages become tokens, see `next_prompt`.
        max_prompt: Tokens of the longest prompt.
        world: The ranks, if all of them have to sample as often as one another; they then raise errors of environments
            together. None if this rank is on its own.

    Returns:
        For each problem its episodes.
    """
    errors = nullcontext if world is None else world.raise_together
    with errors():
        dialogues = [
            Dialogue(prompt, [_user(problem)], [_user(problem)], environment.begin(problem))
            for problem, prompt in zip(problems, prompts, strict=True)
            for _ in range(group_size)
        ]
    turns = sampled_turns(prompts, sample(list(prompts), group_size, list(seeds)))
    with errors():
        _extend(dialogues, turns, environment, tokenizer, prompt_format, max_prompt)
    for turn in range(2, environment.max_turns + 1):
        going_on = [n for n, dialogue in enumerate(dialogues) if not dialogue.is_over]
        if not (going_on if world is None else world.all_reduce_max(len(going_on))):
            break
        own_prompts = [dialogues[n].prompt for n in going_on]
        own_seeds = [derive_seed(seeds[n // group_size], f"turn {turn} of {n % group_size}") for n in going_on]
        turns = sampled_turns(own_prompts, sample(own_prompts, 1, own_seeds))
        with errors():
            _extend([dialogues[n] for n in going_on], turns, environment, tokenizer, prompt_format, max_prompt)
    episodes = [Episode(dialogue.turns, dialogue.reward, is_finished=not dialogue.is_cut) for dialogue in dialogues]
    return [episodes[n : n + group_size] for n in range(0, len(episodes), group_size)]


def next_prompt(
    tokenizer: Any,
    seen: Tensor,
    messages: Sequence[Message],
    parsed: Sequence[Message],
    new: int,
    prompt_format: Literal["plain", "bos", "chat"],
) -> Tensor:
    """Return the tokens that the model sees after an environment's answer.

    Tokens of earlier turns are kept as they were sampled, unless the chat template writes these turns otherwise once
    later messages follow, as templates do that leave out earlier reasoning. Then the conversation is encoded again.

    Args:
        tokenizer: A `CheckpointTokenizer`; for "plain" and "bos" any that has its `encode`.
        seen: [T] int64, the last prompt and what was sampled after it.
        messages: The conversation, with the model's turns as text. The template writes them as they were sampled, also
            tool calls with spaces of their own, unless they have special tokens, which text lacks.
        parsed: The conversation with tool calls, for turns that it does not write so.
        new: How many messages at its end the model has not seen.
        prompt_format: "plain" and "bos" append the content of the new messages; "chat" uses the chat template.

    Returns:
        [P] int64.

    Raises:
        TemplateError: If the chat template refuses the conversation.
        ValueError: If the format is "chat" and the tokenizer has no chat template.
    """
    if prompt_format != "chat":
        added = tokenizer.encode("".join(m["content"] for m in messages[-new:]), add_bos=False, add_eos=False)
        return torch.cat([seen, seen.new_tensor(added)])
    before, texts, refusal = tokenizer.decode_all(seen.tolist()), [], None
    for form in (messages,) if parsed == messages else (messages, parsed):
        try:
            texts.append(tokenizer.chat_text(form))
        except TemplateError as error:  # some refuse a tool's answer without a call, or reasoning next to calls
            refusal = error
    if refusal and not texts:
        raise refusal
    text = next((candidate for candidate in texts if candidate.startswith(before)), texts[-1])
    if text.startswith(before):
        return torch.cat([seen, seen.new_tensor(tokenizer.encode(text[len(before) :]))])
    return seen.new_tensor(tokenizer.encode(text))


def _extend(
    dialogues: Sequence[Dialogue],
    turns: Sequence[Turn],
    environment: EnvironmentConfig,
    tokenizer: Any,
    prompt_format: Literal["plain", "bos", "chat"],
    max_prompt: int,
) -> None:
    """Add a turn of the model to each dialogue, and the environment's answer to those that go on."""
    for dialogue, turn in zip(dialogues, turns, strict=True):
        prompt, completion = turn.prompt.tolist(), turn.completion.tolist()
        message = {"role": "assistant", "content": completion_text(tokenizer, completion)}
        dialogue.turns.append(turn)
        dialogue.messages.append(message)
        is_chat = prompt_format == "chat"
        dialogue.parsed.append(assistant_message(tokenizer, prompt, completion) if is_chat else dict(message))
        dialogue.is_cut = dialogue.is_over = not turn.is_finished
    # A turn that was cut off is answered too, because it has a reward.
    given = answers(
        [dialogue.step for dialogue in dialogues], [dialogue.parsed for dialogue in dialogues], environment.timeout_s
    )
    for dialogue, (messages, reward) in zip(dialogues, given, strict=True):
        dialogue.reward += reward
        dialogue.messages += messages
        dialogue.parsed += messages
        dialogue.is_over |= not messages or len(dialogue.turns) == environment.max_turns
        if not dialogue.is_over:
            last = dialogue.turns[-1]
            seen = torch.cat([last.prompt, last.completion])
            conversation = (dialogue.messages, dialogue.parsed, len(messages))
            dialogue.prompt = next_prompt(tokenizer, seen, *conversation, prompt_format)
            dialogue.is_cut = dialogue.is_over = len(dialogue.prompt) > max_prompt


def _user(problem: Problem) -> Message:
    return {"role": "user", "content": problem.prompt}
