"""Components by their dotpath, `my_rewards.correct`: what a configuration calls `_component_`."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any


def load_dotpath(dotpath: str) -> Any:
    """Return the function or class of a dotpath, by torchtune's rules.

    Raises:
        ValueError: If there is no such module, function or class, with the nearest name; or its module cannot be
            imported.

    >>> load_dotpath("fractions.Fraction")
    <class 'fractions.Fraction'>
    """
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    try:
        found = _get_component_from_path(dotpath)
    except InstantiationError as error:
        raise ValueError(_reason(dotpath, error.__cause__)) from error
    if not callable(found):
        raise ValueError(f"{dotpath} must be a function or class, got {type(found).__name__} {found!r}")
    return found


def near_argument(component: Callable[..., Any], error: Exception) -> str:
    """Return `; did you mean NAME?` if a component has refused an argument and has one of a similar name, else "".

    >>> def optimizer(params, lr): ...
    >>> near_argument(optimizer, TypeError("optimizer() got an unexpected keyword argument 'l_r'"))
    '; did you mean lr?'
    """
    refused = re.search(r"unexpected keyword argument '(\w+)'(?!.*Did you mean)", str(error))
    return _did_you_mean(refused[1], inspect.signature(component).parameters) if refused else ""


def _reason(dotpath: str, cause: BaseException | None) -> str:
    """Return which part of a dotpath does not exist, or what the import of its module has raised."""
    if isinstance(cause, ModuleNotFoundError) and f"{dotpath}.".startswith(f"{cause.name}."):
        parent, _, name = str(cause.name).rpartition(".")
        if not parent:
            near = _did_you_mean(name, (module.name for module in pkgutil.iter_modules()))
            return f"there is no module {name} in the environment or in {Path.cwd()}{near}"
        module = sys.modules[parent]
        where = getattr(module, "__file__", None) or f"the module {parent}"
        return f"{where} has no {name}{_did_you_mean(name, _names(module))}"
    if isinstance(cause, AttributeError):
        return f"{dotpath}: {cause}"
    return f"{dotpath} cannot be imported: {type(cause).__name__}: {cause}"


def _names(module: ModuleType) -> list[str]:
    return [*vars(module), *(child.name for child in pkgutil.iter_modules(getattr(module, "__path__", [])))]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
