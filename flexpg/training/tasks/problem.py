"""What every task hands to the sampler: a prompt, and the answer its reward compares with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One prompt and its final answer, both as text.

    Attributes:
        prompt: what the model continues, worked examples included.
        answer: the final answer alone; the task's reward function compares completions with it.
    """

    prompt: str
    answer: str
