"""Three-digit addition, worked out digit by digit: the task of the demo.

A line of the prompt is one few-shot example, last digits first, with the carry as a third summand:

    356+287: 6+7=13 5+8+1=14 3+2+1=6 =643

The split is a fixed hash of the unordered pair of operands: one pair in ten is held out. Few-shot examples and training
problems use the other nine, for every seed, so a test problem is never seen before the test.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Literal

from flexpg.training.tasks.problem import Problem

_FINAL_ANSWER = re.compile(r" =(\d+)\s*$")


def arithmetic(
    split: Literal["train", "test"] = "train", size: int = 1024, seed: int = 0, shots: int = 8
) -> list[Problem]:
    """Return problems, each with few-shot examples of its own; the same arguments give the same problems.

    Args:
        split: "train", or "test" for pairs that neither the warm start nor training asks or shows.
        size: Number of problems, drawn with replacement.
        seed: The seed of the random numbers.
        shots: Few-shot examples per prompt.

    Raises:
        ValueError: If `split` is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    rng = random.Random(seed)
    problems = []
    for _ in range(size):
        a, b = operands(split, rng)
        problems.append(Problem(f"{few_shot_examples(shots, rng)}{a}+{b}:", str(a + b)))
    return problems


def arithmetic_reward(completion: str, answer: str) -> float:
    """Return 1.0 if the first line of the completion ends in ` =<answer>`, else 0.0."""
    found = _FINAL_ANSWER.search(completion.split("\n", 1)[0])
    return float(found is not None and found.group(1) == answer)


def operands(split: str, rng: random.Random) -> tuple[int, int]:
    """Draw two numbers from 100 to 999 whose unordered pair belongs to the split."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        held_out = zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0
        if held_out == (split == "test"):
            return a, b


def few_shot_examples(count: int, rng: random.Random) -> str:
    """Return lines of correct examples from the training pairs, which come before the question."""
    pairs = [operands("train", rng) for _ in range(count)]
    return "".join(f"{a}+{b}:{worked(a, b)}" for a, b in pairs)


def worked(a: int, b: int, forget: float = 0.0, rng: random.Random | None = None) -> str:
    r"""Return the completion of `a+b:`, from the first space to the newline that ends it.

    Args:
        a: From 100 to 999.
        b: From 100 to 999.
        forget: Probability that a carry is lost on the way to the next digit; the final answer is then wrong.
        rng: Decides which carries are lost; needed if `forget` > 0.

    >>> worked(356, 287)
    ' 6+7=13 5+8+1=14 3+2+1=6 =643\n'
    >>> worked(356, 287, forget=1.0, rng=random.Random(0))
    ' 6+7=13 5+8=13 3+2=5 =533\n'
    """
    text, result, carry = "", "", False
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        text += f" {x}+{y}{'+1' if carry else ''}={total}"
        result = f"{total % 10}{result}"
        carry = total > 9 and not (rng is not None and rng.random() < forget)
    return f"{text} ={'1' if total > 9 else ''}{result}\n"
