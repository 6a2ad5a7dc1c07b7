"""GSM8K from a local JSONL file, with a few-shot prompt long enough to be worth sharing."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

from flexpg.tasks.problem import Problem

_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def gsm8k(path: str, size: int | None = None, shots: int = 8, shots_path: str | None = None) -> list[Problem]:
    """Each problem's prompt is the same worked examples and then its question.

    Args:
        path: JSONL with "question" and "answer" on each line, the final answer after `####`; relative to the
            working directory.
        size: how many problems to take from the start; None for all.
        shots: worked examples, the first rows of `shots_path`; 8 make 2,000 bytes and more.
        shots_path: file of the worked examples; None for `path`, whose first rows are then not asked.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a line that is not such a row, or when too few rows are left.
    """
    rows = _rows(path)
    example_rows = rows if shots_path is None else _rows(shots_path)
    examples = example_rows[:shots]
    asked = (rows[shots:] if shots_path is None else rows)[:size]
    if len(examples) < shots or not asked:
        few = f"{shots_path or path} has {len(example_rows)} rows"
        raise ValueError(f"{few}, too few for {shots} shots and a question; lower `shots`")
    context = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    return [Problem(f"{context}Question: {q}\nAnswer:", a.rpartition("####")[2].strip()) for q, a in asked]


def gsm8k_reward(completion: str, answer: str) -> float:
    """1.0 when the completion's final number equals the answer's, else 0.0.

    The final number is the one after `####`, or without that mark the last one; commas, a dollar sign and trailing
    zeros do not matter. What follows where the completion starts a new `Question:` does not count.
    """
    return float(_final_number(completion) == _value(answer))


def gsm8k_closeness(completion: str, answer: str) -> float:
    """1.0 when the final number is right, less the further off it is relative to the answer, 0.0 without a number.

    For models that are right too rarely to learn from `gsm8k_reward` alone.

    >>> gsm8k_closeness("so #### 50", "100")
    0.6666666666666666
    """
    number, right = _final_number(completion), _value(answer)
    if number is None:
        return 0.0
    return float(1 / (1 + abs(number - right) / max(abs(right), Decimal(1))))


def _final_number(completion: str) -> Decimal | None:
    text = completion.split("\nQuestion:", 1)[0]
    if "####" in text:
        numbers = _NUMBER.findall(text.partition("####")[2])[:1]
    else:
        numbers = _NUMBER.findall(text)[-1:]
    return _value(numbers[0]) if numbers else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", number))


def _rows(path: str) -> list[tuple[str, str]]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no GSM8K file at {path!r} (working directory {Path.cwd()}); give its path as `path`")
    return [
        _row(line, f"{path} line {number}")
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
        if line.strip()
    ]


def _row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"{where} has no text under {key!r}; a row needs 'question' and 'answer'")
    if _NUMBER.fullmatch(row["answer"].rpartition("####")[2].strip()) is None or "####" not in row["answer"]:
        raise ValueError(f"{where}: the answer has no number after '####'")
    return row["question"], row["answer"]
