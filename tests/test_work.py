"""Work counts the entries of masks: those of full attention, of windows and of chunks."""

from __future__ import annotations

import random

import pytest
import torch
from baseline import random_sequences

from flexpg.analysis.work import baseline_work, packed_work, total_work
from flexpg.masks import dense_mask
from flexpg.tree import PrefixTree

LIMITS = [(None, False), (1, False), (4, False), (100, False), (1, True), (3, True), (100, True)]


def visible_pairs(tree: PrefixTree, window: int | None, is_chunked: bool) -> int:
    """Count the visible pairs of a packed sequence by comparing the positions of every two tokens."""
    position = tree.position_ids[: tree.num_tokens]
    visible = dense_mask(tree.end[: tree.num_tokens])
    if window is not None:
        query, key = position[:, None], position[None, :]
        visible = visible & ((query // window == key // window) if is_chunked else (query - key < window))
    return int(visible.sum())


@pytest.mark.parametrize(("window", "is_chunked"), LIMITS)
def test_work_counts_the_entries_of_masks(window, is_chunked):
    rng = random.Random(3)
    for _ in range(50):
        tree = PrefixTree.from_sequences(random_sequences(rng, rng.randint(1, 6), 20, alphabet=2))
        alone = [PrefixTree.from_sequences([[0] * length]) for length in tree.lengths.tolist()]
        packed, baseline = packed_work(tree), baseline_work(tree)
        assert (packed.num_tokens, baseline.num_tokens) == (tree.num_tokens, tree.baseline_tokens)
        counted = [work.num_pairs if window is None else work.pairs(window, is_chunked) for work in (packed, baseline)]
        expected = [visible_pairs(tree, window, is_chunked)]
        expected.append(sum(visible_pairs(each, window, is_chunked) for each in alone))
        assert counted == expected
        if window is None:
            assert counted == [tree.num_pairs, tree.baseline_pairs]


def test_total_work_adds_and_removes_by_position():
    trees = [PrefixTree.from_lengths([length], [[2, 1]]) for length in (3, 5)]
    first, second = map(packed_work, trees)
    assert total_work([first, second]).positions.tolist() == [2, 2, 2, 3, 2, 2, 1]
    assert torch.equal(total_work([first, second], [first]).positions, second.positions)
