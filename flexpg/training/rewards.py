r"""Rewards: plain functions of a completion's text and the problem's answer, named in a configuration and weighted.

The built-in functions read text that a model wrote, so they take anything: a completion never makes one of them raise,
and their patterns are linear in its length.

Departs from TRL: a function scores one completion, not a batch, and one that fails stops the run; None does not mean
"skip". Departs from math_verify: numbers are compared, not expressions; `\sqrt{2}` is read as 2.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from numbers import Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from flexpg.scalars import is_number

_LARGEST = torch.finfo(torch.float32).max
_MOST_DIGITS = 1000  # a longer number is read as none: int() itself refuses 4301 digits
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?|(?<![\d.])\.\d++)(?:[eE][+-]?\d++)?"
_NUMBER = re.compile(
    r"(?P<sign>(?<![^\W_])(?<![)}\]])[+-])?(?:[$€£](?P<inner>[+-])?)?"  # in 10-3 and GPT-4 the hyphen is no sign
    rf"(?:\\[cdt]?frac\{{ ?(?P<top>-?{_DIGITS}) ?\}}\{{ ?(?P<bottom>-?{_DIGITS}) ?\}}"
    rf"|(?P<number>{_DIGITS})(?: ?/ ?(?P<divisor>{_DIGITS}))?)"
)
_BRACES = re.compile(r"\\boxed\s*+\{|\\.|[{}]")
_SPELLINGS = ((r"\$", "$"), ("{,}", ","), (r"\,", ""), (r"\!", ""), ("\N{MINUS SIGN}", "-"))


class RewardError(ValueError):
    """A reward function raised, or returned what is no finite number; the message names the reward and the rollout."""


@dataclass(frozen=True)
class Reward:
    """One term of the total: a function (completion, answer) -> number, and its weight.

    Attributes:
        name: what the log and the errors call it.
        function: from the completion's text and the problem's answer to a finite number.
        weight: finite; 0 logs the values and leaves them out of the total, below 0 is a penalty.

    Raises:
        ValueError: for a weight that is not such a number, or a function that cannot be called.
    """

    name: str
    function: Callable[..., float]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.weight) or not abs(self.weight) <= _LARGEST:
            raise ValueError(f"reward {self.name!r}: weight is {self.weight!r}; give a finite number")
        if not callable(self.function):
            raise ValueError(f"reward {self.name!r}: function is {self.function!r}; give one, or its name to `reward`")


def reward(name: str, function: str, weight: float = 1.0, **options: Any) -> Reward:
    """The reward that a dotpath names, ready to be called with a completion and an answer.

    The module may lie in the working directory, which is the last place that is looked in; it is on `sys.path` for the
    time of the import only, so a module that imports its neighbours does so at its top.

    Args:
        name: what the log and the errors call it.
        function: `module.function`.
        weight: of its values in the total.
        options: further arguments of the function, the same for every completion.

    Raises:
        ValueError: when it cannot be imported, is no function, or does not take the options. An error of the user's
            module that is none of import, syntax, attribute or value comes through as it is.

    Example:
        >>> short = reward("short", "flexpg.training.rewards.short_enough", weight=0.1, max_chars=4)
        >>> short.function("123456", "6"), short.weight
        (0.5, 0.1)
    """
    found = _resolved(name, function)
    try:
        signature = inspect.signature(found)
    except ValueError as error:  # some builtins have none
        raise ValueError(f"reward {name!r}: {function} does not tell its arguments; wrap it in a function") from error
    try:
        signature.bind("", "", **options)
    except TypeError as error:
        taken = f"{function}({', '.join(signature.parameters)})"
        raise ValueError(
            f"reward {name!r}: {taken} cannot take a completion, an answer and {options}: {error}"
        ) from error
    return Reward(name, partial(found, **options), weight)


def named_rewards(described: Mapping[str, Any]) -> list[Reward]:
    """The rewards that a configuration describes, in its order.

    Args:
        described: name -> what `reward` takes, by keyword: {"function": dotpath, "weight": 1.0, ...}.

    Raises:
        ValueError: none is described, one is no mapping with a function, or `reward` refuses it.
    """
    if not isinstance(described, Mapping) or not described:
        raise ValueError(f"rewards is {described!r}; give one or more, as `name: {{function: dotpath, weight: 1.0}}`")
    for name, given in described.items():
        if not isinstance(given, Mapping) or not isinstance(given.get("function"), str) or "name" in given:
            raise ValueError(f"reward {name!r} is {given!r}; give `function: dotpath` and its options, but no name")
    return [reward(name, **given) for name, given in described.items()]


def score(
    rewards: Sequence[Reward],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    first: int = 0,
    count: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every completion's weighted total, and each reward's own values before weighting.

    Args:
        rewards: at least one, each with a name of its own.
        completions: N texts.
        answers: N answers, one for each completion.
        first: number of the first rollout, for errors, when other processes score the rest.
        count: number of rollouts in all processes together; None when these are all.

    Returns:
        [N] float32 totals, and [N] float32 for each reward's name.

    Raises:
        TypeError: for something other than rewards, as a function alone.
        ValueError: for a wrong number of rewards or answers.
        RewardError: when a function raises, or returns what is no finite number; True and False are 1 and 0.

    Example:
        >>> length = Reward("length", lambda completion, answer: len(completion), weight=0.5)
        >>> rewards = [reward("correct", "flexpg.training.rewards.number_correct"), length]
        >>> total, values = score(rewards, ["7", "4 + 4 = 8"], ["8", "8"])
        >>> total, values["correct"].mean()
        (tensor([0.5000, 5.5000]), tensor(0.5000))
    """
    for term in rewards:
        if not isinstance(term, Reward):
            raise TypeError(f"rewards hold a {type(term).__name__}; make it Reward(name, function)")
    names = [term.name for term in rewards]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards are {names}; give at least one, each with a name of its own")
    if len(completions) != len(answers):
        raise ValueError(f"there are {len(completions)} completions and {len(answers)} answers; give one answer each")
    of = len(completions) if count is None else count
    texts = list(zip(completions, answers, strict=True))
    columns = [
        [_value(term, *pair, f"rollout {i} of {of}") for i, pair in enumerate(texts, start=first)] for term in rewards
    ]
    values = torch.tensor(columns, dtype=torch.float64)  # [R, N]
    weights = torch.tensor([term.weight for term in rewards], dtype=torch.float64)  # [R]
    total = (weights @ values).float()  # [N]
    if not total.isfinite().all():
        i = int((~total.isfinite()).nonzero()[0])
        raise RewardError(f"rollout {first + i} of {of}: the weighted total is {total[i]}; lower the weights")
    return total, dict(zip(names, values.float(), strict=True))


