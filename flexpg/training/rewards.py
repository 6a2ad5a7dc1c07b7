"""Rewards: functions of completions, combined by weights.

A configuration names them as components, with options. A function gets what its parameters are named after, see
`flexpg.training.reward_calls`, so reward functions of TRL and torchtune work as they are.

Departure from TRL: a rollout whose rewards are all None ends the run.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexpg.training.answers import claimed_number, equal_expressions, last_number, marked_number
from flexpg.training.dotpaths import load_dotpath, near_argument
from flexpg.training.errors import error_context
from flexpg.training.event_loop import run_all
from flexpg.training.reward_calls import Group, Log, Run, calls, check_names, is_factory, read_values
from flexpg.training.tasks.problem import Problem

LARGEST = torch.finfo(torch.float32).max  # of a reward


@dataclass(frozen=True)
class Reward:
    """One term of the total reward.

    Attributes:
        name: In logs and errors.
        function: (completion, answer) -> a finite number, or another function that `flexpg.training.reward_calls` can
            call; may be async.
        weight: Its factor in the total; 0 only logs it.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """The rewards of a group.

    Attributes:
        total: [G] float64, weighted sums: large ones may differ by less than float32 can tell.
        values: [G] float32 per reward, before weighting; NaN where it does not apply (None).
        log: The values that reward functions have logged.
    """

    total: Tensor
    values: dict[str, Tensor]
    log: Log


def build_rewards(described: Mapping[str, Mapping[str, Any]], problems: Sequence[Problem] = ()) -> list[Reward]:
    """Build the rewards of a configuration.

    Args:
        described: name -> `{"_component_": dotpath, "weight": 1.0, further options}` of a function, of a class whose
            instances are called, or of a function that takes only options and returns the reward function.
        problems: The problems of the completions; a reward may ask for the columns that all of them have.

    Raises:
        ValueError: If there is none, or one cannot be imported, does not take its options, or asks for a name that
            nobody provides.
    """
    if not described:
        raise ValueError("rewards must have at least one entry `name: {_component_: dotpath}`")
    columns = set.intersection(*(set(problem.columns) for problem in problems)) if problems else set()
    rewards = []
    for name, options in described.items():
        arguments = {key: value for key, value in options.items() if key not in ("_component_", "weight")}
        try:
            weight = float(options.get("weight", 1.0))
        except (TypeError, ValueError):
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"weight of reward {name!r} must be a finite number, got {options['weight']!r}")
        loaded = None
        try:
            loaded = load_dotpath(options["_component_"])
            function = _with_options(loaded, arguments)
            check_names(function, columns)
        except (KeyError, TypeError, ValueError) as error:
            near = near_argument(loaded, error) if loaded else ""
            raise ValueError(
                f"reward {name!r} must be a reward function with options {arguments}, got "
                f"{options.get('_component_')!r}: {error}{near}"
            ) from error
        rewards.append(Reward(name, function, weight))
    return rewards


