"""Rollouts whose sequences share prefixes, and the comparison of whole models on them.

tokens(length, seed)                           random token ids
Case.from_groups(prompts, completions)         sequences, prompt lengths and their tree, groups not merged
Case.from_sequences(sequences, prompt_lens)    the same with every shared prefix merged
image_tree((text, image, text, ...), ...)      the tree of prompts with images of these lengths
three_levels()                                 a case with a system prompt, questions and completions that start alike
TREES, rollouts_of(tree, seed)                 for the matrix: one kind of tree each, as Rollouts with a token budget
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from baseline import relative_error
from torch import Tensor, nn

from flexpg.prompt_inputs import read_prompt_inputs
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

VOCAB = 50


@dataclass(frozen=True)
class Case:
    """Sequences, and the tree in which they share prefixes."""

    tree: PrefixTree
    sequences: list[list[int]]
    prompt_lens: list[int]

    @classmethod
    def from_groups(cls, prompts: list[list[int]], completions: list[list[list[int]]]) -> Case:
        """Build a case from groups; what completions or prompts share is not merged."""
        pairs = [(prompt, answer) for prompt, group in zip(prompts, completions, strict=True) for answer in group]
        tree = PrefixTree.from_groups(prompts, completions)
        return cls(tree, [prompt + answer for prompt, answer in pairs], [len(prompt) for prompt, _ in pairs])

    @classmethod
    def from_sequences(cls, sequences: list[list[int]], prompt_lens: list[int]) -> Case:
        """Build a case in which every shared prefix is merged."""
        return cls(PrefixTree.from_sequences(sequences), sequences, prompt_lens)


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def image_tree(*prompts: tuple[int, ...], completions: tuple[int, ...] = (40, 9)) -> PrefixTree:
    """Build the tree of prompts that alternate text and images of these lengths; the text is the same in all."""
    sequences, given = [], []
    for g, lengths in enumerate(prompts):
        types = torch.cat([torch.full((length,), n % 2) for n, length in enumerate(lengths)])
        sequences.append(torch.where(types == 1, VOCAB, torch.tensor(tokens(len(types), 1))))
        pixels = torch.full((len(lengths) // 2, 3, 2, 2), float(g))
        given.append({"mm_token_type_ids": types} | ({"pixel_values": pixels} if len(pixels) else {}))
    inputs = read_prompt_inputs(sequences, given)
    return PrefixTree.from_sequences(
        [
            torch.cat([prompt, torch.tensor(tokens(length, 10 * g + length))])
            for g, prompt in enumerate(sequences)
            for length in completions
        ],
        [given for given in inputs for _ in completions],
    )


def three_levels() -> Case:
    """Build a system prompt, two questions under it, and completions that start alike; in no particular order."""
    system, first, second, reasoning = tokens(30, 1), tokens(12, 2), tokens(9, 3), tokens(6, 4)
    sequences = [
        system + second + tokens(8, 5),
        system + first + reasoning + tokens(4, 6),
        system + second + tokens(11, 7),
        system + first + reasoning + tokens(7, 8),
        system + first + tokens(3, 9),
    ]
    return Case.from_sequences(sequences, [39, 42, 39, 42, 42])


# Comparison.


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Return gradients of a loss that weighs every token differently, so that swapped tokens show."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    (weights.to(logprobs) * logprobs).sum().backward()  # not autograd.grad, which reentrant checkpointing refuses
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def largest_error(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(values) == list(expected)
    return max(relative_error(values[name], expected[name]) for name in expected)


def float32_floor(num_layers: int = 2) -> float:
    """Return the relative error that float32 may cause in a tiny model by chance, whatever the CPU.

    It is that of one rounding each of about 8 operations per layer. An error budget compares two random errors, and the
    baseline's may be near 0 by chance, so the floor is added to it; in the matrix at most a tenth of it is needed.
    """
    return 8 * num_layers * torch.finfo(torch.float32).eps


def assert_within_budget(shared: dict[str, Tensor], baseline: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Check that float32 results are no further from those in float64 than 1.5 times the baseline's."""
    for name, exact in truth.items():
        assert relative_error(shared[name], exact) <= 1.5 * relative_error(baseline[name], exact) + float32_floor(), (
            name
        )


# Kinds of trees, whose tokens a seed draws.

Draw = Callable[[int], list[int]]
Drawn = tuple[list[list[int]], list[list[list[int]]]]  # prompts, and the completions of each


def packed_tokens(count: int, draw: Draw) -> Drawn:
    """A group of `count` packed tokens, at the edge of a block."""
    length = (count - 40) // 3 - 1
    return [draw(40)], [[[1, *draw(length)], [2, *draw(length)], [3, *draw(count - 43 - 2 * length)]]]


def system_prompt(draw: Draw) -> Drawn:
    system = draw(15)
    return [system + draw(6), system + draw(9)], [[draw(7), draw(7)], [draw(7), draw(7)]]


def shared_reasoning(draw: Draw) -> Drawn:
    """Two questions under a system prompt; completions of the first begin alike."""
    system, thought = draw(12), draw(4)
    prompts = [system + draw(5), system + draw(8)]
    return prompts, [[thought + draw(3), thought + draw(6)], [draw(6), draw(4)]]


def conversation(draw: Draw) -> Drawn:
    """Turns of a conversation, in which every prompt is all that was said before."""
    prompts, completions = [draw(10)], [[draw(6)]]
    for question, answer in ((4, 7), (3, 5)):
        prompts.append(prompts[-1] + completions[-1][0] + draw(question))
        completions.append([draw(answer)])
    return prompts, completions


def duplicates(draw: Draw) -> Drawn:
    prompt, first = draw(20), draw(6)
    return [prompt], [[first, draw(8), first]]


def strict_prefixes(draw: Draw) -> Drawn:
    prompt, first = draw(20), draw(6)
    return [prompt], [[first, first[:2], first + draw(3)]]


TREES: dict[str, Callable[[Draw], Drawn]] = {
    "one_group": lambda draw: ([draw(25)], [[draw(7), draw(4), draw(9)]]),
    "groups": lambda draw: ([draw(12), draw(20)], [[draw(5), draw(8)], [draw(6), draw(3)]]),
    "system_prompt": system_prompt,
    "three_levels": shared_reasoning,
    "conversation": conversation,
    "duplicates": duplicates,
    "strict_prefixes": strict_prefixes,
    "singletons": lambda draw: ([draw(9), draw(16)], [[draw(6)], [draw(1)]]),
    **{f"{count}_tokens": partial(packed_tokens, count) for count in (127, 128, 129, 255, 256, 257)},
    "prefix_cache": lambda draw: ([draw(30)], [[draw(6), draw(9), draw(4), draw(8)]]),
}
MAX_TOKENS = {"prefix_cache": 45}  # so that the group is oversized; every other tree is one micro-batch


def rollouts_of(tree: str, seed: int) -> Rollouts:
    """Return one of TREES, with tokens, rewards and the order of its rollouts drawn from the seed."""
    rng = random.Random(seed)
    prompts, completions = TREES[tree](lambda length: [rng.randrange(VOCAB) for _ in range(length)])
    rewards = [[rng.gauss(0, 1) for _ in group] for group in completions]
    rollouts = Rollouts.from_groups(prompts, completions, rewards)
    return rollouts.select(rng.sample(range(len(rollouts)), len(rollouts)))
