"""The mask is reachability in the tree, and its block tables are those that torch would find by looking everywhere."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from baseline import random_sequences

from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask, block_mask, dense_mask, group_block_mask, tree_mask_mod
from flexpg.prefix_cache import EncodedPrefix
from flexpg.tree import BLOCK, PrefixTree

KV_TABLES = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]
TABLES = [*KV_TABLES, ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")]
ON_THE_GRID = {
    "one token": [[7]],
    "one block": [list(range(128))],
    "two full blocks": [list(range(256))],
    "one token more": [list(range(257))],
    "a prompt of one block, completions of one": [[*range(128), *([t] * 128)] for t in (1, 2, 3)],
    "a prompt of three blocks but one token": [[*range(383), *([t] * 129)] for t in (1, 2)],
    "many roots": [[t] * 50 for t in range(12)],
}


def forest(seed: int, longest_run: int | None = None) -> PrefixTree:
    rng = random.Random(seed)
    longest_run = longest_run or rng.choice([3, 40, 300])
    return PrefixTree.from_sequences(random_sequences(rng, rng.randint(2, 9), longest_run, alphabet=2))


def reachable(tree: PrefixTree) -> Tensor:
    """[S, S] bool, along the parents: a token sees what its parent sees, and itself. The oracle."""
    visible = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for token, parent in enumerate(tree.parent.tolist()):
        if parent != -1:
            visible[token] = visible[parent]
        visible[token, token] = True
    return visible


def windowed(tree: PrefixTree, window: int) -> Tensor:
    """[S, S] bool: the nearest `window` on the way up, the token itself among them."""
    position_ids = tree.position_ids
    return reachable(tree) & (position_ids[:, None] - position_ids[None, :] < window)


def listed(mask: BlockMask, num_blocks: str, indices: str) -> Tensor:
    """[n, n] int, how often a table lists each block for each row."""
    counts, columns = getattr(mask, num_blocks)[0, 0], getattr(mask, indices)[0, 0]
    times = torch.zeros_like(columns)
    for row, count in enumerate(counts.tolist()):
        times[row].index_add_(0, columns[row, :count].long(), torch.ones(count, dtype=torch.int32))
    return times


def by_block(dense: Tensor) -> Tensor:
    """[n, n, 128 * 128] the mask's entries, block by block."""
    return dense.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)


def assert_tables_are_torchs(mask: TreeBlockMask, mask_mod, device="cpu") -> None:
    size = len(mask.tree)
    expected = create_block_mask(mask_mod, None, None, size, size, device=device)
    assert mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in (name for pair in TABLES for name in pair):
        table, other = getattr(mask, name), getattr(expected, name)
        assert table.dtype == torch.int32 and table.is_contiguous() and table.device == other.device
        assert table.shape == other.shape and torch.equal(table, other), name


# ---- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_token_sees_itself_and_its_ancestors_and_nothing_else(seed):
    tree = forest(seed)
    expected = reachable(tree)
    assert torch.equal(dense_mask(tree.end), expected)
    index = torch.arange(len(tree))
    assert torch.equal(tree_mask_mod(tree.end)(None, None, index[:, None], index), expected)
    assert torch.equal(block_mask(tree).mask_mod(None, None, index[:, None], index), expected)
    assert expected.any(1).all()  # no row is empty, so no softmax is NaN


def test_no_token_sees_a_sibling_or_another_group():
    tree = PrefixTree.from_lengths([2, 1], [[2, 1], [1]])
    assert dense_mask(tree.end)[:8, :8].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],  # its first completion
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # its second
        [0, 0, 0, 0, 0, 1, 0, 0],  # another prompt
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],  # a pad
    ]


# ---- its tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_all_eight_tables_are_create_block_masks(seed):
    mask = block_mask(forest(seed))
    assert_tables_are_torchs(mask, tree_mask_mod(mask.tree.end))


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_all_eight_tables_are_create_block_masks_at_the_edges_of_blocks(name, device):
    mask = block_mask(PrefixTree.from_sequences(ON_THE_GRID[name]).to(device))
    assert_tables_are_torchs(mask, tree_mask_mod(mask.tree.end), device)
    assert mask.kv_indices.shape[-1] >= 2