def _with_options(component: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return the reward function of a component."""
    if isinstance(component, type):
        return component(**options)
    inspect.signature(component).bind_partial(**options)
    function = partial(component, **options)
    return function() if is_factory(function) else function


def score(rewards: Sequence[Reward], groups: Sequence[Group], run: Run | None = None) -> list[Scores]:
    """Compute every completion's weighted total and the values of each reward.

    Async functions of all rewards and groups run concurrently, after the others. An exception of a reward function is
    re-raised under a line that names the reward and the rollout.

    Args:
        rewards: With different names.
        groups: Completions of problems.
        run: What rewards may ask for besides; None for no tokenizer, and prompts that are text.

    Returns:
        The scores of each group.

    Raises:
        ValueError: If a reward is not a finite number or None, or all rewards of a rollout are None.

    >>> length = Reward("length", lambda completion: len(completion), weight=0.5)
    >>> group = Group(Problem("5 + 3 =", "8"), completions=["#### 8", "8"])
    >>> (scores,) = score([Reward("correct", number_correct), length], [group])
    >>> scores.total, scores.values["correct"]
    (tensor([4.0000, 0.5000], dtype=torch.float64), tensor([1., 0.]))
    """
    names = ("environment", *(reward.name for reward in rewards))
    logs = [Log(rewards=names) for _ in groups]
    started = []  # (reward, number of the group, rollouts of the group, what the call returned)
    for reward in rewards:
        for n, (group, log) in enumerate(zip(groups, logs, strict=True)):
            for rows, call in calls(reward.function, group, run or Run(), log):
                with error_context(_where(reward, group, rows)):
                    started.append((reward, n, rows, call()))
    pending = {
        i: _in_context(result, _where(reward, groups[n], rows))
        for i, (reward, n, rows, result) in enumerate(started)
        if inspect.isawaitable(result)
    }
    awaited = dict(zip(pending, run_all(list(pending.values())), strict=True))
    columns: list[dict[str, list[float]]] = [{reward.name: [] for reward in rewards} for _ in groups]
    for i, (reward, n, rows, result) in enumerate(started):
        with error_context(_where(reward, groups[n], rows)):
            values = read_values(reward.function, awaited.get(i, result), len(rows))
        columns[n][reward.name] += [
            _finite(value, _where(reward, groups[n], range(row, row + 1)))
            for row, value in zip(rows, values, strict=True)
        ]
    return [_scores(rewards, *each) for each in zip(groups, columns, logs, strict=True)]


def add_environment(scores: Scores | None, rewards: Sequence[float]) -> Scores:
    """Return the rewards of a group with those of its environment added, under the name "environment".

    Args:
        scores: The scores of the reward functions; None if there is none.
        rewards: G rewards of the environment.
    """
    given = torch.tensor(rewards, dtype=torch.float64)
    if scores is None:
        return Scores(given, {"environment": given.float()}, Log())
    return Scores(scores.total + given, scores.values | {"environment": given.float()}, scores.log)


def reward_metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """Return the mean and standard deviation of each reward where it applies, and what rewards have logged.

    Args:
        scores: The scores of all groups of a step, at least one.

    Returns:
        "reward/NAME" and "reward/NAME/std" for each reward that applied, and "reward/METRIC" for each name that rewards
        have passed to `log_metric`, the mean of its values.
    """
    logged: dict[str, list[float]] = {}
    for group in scores:
        for name, values in group.log.metrics.items():
            logged.setdefault(name, []).extend(values)
    metrics = {f"reward/{name}": sum(values) / len(values) for name, values in logged.items()}
    for name in scores[0].values:
        column = torch.cat([group.values[name] for group in scores])
        column = column[~column.isnan()]
        if len(column):
            metrics[f"reward/{name}"] = column.mean().item()
            metrics[f"reward/{name}/std"] = column.std(correction=min(1, len(column) - 1)).item()
    return metrics


def unused_rewards(scores: Sequence[Scores]) -> list[str]:
    """Return the names of the rewards that were None for every rollout of a step.

    >>> unused_rewards([Scores(torch.ones(2), {"a": torch.ones(2), "b": torch.full((2,), torch.nan)}, Log())])
    ['b']
    """
    return [name for name in scores[0].values if all(group.values[name].isnan().all() for group in scores)]


def _scores(rewards: Sequence[Reward], group: Group, columns: Mapping[str, list[float]], log: Log) -> Scores:
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    table = torch.stack([values[reward.name] for reward in rewards])  # [rewards, G]
    unscored = table.isnan().all(0).nonzero().flatten().tolist()
    if unscored:
        raise ValueError(
            f"a rollout must have a reward that is not None, got None from {', '.join(map(repr, values))} for "
            f"{_rollout(group, unscored[0])}"
        )
    weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
    sums = (weights[:, None] * table).nansum(0).tolist()
    total = torch.tensor([float(f"{value:.13g}") for value in sums], dtype=torch.float64)  # 0.1 + 0.2 equals 0.3
    if total.abs().max() > LARGEST:
        raise ValueError(
            f"the weighted sum of rewards must be at most {LARGEST:.3g}, got {total.tolist()} from "
            f"{', '.join(map(repr, values))} for {_rollout(group, int(total.abs().argmax()))}"
        )
    return Scores(total, {name: column.float() for name, column in values.items()}, log)


def _finite(value: float | None, where: str) -> float:
    """Return a value, NaN if the reward does not apply."""
    if value is None:
        return math.nan
    with error_context(where):
        if not math.isfinite(value):
            raise ValueError(f"rewards must be finite, got {value} from {where}")
        if abs(value) > LARGEST:
            raise ValueError(f"rewards must be at most {LARGEST:.3g}, the largest float32, got {value} from {where}")
    return value


def _where(reward: Reward, group: Group, rows: range) -> str:
    if len(rows) == 1:
        return f"reward {reward.name!r}, {_rollout(group, rows[0])}"
    first, last = group.first, group.first + len(rows) - 1
    return f"reward {reward.name!r}, rollouts {first} to {last}, answer {group.problem.answer[:80]!r}"


def _rollout(group: Group, row: int) -> str:
    completion, answer = group.completions[row], group.problem.answer
    return f"rollout {group.first + row}, completion {completion[:80]!r}, answer {answer[:80]!r}"


async def _in_context(result: Awaitable[Any], where: str) -> Any:
    with error_context(where):
        return await result


def number_correct(completion: str, answer: str, until: str | None = None) -> float:
    r"""Return 1.0 if the number after the last `####` of a completion is the answer, as GSM8K writes answers, else 0.0.

    Args:
        completion: The model's text.
        answer: The correct number.
        until: Text from which on the completion does not count, for a model that continues with another question.

    >>> number_correct("6 * 7 = 42\n#### 42", "42"), number_correct("It is 42.", "42")
    (1.0, 0.0)
    >>> number_correct("#### $1,234.50", "1234.5"), number_correct("#### 5\n\nQuestion: #### 7", "5", until="Question:")
    (1.0, 1.0)
    """
    return float(marked_number(_before(completion, until)) == _number(answer))


def number_closeness(completion: str, answer: str, until: str | None = None) -> float:
    """Return 1.0 if the last number of a completion is the answer, less the further off it is, 0.0 without a number.

    For models that are correct too rarely to learn from `number_correct`; the arguments are the same.

    >>> number_closeness("so 50", "100"), number_closeness("no idea", "100")
    (0.6666666666666666, 0.0)
    """
    number, correct = last_number(_before(completion, until)), _number(answer)
    return 0.0 if number is None else float(1 / (1 + abs(number - correct) / max(abs(correct), Fraction(1))))


def math_correct(completion: str, answer: str) -> float:
    r"""Return 1.0 if a completion's final expression equals the answer mathematically, else 0.0.

    Expressions are extracted and compared by math-verify: `\boxed{...}` first, then LaTeX and plain numbers. It reads
    several boxes as a set in most cases.

    Raises:
        ImportError: If math-verify is not installed.

    >>> math_correct(r"so it is \boxed{\frac{1}{2}}", "0.5")
    1.0
    """
    return float(equal_expressions(completion, answer))


def matches(completion: str, answer: str, pattern: str) -> float:
    r"""Return 1.0 if a regular expression is found in the completion, else 0.0; a dot matches newlines too.

    >>> matches("6+7=13\n#### 13", "13", pattern=r"#### -?\d+$")
    1.0
    """
    return float(re.search(pattern, completion, re.DOTALL) is not None)


def short_enough(completion: str, answer: str, max_chars: int) -> float:
    """Return 1.0 up to `max_chars` characters, then linearly less, 0.0 from twice as many on.

    >>> [short_enough("x" * length, "", max_chars=100) for length in (0, 100, 125, 200, 300)]
    [1.0, 1.0, 0.75, 0.0, 0.0]
    """
    return min(1.0, max(0.0, 2 - len(completion) / max_chars))


def _before(text: str, until: str | None) -> str:
    return text.partition(until)[0] if until else text


def _number(answer: str) -> Fraction:
    number = claimed_number(answer.rpartition("=")[2])
    if number is None:
        raise ValueError(f"the answer must be a number, got {answer!r}")
    return number
