"""Rollouts whose sequences share prefixes, for tests of whole models: each beside the tree that shares them."""

from __future__ import annotations

from dataclasses import dataclass

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