def number_correct(completion: str, answer: str, until: str | None = None) -> float:
    r"""1.0 when the completion's final number equals the answer's, else 0.0.

    Both are read by `final_number`, exactly: 0.5, .50 and \frac{1}{2} are one number.

    Args:
        completion: what the model wrote.
        answer: the right answer, with a number in it.
        until: text from which on the completion does not count, for a model that goes on with another question.

    Raises:
        ValueError: when the answer has no number; the completion need not.

    Example:
        >>> number_correct("so she pays $1,234.50.", "1234.5")
        1.0
        >>> number_correct("#### 5\n\nQuestion: next? Answer: \\boxed{7}", "5", until="\nQuestion:")
        1.0
    """
    return float(final_number(completion, until) == _right(answer))


def number_closeness(completion: str, answer: str, until: str | None = None) -> float:
    """1.0 when the final number is right, less the further off it is relative to the answer, 0.0 without a number.

    For models that are right too rarely to learn from `number_correct` alone; the arguments and errors are the same.

    Example:
        >>> number_closeness("so #### 50", "100")
        0.6666666666666666
    """
    number, right = final_number(completion, until), _right(answer)
    return 0.0 if number is None else float(1 / (1 + abs(number - right) / max(abs(right), Fraction(1))))


def matches(completion: str, answer: str, pattern: str) -> float:
    r"""1.0 when the regular expression is found anywhere in the completion, else 0.0; a dot matches newlines too.

    The time it takes is the pattern's own: one like `(a+)+b` can take forever.

    Example:
        >>> matches("6+7=13\n#### 13", "13", pattern=r"#### -?\d+$")
        1.0
    """
    return float(re.search(pattern, completion, re.DOTALL) is not None)


def short_enough(completion: str, answer: str, max_chars: int) -> float:
    """1.0 up to `max_chars` characters, then falling in a straight line to 0.0 at twice as many.

    Raises:
        ValueError: for `max_chars` below 1.

    Example:
        >>> [short_enough("x" * length, "", max_chars=100) for length in (0, 100, 125, 200, 300)]
        [1.0, 1.0, 0.75, 0.0, 0.0]
    """
    if not max_chars >= 1:
        raise ValueError(f"max_chars is {max_chars!r}; give 1 or more")
    return min(1.0, max(0.0, 2 - len(completion) / max_chars))


