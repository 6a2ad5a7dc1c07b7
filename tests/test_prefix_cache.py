"""A cached prompt: attention of what follows it, sums of gradients, and what is refused.

Whole models with cached prompts are in test_packed_logprobs.py and test_matrix.py.
"""

from __future__ import annotations

import copy
import pickle
import random

import hf_models as hf
import pytest
import torch
from baseline import baseline_attention, relative_error, tiny_model
from cases import tokens
from oracles import assert_tables
from torch import Tensor

from flexpg.backends.dispatch import attention
from flexpg.integrations import encode_prefix, integration_for
from flexpg.masks import TreeBlockMask, block_mask
from flexpg.prefix_cache import PrefixBlockMask, PrefixCache
from flexpg.tree import PrefixTree

PROMPT, COMPLETIONS = tokens(20, 1), [tokens(6, 2), tokens(9, 3)]


def tree_of(prompt: list[int], completions: list[list[int]]) -> PrefixTree:
    return PrefixTree.from_sequences([prompt + completion for completion in completions])


def cache_without_model(prompt: list[int]) -> PrefixCache:
    return PrefixCache(prompt, lambda tree, prefix: torch.zeros(1, tree.padded_length, 1))


def random_mask(seed: int) -> TreeBlockMask:
    """Return the mask of a micro-batch whose prompt is cached."""
    rng = random.Random(seed)
    prompt = [rng.randrange(9) for _ in range(rng.choice([1, 100, 127, 128, 129, 256, 300]))]
    start = [rng.randrange(9) for _ in range(rng.choice([0, 0, 3]))]  # of all completions
    completions = [start + [rng.randrange(9) for _ in range(rng.randint(1, 200))] for _ in range(rng.randint(1, 4))]
    return cache_without_model(prompt).mask_for(tree_of(prompt, completions))


# Masks and attention


@pytest.mark.parametrize(("backend", "chunk"), [("split", None), ("dense", None), ("dense", 100)])
def test_attention_sinks_and_chunks_after_cached_prompt_match_baseline(backend, chunk):
    for seed in range(6):
        mask = random_mask(seed).for_chunk(chunk)
        tree, first = mask.tree, mask.first_query
        torch.manual_seed(seed)
        shapes = [(1, heads, tree.padded_length, 16) for heads in (4, 2, 2)]
        q, k, v, sinks = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (*shapes, (4,)))
        out = attention(q[:, :, first:], k, v, mask, sinks=sinks, backend=backend)[:, :, : tree.num_tokens - first]
        expected = baseline_attention(q, k, v, tree.node, sinks=sinks, chunk=chunk)[:, :, first : tree.num_tokens]
        assert relative_error(out, expected) < 1e-14
        weight = torch.randn_like(expected)
        grads, truth = (torch.autograd.grad((x * weight).sum(), (q, k, v, sinks)) for x in (out, expected))
        assert max(map(relative_error, grads, truth)) < 1e-13


@pytest.mark.parametrize("backend", ["split", "dense", pytest.param("flex", marks=pytest.mark.slow)])
def test_attention_after_cached_prompt_matches_baseline(backend):
    for seed in range(2 if backend == "flex" else 12):
        mask = random_mask(seed)
        tree, first = mask.tree, mask.first_query
        assert_tables(mask)
        torch.manual_seed(seed)
        needs_grad = backend != "flex"  # which has no backward on CPU
        dtype = torch.float64 if needs_grad else torch.float32
        q, k, v = (torch.randn(1, heads, tree.padded_length, 16, dtype=dtype) for heads in (4, 2, 2))
        q, k, v = (x.requires_grad_(needs_grad) for x in (q, k, v))
        out = attention(q[:, :, first:], k, v, mask, backend=backend)[:, :, : tree.num_tokens - first]
        expected = baseline_attention(q, k, v, tree.node)[:, :, first : tree.num_tokens]
        assert relative_error(out, expected) < (1e-14 if needs_grad else 1e-6)
        if needs_grad:
            weight = torch.randn_like(expected)
            grads, truth = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
            assert max(map(relative_error, grads, truth)) < 1e-13


def out_and_grads(inputs: list[Tensor], mask: TreeBlockMask, used: slice) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attention(q[:, :, mask.first_query :], k, v, mask)[:, :, used]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weight.to(out)).sum(), (q, k, v))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_after_cached_prompt_is_within_error_budget(device, dtype):
    for seed in range(6):
        tree, first = random_mask(seed).tree.to(device), random_mask(seed).first_query
        torch.manual_seed(seed)
        low = [torch.randn(1, heads, tree.padded_length, 64, device=device).to(dtype) for heads in (4, 2, 2)]
        used, queries = slice(first, tree.num_tokens), slice(0, tree.num_tokens - first)
        expected = out_and_grads([x.double() for x in low], block_mask(tree), used)
        whole = out_and_grads(low, block_mask(tree), used)
        found = out_and_grads(low, block_mask(tree, first_query=first), queries)
        for value, other, truth in zip(found, whole, expected, strict=True):
            assert relative_error(value, truth) < 1.5 * relative_error(other, truth) + 1e-7


