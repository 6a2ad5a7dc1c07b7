"""What a task gives to the recipe: a prompt, the answer that rewards compare with, and the rest of its data row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A prompt and its answer, as text.

    Attributes:
        prompt: What the model continues, few-shot examples included.
        answer: The final answer only.
        columns: The data row that they come from, for rewards that ask for more.
    """

    prompt: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
