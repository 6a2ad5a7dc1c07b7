"""Environments: how they are built and called, and their limits."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from flexpg.training.environments import answers, build_environment, longest_episode
from flexpg.training.tasks import Problem

PROBLEM = Problem("What is 2+3?", "5")
TURN = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "add 2 3"}]


class Counter:
    """Answers a number of times, each time with the problem's answer and a reward of its own."""

    def __init__(self, problem: Problem, times: int = 1) -> None:
        self.problem, self.left = problem, times

    def step(self, messages: list) -> tuple[list, float]:
        self.left -= 1
        return ([{"role": "tool", "content": self.problem.answer}], 0.25) if self.left >= 0 else ([], 1.0)


def echo(messages: list, problem: Problem, prefix: str = "") -> tuple[list, float]:
    messages.append("changes no other list")
    return [{"role": "user", "content": prefix + messages[-2]["content"] + problem.answer}], 0.0


async def slow_echo(messages: list, problem: Problem) -> tuple[list, float]:
    await asyncio.sleep(0.2)
    return echo(messages, problem)


def sleeper(messages: list, problem: Problem) -> tuple[list, float]:
    time.sleep(0.2)
    return echo(messages, problem)


def hangs(messages: list, problem: Problem) -> tuple[list, float]:
    time.sleep(60)
    return [], 0.0


def built(name: str, **options):
    return build_environment({"_component_": f"test_environments.{name}", **options})


def test_class_has_an_instance_per_episode():
    environment = built("Counter", times=1, max_turns=3, timeout_s=5.0)
    assert (environment.max_turns, environment.timeout_s, environment.max_length) == (3, 5.0, None)
    first, second = environment.begin(PROBLEM), environment.begin(PROBLEM)
    tool = ([{"role": "tool", "content": "5"}], 0.25)
    assert answers([first, second], [TURN, TURN], 5.0) == [tool, tool]
    assert answers([first], [TURN], 5.0) == [([], 1.0)]


@pytest.mark.parametrize("name", ["echo", "slow_echo"])
def test_function_gets_messages_and_problem(name):
    options = {"prefix": ">"} if name == "echo" else {}
    step = built(name, **options).begin(PROBLEM)
    messages = list(TURN)
    [(reply, reward)] = answers([step], [messages], 5.0)
    assert (reply[0]["content"], reward) == (options.get("prefix", "") + "add 2 35", 0.0)
    assert messages == TURN


@pytest.mark.parametrize("name", ["slow_echo", "sleeper"])
def test_environments_of_a_turn_run_at_the_same_time(name):
    steps = [built(name).begin(PROBLEM) for _ in range(20)]
    started = time.perf_counter()
    assert len(answers(steps, [TURN] * 20, 30.0)) == 20
    assert time.perf_counter() - started < 20 * 0.2 / 2


def test_environment_that_hangs_raises_timeout_error():
    step = built("hangs").begin(PROBLEM)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"timeout_s=0.1 seconds; .*turn 1, which ended with 'add 2 3'"):
        answers([step], [TURN], 0.1)
    assert time.perf_counter() - started < 10


def test_timeout_of_the_environment_itself_is_raised_as_it_is():
    def times_out(messages: list) -> tuple[list, float]:
        raise TimeoutError("the client waited in vain")

    with pytest.raises(TimeoutError, match="the client waited in vain"):
        answers([times_out], [TURN], 5.0)


def test_time_limit_begins_with_the_call_of_the_environment():
    assert len(answers([built("sleeper").begin(PROBLEM)] * 80, [TURN] * 80, 0.5)) == 80  # 32 at a time, 0.6 s in all


def test_environment_that_raises_is_named_with_its_turn(capsys):
    with pytest.raises(ZeroDivisionError):
        answers([lambda messages: 1 / 0], [TURN], 5.0)
    assert "error: environment, turn 1, which ended with 'add 2 3'" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [None, [], ([], None), ("text", 0.0), ([{"role": "tool"}], 0.0), ([], float("nan"))])
def test_answer_of_another_form_raises_type_error(answer):
    with pytest.raises(TypeError, match="must return a list of messages, each with 'role' and a text as 'content'"):
        answers([lambda messages: answer], [TURN], 5.0)


def test_environment_that_returns_the_whole_conversation_raises():
    def history(messages):
        messages.append({"role": "user", "content": "again"})
        return messages, 0.0

    with pytest.raises(ValueError, match="must return its new messages only, got 3 that begin with the conversation"):
        answers([history], [TURN], 5.0)


def test_reward_of_numpy_is_a_number():
    ((_, reward),) = answers([lambda messages: ([], np.float32(0.5))], [TURN], 5.0)
    assert reward == 0.5 and type(reward) is float


@pytest.mark.parametrize(
    "options", [{"_component_": "no.such.thing"}, {"times": 1, "color": "red"}, {"max_turns": 0}, {"timeout_s": 0}, {}]
)
def test_wrong_configuration_raises_value_error(options):
    described = {"_component_": "test_environments.Counter"} | options
    if not options:
        del described["_component_"]
    with pytest.raises(ValueError, match="environment must"):
        build_environment(described)


@pytest.mark.parametrize(
    ("max_length", "of_model", "expected"), [(None, 256, 256), (None, 1024, 512), (None, None, 512), (300, 512, 300)]
)
def test_longest_episode_fits_budget_and_model(max_length, of_model, expected):
    environment = built("Counter", times=1, max_length=max_length)
    assert longest_episode(environment, first_turn=20, budget=512, of_model=of_model) == expected


@pytest.mark.parametrize(("of_model", "message"), [(256, "256, for the model"), (None, "512, for the budgets")])
def test_longest_episode_beyond_the_budget_or_the_model_raises(of_model, message):
    with pytest.raises(ValueError, match=f"environment.max_length must be at most {message}, got 600"):
        longest_episode(built("Counter", times=1, max_length=600), first_turn=20, budget=512, of_model=of_model)


class WithoutStep:
    def __init__(self, problem: Problem) -> None:
        pass


def test_class_without_step_raises_before_the_run():
    with pytest.raises(ValueError, match=r"environment must be .* it has no method step"):
        built("WithoutStep")


def test_several_environments_that_raise_print_one_line(capsys):
    def broken(messages: list) -> list:
        return []

    with pytest.raises(TypeError, match="an environment must return a list of messages"):
        answers([broken] * 3, [TURN] * 3, 5.0)
    assert capsys.readouterr().err.count("error: ") == 1
