"""What a task gives to the recipe: a prompt, and the answer that rewards compare with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A prompt and its answer, as text.

    Attributes:
        prompt: What the model continues, few-shot examples included.
        answer: The final answer only.
    """

    prompt: str
    answer: str
