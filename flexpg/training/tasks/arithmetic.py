"""Three-digit addition, written out digit by digit: the task of the embedded demo.

A line of the prompt is one worked example, last digits first, the carry as a third summand:

    356+287: 6+7=13 5+8+1=14 3+2+1=6 =643

The split is a fixed hash of the unordered pair of operands: one pair in ten is held out. Worked examples and training
problems come from the other nine, for every seed, so a test problem is never seen before the test.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Literal

from flexpg.training.tasks.problem import Problem

MIN_PROMPT_BYTES = 256
_FINAL_ANSWER = re.compile(r" =(\d+)\s*$")


def arithmetic(
    split: Literal["train", "test"] = "train", size: int = 1024, seed: int = 0, examples: int = 8
) -> list[Problem]:
    """The same arguments give the same problems, each with worked examples of its own.

    Args:
        split: "train", or "test" for pairs that neither the warm start nor training ever asks or shows.
        size: number of problems, drawn with replacement.
        seed: of the draw.
        examples: worked examples per prompt; 8 make at least 256 bytes.

    Raises:
        ValueError: for a split of another name, a size that is no whole number or below 1, or for prompts shorter than
            256 bytes.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; arithmetic has 'train' and 'test'")
    for name, count, least in (("size", size, 1), ("examples", examples, 0)):
        if type(count) is not int or count < least:
            raise ValueError(f"{name} is {count!r}; give a whole number, {least} or more")
    rng = random.Random(seed)
    problems = []
    for _ in range(size):
        a, b = operands(split, rng)
        problems.append(Problem(f"{worked_examples(examples, rng)}{a}+{b}:", str(a + b)))
    shortest = min((len(problem.prompt) for problem in problems), default=MIN_PROMPT_BYTES)
    if shortest < MIN_PROMPT_BYTES:
        raise ValueError(
            f"{examples} worked examples make a prompt of {shortest} bytes, under {MIN_PROMPT_BYTES}; "
            "ask for examples=8 or more"
        )
    return problems


def arithmetic_reward(completion: str, answer: str) -> float:
    """1.0 when the first line of the completion ends in ` =<answer>`, else 0.0."""
    found = _FINAL_ANSWER.search(completion.split("\n", 1)[0])
    return float(found is not None and found.group(1) == answer)


def operands(split: str, rng: random.Random) -> tuple[int, int]:
    """Two numbers from 100 to 999 whose unordered pair belongs to the split."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        held_out = zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0
        if held_out == (split == "test"):
            return a, b


def worked_examples(count: int, rng: random.Random) -> str:
    """The lines that stand before the question, all right, from the training pairs."""
    pairs = [operands("train", rng) for _ in range(count)]
    return "".join(f"{a}+{b}:{worked(a, b)}" for a, b in pairs)


def worked(a: int, b: int, forget: float = 0.0, rng: random.Random | None = None) -> str:
    r"""The completion of `a+b:`, from the first space to the newline that ends it.

    Args:
        a: from 100 to 999.
        b: from 100 to 999.
        forget: probability that a carry is lost on the way to the next digit; the final answer is then wrong.
        rng: decides which carries are lost; may be left out when forget is 0.

    Example:
        >>> worked(356, 287)
        ' 6+7=13 5+8+1=14 3+2+1=6 =643\n'
        >>> worked(356, 287, forget=1.0, rng=random.Random(0))
        ' 6+7=13 5+8=13 3+2=5 =533\n'
    """
    if forget and rng is None:
        raise ValueError("worked() with forget above 0 needs an rng that decides which carries are lost")
    text, result, carry = "", "", False
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        text += f" {x}+{y}{'+1' if carry else ''}={total}"
        result = f"{total % 10}{result}"
        carry = total > 9 and not (rng is not None and rng.random() < forget)
    return f"{text} ={'1' if total > 9 else ''}{result}\n"