def test_an_end_off_by_one_changes_mask_and_tables():
    tree = PrefixTree.from_lengths([128], [[128, 128]])
    end = tree.end.clone()
    end[:128] -= 1
    wrong = block_mask(replace(tree, end=end))
    assert not torch.equal(dense_mask(end), reachable(tree))
    with pytest.raises(AssertionError):
        assert_tables_are_torchs(wrong, tree_mask_mod(tree.end))


@pytest.mark.parametrize("window", [1, 2, 100, 127, 128, 129, 300, 5000])
@pytest.mark.parametrize("seed", [0, 1, 3])  # forests large enough for full blocks
def test_windowed_tables_miss_no_visible_pair_and_call_no_partial_block_full(seed, window):
    tree = forest(seed, longest_run=400)
    mask, expected = block_mask(tree, window), windowed(tree, window)
    index = torch.arange(len(tree))
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index), expected)
    partial, full = (listed(mask, *names) for names in KV_TABLES)
    assert (partial + full).max() == 1  # no block twice, in one list or in both
    assert (partial + full).bool()[by_block(expected).any(-1)].all()
    assert by_block(expected).all(-1)[full.bool()].all()
    assert full.any() == (window >= 300)
    for (num_blocks, indices), table in zip(TABLES[2:], (partial, full), strict=True):
        assert torch.equal(listed(mask, num_blocks, indices).T, table)


def test_a_window_shortens_the_tables():
    tree = PrefixTree.from_lengths([1280], [[256, 256]])
    blocks = [sum(listed(block_mask(tree, window), *names).sum() for names in KV_TABLES) for window in (None, 400, 100)]
    assert blocks[0] > blocks[1] > blocks[2]


def test_a_window_is_measured_in_positions_and_not_in_the_row():
    tree = PrefixTree.from_lengths([40], [[30, 30]])
    index = torch.arange(len(tree))
    expected = windowed(tree, 20)
    in_the_row = reachable(tree) & (index[:, None] - index < 20)
    assert not torch.equal(in_the_row, expected)
    assert torch.equal(block_mask(tree, 20).mask_mod(None, None, index[:, None], index), expected)
    assert expected[70, 39] and not in_the_row[70, 39]  # the second completion's first token sees the prompt's last


# ---- use -------------------------------------------------------------------------------------------------------------


def test_group_lengths_give_the_mask_of_their_tree(device):
    mask = group_block_mask([200, 7], [[60, 128, 1], [300]], device=device)
    tree = PrefixTree.from_lengths([200, 7], [[60, 128, 1], [300]])
    assert mask.kv_indices.device.type == device and mask.window is None
    assert torch.equal(mask.tree.end.cpu(), tree.end)
    assert_tables_are_torchs(mask, tree_mask_mod(mask.tree.end), device)


def test_a_mask_moves_with_its_tree_and_its_window(device):
    mask = block_mask(forest(3), 50)
    moved = mask.to(device)
    assert isinstance(moved, TreeBlockMask) and moved.window == 50
    assert moved.kv_indices.device.type == moved.tree.end.device.type == device
    for names in TABLES:
        assert torch.equal(listed(moved.to("cpu"), *names), listed(mask, *names))


def test_a_mask_on_another_device_keeps_its_window_its_first_query_and_its_prefix():
    prefix = EncodedPrefix([1, 2])
    assert prefix.mask.to("meta").prefix is prefix
    moved = block_mask(forest(3), 50, first_query=128).to("meta")
    assert moved.tree.end.is_meta and (moved.window, moved.first_query) == (50, 128)


def test_another_window_is_made_once():
    mask = block_mask(forest(3))
    assert mask.for_window(9) is mask.for_window(9)
    assert mask.for_window(9).window == 9 and mask.for_window(8).window == 8
    assert mask.for_window(9).tree is mask.tree and mask.window is None


@pytest.mark.parametrize("window", [None, 5])
def test_a_mask_made_in_inference_mode_is_fit_for_training(window):
    with torch.inference_mode():
        mask = block_mask(PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]]).to("cpu"), window)
        made = [mask.tree.position_ids, mask.tree.parent, mask.tree.segments, mask.tree.node, mask.kv_indices]
    assert not any(tensor.is_inference() for tensor in made)
    inputs = [torch.randn(1, 1, 256, 8, requires_grad=True) for _ in range(3)]
    attention(*inputs, mask).square().sum().backward()
    assert all(x.grad.any() for x in inputs)
