"""Problems as prompt tokens, and completions as text, through a tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchtune.data import Message

from flexpg.training.causal_lm import CheckpointTokenizer
from flexpg.training.components import component
from flexpg.training.episodes import Episode
from flexpg.training.models import library_of
from flexpg.training.reward_calls import Group
from flexpg.training.tasks.problem import Problem
from flexpg.tree import BLOCK


def prompt_tokens(tokenizer: Any, prompt: str, prompt_format: Literal["plain", "bos", "chat"]) -> list[int]:
    """Return a prompt's tokens: as it is, after the beginning-of-sequence token, or as a user message.

    Args:
        tokenizer: A torchtune tokenizer, or one with its methods.
        prompt: The text.
        prompt_format: "chat" is the chat template of a checkpoint's tokenizer, or the format of a torchtune tokenizer,
            which adds no system message, as the chat templates of Qwen2.5 and Llama 3.2 do.

    Raises:
        ValueError: If the tokenizer's max_seq_len truncates the prompt.
    """
    if prompt_format != "chat":
        return list(tokenizer.encode(prompt, add_bos=prompt_format == "bos", add_eos=False))
    if isinstance(tokenizer, CheckpointTokenizer):
        return tokenizer.chat_prompt(prompt)
    # What two answers have in common; torchtune 0.6.1 would end an empty assistant message of Qwen and Phi.
    user = Message(role="user", content=prompt)
    first, second = (
        tokenizer.tokenize_messages([user, Message(role="assistant", content=answer)])[0] for answer in ("a", "b")
    )
    end = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if end is None:
        raise ValueError(f"the tokenizer's max_seq_len={tokenizer.max_seq_len} truncates the prompt; set it to null")
    return list(first[:end])


def shown_prompt(tokenizer: Any, tokens: Sequence[int], length: int = 500) -> str:
    """Return a prompt as the model sees it, special tokens included, without its middle if it is long.

    Args:
        tokenizer: A torchtune tokenizer, or one with its methods.
        tokens: The prompt's token ids.
        length: Characters that are shown at most.
    """
    decode = tokenizer.decode_all if isinstance(tokenizer, CheckpointTokenizer) else tokenizer.decode
    known = inspect.signature(decode).parameters
    options = {name: False for name in ("truncate_at_eos", "skip_special_tokens") if name in known}  # of Llama 3's
    text = str(decode(list(tokens), **options))
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def build_problems(cfg: Any, name: str) -> list[Problem]:
    """Return the problems of an option.

    Args:
        cfg: The configuration.
        name: The option.

    Raises:
        ValueError: If its component cannot be built, or does not return a list of problems whose prompts and answers
            are text.
    """
    problems = component(cfg, name)
    if not isinstance(problems, list | tuple):
        raise ValueError(f"{name} must return a list of problems, got {type(problems).__name__}")
    for number, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            kind = type(problem).__name__
            raise ValueError(
                f"{name}, problem {number} must be a flexpg.training.tasks.Problem, got {kind} {problem!r:.80}"
            )
        for field in ("prompt", "answer"):
            if not isinstance(value := getattr(problem, field), str):
                raise ValueError(
                    f"{name}, problem {number}: its {field} must be text, got {type(value).__name__} {value!r:.80}"
                )
    return list(problems)


def tokenize_problems(
    cfg: Any,
    tokenizer: Any,
    model: nn.Module,
    name: str,
    problems: Sequence[Problem],
    *,
    at_least: int,
    device: torch.device,
) -> list[Tensor]:
    """Return the prompt tokens of every problem.

    Args:
        cfg: The configuration.
        tokenizer: A torchtune tokenizer, or one with its methods.
        model: The model that is trained.
        name: The option that the problems came from.
        problems: The problems.
        at_least: How many the run needs.
        device: The device of the tokens.

    Raises:
        ValueError: If there are too few problems, or the model or a budget cannot hold a prompt and its completion.
    """
    if len(problems) < at_least:
        raise ValueError(f"{name} must have at least {at_least} problem{'s' * (at_least > 1)}, got {len(problems)}")
    prompts = []
    for number, problem in enumerate(problems):
        tokens = prompt_tokens(tokenizer, problem.prompt, cfg.prompt_format)
        length = len(tokens) + cfg.sampling.max_new_tokens
        slots = length + (-len(tokens) % BLOCK if cfg.compile else 0)
        try:
            if not tokens:
                raise ValueError("its prompt is empty")
            for budget, needed in (("max_tokens", length), ("max_cache_tokens", slots)):
                if needed > cfg[budget]:
                    raise ValueError(f"prompt and completion need {needed} tokens, more than {budget}={cfg[budget]}")
            library_of(model).check_fits(model, max([*tokens, *tokenizer.stop_tokens]), length)
        except ValueError as error:
            raise ValueError(f"{name}, problem {number}: {error}") from None
        prompts.append(torch.tensor(tokens, device=device))
    return prompts


def completion_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return a completion as rewards read it, without the stop token that ends it.

    Ids without text (a model's vocabulary is often larger than its tokenizer's) become U+FFFD.

    Args:
        tokenizer: A torchtune tokenizer, or one with its methods.
        tokens: The completion's token ids.
    """
    text = tokens[:-1] if tokens[-1] in tokenizer.stop_tokens else tokens
    try:
        return str(tokenizer.decode(list(text)))
    except (KeyError, TypeError, ValueError):  # what tokenizers raise for an unknown id
        runs = [(known, list(run)) for known, run in groupby(text, key=partial(_has_text, tokenizer))]
        return "".join(tokenizer.decode(run) if known else "\ufffd" * len(run) for known, run in runs)


def assistant_message(tokenizer: Any, prompt: Sequence[int], completion: Sequence[int]) -> dict[str, Any]:
    """Return a completion as the message that an environment reads.

    With a checkpoint's tokenizer that has a `response_template`, tool calls and reasoning are apart from the content. A
    completion that is malformed, such as one with a call that is no JSON, is content and nothing else.

    Args:
        tokenizer: A torchtune tokenizer, or one with its methods.
        prompt: What the completion follows.
        completion: The completion's token ids.
    """
    parsed = None
    if isinstance(tokenizer, CheckpointTokenizer):
        # What the parser raises for malformed text; RecursionError for JSON of a thousand brackets.
        with suppress(KeyError, RecursionError, TypeError, ValueError):
            parsed = tokenizer.parse(list(prompt), list(completion))
    return parsed or {"role": "assistant", "content": completion_text(tokenizer, completion)}


def completion_groups(
    tokenizer: Any, problems: Sequence[Problem], groups: Sequence[Sequence[Episode]], first: Sequence[int]
) -> list[Group]:
    """Return the last turns of episodes as rewards read them.

    Args:
        tokenizer: A torchtune tokenizer, or one with its methods.
        problems: P problems.
        groups: Their episodes.
        first: For each problem the number of its first episode, for errors.
    """
    ids = [[episode.turns[-1].completion.tolist() for episode in group] for group in groups]
    return [
        Group(problem, [completion_text(tokenizer, tokens) for tokens in completions], completions, number)
        for problem, completions, number in zip(problems, ids, first, strict=True)
    ]


def _has_text(tokenizer: Any, token: int) -> bool:
    try:
        tokenizer.decode([token])
    except (KeyError, TypeError, ValueError):
        return False
    return True
