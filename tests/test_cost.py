"""Costs are counts of the real masks."""

import random

import torch

from flexpg.cost import Cost, dense_cost, group_cost, shared_cost
from flexpg.masks import dense_mask
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree


def test_costs_count_the_pairs_of_the_masks():
    for seed in range(100):
        rng = random.Random(seed)
        sequences = [[rng.randrange(2) for _ in range(rng.randint(1, 30))] for _ in range(rng.randint(1, 8))]
        tree = PrefixTree.from_sequences(sequences)
        visible = dense_mask(tree.end[: tree.num_tokens])
        assert shared_cost(tree) == Cost(tree.num_tokens, int(visible.sum()))
        causal = sum(int(torch.ones(len(s), len(s)).tril().sum()) for s in sequences)
        assert dense_cost(tree) == Cost(sum(map(len, sequences)), causal)


def test_a_group_costs_its_prompt_once_and_its_completions_in_full_even_if_they_are_equal():
    same = torch.tensor([7, 7])
    rollouts = Rollouts([torch.arange(3)], [same, same], torch.tensor([0, 0]), torch.ones(2))
    assert group_cost(rollouts) == Cost(3 + 2 + 2, 1 + 2 + 3 + (4 + 5) + (4 + 5))
    assert shared_cost(PrefixTree.from_sequences(rollouts.sequences)) == Cost(5, 15)


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
