"""Environments that answer a model between its turns: messages in, messages and a reward out.

    environment:
      _component_: my_project.Environment  # a class or a function
      max_turns: 8  # of the model
      max_length: 4096  # tokens of an episode; by default as many as the model, the budgets and the sampler allow
      timeout_s: 60.0  # of one answer
      level: hard  # further options are its own

A class gets the problem and its options, and an instance per episode answers by `step(messages)`. A function is called
as `function(messages, problem=problem, **options)`. Both may be async. `messages` is the conversation so far, from the
user's message to the model's turn, as dicts with "role" and "content", and "tool_calls" if the tokenizer parses them.
The answer is a list of messages, which the model sees next, and a reward, which is added to those of earlier turns. An
empty list ends the episode.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol

from flexpg.training.dotpaths import load_dotpath
from flexpg.training.errors import error_context
from flexpg.training.event_loop import in_daemon_thread, run_all
from flexpg.training.tasks.problem import Problem

AT_A_TIME = 32  # environments that compute an answer; the time limit of the others has not begun
Message = dict[str, Any]
Answer = tuple[list[Message], float]
Step = Callable[[list[Message]], Any]  # the answer, or an awaitable of it


class Environment(Protocol):
    """What an instance per episode does."""

    def step(self, messages: list[Message]) -> Answer:
        """Answer the last message of a conversation.

        Args:
            messages: The conversation so far; its last message is the model's turn.

        Returns:
            The messages that the model sees next, none to end the episode, and the reward of this turn.
        """


@dataclass(frozen=True)
class EnvironmentConfig:
    """An environment and its limits.

    Attributes:
        begin: Returns what answers in one episode of a problem.
        max_turns: Turns of the model in an episode, at least 1.
        max_length: Tokens of the longest episode; None for as many as the model, the budgets and the sampler allow.
        timeout_s: Seconds within which it has to answer.
    """

    begin: Callable[[Problem], Step]
    max_turns: int = 8
    max_length: int | None = None
    timeout_s: float = 60.0


def build_environment(described: Mapping[str, Any]) -> EnvironmentConfig:
    """Build the environment of a configuration.

    Args:
        described: {"_component_": dotpath, "max_turns": 8, "max_length": None, "timeout_s": 60.0, further options}.

    Raises:
        ValueError: If it cannot be imported, does not take its options, or a limit is out of range.
    """
    limits = {key: described[key] for key in ("max_turns", "max_length", "timeout_s") if key in described}
    options = {key: value for key, value in described.items() if key != "_component_" and key not in limits}
    try:
        component = load_dotpath(described["_component_"])
        is_class = inspect.isclass(component)
        if is_class and not callable(getattr(component, "step", None)):
            raise TypeError("it has no method step")
        signature = inspect.signature(component)
        signature.bind(None, **options) if is_class else signature.bind([], problem=None, **options)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"environment must be a class that takes a problem, or a function that takes messages and `problem`, with "
            f"options {options}, got {described.get('_component_')!r}: {error}"
        ) from error

    def begin(problem: Problem) -> Step:
        if is_class:
            step: Step = component(problem, **options).step
            return step
        return partial(component, problem=problem, **options)

    config = EnvironmentConfig(begin, **limits)
    if config.max_turns < 1 or not config.timeout_s > 0:
        raise ValueError(
            f"environment must have max_turns of at least 1 and a positive timeout_s, got {config.max_turns} and "
            f"{config.timeout_s}"
        )
    return config


def longest_episode(environment: EnvironmentConfig, first_turn: int, budget: int, of_model: int | None) -> int:
    """Return how many tokens an episode may have.

    Args:
        environment: The environment.
        first_turn: Tokens of the longest prompt and its completion.
        budget: Tokens for which a run has memory.
        of_model: Tokens of the longest sequence that the model was made for; None for any.

    Raises:
        ValueError: If `max_length` exceeds the budget or what the model was made for, or a first turn exceeds it.
    """
    most = budget if of_model is None else min(budget, of_model)
    length = environment.max_length or most
    if length > most:
        whose = "the budgets" if most == budget else "the model"
        raise ValueError(f"environment.max_length must be at most {most}, for {whose}, got {length}")
    if first_turn > length:
        raise ValueError(f"environment.max_length must be at least {first_turn}, got {length}")
    return length


def answers(steps: Sequence[Step], conversations: Sequence[list[Message]], timeout_s: float) -> list[Answer]:
    """Return the answers of environments, which run at the same time, each in a thread of its own if not async.

    Args:
        steps: One per conversation.
        conversations: What they answer; each gets a copy of its list.
        timeout_s: Seconds within which each has to answer.

    Raises:
        TimeoutError: If one does not; it is named by its conversation.
        TypeError: If an answer is not a list of messages and a number.
        ValueError: If it begins with the conversation.
        Exception: What an environment raises, with one line above the traceback that names the conversation.
    """
    free = asyncio.Semaphore(AT_A_TIME)
    failed: list[list[Message]] = []

    async def ask(step: Step, messages: list[Message]) -> Answer:
        async with free:
            try:
                answer = await _within(timeout_s, _call(step, list(messages)), messages)
                return _checked(answer, messages)
            except BaseException:  # cancelled ones fail after the first
                failed.append(messages)
                raise

    try:
        return run_all([ask(step, messages) for step, messages in zip(steps, conversations, strict=True)])
    except Exception:
        with error_context(f"environment, {_turn(failed[0])}"):
            raise


async def _within(timeout_s: float, answer: Coroutine[Any, Any, Any], messages: list[Message]) -> Any:
    """Return an answer that comes in time; a TimeoutError of the environment's own passes unchanged."""
    task = asyncio.ensure_future(answer)
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        task.cancel()
        raise TimeoutError(
            f"the environment must answer within timeout_s={timeout_s} seconds; it did not in {_turn(messages)}"
        )
    return task.result()


def _turn(messages: list[Message]) -> str:
    """Return which turn of the model an environment was to answer, for an error."""
    number = sum(message["role"] == "assistant" for message in messages)
    text = str(messages[-1].get("content") or messages[-1].get("tool_calls"))
    return f"turn {number}, which ended with {text[-80:]!r}"


async def _call(step: Step, messages: list[Message]) -> Any:
    if inspect.iscoroutinefunction(step.func if isinstance(step, partial) else step):
        return await step(messages)
    return await asyncio.wrap_future(in_daemon_thread(partial(step, messages)))


def _checked(answer: Any, messages: list[Message]) -> Answer:
    """Return the answer to a conversation, or raise TypeError or ValueError."""
    match answer:
        case (list() as new, Real() as reward) if all(map(_is_message, new)) and math.isfinite(reward):
            if new[: len(messages)] == messages:
                raise ValueError(
                    f"an environment must return its new messages only, got {len(new)} that begin with the "
                    "conversation so far"
                )
            return new, float(reward)
    raise TypeError(
        "an environment must return a list of messages, each with 'role' and a text as 'content', and a finite "
        f"number, got {answer!r}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and "role" in value
