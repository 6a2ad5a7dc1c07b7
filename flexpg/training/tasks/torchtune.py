"""Problems from a dataset of torchtune's GRPO recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpg.training.tasks.problem import Problem


def torchtune_dataset(
    dataset: Mapping[str, Any], tokenizer: Mapping[str, Any], skip: int = 0, size: int | None = None
) -> list[Problem]:
    """Return the items of a dataset as torchtune's GRPO recipes use it, for `prompt_format: bos`.

    Args:
        dataset: Component of the dataset, such as torchtune's `gsm8k_dataset`. It is called with the tokenizer, and its
            items have "question" (the whole prompt), "tokens" and "answer"; other entries become columns.
        tokenizer: Component of the recipe's tokenizer: `${tokenizer}`.
        skip: Items to leave out before the first.
        size: Number of items at most; None for all.

    Raises:
        ValueError: If an item lacks one of these, there are no items left, or an item's tokens are not what the recipe
            makes of its question, so that the model would be trained on another prompt.
    """
    from omegaconf import OmegaConf  # at first use: importing tasks must not import torchtune
    from torchtune import config

    encoder = config.instantiate(OmegaConf.create(dict(tokenizer)))
    items = config.instantiate(OmegaConf.create(dict(dataset)), encoder)
    numbers = range(len(items))[skip:][:size]
    if not numbers:
        raise ValueError(f"the dataset must have more than {skip} items, got {len(items)}")
    return [_problem(n, items[n], encoder) for n in numbers]


def _problem(number: int, item: Mapping[str, Any], tokenizer: Any) -> Problem:
    if missing := {"question", "tokens", "answer"} - set(item):
        raise ValueError(f"item {number} of the dataset must have question, tokens and answer, got no {min(missing)}")
    if list(item["tokens"]) != tokenizer.encode(item["question"], add_bos=True, add_eos=False):
        raise ValueError(
            f"the tokens of item {number} of the dataset must be its question with a beginning-of-sequence token; for "
            "another format use flexpg.training.tasks.problems with prompt_format"
        )
    columns = {name: value for name, value in item.items() if name not in ("question", "tokens", "mask", "answer")}
    return Problem(item["question"], item["answer"], columns)
