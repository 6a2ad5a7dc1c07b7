"""Problems from the rows of a dataset: a local file, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from flexpg.conversations.row_files import read_rows
from flexpg.training.tasks.problem import Problem

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class WrittenFloat(float):
    """A number whose text is the one in its JSON file: 2.50, not 2.5."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Return the number of a text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __format__(self, format_spec: str) -> str:
        return format(float(self), format_spec) if format_spec else self.text


Template = str | Callable[[Mapping[str, Any]], str]


def problems(
    source: str,
    template: str,
    answer: Template,
    *,
    split: str = "train",
    subset: str | None = None,
    size: int | None = None,
    skip: int = 0,
    partition: str | None = None,
    shots: int = 0,
    shot_template: str | None = None,
    shots_source: str | None = None,
    shots_split: str | None = None,
) -> list[Problem]:
    r"""Return one problem per row, each with the same few-shot examples before its own question.

    Templates are Python format strings over the columns: `{question}`, `{choices[0]}`; braces are doubled. Numbers of a
    JSON file are filled in as they are written there, and booleans as true and false.

    Args:
        source: A .jsonl, .json, .parquet or .csv file or a folder, relative to the working directory, or a name on the
            hub. Local data take precedence.
        template: Format string of the prompt.
        answer: Format string of the answer that rewards compare with, or in Python a function of the row.
        split: A split of a folder or a dataset on the hub. A file is one split, whatever it is called.
        subset: Name of the subset, for a folder or a dataset on the hub that has several.
        size: Number of problems at most; None for all.
        skip: Rows to leave out before the first question.
        partition: Rows to take, before `skip` and `shots` count: those of `partition_numbers`, as torchtune's
            `gsm8k_dataset` takes them; None for all.
        shots: Few-shot examples, the first rows of their data. If these are also the data of the questions, they are
            not asked: `skip` counts from the row after them.
        shot_template: Format string of a few-shot example; None for the prompt, a space, the answer and an empty line.
        shots_source: Data of the few-shot examples; None for `source`.
        shots_split: Their split; None for `split`, or "train" with a `shots_source`.

    Raises:
        FileNotFoundError: If `source` looks like a path and does not exist.
        ValueError: If data cannot be loaded, a row does not fill a template, there are too few rows, or `partition` has
            another form.

    >>> import tempfile
    >>> file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
    >>> _ = file.write('{"q": "1+1", "a": 2}\n{"q": "2+3", "a": 5}\n')
    >>> file.flush()
    >>> problems(file.name, template="{q} =", answer="{a}", shots=1)
    [Problem(prompt='1+1 = 2\n\n2+3 =', answer='5', columns={'q': '2+3', 'a': 5})]
    """
    if skip < 0 or shots < 0 or (size is not None and size < 0):
        raise ValueError(f"skip, size and shots must be at least 0, got {skip}, {size} and {shots}")
    asked_from = (source, split)
    shown_from = (shots_source or source, shots_split or (split if shots_source is None else "train"))
    rows = _rows(*asked_from, subset)
    rows = [rows[n] for n in partition_numbers(len(rows), partition)]
    examples = (rows if shown_from == asked_from or not shots else _rows(*shown_from, subset))[:shots]
    start = skip + (shots if shown_from == asked_from else 0)
    asked = rows[start:][:size]
    if len(examples) < shots or not asked:
        shown = f" and {shown_from[0]} at least {shots} examples, got {len(examples)}" if shots else ""
        raise ValueError(f"{source} must have more than {start} rows (skip={skip}), got {len(rows)}{shown}")
    context = "".join(_shot(f"{shown_from[0]}, row {n}", row, template, answer, shot_template) for n, row in examples)
    return [_problem(f"{source}, row {n}", row, template, answer, context) for n, row in asked]


def partition_numbers(count: int, partition: str | None) -> list[int]:
    """Return the numbers, from 0, of the rows that belong to a partition.

    Args:
        count: Number of rows.
        partition: "1-9/10" for those whose number modulo 10 is 1 to 9; None for all.

    Raises:
        ValueError: If `partition` has another form.

    >>> partition_numbers(12, "8-9/10"), partition_numbers(2, None)
    ([8, 9], [0, 1])
    """
    if partition is None:
        return list(range(count))
    found = re.fullmatch(r"(\d+)-(\d+)/(\d+)", partition)
    first, last, total = map(int, found.groups()) if found else (0, 0, 0)
    if not first <= last < total:
        raise ValueError(f"partition must be FIRST-LAST/TOTAL with FIRST <= LAST < TOTAL, got {partition!r}")
    return [n for n in range(count) if first <= n % total <= last]