def final_number(text: str, until: str | None = None) -> Fraction | None:
    r"""The number that a text ends up with, exactly, or None.

    It is the first number in the last complete `\boxed{...}`; without one, the first after the first `####`; without
    that, the last of the text. Signs, `$`, thousands commas, decimals, `1e3`, `1/2` and `\frac{1}{2}` are read; `%` and
    other units do not matter, and spacing commands of LaTeX inside a number are skipped. A number of more than 1,000
    digits, or divided by 0, is None.

    Example:
        >>> final_number(r"10 and \boxed{\text{about } -1{,}234.50} or 7")
        Fraction(-2469, 2)
        >>> final_number("#### 5 apples out of 9"), final_number("3/4 of it, 12%."), final_number("none")
        (Fraction(5, 1), Fraction(12, 1), None)
    """
    if until:
        text = text.partition(until)[0]
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    _, mark, marked = text.partition("####")
    box = _last_box(text)
    if box is None and not mark:
        found = next(reversed(list(_NUMBER.finditer(text))), None)
    else:
        found = _NUMBER.search(marked if box is None else box)
    return None if found is None else _fraction(found)


def _right(answer: str) -> Fraction:
    number = final_number(answer)
    if number is None:
        raise ValueError("the answer has no number to compare with")
    return number


def _last_box(text: str) -> str | None:
    r"""What stands between the braces of the `\boxed{...}` that closes last."""
    last: tuple[int, int] | None = None
    starts: list[int | None] = []  # of the braces that are open; None for one that opens no box
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and starts:
            start = starts.pop()
            last = last if start is None else (start, brace.start())
        elif brace[0].endswith("{") and brace[0] != r"\{":
            starts.append(None if brace[0] == "{" else brace.end())
    return None if last is None else text[slice(*last)]


def _fraction(found: re.Match[str]) -> Fraction | None:
    top = _decimal(found["top"] or found["number"])
    bottom = _decimal(found["bottom"] or found["divisor"] or "1")
    if top is None or not bottom:
        return None
    negative = (found["sign"] == "-") != (found["inner"] == "-")
    return (-top if negative else top) / bottom


def _decimal(text: str) -> Fraction | None:
    mantissa, _, exponent = text.lower().replace(",", "").partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(mantissa) > _MOST_DIGITS or len(exponent) > 4:
        return None
    return int(whole + decimals) * Fraction(10) ** (int(exponent or 0) - len(decimals))


def _resolved(name: str, function: str) -> Callable[..., float]:
    where = f"reward {name!r}: function is {function!r}"
    if not isinstance(function, str):
        raise ValueError(f"{where}; name it as 'module.function'")
    try:
        with _working_directory_on_path():
            found = resolve_name(function)
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        place = f"your own module belongs in the working directory, {Path.cwd()}"
        raise ValueError(f"{where}, which cannot be imported: {error} ({place})") from error
    if not callable(found):
        raise ValueError(f"{where}, a {type(found).__name__}; name a function")
    return found


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)  # last: a file of the user's never hides an installed module
    try:
        yield
    finally:
        sys.path.remove(here)


def _value(term: Reward, completion: str, answer: str, rollout: str) -> float:
    """What the function returns, as a float, or an error that says for what."""
    where = f"reward {term.name!r}: {rollout}"
    texts = f"(completion {_start(completion)}, answer {_start(answer)})"
    try:
        value = term.function(completion, answer)
    except Exception as error:  # the function is the user's: it may raise anything
        raise RewardError(f"{where} raised {type(error).__name__}: {error} {texts}") from error
    if not isinstance(value, Real):
        kind = type(value).__name__
        raise RewardError(f"{where} returned {_start(value)} of type {kind}; return a finite number {texts}")
    try:
        number = float(value)
    except OverflowError:  # of an int or a Fraction; one of many digits cannot even be printed
        number = math.inf
    if not abs(number) <= _LARGEST:
        raise RewardError(f"{where} returned {number}; return a finite number {texts}")
    return number


def _start(value: object) -> str:
    if isinstance(value, str):
        return f"{value[:80]!r}{'...' * (len(value) > 80)}"
    return repr(value)[:80]
