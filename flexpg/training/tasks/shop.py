"""A task with two tools: questions about the goods of a shop, whose prices and stocks only its tools know.

A right episode has two turns of the model: a tool and an item, as in `stock egg`, and then the number that the shop has
answered. Its vocabulary is so small that a random model finds rewards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from flexpg.training.tasks.problem import Problem

ITEMS = ("apple", "bread", "cheese", "egg")
QUESTIONS = {"price": "cost of {item}", "stock": "count of {item}"}
MANUAL = "tools : price item , stock item . items : " + " , ".join(ITEMS) + " . answer : number . question : "
NUMBERS = tuple(str(number) for number in range(8))
WORDS = tuple(dict.fromkeys((*" ".join((MANUAL, *QUESTIONS.values())).replace("{item}", "").split(), *ITEMS, *NUMBERS)))
RIGHT_TOOL, RIGHT_ITEM, RIGHT_ANSWER = 0.2, 0.2, 0.6


def shop_problems(split: Literal["train", "test"], size: int, seed: int = 0) -> list[Problem]:
    """Return questions; the columns "tool", "item" and "numbers" say what is right.

    Args:
        split: The two splits have other random numbers.
        size: How many.
        seed: The seed of the random numbers.
    """
    rng = random.Random(f"{split} {seed}")
    problems = []
    for _ in range(size):
        tool, item = rng.choice(list(QUESTIONS)), rng.choice(ITEMS)
        numbers = {f"{question} {other}": rng.choice(NUMBERS) for question in QUESTIONS for other in ITEMS}
        columns = {"tool": tool, "item": item, "numbers": numbers}
        problems.append(Problem(MANUAL + QUESTIONS[tool].format(item=item), numbers[f"{tool} {item}"], columns))
    return problems


class Shop:
    """The shop as an environment: 0.2 for the right tool, 0.2 for the right item, 0.6 for the right number.

    Args:
        problem: One of `shop_problems`.

    >>> shop = Shop(shop_problems("train", 1)[0])
    >>> shop.problem.prompt[-14:], shop.problem.answer
    (': count of egg', '2')
    >>> shop.step([{"role": "user", "content": shop.problem.prompt}, {"role": "assistant", "content": "stock egg"}])
    ([{'role': 'tool', 'content': '2'}], 0.4)
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.columns: Mapping[str, Any] = problem.columns

    def step(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
        """Answer a call with a number, and a number with its reward; anything else ends the episode."""
        words = messages[-1]["content"].split()
        if len(messages) > 2:
            return [], RIGHT_ANSWER * (words == [self.problem.answer])
        tool, item = (*words, "", "")[:2]
        reward = RIGHT_TOOL * (tool == self.columns["tool"]) + RIGHT_ITEM * (item == self.columns["item"])
        number = self.columns["numbers"].get(" ".join(words))
        return ([] if number is None else [{"role": "tool", "content": number}]), reward
