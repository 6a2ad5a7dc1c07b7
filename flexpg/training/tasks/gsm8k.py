"""GSM8K, with a few-shot prompt long enough to be worth sharing (arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexpg.training.tasks.dataset import problems
from flexpg.training.tasks.problem import Problem

_FINAL_ANSWER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def gsm8k(
    source: str = "openai/gsm8k",
    split: str = "train",
    subset: str | None = "main",
    size: int | None = None,
    skip: int = 0,
    shots: int = 8,
    template: str = "Question: {question}\nAnswer:",
    shots_source: str | None = None,
    shots_split: str | None = None,
) -> list[Problem]:
    """Each problem's prompt is the same worked examples, with all their steps, and then its question.

    The arguments are those of `problems`; rows have "question" and "answer", which ends in `####` and a number.

    Args:
        source: GSM8K on the hub, or a copy of it: a file or a directory.
        split: "train" or "test"; leave it out for a file.
        subset: "main", as on the hub; None for a directory that has no subsets. Files have none.
        size: take this many problems at most; None for all.
        skip: rows to leave out before the first that is asked.
        shots: worked examples, the first rows of their data; 8 make 2,000 bytes and more.
        template: of the prompt; a worked example is the prompt, a space, the row's whole answer and an empty line.
        shots_source: data of the worked examples; None for `source`.
        shots_split: their split; None for `split`, whose first rows are then not asked.

    Raises:
        FileNotFoundError: when the source looks like a path and nothing is there.
        ValueError: for data that cannot be loaded, a row that is not such a row, or too few rows.
    """
    return problems(
        source,
        template,
        _final_answer,
        split=split,
        subset=subset,
        size=size,
        skip=skip,
        shots=shots,
        shot_template=template + " {answer}\n\n",
        shots_source=shots_source,
        shots_split=shots_split,
    )


def _final_answer(row: Mapping[str, Any]) -> str:
    _, mark, answer = str(row["answer"]).rpartition("####")
    if not mark or not _FINAL_ANSWER.fullmatch(answer.strip()):
        raise ValueError("the answer has no number after '####'")
    return answer.strip()
