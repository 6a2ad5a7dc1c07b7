"""Prefix trees, compared with a trie of nested dicts."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from baseline import random_sequences
from oracles import assert_is_trie

from flexpg.masks import dense_mask, group_block_mask
from flexpg.tree import PrefixTree

FIELDS = ("end", "node", "lengths", "position_ids", "parent", "segments")

# from_sequences


@pytest.mark.parametrize("seed", range(3))
def test_from_sequences_random_forests_match_trie(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        alphabet = rng.choice([1, 2, 3, 1000])  # 1: all are prefixes of one another; 1000: many roots
        sequences = random_sequences(rng, count=rng.randint(1, 8), longest_run=rng.randint(1, 7), alphabet=alphabet)
        assert_is_trie(PrefixTree.from_sequences(sequences), sequences)


@pytest.mark.parametrize(
    "sequences",
    [
        [[0]],
        [[7, 7, 7, 7]],
        [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
        [[1, 2, 3, 4], [1], [1, 2], [1, 2, 3, 4]],
        [[3], [1], [2]],
        [[5, 6], [6, 5], [5, 6, 5]],
        [[256, 1], [1, 256], [65536], [255]],  # little-endian bytes would have another order
        [[2**40 + 1, 5], [2**40, 5], [3, 2**62], [2**40 + 1]],
        [[2**32], [2**32 - 1], [0]],
    ],
)
def test_from_sequences_edge_cases_match_trie(sequences):
    assert_is_trie(PrefixTree.from_sequences(sequences), sequences)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 255, 256, 257, 383, 384, 385])
def test_from_sequences_padding_fills_whole_blocks_with_roots(num_tokens):
    assert_is_trie(PrefixTree.from_sequences([list(range(num_tokens))]), [list(range(num_tokens))])


@pytest.mark.parametrize(
    "convert",
    [tuple, np.array, *(lambda x, d=d: torch.tensor(x, dtype=d) for d in (torch.uint8, torch.int16, torch.int64))],
)
def test_from_sequences_accepts_tuples_arrays_and_integer_tensors(convert):
    sequences = [[1, 2, 3], [1, 2, 200]]
    tree = PrefixTree.from_sequences([convert(tokens) for tokens in sequences])
    assert_is_trie(tree, sequences)
    assert tree.end.dtype == torch.int32
    for tensor in (tree.tokens, tree.node, tree.lengths, tree.position_ids, tree.parent, tree.segments):
        assert tensor.dtype == torch.int64


def test_from_sequences_two_million_tokens_takes_under_150_ms():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(150_000, (30_000,), generator=generator)
    sequences = [torch.cat([shared, torch.randint(150_000, (2_000,), generator=generator)]) for _ in range(64)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tree = PrefixTree.from_sequences(sequences)
        seconds.append(time.perf_counter() - start)
    assert tree.num_tokens == 30_000 + 64 * 2_000
    assert min(seconds) < 0.15


# from_groups, from_lengths


def random_groups(rng: random.Random) -> tuple[list[list[int]], list[list[list[int]]]]:
    def tokens() -> list[int]:
        return [rng.randrange(3) for _ in range(rng.randint(1, 6))]

    count = rng.randint(1, 4)
    return [tokens() for _ in range(count)], [[tokens() for _ in range(rng.randint(1, 4))] for _ in range(count)]


def test_from_groups_keeps_order_and_merges_nothing():
    rng = random.Random(0)
    for _ in range(500):
        prompts, completions = random_groups(rng)
        tokens, end, node, position_ids = [], [], [], []
        for prompt, group in zip(prompts, completions, strict=True):
            start = len(tokens)
            tokens += prompt
            end += [start + len(prompt) + sum(map(len, group))] * len(prompt)
            position_ids += range(len(prompt))
            for completion in group:
                node.append([*range(start, start + len(prompt)), *range(len(tokens), len(tokens) + len(completion))])
                tokens += completion
                end += [len(tokens)] * len(completion)
                position_ids += range(len(prompt), len(prompt) + len(completion))
        tree = PrefixTree.from_groups(prompts, completions)
        used, longest = tree.num_tokens, max(map(len, node))
        assert tree.tokens[:used].tolist() == tokens
        assert tree.end[:used].tolist() == end
        assert tree.position_ids[:used].tolist() == position_ids
        assert tree.node.tolist() == [nodes + [-1] * (longest - len(nodes)) for nodes in node]
        assert tree.lengths.tolist() == list(map(len, node))


def test_from_lengths_equals_from_groups_without_tokens():
    rng = random.Random(1)
    for _ in range(300):
        prompts, completions = random_groups(rng)
        tree = PrefixTree.from_groups(prompts, completions)
        other = PrefixTree.from_lengths([len(p) for p in prompts], [[len(c) for c in group] for group in completions])
        assert other.tokens is None and other.max_token == -1
        assert all(torch.equal(getattr(other, name), getattr(tree, name)) for name in FIELDS)
        assert (other.num_tokens, other.max_length) == (tree.num_tokens, tree.max_length)


@pytest.mark.parametrize("build", [PrefixTree.from_lengths, group_block_mask])
def test_from_lengths_flat_suffix_lens_raises(build):
    with pytest.raises(ValueError, match=r"suffix_lens must have one list of lengths per prompt, got \[200, 50\]"):
        build([1000], [200, 50])


def test_from_groups_without_completions_of_every_prompt_raises():
    with pytest.raises(ValueError, match="completions must have one list per prompt, got 2 for 1 prompts"):
        PrefixTree.from_groups([[1]], [[[2]], [[3]]])


def test_from_sequences_merges_what_from_groups_keeps_apart():
    prompts, completions = [[1, 2], [1, 2]], [[[3, 4], [3, 5]], [[3, 4]]]
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]]
    separate, merged = PrefixTree.from_groups(prompts, completions), PrefixTree.from_sequences(sequences)
    assert (separate.num_tokens, merged.num_tokens) == (10, 5)
    for tree in (separate, merged):
        assert [tree.tokens[nodes].tolist() for nodes in tree.node] == sequences


# Counts, devices


def test_num_pairs_and_baseline_pairs_count_the_entries_of_masks():
    rng = random.Random(2)
    for _ in range(100):
        tree = PrefixTree.from_sequences(random_sequences(rng, rng.randint(1, 6), 20, alphabet=2))
        masks = [dense_mask(torch.full((length,), length)) for length in tree.lengths.tolist()]  # causal
        assert tree.num_pairs == dense_mask(tree.end[: tree.num_tokens]).sum()
        assert tree.baseline_pairs == sum(mask.sum() for mask in masks)
        assert tree.baseline_tokens == sum(map(len, masks))


def test_to_moves_every_tensor(device):
    tokens = torch.tensor([1, 2, 3], device=device)
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    moved = tree.to(device)
    for name in ("tokens", *FIELDS):
        assert getattr(moved, name).device.type == device
        assert torch.equal(getattr(moved, name).cpu(), getattr(tree, name))
    assert (moved.num_tokens, moved.max_length, moved.max_token) == (4, 3, 4)
    for tree in (PrefixTree.from_sequences([tokens]), PrefixTree.from_groups([tokens], [[tokens]])):
        assert tree.tokens.device.type == tree.end.device.type == tree.position_ids.device.type == device


def test_repr_is_one_line_of_counts():
    tree = PrefixTree.from_sequences([[1, 2], [1, 3]])
    assert repr(tree) == "PrefixTree(2 sequences, 4 tokens packed into 3, device=cpu)"