def _problem(where: str, row: Mapping[str, Any], template: str, answer: Template, context: str) -> Problem:
    filled = _filled(where, "answer", answer, row)
    if not filled.strip() and (callable(answer) or answer.strip()):
        raise ValueError(f"{where}: the answer is empty; fill it in, or leave the row out")
    return Problem(context + _filled(where, "template", template, row), filled, row)


def _shot(where: str, row: Mapping[str, Any], template: str, answer: Template, shot_template: str | None) -> str:
    example = _problem(where, row, template, answer, context="")  # also validates the row
    if shot_template is None:
        return f"{example.prompt} {example.answer}\n\n"
    return _filled(where, "shot_template", shot_template, row)


class _Fill(Formatter):
    """Fill values into a template; an answer's must be scalars, because rewards compare its text."""

    def __init__(self, is_answer: bool) -> None:
        self.is_answer = is_answer

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bool) and not format_spec:
            value = json.dumps(value)
        is_nan = isinstance(value, float) and not math.isfinite(value)
        if self.is_answer and (is_nan or isinstance(value, list | dict)):
            raise ValueError(f"the answer must be a text, a number, true or false, got {value!r:.80}")
        return str(super().format_field(value, format_spec))


def _filled(where: str, name: str, template: Template, row: Mapping[str, Any]) -> str:
    given = {name: value for name, value in row.items() if value is not None}
    try:
        return (
            _Fill(is_answer=name == "answer").vformat(template, (), given)
            if isinstance(template, str)
            else template(given)
        )
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        if not isinstance(template, str) and not callable(template):
            raise ValueError(
                f"{name} must be a string, got {template}; on a command line, quote braces: "
                f"'train_problems.{name}=\"{{column}}\"'"
            ) from None
        nulls = f"; null: {', '.join(name for name in row if name not in given)}" if len(given) < len(row) else ""
        raise ValueError(
            f"{where}: {template if isinstance(template, str) else 'the answer'!r} cannot be filled from the columns "
            f"{', '.join(given) or '(none)'}{nulls}: {type(error).__name__}: {error}"
        ) from error


def _rows(source: str, split: str, subset: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Return numbered rows; the value of a null is None."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"source must be a {', '.join(_SUFFIXES)} file, got {source}")
        if path.stat().st_size == 0:
            raise ValueError(f"source must have rows, got the empty file {source}")
        if path.suffix != ".parquet":  # `datasets` would turn texts into dates and numbers
            return list(enumerate(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path)))
        arguments: dict[str, Any] = {"path": "parquet", "data_files": str(path)}
        split = "train"  # what `datasets` calls the one split of a file
    elif path.suffix in _SUFFIXES or source.count("/") > 1:
        raise FileNotFoundError(f"no file or folder {source!r} (working directory {Path.cwd()})")
    else:
        arguments = {"path": str(path) if path.is_dir() else source, "name": subset}
    import datasets  # at first use: it takes a second

    try:
        rows = datasets.load_dataset(**arguments, split=split).to_list()  # broken UTF-8 is found by to_list
    except Exception as error:  # of many kinds
        raise ValueError(f"could not load {source!r}, split {split!r}: {error.__cause__ or error}") from error
    return list(enumerate(rows))


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of JSON lines or an array, with None where a row lacks a column of others."""
    rows = [row for _, row in read_rows(path, dict, parse_float=WrittenFloat)]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file, whose cells are texts; None for an empty one."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"could not load {str(path)!r}: {error}") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} must name each column once in its first line, got {twice[0]!r} twice")
    for n, row in enumerate(rows):
        if None in row:  # where DictReader keeps what exceeds the header
            raise ValueError(f"{path}, row {n} has more cells than the first line has names")
    return [{name: value or None for name, value in row.items()} for row in rows]
