"""The prefix tree against a trie of dicts, built token by token."""

from __future__ import annotations

import random
import time

import pytest
import torch
from baseline import random_sequences

from flexpg.tree import PrefixTree

# ---- any set of sequences --------------------------------------------------------------------------------------------


class Trie:
    """The oracle: nested dicts, walked depth first with children by token id, noting what each token's place is."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.root: dict[int, dict] = {}
        for tokens in sequences:
            children = self.root
            for token in tokens:
                children = children.setdefault(token, {})
        self.tokens, self.end, self.parent, self.depth, self.segments = [], [], [], [], []
        self.packed_index: dict[tuple[int, ...], int] = {}
        self._walk(self.root, path=(), parent=-1)
        for segment in self.segments:
            segment[2] = self.end[segment[0]]

    def _walk(self, children: dict[int, dict], path: tuple[int, ...], parent: int) -> None:
        for token, below in sorted(children.items()):
            index = len(self.tokens)
            self.packed_index[(*path, token)] = index
            self.tokens.append(token)
            self.end.append(None)
            self.parent.append(parent)
            self.depth.append(len(path))
            if parent == -1 or len(children) > 1:
                self.segments.append([index, index + 1, None])  # start, own end, subtree end
            else:
                self.segments[-1][1] = index + 1
            self._walk(below, (*path, token), index)
            self.end[index] = len(self.tokens)


def assert_is_trie_of(tree: PrefixTree, sequences: list[list[int]]) -> None:
    trie = Trie(sequences)
    size, used, longest = len(tree), len(trie.tokens), max(map(len, sequences))
    pads = list(range(used, size))
    assert (tree.num_tokens, tree.max_length, tree.max_token) == (used, longest, max(map(max, sequences)))
    assert size % 128 == 0 and size >= 256 and size - used < max(128, 257 - used)
    assert tree.tokens.tolist() == trie.tokens + [0] * len(pads)
    assert tree.end.tolist() == trie.end + [pad + 1 for pad in pads]
    assert tree.parent.tolist() == trie.parent + [-1] * len(pads)
    assert tree.position_ids.tolist() == trie.depth + [0] * len(pads)
    assert tree.segments.tolist() == trie.segments
    assert tree.lengths.tolist() == [len(tokens) for tokens in sequences]
    for row, tokens in zip(tree.node.tolist(), sequences, strict=True):
        paths = [tuple(tokens[: t + 1]) for t in range(len(tokens))]
        assert row == [trie.packed_index[path] for path in paths] + [-1] * (longest - len(tokens))


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_random_forests_are_tries(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        alphabet = rng.choice([1, 2, 3, 1000])  # 1: all are prefixes of one another; 1000: many roots
        sequences = random_sequences(rng, count=rng.randint(1, 8), longest_run=rng.randint(1, 7), alphabet=alphabet)
        assert_is_trie_of(PrefixTree.from_sequences(sequences), sequences)


@pytest.mark.parametrize(
    "sequences",
    [
        [[0]],
        [[7, 7, 7, 7]],
        [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
        [[1, 2, 3, 4], [1], [1, 2], [1, 2, 3, 4]],
        [[3], [1], [2]],
        [[5, 6], [6, 5], [5, 6, 5]],
        [[256, 1], [1, 256], [65536], [255]],  # little-endian bytes would sort these otherwise
        [[2**40 + 1, 5], [2**40, 5], [3, 2**62], [2**40 + 1]],
        [[2**32], [2**32 - 1], [0]],
    ],
)
def test_special_forests_are_tries(sequences):
    assert_is_trie_of(PrefixTree.from_sequences(sequences), sequences)
    tensors = [torch.tensor(tokens) for tokens in sequences]
    assert_is_trie_of(PrefixTree.from_sequences(tensors), sequences)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 255, 256, 257, 383, 384, 385])
def test_rows_are_padded_to_whole_blocks_and_pads_are_roots(num_tokens):
    assert_is_trie_of(PrefixTree.from_sequences([list(range(num_tokens))]), [list(range(num_tokens))])


def test_token_ids_may_be_of_any_integer_type():
    sequences = [[1, 2, 3], [1, 2, 200]]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        tree = PrefixTree.from_sequences([torch.tensor(tokens, dtype=dtype) for tokens in sequences])
        assert tree.tokens.dtype == torch.int64
        assert_is_trie_of(tree, sequences)


def test_the_number_types_are_the_ones_that_are_promised():
    tree = PrefixTree.from_sequences([[1, 2], [1, 3]])
    assert tree.end.dtype == torch.int32
    for tensor in (tree.tokens, tree.node, tree.lengths, tree.position_ids, tree.parent, tree.segments):
        assert tensor.dtype == torch.int64
    assert repr(tree) == "PrefixTree(2 sequences of 4 tokens in 3, on cpu)"


def test_an_end_off_by_one_is_another_tree():
    sequences = [[1, 2, 3], [1, 2, 4, 5]]
    tree = PrefixTree.from_sequences(sequences)
    tree.end[1] -= 1
    with pytest.raises(AssertionError):
        assert_is_trie_of(tree, sequences)


# ---- groups ----------------------------------------------------------------------------------------------------------


def random_groups(rng: random.Random) -> tuple[list[list[int]], list[list[list[int]]]]:
    def tokens() -> list[int]:
        return [rng.randrange(3) for _ in range(rng.randint(1, 6))]

    count = rng.randint(1, 4)
    return [tokens() for _ in range(count)], [[tokens() for _ in range(rng.randint(1, 4))] for _ in range(count)]


def test_groups_stand_in_the_order_given_with_nothing_merged():
    rng = random.Random(0)
    for _ in range(500):
        prompts, completions = random_groups(rng)
        tokens, end, node, position_ids = [], [], [], []  # as the layout is described, one list at a time
        for prompt, group in zip(prompts, completions, strict=True):
            start = len(tokens)
            whole = len(prompt) + sum(map(len, group))
            tokens += prompt
            end += [start + whole] * len(prompt)
            position_ids += range(len(prompt))
            for completion in group:
                node.append([*range(start, start + len(prompt)), *range(len(tokens), len(tokens) + len(completion))])
                tokens += completion
                end += [len(tokens)] * len(completion)
                position_ids += range(len(prompt), len(prompt) + len(completion))
        tree = PrefixTree.from_groups(prompts, completions)
        used = tree.num_tokens
        assert tree.tokens[:used].tolist() == tokens
        assert tree.end[:used].tolist() == end
        assert tree.position_ids[:used].tolist() == position_ids
        longest = max(map(len, node))
        assert tree.node.tolist() == [row + [-1] * (longest - len(row)) for row in node]
        assert tree.lengths.tolist() == [len(row) for row in node]


def test_lengths_alone_give_the_groups_tree_without_tokens():
    rng = random.Random(1)
    for _ in range(300):
        prompts, completions = random_groups(rng)
        tree = PrefixTree.from_groups(prompts, completions)
        lengths = [[len(completion) for completion in group] for group in completions]
        bare = PrefixTree.from_lengths([len(prompt) for prompt in prompts], lengths)
        assert bare.tokens is None and bare.max_token == -1
        for name in ("end", "node", "lengths", "position_ids", "parent", "segments"):
            assert torch.equal(getattr(bare, name), getattr(tree, name))
        assert (bare.num_tokens, bare.max_length) == (tree.num_tokens, tree.max_length)


def test_from_sequences_merges_what_from_groups_keeps_apart():
    prompts, completions = [[1, 2], [1, 2]], [[[3, 4], [3, 5]], [[3, 4]]]
    apart = PrefixTree.from_groups(prompts, completions)
    merged = PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    assert (apart.num_tokens, merged.num_tokens) == (10, 5)
    for tree in (apart, merged):  # either way, each sequence is found again along its nodes
        rows = [tree.tokens[nodes].tolist() for nodes in tree.node]
        assert rows == [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]]


# ---- use -------------------------------------------------------------------------------------------------------------


def test_to_moves_every_tensor_and_keeps_every_number(device):
    tree = PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    moved = tree.to(device)
    for name in ("tokens", "end", "node", "lengths", "position_ids", "parent", "segments"):
        assert getattr(moved, name).device.type == device
        assert torch.equal(getattr(moved, name).cpu(), getattr(tree, name))
    assert (moved.num_tokens, moved.max_length, moved.max_token) == (4, 3, 4)
    on_meta = PrefixTree.from_lengths([2], [[3]]).to("meta")
    assert on_meta.tokens is None and on_meta.end.is_meta


def test_a_tree_stands_where_its_tokens_were(device):
    tokens = torch.tensor([1, 2, 3], device=device)
    for tree in (PrefixTree.from_sequences([tokens]), PrefixTree.from_groups([tokens], [[tokens]])):
        assert tree.tokens.device.type == tree.end.device.type == tree.position_ids.device.type == device


def test_sequences_of_two_million_tokens_are_found_in_under_150_ms():
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


def test_prompts_and_completions_on_two_devices_are_refused(cuda):
    with pytest.raises(ValueError, match="prompts are on cpu and completions on cuda:0; move them to one device"):
        PrefixTree.from_groups([[1]], [[torch.tensor([2], device=cuda)]])


def test_a_tree_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        PrefixTree.from_sequences([[1]]).num_tokens = 3
