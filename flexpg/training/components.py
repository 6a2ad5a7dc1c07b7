"""Components: what a configuration names by `_component_`, with its arguments, as in torchtune."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchtune import config
from torchtune.config._errors import InstantiationError

from flexpg.training.dotpaths import load_dotpath, near_argument
from flexpg.training.errors import one_line


def component(cfg: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the component of an option; its errors are prefixed with the option's name.

    Args:
        cfg: The configuration.
        name: The option.
        args: Positional arguments before those of the configuration.
        kwargs: Arguments over those of the configuration.

    Raises:
        ValueError: If the component cannot be imported, rejects its arguments, or misses a file.
    """
    try:
        loaded = load_dotpath(cfg[name]["_component_"])
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error)}") from error
    try:
        return config.instantiate(cfg[name], *args, **kwargs)
    except Exception as error:  # a component is anybody's code
        kind = "" if isinstance(error, ValueError | InstantiationError | OSError) else f"{type(error).__name__}: "
        # Probably a text where a number was expected.
        is_text = isinstance(error, TypeError) and re.search(r"\bstr\b", str(error))
        is_null = isinstance(error, TypeError) and "NoneType" in str(error)
        near = near_argument(loaded, error)
        texts: dict[Any, str] = {}  # of each value, with its first name
        for key, value in cfg[name].items():
            is_input = key not in ("_component_", "output_dir") and isinstance(value, str) and value not in str(error)
            if is_input and is_text:
                texts.setdefault(value, f"{key}={value!r}")
            elif (is_input and Path(value).exists() and not near) or (
                value is None and is_null
            ):  # parsers name no file
                texts.setdefault(value, f"{key}={value}")
        given = f" (given {', '.join(texts.values())})" if texts else ""
        raise ValueError(f"{name}: {kind}{one_line(error)}{near}{given}") from error
