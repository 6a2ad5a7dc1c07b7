"""Costs are counts of the real masks."""

import random

import torch

from flexpg.cost import Cost, dense_cost, shared_cost
from flexpg.masks import dense_mask
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


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
