"""Environments that answer a model between its turns: messages in, messages and a reward out.

    environment:
      _component_: my_project.Environment  # a class or a function
      max_turns: 8  # of the model
      max_length: 4096  # tokens of an episode; by default as many as the run's budgets allow
      timeout_s: 60.0  # of one answer
      level: hard  # further options are its own

A class gets the problem and its options, and an instance per episode answers by `step(messages)`. A function is called
as `function(messages, problem, **options)`. Both may be async. `messages` is the conversation so far, from the user's
message to the model's turn, as dicts with "role" and "content". The answer is a list of messages, which the model sees
next, and a reward, which is added to those of earlier turns. An empty list ends the episode.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from flexpg.training.errors import error_context
from flexpg.training.event_loop import run_all
from flexpg.training.tasks.problem import Problem

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
        max_length: Tokens of the longest episode; None for as many as the run's budgets allow.
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
    from torchtune.config._errors import InstantiationError  # torchtune's rules for `_component_`
    from torchtune.config._utils import _get_component_from_path

    limits = {key: described[key] for key in ("max_turns", "max_length", "timeout_s") if key in described}
    options = {key: value for key, value in described.items() if key != "_component_" and key not in limits}
    try:
        component = _get_component_from_path(described["_component_"])
        is_class = inspect.isclass(component)
        inspect.signature(component).bind(*((None,) if is_class else ([], None)), **options)
    except (KeyError, TypeError, InstantiationError) as error:
        raise ValueError(
            f"environment must be a class that takes a problem, or a function that takes messages and a problem, with "
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


def answers(steps: Sequence[Step], conversations: Sequence[list[Message]], timeout_s: float) -> list[Answer]:
    """Return the answers of environments, which run at the same time, each in a thread of its own if not async.

    Args:
        steps: One per conversation.
        conversations: What they answer; each gets a copy of its list.
        timeout_s: Seconds within which each has to answer.

    Raises:
        TimeoutError: If one does not; it is named by its conversation.
        TypeError: If an answer is not a list of messages and a number.
        Exception: What an environment raises, with one line above the traceback that names the conversation.
    """

    async def ask(step: Step, messages: list[Message]) -> Answer:
        shown = str(messages[-1].get("content"))[-80:]
        where = f"environment, turn {sum(own['role'] == 'assistant' for own in messages)}, which ended with {shown!r}"
        with error_context(where):
            try:
                return _checked(await asyncio.wait_for(_call(step, list(messages)), timeout_s))
            except TimeoutError as error:
                raise TimeoutError(
                    f"the environment must answer within timeout_s={timeout_s} seconds; it did not in the {where}"
                ) from error

    return run_all([ask(step, messages) for step, messages in zip(steps, conversations, strict=True)])


async def _call(step: Step, messages: list[Message]) -> Any:
    if inspect.iscoroutinefunction(step.func if isinstance(step, partial) else step):
        return await step(messages)
    return await asyncio.wrap_future(_in_thread(partial(step, messages)))


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run a function in a daemon thread: one that hangs does not keep the process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            outcome = partial(future.set_exception, error)
        else:
            outcome = partial(future.set_result, result)
        if future.set_running_or_notify_cancel():  # False if it answers after its time
            outcome()

    threading.Thread(target=run, name="flexpg environment", daemon=True).start()
    return future


def _checked(answer: Any) -> Answer:
    match answer:
        case (list() as messages, int() | float() as reward) if all(
            isinstance(own, dict) and isinstance(own.get("content"), str) and "role" in own for own in messages
        ):
            return messages, float(reward)
    raise TypeError(
        f"an environment must return a list of messages with 'role' and 'content', and a number, got {answer!r}"
    )
