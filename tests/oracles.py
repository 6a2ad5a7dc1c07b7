"""Slow and obvious versions of prefix trees, masks, block tables and sampling, which the tests compare with.

assert_is_trie(tree, sequences)            a trie of nested dicts
reachable(tree), windowed(tree, window),   the mask, along parents
chunked(tree, chunk), with_blocks(tree)
listed(mask, ...), assert_tables(mask)     block tables, those of create_block_mask
truncate(...), sample_one_by_one(...)      top-k and top-p, and one whole forward per sampled token
"""

from __future__ import annotations

import torch
from baseline import baseline_hidden
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flexpg.masks import TreeBlockMask
from flexpg.sampling import SamplingParams
from flexpg.tree import PrefixTree

KV_TABLES = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]
TABLES = [*KV_TABLES, ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")]


class Trie:
    """Nested dicts, walked depth-first with children by token id."""

    def __init__(self, sequences: list[list[int]]) -> None:
        root: dict[int, dict] = {}
        for tokens in sequences:
            children = root
            for token in tokens:
                children = children.setdefault(token, {})
        self.tokens, self.end, self.parent, self.depth, self.segments = [], [], [], [], []
        self.packed_index: dict[tuple[int, ...], int] = {}
        self._walk(root, path=(), parent=-1)
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
                self.segments.append([index, index + 1, None])  # start, stop, subtree end
            else:
                self.segments[-1][1] = index + 1
            self._walk(below, (*path, token), index)
            self.end[index] = len(self.tokens)


def assert_is_trie(tree: PrefixTree, sequences: list[list[int]]) -> None:
    """Check every field of a tree of these sequences."""
    trie = Trie(sequences)
    size, used, longest = tree.padded_length, len(trie.tokens), max(map(len, sequences))
    padding = list(range(used, size))
    assert (tree.num_tokens, tree.max_length, tree.max_token) == (used, longest, max(map(max, sequences)))
    assert size % 128 == 0 and size >= 256 and size - used < max(128, 257 - used)
    assert tree.input_ids.tolist() == [trie.tokens + [0] * len(padding)]
    assert tree.end.tolist() == trie.end + [index + 1 for index in padding]
    assert tree.parent.tolist() == trie.parent + [-1] * len(padding)
    assert tree.position_ids.tolist() == trie.depth + [0] * len(padding)
    assert tree.segments.tolist() == trie.segments
    assert tree.lengths.tolist() == [len(tokens) for tokens in sequences]
    for nodes, tokens in zip(tree.node.tolist(), sequences, strict=True):
        paths = [tuple(tokens[: t + 1]) for t in range(len(tokens))]
        assert nodes == [trie.packed_index[path] for path in paths] + [-1] * (longest - len(tokens))


def reachable(tree: PrefixTree) -> Tensor:
    """Return [S, S] bool: a token sees what its parent sees, and itself."""
    visible = torch.zeros(tree.padded_length, tree.padded_length, dtype=torch.bool)
    for token, parent in enumerate(tree.parent.tolist()):
        if parent != -1:
            visible[token] = visible[parent]
        visible[token, token] = True
    return visible


def windowed(tree: PrefixTree, window: int) -> Tensor:
    """Return [S, S] bool: the nearest `window` tokens on the path to the root, the token itself included."""
    position_ids = tree.position_ids
    return reachable(tree) & (position_ids[:, None] - position_ids[None, :] < window)


def chunked(tree: PrefixTree, chunk: int) -> Tensor:
    """Return [S, S] bool: the tokens on the path to the root whose positions are in the same chunk."""
    chunks = torch.tensor([position // chunk for position in tree.position_ids.tolist()])
    return reachable(tree) & (chunks[:, None] == chunks[None, :])


def with_blocks(tree: PrefixTree) -> Tensor:
    """Return [S, S] bool: the path to the root, the token itself, and all of its own image block."""
    visible = reachable(tree)
    for nodes, inputs in zip(tree.node, tree.inputs, strict=True):
        for start, stop in inputs.blocks if inputs is not None else []:
            visible[nodes[start:stop, None], nodes[start:stop]] = True
    return visible


def listed(mask: BlockMask, num_blocks: str, indices: str) -> Tensor:
    """Return [n, m] int, how often a table lists each block for each row."""
    counts, columns = getattr(mask, num_blocks)[0, 0], getattr(mask, indices)[0, 0]
    times = torch.zeros_like(columns)
    for row, count in enumerate(counts.tolist()):
        times[row].index_add_(0, columns[row, :count].long(), torch.ones(count, dtype=torch.int32))
    return times


def assert_tables(mask: TreeBlockMask) -> None:
    """Check that all eight tables equal those that create_block_mask finds by evaluating the mask."""
    device = mask.tree.end.device
    expected = create_block_mask(mask.mask_mod, None, None, *mask.shape[2:], device=device)
    assert mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in (name for pair in TABLES for name in pair):
        table, other = getattr(mask, name), getattr(expected, name)
        assert table.dtype == torch.int32 and table.is_contiguous() and table.device == other.device
        assert table.shape == other.shape and torch.equal(table, other), name


def truncate(probabilities: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Return probabilities [V] after top-k and then top-p, chosen token by token from the most likely."""
    order = probabilities.argsort(descending=True).tolist()[:top_k]
    total, chosen = sum(probabilities[token].item() for token in order), []
    for token in order:
        chosen.append(token)
        if sum(probabilities[token].item() for token in chosen) / total >= top_p:
            break
    truncated = torch.zeros_like(probabilities)
    truncated[chosen] = probabilities[chosen]
    return truncated / truncated.sum()


def sample_one_by_one(
    model: nn.Module, prompts: list[list[int]], group_size: int, params: SamplingParams, uniforms: Tensor
) -> list[list[int]]:
    """Sample every rollout on its own from random numbers [N, max_new_tokens], with one whole forward per token."""
    completions = []
    for n, numbers in enumerate(uniforms.tolist()):
        completion: list[int] = []
        for number in numbers:
            logits = model.output(baseline_hidden(model, prompts[n // group_size] + completion))[-1]
            allowed = truncate((logits / params.temperature).softmax(-1), params.top_k, params.top_p)
            completion.append(int((allowed.cumsum(0) <= number).sum()))
            if completion[-1] in params.stop_tokens:
                break
        completions.append(completion)
    return completions
