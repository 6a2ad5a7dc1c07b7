"""Problems from rows of a data set: a local file, a directory, or a name on the Hugging Face hub.

The `datasets` library reads all but local JSON. That is read here, because `datasets` takes ISO dates for timestamps,
"007" for 7 where a column also has numbers, and does not say which line is broken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpg.training.tasks.problem import Problem

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOADERS = {".parquet": "parquet", ".csv": "csv"}
_SUFFIXES = (".jsonl", ".json", *_LOADERS)

Template = str | Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Row:
    """One row's columns, those that are null left out, and where it stands, for errors."""

    where: str
    columns: dict[str, Any]


def problems(
    source: str,
    template: str,
    answer: Template,
    *,
    split: str = "train",
    subset: str | None = None,
    size: int | None = None,
    skip: int = 0,
    shots: int = 0,
    shot_template: str | None = None,
    shots_source: str | None = None,
    shots_split: str | None = None,
) -> list[Problem]:
    r"""One problem for each row: the same worked examples, then the row's own question.

    Templates are Python format strings over the columns: `{question}`, `{choices[0]}`; a plain brace is doubled.

    Args:
        source: a .jsonl, .json, .parquet or .csv file or a directory, relative to the working directory, or a name on
            the hub; what exists locally is taken first. A .json file is one list, or has one object on each line.
        template: of the prompt.
        answer: of the answer that rewards compare with; in Python also a function of the row.
        split: of the data; a file has "train" alone.
        subset: of a directory or a data set on the hub, where it has several; files have none.
        size: take this many problems at most; None for all.
        skip: rows to leave out before the first that is asked.
        shots: worked examples, the first rows of their data. When these are the data that is asked, too, they are not
            asked: `skip` counts from the row behind them.
        shot_template: of a worked example, its end included; None for the prompt, a space, the answer, an empty line.
        shots_source: data of the worked examples; None for `source`.
        shots_split: their split; None for `split`, or for "train" with a `shots_source`.

    Raises:
        FileNotFoundError: when the source looks like a path and nothing is there.
        ImportError: when `datasets` is needed and not installed.
        ValueError: for data that cannot be loaded or lacks the split, a row that fills no template, too few rows, or an
            argument of another kind.

    Example:
        >>> import tempfile
        >>> file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
        >>> _ = file.write('{"q": "1+1", "a": 2}\n{"q": "2+3", "a": 5}\n')
        >>> file.flush()
        >>> problems(file.name, template="{q} =", answer="{a}", shots=1)
        [Problem(prompt='1+1 = 2\n\n2+3 =', answer='5')]
    """
    for name, count, least in (("size", 1 if size is None else size, 1), ("skip", skip, 0), ("shots", shots, 0)):
        if type(count) is not int or count < least:
            raise ValueError(f"{name} is {count!r}; give a whole number, {least} or more")
    for name, text in (("source", source), ("template", template)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} is {text!r}; give a text")
    asked_from = (source, split)
    shown_from = (shots_source or source, shots_split or (split if shots_source is None else "train"))
    rows = _rows(*asked_from, subset)
    examples = (rows if shown_from == asked_from or not shots else _rows(*shown_from, subset))[:shots]
    start = skip + (shots if shown_from == asked_from else 0)
    asked = rows[start:][:size]
    if len(examples) < shots:
        raise ValueError(f"{shown_from[0]} has {len(examples)} rows, too few for {shots} shots; lower `shots`")
    if not asked:
        raise ValueError(f"{source} has {len(rows)} rows, too few for a question behind {start} (`shots` and `skip`)")
    context = "".join(_shot(row, template, answer, shot_template) for row in examples)
    return [_problem(row, template, answer, context) for row in asked]


def _problem(row: Row, template: str, answer: Template, context: str) -> Problem:
    return Problem(context + _filled("template", template, row), _filled("answer", answer, row))


def _shot(row: Row, template: str, answer: Template, shot_template: str | None) -> str:
    example = _problem(row, template, answer, context="")  # checks the row, whatever is shown of it
    if shot_template is None:
        return f"{example.prompt} {example.answer}\n\n"
    return _filled("shot_template", shot_template, row)


def _filled(name: str, template: Template, row: Row) -> str:
    try:
        return template.format_map(row.columns) if isinstance(template, str) else template(row.columns)
    except KeyError as error:
        columns = ", ".join(row.columns) or "no columns"
        raise ValueError(f"{row.where} has nothing under {error}, which `{name}` needs; it has {columns}") from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        what = f"{name} {template!r} cannot be filled: " if isinstance(template, str) else ""
        raise ValueError(f"{row.where}: {what}{error}") from error


def _rows(source: str, split: str, subset: str | None) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{source} is not a {', '.join(_SUFFIXES)} file; convert it, or name a directory")
        if split != "train":
            raise ValueError(f"{source} is one file, whose split is 'train', not {split!r}; leave the split out")
        if path.suffix in _LOADERS:
            return _loaded(source, split, _LOADERS[path.suffix], data_files=str(path))
        return _json_rows(source, path.read_bytes())
    if path.is_dir():
        return _loaded(source, split, str(path), subset)
    if path.suffix in _SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"no file or directory {source!r} (working directory {Path.cwd()})")
    return _loaded(source, split, source, subset)


def _json_rows(source: str, text: bytes) -> list[Row]:
    text = text.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    if text.lstrip().startswith(b"["):
        return [_row(f"{source} row {i}", columns) for i, columns in enumerate(_parsed(source, text))]
    lines = [(f"{source} line {i}", line) for i, line in enumerate(text.split(b"\n"), start=1) if line.strip()]
    return [_row(where, _parsed(where, line)) for where, line in lines]


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{where} is not JSON: {error}") from error


def _row(where: str, columns: Any) -> Row:
    if not isinstance(columns, dict):
        raise ValueError(f"{where} is {str(columns)[:40]!r}; a row is an object like {{'question': ...}}")
    return Row(where, {name: value for name, value in columns.items() if value is not None})


def _loaded(source: str, split: str, *args: str | None, **kwargs: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {source!r} needs the `datasets` package: pip install datasets") from error
    local = Path(source).expanduser().exists()
    with _quiet(local):
        try:
            splits = datasets.load_dataset(*args, **kwargs)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
            cause = error.__cause__ or error  # a DatasetGenerationError itself says nothing
            remedy = f"; no such file or directory in {Path.cwd()} either: give one, or download the data set first"
            raise ValueError(
                f"could not load {source!r}: {type(cause).__name__}: {cause}{'' if local else remedy}"
            ) from error
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return [_row(f"{source} row {i}", columns) for i, columns in enumerate(splits[split].to_list())]


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Without progress bars; for local data, also without the log of an error that is raised anyway."""
    import datasets
    from datasets.utils import logging

    bars, verbosity = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    if local:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
