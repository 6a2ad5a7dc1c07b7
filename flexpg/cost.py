"""What a packed row costs, and what its sequences would cost unshared."""

from __future__ import annotations

from dataclasses import dataclass

from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree


@dataclass(frozen=True)
class Cost:
    """Work of one forward, padding left out.

    Attributes:
        tokens: through every linear layer.
        attention_pairs: query-key pairs that are visible, in every layer and head.
    """

    tokens: int
    attention_pairs: int

    def __add__(self, other: Cost) -> Cost:
        """Both after one another."""
        return Cost(self.tokens + other.tokens, self.attention_pairs + other.attention_pairs)


def shared_cost(tree: PrefixTree) -> Cost:
    """The packed row: every token once, each with itself and its ancestors.

    >>> shared_cost(PrefixTree.from_lengths([3], [[1, 1]]))
    Cost(tokens=5, attention_pairs=14)
    """
    return Cost(tree.num_tokens, int((tree.position_ids[: tree.num_tokens] + 1).sum()))


def group_cost(rollouts: Rollouts) -> Cost:
    """Every prompt once and every completion in full, even where completions begin alike and a tree merges them."""
    suffix_lens: list[list[int]] = [[] for _ in rollouts.prompts]
    for group, completion in zip(rollouts.group_ids.tolist(), rollouts.completions, strict=True):
        suffix_lens[group].append(len(completion))
    return shared_cost(PrefixTree.from_lengths([len(prompt) for prompt in rollouts.prompts], suffix_lens))


def dense_cost(tree: PrefixTree) -> Cost:
    """The tree's sequences, each on its own under a causal mask.

    >>> dense_cost(PrefixTree.from_lengths([3], [[1, 1]]))
    Cost(tokens=8, attention_pairs=20)
    """
    return Cost(int(tree.lengths.sum()), int((tree.lengths * (tree.lengths + 1) // 2).sum()))
