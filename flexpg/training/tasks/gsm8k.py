"""GSM8K, with few-shot prompts that are long enough to be worth sharing (arXiv 2110.14168)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpg.training.tasks.dataset import problems
from flexpg.training.tasks.problem import Problem


def gsm8k(
    source: str = "openai/gsm8k",
    split: str = "train",
    subset: str | None = "main",
    size: int | None = None,
    skip: int = 0,
    partition: str | None = None,
    shots: int = 8,
    template: str = "Question: {question}\nAnswer:",
    shots_source: str | None = None,
    shots_split: str | None = None,
) -> list[Problem]:
    """Return problems that all start with the same few-shot examples, with all their steps.

    The arguments are those of `problems`. Rows have "question" and "answer", which ends in `####` and a number.

    Args:
        source: GSM8K on the hub, or a copy of it: a file or a folder.
        split: "train" or "test".
        subset: "main", as on the hub; None for a folder without subsets.
        size: Number of problems at most; None for all.
        skip: Rows to leave out before the first question.
        partition: Rows to take, such as "1-9/10"; None for all.
        shots: Few-shot examples, the first rows of their data; 8 are more than 2,000 bytes.
        template: Format string of the prompt; a few-shot example is the prompt, a space, the row's whole answer and an
            empty line.
        shots_source: Data of the few-shot examples; None for `source`.
        shots_split: Their split; None for `split`, whose first rows are then not asked.

    Raises:
        FileNotFoundError: If `source` looks like a path and does not exist.
        ValueError: If data cannot be loaded, a row is not a GSM8K row, or there are too few rows.
    """
    return problems(
        source,
        template,
        _final_answer,
        split=split,
        subset=subset,
        size=size,
        skip=skip,
        partition=partition,
        shots=shots,
        shot_template=template + " {answer}\n\n",
        shots_source=shots_source,
        shots_split=shots_split,
    )


def _final_answer(row: Mapping[str, Any]) -> str:
    _, mark, answer = str(row["answer"]).rpartition("####")
    if not mark or not any(character.isdigit() for character in answer):
        raise ValueError("the answer must end in '####' and a number")
    return answer.strip()