def test_attention_after_cached_prompt_with_other_lengths_raises():
    tree = PrefixTree.from_lengths([300], [[20, 30]])
    q = torch.randn(1, 1, 384, 8)
    with pytest.raises(ValueError, match=r"q and k must have 128 and 384 tokens, .* got 384 and 384"):
        attention(q, q, q, block_mask(tree, first_query=256))


def test_cached_mask_for_another_window_chunk_or_device_keeps_its_cache():
    prefix = cache_without_model(PROMPT)
    mask = prefix.mask_for(tree_of(PROMPT, COMPLETIONS))
    for other in (mask.for_window(5), mask.for_chunk(5), mask.to("meta")):
        assert isinstance(other, PrefixBlockMask) and other.cache is prefix and other.first_query == mask.first_query


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy, copy.copy])
def test_pickle_or_copy_of_cached_mask_raises(duplicate):
    mask = cache_without_model(PROMPT).mask_for(tree_of(PROMPT, COMPLETIONS))
    with pytest.raises(TypeError, match=r"PrefixBlockMask cannot be pickled or copied: .*; pickle mask\.tree"):
        duplicate(mask)


# Gradients


def test_cache_bfloat16_sums_gradients_in_float32():
    output = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    prefix = PrefixCache([1], lambda tree, prefix: (output * 1).expand(1, tree.padded_length, 1))
    with prefix:
        for _ in range(1000):
            prefix.prepend_hidden(torch.zeros(1, 0, 1)).sum().backward()
    assert output.grad == 1000  # in bfloat16 the sum would stop at 256


def test_cache_gradient_after_its_backward_raises():
    model = tiny_model("llama3_2")
    integration, tree = integration_for(model), tree_of(PROMPT, COMPLETIONS)
    with encode_prefix(model, PROMPT) as prefix:
        late = integration.forward(model, tree, prefix=prefix).sum()
        integration.forward(model, tree, prefix=prefix).sum().backward()
    with pytest.raises(ValueError, match="a gradient arrived after the prompt's backward"):
        late.backward()
    with pytest.raises(ValueError, match="the prefix cache is closed"):
        integration.forward(model, tree, prefix=prefix)


def test_cache_block_that_raises_runs_no_backward_and_is_closed():
    model = tiny_model("llama3_2")
    with pytest.raises(RuntimeError, match="mine"), encode_prefix(model, PROMPT) as prefix:
        hidden = integration_for(model).forward(model, tree_of(PROMPT, COMPLETIONS), prefix=prefix)
        torch.autograd.grad(hidden.sum(), model.norm.scale)  # would leave no gradient in a parameter
        raise RuntimeError("mine")
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="the prefix cache is closed"):
        prefix.mask_for(tree_of(PROMPT, COMPLETIONS))


# Errors


def test_cache_sequences_that_do_not_continue_the_prompt_raise():
    other_token = [*PROMPT[:-1], (PROMPT[-1] + 1) % 50]
    trees = [tree_of(PROMPT[1:], COMPLETIONS), tree_of(PROMPT, [COMPLETIONS[0], []])]
    trees.append(PrefixTree.from_sequences([[*PROMPT, 1], [*other_token, 4]]))
    prefix = cache_without_model(PROMPT)
    for tree in trees:
        with pytest.raises(ValueError, match="every sequence must continue the prompt of 20 tokens"):
            prefix.mask_for(tree)


def test_cache_with_gradients_and_micro_batches_without_raise():
    model = tiny_model("llama3_2")
    prefix = encode_prefix(model, PROMPT)
    with torch.no_grad(), pytest.raises(ValueError, match="must all run with gradients or all without"):
        integration_for(model).forward(model, tree_of(PROMPT, COMPLETIONS), prefix=prefix)


def test_cache_reentrant_checkpointing_raises():
    model, _ = hf.model_pair("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="activation checkpointing with use_reentrant=False"):
        encode_prefix(model, PROMPT)


def test_cache_longrope_prompt_shorter_than_the_original_length_raises():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 30}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model, _ = hf.model_pair("phi3", original_max_position_embeddings=30, rope_parameters=rope)
    integration, tree = integration_for(model), tree_of(PROMPT, [tokens(30, 2), tokens(40, 3)])
    integration.forward(model, tree)  # both sequences are long
    with pytest.raises(ValueError, match="RoPE scaling 'longrope' depends on the longest sequence"):
        integration.forward(model, tree, prefix=encode_prefix(model, PROMPT))
