"""Rollouts whose sequences share prefixes, for tests of whole models: each beside the tree that shares them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from flexpg.tree import PrefixTree

VOCAB = 50


@dataclass
class Case:
    """Rollouts, and the tree that shares them."""

    tree: PrefixTree
    sequences: list[list[int]]
    prompt_lens: list[int]


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def grouped(prompts: list[list[int]], completions: list[list[list[int]]]) -> Case:
    pairs = [(prompt, own) for prompt, group in zip(prompts, completions, strict=True) for own in group]
    tree = PrefixTree.from_groups(prompts, completions)
    return Case(tree, [prompt + own for prompt, own in pairs], [len(prompt) for prompt, _ in pairs])


def found(sequences: list[list[int]], prompt_lens: list[int]) -> Case:
    return Case(PrefixTree.from_sequences(sequences), sequences, prompt_lens)


def three_levels() -> Case:
    """A system prompt, two questions under it, and completions that start alike; rollouts in no order."""
    system, first, second, reasoning = tokens(30, 1), tokens(12, 2), tokens(9, 3), tokens(6, 4)
    sequences = [
        system + second + tokens(8, 5),
        system + first + reasoning + tokens(4, 6),
        system + second + tokens(11, 7),
        system + first + reasoning + tokens(7, 8),
        system + first + tokens(3, 9),
    ]
    return found(sequences, [39, 42, 39, 42, 42])


# ---- one of every kind, of tokens that are drawn by seed -------------------------------------------------------------

Row = tuple[list[int], PrefixTree]  # which sequences, and their packed row
Draw = Callable[[int], list[int]]


class Packed(NamedTuple):
    """Rollouts, and the rows that they are packed in; `prefix` is encoded before them, once."""

    case: Case
    rows: list[Row]
    prefix: list[int]


def in_a_row(case: Case) -> Packed:
    return Packed(case, [(list(range(len(case.sequences))), case.tree)], [])


def of_packed_tokens(count: int, draw: Draw) -> Packed:
    own = (count - 40) // 3
    return in_a_row(grouped([draw(40)], [[draw(own), draw(own), draw(count - 40 - 2 * own)]]))


def system_prompt(draw: Draw) -> Packed:
    system, questions = draw(15), (draw(6), draw(9))
    prompts = [system + question for question in (*questions, *questions)]
    return in_a_row(found([prompt + draw(7) for prompt in prompts], list(map(len, prompts))))


def two_questions(draw: Draw) -> Packed:
    """Two questions under a system prompt, and completions of the first that think alike; in no order."""
    system, first, second, thought = draw(12), draw(5), draw(8), draw(4)
    ends = [second + draw(6), first + thought + draw(3), second + draw(4), first + thought + draw(6)]
    return in_a_row(found([system + end for end in ends], [20, 17, 20, 17]))


def chain(draw: Draw) -> Packed:
    """Turns of a conversation: every prompt is all that was said before."""
    first = draw(10) + draw(6)
    second = first + draw(4) + draw(7)
    return in_a_row(found([first, second, second + draw(3) + draw(5)], [10, 20, 30]))


def duplicates(draw: Draw) -> Packed:
    prompt, own = draw(20), draw(6)
    return in_a_row(found([prompt + own, prompt + draw(8), prompt + own], [20] * 3))


def strict_prefixes(draw: Draw) -> Packed:
    prompt, own = draw(20), draw(6)
    return in_a_row(found([prompt + own, prompt + own[:2], prompt + own + draw(3)], [20] * 3))


def behind_a_prefix(draw: Draw) -> Packed:
    """Micro-batches of a group whose prompt is encoded once for them."""
    prompt = draw(30)
    case = found([prompt + draw(length) for length in (6, 9, 4, 8)], [30] * 4)
    parts = [0, 2], [1, 3]
    rows = [(part, PrefixTree.from_sequences([case.sequences[n] for n in part])) for part in parts]
    return Packed(case, rows, prompt)


TREES: dict[str, Callable[[Draw], Packed]] = {
    "a group": lambda draw: in_a_row(grouped([draw(25)], [[draw(7), draw(4), draw(9)]])),
    "groups": lambda draw: in_a_row(grouped([draw(12), draw(20)], [[draw(5), draw(8)], [draw(6), draw(3)]])),
    "system prompt": system_prompt,
    "three levels": two_questions,
    "a chain": chain,
    "duplicates": duplicates,
    "strict prefixes": strict_prefixes,
    "singletons": lambda draw: in_a_row(grouped([draw(9), draw(16)], [[draw(6)], [draw(1)]])),
    **{f"{count} tokens": partial(of_packed_tokens, count) for count in (127, 128, 129, 255, 256, 257)},
    "behind a prefix": behind_a_prefix,
}


def packed(tree: str, seed: int) -> Packed:
    """One of TREES, of tokens that the seed draws."""
    rng = random.Random(seed)
    return TREES[tree](lambda length: [rng.randrange(VOCAB) for _ in range(length)])
