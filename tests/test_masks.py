"""The mask is reachability in the tree, and its block tables are those that torch finds by evaluating the mask."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from baseline import Operators, random_sequences
from cases import image_tree
from oracles import KV_TABLES, TABLES, assert_tables, chunked, listed, reachable, windowed, with_blocks
from torch import Tensor

from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask, block_mask, dense_mask, group_block_mask, tree_mask_mod
from flexpg.tree import PrefixTree

BLOCK_EDGES = {
    "one token": [[7]],
    "one block": [list(range(128))],
    "two full blocks": [list(range(256))],
    "one token more": [list(range(257))],
    "a prompt of one block": [[*range(128), *([t] * 128)] for t in (1, 2, 3)],
    "a prompt of three blocks less a token": [[*range(383), *([t] * 129)] for t in (1, 2)],
    "many roots": [[t] * 50 for t in range(12)],
}


def forest(seed: int, longest_run: int | None = None) -> PrefixTree:
    rng = random.Random(seed)
    longest_run = longest_run or rng.choice([3, 40, 300])
    return PrefixTree.from_sequences(random_sequences(rng, rng.randint(2, 9), longest_run, alphabet=2))


# The mask


@pytest.mark.parametrize("seed", range(20))
def test_mask_shows_each_token_its_ancestors_and_itself(seed):
    tree = forest(seed)
    expected = reachable(tree)
    index = torch.arange(tree.padded_length)
    assert torch.equal(dense_mask(tree.end), expected)
    assert torch.equal(tree_mask_mod(tree.end)(None, None, index[:, None], index), expected)
    assert torch.equal(block_mask(tree).mask_mod(None, None, index[:, None], index), expected)


def test_dense_mask_hides_siblings_and_other_groups():
    tree = PrefixTree.from_lengths([2, 1], [[2, 1], [1]])
    assert dense_mask(tree.end)[:8, :8].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],  # its first completion
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # its second completion
        [0, 0, 0, 0, 0, 1, 0, 0],  # another prompt
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],  # padding
    ]


# Block tables


@pytest.mark.parametrize("seed", range(60))
def test_block_tables_equal_create_block_mask(seed):
    assert_tables(block_mask(forest(seed)))


@pytest.mark.parametrize("name", BLOCK_EDGES)
def test_block_tables_at_block_edges_equal_create_block_mask(name, device):
    mask = block_mask(PrefixTree.from_sequences(BLOCK_EDGES[name]).to(device))
    assert_tables(mask)
    assert mask.kv_indices.shape[-1] >= 2


@pytest.mark.parametrize("first_query", [128, 256, 512])
def test_block_tables_with_first_query_equal_create_block_mask(first_query):
    for seed in range(20):
        tree = forest(seed, longest_run=400)
        if first_query >= tree.padded_length:
            continue
        mask = block_mask(tree, first_query=first_query)
        queries, keys = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])
        assert torch.equal(mask.mask_mod(None, None, queries, keys), reachable(tree)[first_query:])
        assert_tables(mask)


LIMITS = [{"window": window} for window in (1, 2, 100, 127, 128, 129, 300, 5000)]
LIMITS += [{"chunk": chunk} for chunk in (1, 2, 100, 127, 128, 129, 300, 5000)]
LIMITS += [{"window": 150, "chunk": 200}, {"window": 10, "chunk": 7}]


def visible(tree: PrefixTree, window: int = 10**9, chunk: int = 10**9) -> Tensor:
    return windowed(tree, window) & chunked(tree, chunk)


@pytest.mark.parametrize("first_query", [0, 128, 256])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_block_tables_sliding_window_and_chunks_equal_create_block_mask(limits, first_query):
    for seed in (0, 1, 3):  # forests large enough for full blocks
        tree = forest(seed, longest_run=400)
        if first_query < tree.padded_length:
            mask = block_mask(tree, **limits, first_query=first_query)
            queries, keys = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])
            expected = visible(tree, **limits)[first_query:]
            assert torch.equal(mask.mask_mod(None, None, queries, keys), expected)
            assert_tables(mask)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", BLOCK_EDGES)
def test_block_tables_with_limits_at_block_edges_equal_create_block_mask(name, limits, device):
    assert_tables(block_mask(PrefixTree.from_sequences(BLOCK_EDGES[name]).to(device), **limits))


@pytest.mark.parametrize("limits", [{"window": 100}, {"window": 300}, {"chunk": 100}, {"chunk": 300}], ids=str)
def test_block_tables_with_limits_list_full_blocks(limits):
    table = listed(block_mask(PrefixTree.from_sequences([range(1024)]), **limits), *KV_TABLES[1])
    assert table.any() == (300 in limits.values())


def test_block_tables_smaller_window_lists_fewer_blocks():
    tree = PrefixTree.from_lengths([1280], [[256, 256]])
    blocks = [sum(listed(block_mask(tree, window), *names).sum() for names in KV_TABLES) for window in (None, 400, 100)]
    assert blocks[0] > blocks[1] > blocks[2]


# Image blocks

IMAGES = {
    "one short image": [(9, 20, 30)],
    "a whole block": [(128, 128, 30)],
    "from one block into the next": [(100, 60, 9)],
    "three blocks": [(50, 400, 20)],
    "a token less than a block": [(128, 127, 200)],
    "two images": [(100, 200, 60, 150, 7)],
    "two prompts and text": [(100, 200, 60), (100, 300, 60), (40,)],
    "an image of one token": [(100, 1, 60)],
}


@pytest.mark.parametrize("limits", [{}, {"window": 1}, {"window": 100}, {"window": 128}, {"chunk": 100}], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_block_tables_with_bidirectional_images_equal_create_block_mask(name, limits, device):
    tree = image_tree(*IMAGES[name]).to(device)
    mask = block_mask(tree, **limits, bidirectional=True)
    index = torch.arange(tree.padded_length, device=device)
    positions = tree.position_ids.cpu()
    expected = with_blocks(tree.to("cpu"))
    if "window" in limits:
        expected &= positions[:, None] - positions < limits["window"]
    if "chunk" in limits:
        expected &= positions[:, None] // limits["chunk"] * limits["chunk"] <= positions
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index).cpu(), expected)
    assert_tables(mask)


def test_block_tables_of_image_after_first_query_equal_create_block_mask():
    mask = block_mask(image_tree((300, 200, 60)), first_query=256, bidirectional=True)
    assert_tables(mask)


def test_images_are_causal_unless_asked_for():
    tree = image_tree(*IMAGES["two prompts and text"])
    index = torch.arange(tree.padded_length)
    mask = block_mask(tree)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index), reachable(tree))
    assert mask.for_images(True) is mask.for_images(True) and mask.for_images(True).for_images(False).window is None
    assert torch.equal(dense_mask(tree.end, tree.block_end), with_blocks(tree))
    for name in (name for pair in TABLES for name in pair):
        twin = pickled(mask.for_images(True))
        assert torch.equal(getattr(twin, name), getattr(mask.for_images(True), name)), name
    assert "bidirectional=True" in repr(mask.for_images(True))


def test_tree_without_images_is_the_same_with_bidirectional_images():
    mask = block_mask(forest(3), bidirectional=True)
    for name in (name for pair in TABLES for name in pair):
        assert torch.equal(getattr(mask, name), getattr(block_mask(forest(3)), name)), name


def test_chunk_is_counted_in_positions():
    tree = PrefixTree.from_lengths([40], [[30, 30]])
    mask = block_mask(tree, chunk=35)
    # The first token of the second completion is at position 40, in the chunk of positions 35 to 69.
    assert mask.mask_mod(None, None, torch.tensor(70), torch.tensor([34, 35, 39])).tolist() == [False, True, True]


def test_window_is_counted_in_positions():
    tree = PrefixTree.from_lengths([40], [[30, 30]])
    mask = block_mask(tree, 20)
    # The first token of the second completion sees the prompt's last, which is 31 packed tokens away.
    assert mask.mask_mod(None, None, torch.tensor(70), torch.tensor(39)) and tree.position_ids[70] == 40


def test_block_mask_work_is_constant_in_calls_and_quadratic_in_blocks():
    counted = []
    for blocks in (64, 128):
        tree = PrefixTree.from_lengths([blocks * 64], [[blocks * 8] * 8])
        with Operators() as operators:
            block_mask(tree)
        counted.append(operators)
    assert counted[0].calls == counted[1].calls
    assert counted[1].largest <= 128**2 and counted[1].bytes < 200 * 128**2  # per pair of blocks


# Use


@pytest.mark.filterwarnings("error")
def test_group_block_mask_accepts_tensors_and_arrays():
    expected = group_block_mask([10, 20], [[3, 4], [5, 6]])
    for convert in (torch.tensor, np.array):
        found = group_block_mask(convert([10, 20]), convert([[3, 4], [5, 6]]))
        assert torch.equal(found.tree.end, expected.tree.end)


def test_group_block_mask_equals_mask_of_the_tree(device):
    mask = group_block_mask([200, 7], [[60, 128, 1], [300]], device=device)
    tree = PrefixTree.from_lengths([200, 7], [[60, 128, 1], [300]])
    assert mask.kv_indices.device.type == device and mask.window is None
    assert torch.equal(mask.tree.end.cpu(), tree.end)
    assert_tables(mask)


def test_mask_to_device_moves_tables_and_keeps_window(device):
    mask = block_mask(forest(3), 50)
    moved = mask.to(device)
    assert isinstance(moved, TreeBlockMask) and moved.window == 50
    assert moved.kv_indices.device.type == moved.tree.end.device.type == device
    for names in TABLES:
        assert torch.equal(listed(moved.to("cpu"), *names), listed(mask, *names))


def test_mask_to_meta_keeps_window_chunk_and_first_query():
    moved = block_mask(forest(3), 50, first_query=128, chunk=90).to("meta")
    assert moved.tree.end.is_meta and (moved.window, moved.first_query, moved.chunk) == (50, 128, 90)


def test_for_window_caches_one_mask_per_window():
    mask = block_mask(forest(3))
    assert mask.for_window(9) is mask.for_window(9)
    assert mask.for_window(9).window == 9 and mask.for_window(8).window == 8
    assert mask.for_window(9).tree is mask.tree and mask.window is None


def test_for_chunk_caches_one_mask_per_chunk_and_keeps_the_window():
    mask = block_mask(forest(3), 50)
    assert mask.for_chunk(9) is mask.for_chunk(9) and mask.for_chunk(None) is mask
    assert (mask.for_chunk(9).chunk, mask.for_chunk(8).chunk, mask.chunk) == (9, 8, None)
    assert mask.for_chunk(9).window == 50
    assert (mask.for_chunk(9).for_window(5).chunk, mask.for_chunk(9).for_window(5).window) == (9, 5)


def pickled(mask: TreeBlockMask) -> TreeBlockMask:
    return pickle.loads(pickle.dumps(mask))


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy, copy.copy])
@pytest.mark.parametrize(
    ("window", "first_query", "chunk"), [(None, 0, None), (50, 0, None), (None, 128, 90), (50, 128, 90)]
)
def test_pickled_or_copied_mask_equals_the_mask(duplicate: Callable, window, first_query, chunk, device):
    mask = block_mask(forest(3), window, first_query=first_query, chunk=chunk).to(device)
    mask.for_window(9)
    twin = duplicate(mask)
    assert type(twin) is TreeBlockMask and twin is not mask
    assert (twin.window, twin.first_query, twin.chunk) == (window, first_query, chunk)
    assert twin.seq_lengths == mask.seq_lengths
    for name in (name for pair in TABLES for name in pair):
        assert torch.equal(getattr(twin, name), getattr(mask, name)), name
    for name in ("tokens", "end", "node", "lengths", "position_ids"):
        assert torch.equal(getattr(twin.tree, name), getattr(mask.tree, name)), name
    queries, keys = (torch.arange(length, device=device) for length in mask.seq_lengths)
    assert torch.equal(*(each.mask_mod(None, None, queries[:, None], keys) for each in (twin, mask)))


@pytest.mark.parametrize("window", [None, 5])
def test_mask_built_in_inference_mode_is_fit_for_training(window):
    with torch.inference_mode():
        mask = block_mask(PrefixTree.from_sequences([[1, 2, 3], [1, 2, 4]]).to("cpu"), window)
        tensors = [mask.tree.position_ids, mask.tree.parent, mask.tree.segments, mask.tree.node, mask.kv_indices]
    assert not any(tensor.is_inference() for tensor in tensors)
    inputs = [torch.randn(1, 1, 256, 8, requires_grad=True) for _ in range(3)]
    attention(*inputs, mask).square().sum().backward()
    assert all(x.grad.any() for x in inputs)


@pytest.mark.parametrize("first_query", [1, 64, -128, 512])
def test_block_mask_first_query_inside_a_block_raises(first_query):
    tree = PrefixTree.from_lengths([300], [[20, 30]])
    with pytest.raises(ValueError, match=f"first_query must be a multiple of 128 in .*, got {first_query}"):
        block_mask(tree, first_query=first_query)


def test_mask_of_a_tensor_or_a_tree_where_the_other_is_expected_raises():
    tree = PrefixTree.from_lengths([3], [[1, 2]])
    with pytest.raises(TypeError, match="tree must be a PrefixTree, got Tensor"):
        block_mask(tree.end)
    for build in (tree_mask_mod, dense_mask):
        with pytest.raises(TypeError, match=r"end must be a tensor, got PrefixTree; pass tree\.end"):
            build(tree)


def test_index_that_keeps_everything_returns_the_mask_itself():
    """Layers that share keys and values ask for such slices; a real slice is no mask of the tree any more."""
    mask = block_mask(PrefixTree.from_lengths([300], [[20, 30]]))
    assert mask[:] is mask and mask[:, :, 0:, :] is mask
    assert not isinstance(mask[:, :, 1:], TreeBlockMask)
    assert not isinstance(mask[:, :, torch.tensor([1])], TreeBlockMask)


@pytest.mark.parametrize("name", ["window", "chunk"])
def test_block_mask_window_or_chunk_below_one_raises(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least 1 \(a token sees itself\) or None, got 0"):
        block_mask(PrefixTree.from_lengths([300], [[20, 30]]), **{name: 0})


def test_repr_is_one_line():
    assert repr(block_mask(PrefixTree.from_lengths([2], [[1, 2]]), 4)) == (
        "TreeBlockMask(PrefixTree(2 sequences, 7 tokens packed into 5, device=cpu), window=4, first_query=0)"
    )
