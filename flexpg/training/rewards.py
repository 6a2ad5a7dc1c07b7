r"""Rewards: functions of a completion's text and the problem's answer, combined by weights.

A configuration names them as components: a function is called with its options for every completion, a class is
instantiated with its options and its instances are called.

Departures from TRL: a function scores one completion, not a batch, and an exception ends the run; None does not mean
"skip".
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexpg.training.answers import claimed_number, equal_expressions, last_number, marked_number
from flexpg.training.errors import error_context


@dataclass(frozen=True)
class Reward:
    """One term of the total reward.

    Attributes:
        name: In logs and errors.
        function: (completion, answer) -> a finite number.
        weight: Its factor in the total; 0 only logs it.
    """

    name: str
    function: Callable[[str, str], float]
    weight: float = 1.0


def build_rewards(described: Mapping[str, Mapping[str, Any]]) -> list[Reward]:
    """Build the rewards of a configuration.

    Args:
        described: name -> {"_component_": dotpath of a function or class, "weight": 1.0, further options}.

    Raises:
        ValueError: If there is none, or one cannot be imported or does not take its options.
    """
    from torchtune.config._errors import InstantiationError  # torchtune's rules for `_component_`
    from torchtune.config._utils import _get_component_from_path

    if not described:
        raise ValueError("rewards must have at least one entry `name: {_component_: dotpath}`")
    rewards = []
    for name, options in described.items():
        own = {key: value for key, value in options.items() if key not in ("_component_", "weight")}
        try:
            weight = float(options.get("weight", 1.0))
            found = _get_component_from_path(options["_component_"])
            if isinstance(found, type):
                function = found(**own)
                inspect.signature(function).bind("", "")
            else:
                inspect.signature(found).bind("", "", **own)
                function = partial(found, **own)
        except (KeyError, TypeError, ValueError, InstantiationError) as error:
            raise ValueError(
                f"reward {name!r} must be a function (completion, answer) -> float with options {own}, got "
                f"{options.get('_component_')!r}: {error}"
            ) from error
        rewards.append(Reward(name, function, weight))
    return rewards


def score(
    rewards: Sequence[Reward], completions: Sequence[str], answers: Sequence[str], *, first: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute every completion's weighted total and the values of each reward.

    An exception of a reward function is re-raised under a line that names the reward and the rollout.

    Args:
        rewards: With different names.
        completions: N texts.
        answers: N answers.
        first: The number of the first rollout in errors, if other ranks score the others.

    Returns:
        [N] float32 totals, and [N] float32 values before weighting per name.

    Raises:
        ValueError: If a reward is not a finite number.

    >>> length = Reward("length", lambda completion, answer: len(completion), weight=0.5)
    >>> total, values = score([Reward("correct", number_correct), length], ["#### 8", "8"], ["8", "8"])
    >>> total, values["correct"]
    (tensor([4.0000, 0.5000]), tensor([1., 0.]))
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    values = {}
    for reward in rewards:
        column = []
        for n, (completion, answer) in enumerate(zip(completions, answers, strict=True), start=first):
            where = f"reward {reward.name!r}, rollout {n}, completion {completion[:80]!r}, answer {answer[:80]!r}"
            with error_context(where):
                value = float(reward.function(completion, answer))
                if not math.isfinite(value):
                    raise ValueError(f"rewards must be finite, got {value} from {where}")
            column.append(value)
        values[reward.name] = torch.tensor(column, dtype=torch.float32)
        total += reward.weight * torch.tensor(column, dtype=torch.float64)
    return total.float(), values


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
