"""What counts as a number where a caller gives one: numpy's do, as data sets hold them; a bool does not."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`.

    >>> [is_whole(value) for value in (3, 0, 2.0, True, "3", None)]
    [True, False, False, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number; an infinity and NaN are.

    >>> [is_number(value) for value in (3, 0.5, float("nan"), True, "3", None)]
    [True, True, True, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool)
