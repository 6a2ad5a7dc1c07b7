"""Random cases of every claim, each compared with a slow oracle; `fuzz.py` draws them and says how to run more."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import get_args

import fuzz
import pytest
import torch
import torch.nn.functional as F
from baseline import VOCAB, baseline_attention, baseline_logprobs, in_float64, tiny_model
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from oracles import assert_is_trie, assert_tables, chunked, reachable, sample_one_by_one, windowed
from torch import Tensor, nn

import flexpg
from flexpg import PrefixTree, Rollouts, SamplingParams, attention, block_mask, dense_mask, grpo_loss, pack
from flexpg.advantages import ScaleRewards
from flexpg.analysis.rollout_files import read_rollouts
from flexpg.analysis.work import encoded_work
from flexpg.context_parallel import token_ranges
from flexpg.conversations import conversation_rollouts
from flexpg.integrations.transformers.recurrent import _run
from flexpg.integrations.transformers.segment_plan import plan_range, plan_segments
from flexpg.loss_terms import ImportanceSamplingMode
from flexpg.losses import ImportanceSamplingLevel, LossType
from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.prefix_cache import _with_padded_prefix
from flexpg.sampling import _uniforms
from flexpg.training.config import load_config
from flexpg.tree import BLOCK, padded_length

TINY = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[1] / "recipes/configs/tiny_cpu.yaml"))


def assert_close(value: Tensor, expected: Tensor, error: float = 1e-12) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= error * max(1.0, expected.abs().max().item())


def num_nodes(sequences: list[Tensor]) -> int:
    """Return the size of the trie of the sequences."""
    return len({tuple(row[: t + 1]) for row in map(Tensor.tolist, sequences) for t in range(len(row))})


def test_fuzz_weights_sum_to_the_suites_cases():
    assert sum(fuzz.WEIGHTS.values()) == fuzz.SUITE_CASES


# Trees, masks and attention.


@given(sequences=fuzz.forests(alphabets=(*fuzz.SMALL_IDS, *fuzz.LARGE_IDS)), order=st.randoms(use_true_random=False))
@fuzz.cases("sequences")
def test_fuzz_from_sequences_matches_trie_in_any_order(sequences, order):
    tree = PrefixTree.from_sequences(sequences)
    assert_is_trie(tree, sequences)
    shuffled = order.sample(range(len(sequences)), len(sequences))
    other = PrefixTree.from_sequences([sequences[n] for n in shuffled])
    assert torch.equal(other.tokens, tree.tokens) and torch.equal(other.end, tree.end)
    assert torch.equal(other.node, tree.node[shuffled])


@given(fuzz.groups())
@fuzz.cases("groups")
def test_fuzz_from_groups_keeps_order_and_merges_nothing(drawn):
    prompts, completions = drawn
    tree = PrefixTree.from_groups(prompts, completions)
    packed, at_prompts, at_completions = [], [], []  # all tokens, and the packed indices of each segment
    for prompt, group in zip(prompts, completions, strict=True):
        for tokens, found in [(prompt, at_prompts), *((at, at_completions) for at in group)]:
            found.append(list(range(len(packed), len(packed) + len(tokens))))
            packed += tokens
    assert tree.tokens[: tree.num_tokens].tolist() == packed
    # If every token were another one, larger than those before it, a trie would merge nothing and keep the order.
    prompt_of = [prompt for prompt, group in zip(at_prompts, completions, strict=True) for _ in group]
    sequences = [prompt + completion for prompt, completion in zip(prompt_of, at_completions, strict=True)]
    it = iter(at_completions)
    assert_is_trie(PrefixTree.from_groups(at_prompts, [[next(it) for _ in group] for group in completions]), sequences)
    bare = PrefixTree.from_lengths(list(map(len, prompts)), [list(map(len, group)) for group in completions])
    for name in ("end", "node", "lengths", "position_ids", "parent", "segments"):
        assert torch.equal(getattr(bare, name), getattr(tree, name))


@given(sequences=fuzz.long_forests(), data=st.data())
@fuzz.cases("mask")
def test_fuzz_block_mask_shows_only_ancestors(sequences, data):
    tree = PrefixTree.from_sequences(sequences)
    size, visible, index = tree.padded_length, reachable(tree), torch.arange(tree.padded_length)
    assert torch.equal(dense_mask(tree.end), visible)
    first = data.draw(st.sampled_from(range(0, size, BLOCK)), label="first query")
    mask = block_mask(tree, first_query=first)
    assert torch.equal(mask.mask_mod(None, None, index[: size - first, None], index), visible[first:])
    assert_tables(mask)
    sizes = st.sampled_from([1, 2, 127, 128, 129, 255, 256, 999])
    limits = data.draw(st.fixed_dictionaries({}, optional={"window": sizes, "chunk": sizes}), label="limits")
    mask = block_mask(tree, **limits, first_query=first)
    visible &= windowed(tree, limits.get("window", size)) & chunked(tree, limits.get("chunk", size))
    assert torch.equal(mask.mask_mod(None, None, index[: size - first, None], index), visible[first:])
    assert_tables(mask)


@given(
    sequences=fuzz.forests(lengths=st.integers(1, 40), max_runs=3, max_count=5),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]),
    width=st.sampled_from([1, 2, 5, 8, 16]),
    options=st.sampled_from([{"backend": "split"}, {"backend": "dense"}])
    | st.fixed_dictionaries({}, optional={"window": st.integers(1, 60), "softcap": st.sampled_from([0.7, 2.0])}),
    is_padded=st.booleans(),
    data=st.data(),
)
@fuzz.cases("attention")
def test_fuzz_attention_output_and_gradients_match_baseline(sequences, heads, width, options, is_padded, data):
    tree = PrefixTree.from_sequences(sequences)
    length = tree.padded_length if is_padded else tree.num_tokens
    first = data.draw(st.sampled_from(range(0, tree.num_tokens, BLOCK)), label="first query")
    seed, weights = data.draw(fuzz.SEEDS, label="seed"), torch.zeros(1, heads[0], length, width, dtype=torch.float64)
    weights[:, :, first : tree.num_tokens] = fuzz.normal(seed, 1, heads[0], tree.num_tokens - first, width)
    q, k, v = (
        fuzz.normal(seed + 1 + n, 1, h, length, width).requires_grad_()
        for n, h in enumerate((heads[0], *heads[1:] * 2))
    )
    out = attention(q[:, :, first:], k, v, block_mask(tree, first_query=first), **options)
    expected = baseline_attention(q, k, v, tree.node, options.get("window"), options.get("softcap"))
    assert_close(out[:, :, : tree.num_tokens - first], expected[:, :, first : tree.num_tokens])
    grads = torch.autograd.grad((out * weights[:, :, first:]).sum(), (q, k, v))
    for grad, other in zip(grads, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert_close(grad, other)


# Recurrent layers.


def halving_sum(hidden: Tensor, previous: dict | None) -> tuple[Tensor, dict]:
    """A recurrent layer: each output is half of the one before plus the token's hidden state."""
    assert previous is None or hidden.shape[1] > 1  # with one token, layers write into the state
    state, outputs = torch.zeros_like(hidden[:, 0]) if previous is None else previous["recurrent", 0], []
    for token in hidden.unbind(1):
        state = state / 2 + token
        outputs.append(state)
    return torch.stack(outputs, 1), {("recurrent", 0): state}


def halving_sums(tree: PrefixTree, hidden: Tensor) -> Tensor:
    """Return the layer's outputs token by token, from each token's parent."""
    outputs = torch.zeros_like(hidden)
    for index, parent in enumerate(tree.parent[: tree.num_tokens].tolist()):
        outputs[0, index] = hidden[0, index] + (outputs[0, parent] / 2 if parent >= 0 else 0)
    return outputs


def over_ranges(tree: PrefixTree, hidden: Tensor, borders: list[int], cached: dict) -> Tensor | None:
    """Return the layer's outputs from ranges that hand on states; None if a state of one token would be handed on."""
    ranged = [plan_range(tree, borders, number) for number in range(len(borders) - 1)]
    if None in ranged:
        assert set(ranged) == {None}
        return None
    outputs, handed_on = [], {}
    for ranged_plan, (start, stop) in zip(ranged, pairwise(borders), strict=True):
        assert ranged_plan.received == list(handed_on)
        kept = cached | handed_on
        outputs.append(_run(ranged_plan.plan, halving_sum, hidden[:, start:stop], kept))
        handed_on = {segment: kept[segment] for segment in ranged_plan.sent}
    return torch.cat(outputs, 1)


@given(fuzz.long_forests(), st.sampled_from([1, 127, 256, 384]), st.booleans(), fuzz.SEEDS, st.data())
@fuzz.cases("recurrent")
def test_fuzz_recurrent_layer_over_segments_and_ranges_matches_a_loop(sequences, prompt_len, is_cached, seed, data):
    first, cached = 0, {}
    if is_cached:
        tree = PrefixTree.from_sequences([[2] * prompt_len + sequence for sequence in sequences])
        first = padded_length(prompt_len)
        tree = _with_padded_prefix(tree, prompt_len, first)
    else:
        tree = PrefixTree.from_sequences(sequences)
    hidden = fuzz.normal(seed, 1, tree.padded_length, 2)
    expected = halving_sums(tree, hidden)
    if is_cached:
        cached = {0: ({("recurrent", 0): expected[:, prompt_len - 1]}, 0)}
    plan = plan_segments(block_mask(tree, first_query=first), tree.padded_length - first)
    whole = _run(plan, halving_sum, hidden[:, first:], dict(cached))
    count = tree.num_tokens - first
    assert_close(whole[:, :count], expected[:, first:][:, :count])
    size = data.draw(st.integers(1, (tree.padded_length - first) // BLOCK), label="ranges")
    ranges = over_ranges(tree, hidden, token_ranges(tree, size, first), cached)
    assert ranges is None or torch.equal(ranges[:, :count], whole[:, :count])


# Packing.


def size_of(drawn: Rollouts, indices: list[int], sharing: bool) -> int:
    """Return the tokens of a packed sequence."""
    sequences = [drawn.sequences[n] for n in indices]
    return num_nodes(sequences) if sharing else sum(map(len, sequences))


def assert_is_packed(batches: list[MicroBatch], drawn: Rollouts, chosen: list[int], budget: int, sharing: bool) -> None:
    """Check that every rollout is there once and unchanged, within the budget, with groups whole where they fit."""
    busy = [batch for batch in batches if not batch.is_idle]
    assert sorted(n for batch in busy for n in batch.indices.tolist()) == sorted(chosen)
    for batch in batches:
        sequences, indices = batch.rollouts.sequences, batch.indices.tolist()
        packed = [batch.tree.tokens[node[node >= 0]] for node in batch.tree.node]
        assert all(map(torch.equal, packed, sequences)) and len(packed) == len(sequences)
        if batch.is_idle:
            assert not batch.loss_mask.any() and not batch.cached_tokens
            continue
        assert size_of(drawn, indices, sharing) <= budget
        assert all(map(torch.equal, sequences, (drawn.sequences[n] for n in indices)))
        assert torch.equal(batch.loss_mask, drawn.loss_mask[indices, : batch.loss_mask.shape[1]])
    for group in range(drawn.num_groups):
        members = {n for n in chosen if drawn.group_ids[n] == group}
        if members and size_of(drawn, list(members), sharing) <= budget:
            assert any(members <= set(batch.indices.tolist()) for batch in busy)


@given(
    fuzz.rollouts(fuzz.SMALL_IDS[2:]), st.sampled_from([1, 2, 3, 5]), st.sampled_from([True, True, False]), st.data()
)
@fuzz.cases("pack")
def test_fuzz_pack_assigns_every_rollout_to_one_rank_once(drawn, world_size, sharing, data):
    everything, longest = list(range(len(drawn))), max(map(len, drawn.sequences))
    of_groups = [size_of(drawn, (drawn.group_ids == g).nonzero().flatten().tolist(), True) for g in drawn.group_ids]
    tight = st.sampled_from([longest, *(size for size in of_groups if size > longest)])
    max_tokens = data.draw(tight | st.integers(longest, longest + 12), label="max_tokens")
    chosen = data.draw(st.none() | st.lists(st.sampled_from(everything), min_size=1, unique=True), label="indices")
    options = {"world_size": world_size, "sharing": sharing, "indices": chosen}
    batches, chosen = pack(drawn, max_tokens, **options), everything if chosen is None else chosen
    assert_is_packed(batches, drawn, chosen, max_tokens, sharing)
    by_rank = [[len(series) for series in by_cache(batches) if series[0].rank == rank] for rank in range(world_size)]
    assert all(sizes == by_rank[0] for sizes in by_rank)
    if not sharing:
        return
    encoded = 0
    for series in by_cache(batches):
        cached = max(batch.cached_tokens for batch in series)
        prompts = {tuple(batch.rollouts.prompts[0].tolist()) for batch in series if batch.cached_tokens}
        assert len(prompts) == (cached > 0) and all(len(prompt) == cached for prompt in prompts)
        sizes = [num_nodes(batch.rollouts.sequences) - batch.cached_tokens for batch in series]
        assert max(sizes) + cached <= max_tokens
        encoded += sum(sizes) + cached
    idle = sum(batch.is_idle for batch in batches)
    assert encoded_work(batches).num_tokens == encoded <= size_of(drawn, chosen, sharing=False) + 2 * idle


# Losses and advantages.


def correction(gaps: dict[int, float], mode: str) -> dict[int, float]:
    """Return the weight of each token of a rollout, at most 3."""
    if mode.startswith("sequence"):
        gaps = dict.fromkeys(gaps, sum(gaps.values()))
    above = 3.0 if mode.endswith("truncate") else 0.0
    return {t: math.exp(gap) if math.exp(gap) <= 3 else above for t, gap in gaps.items()}


def vespo_weight(log_ratios: dict[int, float], weights: dict[int, float], advantage: float) -> float:
    """Return phi of a rollout."""
    lowest = math.log(1e-8)
    log_w = sum(min(max(value, -20.0), 20.0) for value in log_ratios.values())
    log_w += sum(max(math.log(value), lowest) if value else lowest for value in weights.values())
    log_w = min(max(log_w, lowest), 20.0)
    k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return math.exp(decay + k * log_w - decay * math.exp(log_w))


def loss_by_loop(batch: dict, options: dict) -> tuple[float, Tensor]:
    """Return the loss and its gradient, token by token in Python's floats."""
    mask, beta, kind = batch["loss_mask"].tolist(), options["beta"], options["loss_type"]
    policy, ref, entropies = (batch[name].tolist() for name in ("logprobs", "ref_logprobs", "entropies"))
    old = policy if batch["old_logprobs"] is None else batch["old_logprobs"].tolist()
    sampler = old if batch["sampler_logprobs"] is None else batch["sampler_logprobs"].tolist()
    low, high = 1 - options["epsilon"], 1 + options["epsilon_high"]
    counts = [sum(row) for row in mask]
    per_token = 1 / {"grpo": len(mask), "sapo": len(mask), "dr_grpo": 9 * len(mask)}.get(kind, sum(counts))
    total, gradient = 0.0, [[0.0] * len(row) for row in mask]
    for n, advantage in enumerate(batch["advantages"].tolist()):
        tokens = [t for t, counts_in_loss in enumerate(mask[n]) if counts_in_loss]
        weight = per_token / counts[n] if kind in ("grpo", "sapo") and tokens else per_token
        distances = {t: policy[n][t] - old[n][t] for t in tokens}
        corrections = correction({t: old[n][t] - sampler[n][t] for t in tokens}, options["importance_sampling_mode"])
        phi = vespo_weight(distances, corrections, advantage)
        if options["importance_sampling_level"] == "sequence" and tokens:
            distances = dict.fromkeys(tokens, sum(distances.values()) / len(tokens))
        for t in tokens:
            ratio, kl, w = math.exp(distances[t]), ref[n][t] - policy[n][t], corrections[t]
            clipped = min(max(ratio, low), high)
            term = -min(ratio * advantage, clipped * advantage)
            slope = -ratio * advantage * (ratio * advantage <= clipped * advantage)
            if kind in ("cispo", "vespo"):
                slope = -(min(ratio, options["epsilon_high"]) if kind == "cispo" else phi) * advantage
                term, w = slope * policy[n][t], w if kind == "cispo" else 1.0
            elif kind == "sapo":
                temperature = 1.0 if advantage > 0 else 1.05
                gate = 1 / (1 + math.exp(-temperature * (ratio - 1)))
                term, slope = -4 * gate / temperature * advantage, -4 * gate * (1 - gate) * ratio * advantage
            total += weight * (w * term + beta * (math.exp(kl) - kl - 1))
            total -= options["entropy_coef"] * entropies[n][t] / sum(counts)
            if options["importance_sampling_level"] == "sequence" and kind != "cispo":
                w = sum(corrections.values()) / len(tokens)  # the ratio of all tokens moves with each
            gradient[n][t] = weight * (w * slope + beta * (1 - math.exp(kl)))
    return total, torch.tensor(gradient, dtype=torch.float64)


def loss_and_gradient(batch: dict, rows: list[int], **options) -> tuple[float, Tensor]:
    """Return those of some rollouts of a batch."""
    part = {name: table if table is None else table[rows] for name, table in batch.items()}
    part |= {name: part[name].clone().requires_grad_() for name in ("logprobs", "entropies")}
    metrics: dict[str, Tensor] = {}
    loss = grpo_loss(**part, **options, max_completion_length=9, metrics=metrics)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    return loss.item(), part["logprobs"].grad


@given(
    fuzz.loss_batches(),
    st.fixed_dictionaries(
        {
            "loss_type": st.sampled_from(get_args(LossType)),
            "importance_sampling_level": st.sampled_from(get_args(ImportanceSamplingLevel)),
            "importance_sampling_mode": st.sampled_from(get_args(ImportanceSamplingMode)),
            "beta": st.sampled_from([0.0, 0.3]),
            "entropy_coef": st.sampled_from([0.0, 0.2]),
            "epsilon": st.sampled_from([0.0, 0.1, 0.3]),
            "epsilon_high": st.sampled_from([0.0, 0.2, 0.5]),
        }
    ),
    st.data(),
)
@fuzz.cases("loss")
def test_fuzz_grpo_loss_of_micro_batches_sums_to_a_python_loop(batch, options, data):
    if options["loss_type"] == "cispo":  # the limit itself
        options = options | {"epsilon_high": 1 + options["epsilon_high"]}
    if options["loss_type"] == "vespo":
        mode = options["importance_sampling_mode"].replace("sequence", "token")
        options = options | {"importance_sampling_level": "token", "importance_sampling_mode": mode}
    loss, gradient = loss_by_loop(batch, options)
    order = data.draw(st.permutations(range(len(gradient))), label="order")
    whole = loss_and_gradient(batch, order, **options)
    assert whole[0] == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert_close(whole[1], gradient[order])
    cut = data.draw(st.integers(0, len(order) - 1), label="cut")
    totals = {"total_tokens": batch["loss_mask"].sum(), "total_rollouts": len(gradient)}
    parts = [loss_and_gradient(batch, part, **totals, **options) for part in (order[:cut], order[cut:]) if part]
    assert sum(value for value, _ in parts) == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert_close(torch.cat([gradient for _, gradient in parts]), whole[1])


def standard_deviation(values: list[Fraction]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


LARGEST = torch.finfo(torch.float32).max / 2  # the difference of two is a float32 too
REWARDS = st.floats(-1e3, 1e3, width=32) | st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@given(
    st.lists(st.tuples(st.integers(0, 4), REWARDS), min_size=1, max_size=10),
    st.sampled_from(get_args(ScaleRewards)),
    st.sampled_from([(torch.float32, 1e-6), (torch.float64, 1e-8)]),
    st.randoms(use_true_random=False),
)
@example([(0, 1e20), (0, 0.0)], "group", (torch.float32, 1e-6), random.Random(0))  # the squares overflow float32
@fuzz.cases("advantages")
def test_fuzz_group_advantages_match_exact_fractions(drawn, scale_rewards, precision, order):
    dtype, error = precision
    ids, rewards = (torch.tensor(column) for column in zip(*drawn, strict=True))
    rewards, expected = rewards.to(dtype), []
    exact = list(map(Fraction, rewards.tolist()))
    for (group, _), reward in zip(drawn, exact, strict=True):
        of_group = [other for (its, _), other in zip(drawn, exact, strict=True) if its == group]
        scale = {"none": 1.0, "group": standard_deviation(of_group) + 1e-4, "batch": standard_deviation(exact) + 1e-4}
        expected.append(float(reward - sum(of_group) / len(of_group)) / scale[scale_rewards])

    def advantages(order: list[int]) -> Tensor:
        one_prompt = Rollouts([torch.tensor([1])], [torch.tensor([2])] * len(order), 0 * ids, rewards[order])
        return flexpg.group_advantages(one_prompt, scale_rewards, group_ids=ids[order])

    found = advantages(list(range(len(drawn))))
    assert found.dtype == dtype
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), error)
    shuffled = order.sample(range(len(drawn)), len(drawn))
    assert_close(advantages(shuffled), found[shuffled], error)


# Log-probabilities, models and sampling.


@given(fuzz.rollouts(), st.integers(1, 40), st.sampled_from([0.5, 1.0, 1.7]), st.sampled_from([None, 0.8]), fuzz.SEEDS)
@fuzz.cases("logprobs")
def test_fuzz_token_logprobs_and_entropies_match_each_sequence(drawn, chunk_tokens, temperature, softcap, seed):
    tree, mask = PrefixTree.from_sequences(drawn.sequences), drawn.loss_mask
    leaves = fuzz.normal(seed, 1, tree.padded_length, 3).requires_grad_(), fuzz.normal(seed + 1, 50, 3).requires_grad_()

    def output(rows: Tensor) -> Tensor:
        logits = rows @ leaves[1].T
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logprobs, entropies = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    for n, tokens in enumerate(drawn.sequences):
        scores = (output(leaves[0][0, tree.node[n, : len(tokens)]]) / temperature).log_softmax(-1)  # [T, V]
        for t in mask[n].nonzero().flatten().tolist():
            position = int(drawn.prompt_lens[n]) + t
            logprobs[n, t] = scores[position - 1, tokens[position]]
            entropies[n, t] = -(scores[position - 1].exp() * scores[position - 1]).sum()
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "return_entropy": True}
    found = flexpg.token_logprobs(
        leaves[0], output, tree, prompt_lens=drawn.prompt_lens, loss_mask=drawn.loss_mask, **options
    )
    assert_close(found[0], logprobs)
    assert_close(found[1], entropies)
    if mask.any():
        weights = fuzz.normal(seed + 2, *mask.shape)
        grads = torch.autograd.grad((found[0] * weights).sum(), leaves)
        for grad, other in zip(grads, torch.autograd.grad((logprobs * weights).sum(), leaves), strict=True):
            assert_close(grad, other)


MODELS = st.sampled_from(["llama3_2", "qwen2_tied", "mistral", "phi3"])
PROMPTS = fuzz.forests(max_count=3, alphabets=fuzz.SMALL_IDS[1:])


@cache
def float64_model(name: str) -> nn.Module:
    return flexpg.enable(in_float64(tiny_model(name)))


@given(MODELS, fuzz.rollouts(fuzz.SMALL_IDS[2:]), st.integers(0, 12), st.integers(1, 3), fuzz.SEEDS)
@fuzz.cases("model")
def test_fuzz_packed_logprobs_and_gradients_match_baseline(name, drawn, room, world_size, seed):
    model, weights = float64_model(name), fuzz.normal(seed, *drawn.loss_mask.shape) * drawn.loss_mask
    sequences = [row.tolist() for row in drawn.sequences]
    expected = baseline_logprobs(model, sequences, drawn.prompt_lens.tolist()) * drawn.loss_mask
    grads = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    table = torch.full_like(expected, float("nan"))
    model.zero_grad()
    batches = pack(drawn, max(map(len, sequences)) + room, world_size=world_size)
    by_rank = ([batch for batch in batches if batch.rank == rank] for rank in range(world_size))
    for batch, logprobs in (pair for batches in by_rank for pair in flexpg.packed_logprobs(model, batches)):
        (logprobs * weights[batch.indices, : logprobs.shape[1]]).sum().backward()
        if not batch.is_idle:
            table[batch.indices] = F.pad(logprobs.detach(), (0, expected.shape[1] - logprobs.shape[1]))
    assert_close(table, expected)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert_close(parameter.grad, grad)


@given(
    MODELS, fuzz.forests(max_count=3, alphabets=fuzz.SMALL_IDS[1:]), st.integers(1, 4), st.integers(0, 80), fuzz.SEEDS
)
@fuzz.cases("sampling")
@torch.no_grad()
def test_fuzz_sample_matches_one_by_one_for_any_kv_cache_size(name, prompts, group_size, room, seed):
    model, rng = float64_model(name), random.Random(seed)
    stops = rng.sample(range(VOCAB), rng.choice([0, 10, 25]))
    params = SamplingParams(6, rng.choice([0.7, 1.0]), rng.choice([None, 9]), rng.choice([0.9, 1.0]), stops)
    budget = max(map(len, prompts)) + params.max_new_tokens + room
    samples = flexpg.sample(model, prompts, group_size, params, seed=seed, max_cache_tokens=budget)
    uniforms = _uniforms(seed, len(prompts), group_size, params)
    expected = sample_one_by_one(model, prompts, group_size, params, uniforms)
    assert [completion.tolist() for completion in samples.completions] == expected


# Options, files and conversations.

KEYS = [*TINY, *(f"{key}.{name}" for key in ("sampling", "test_reward", "optimizer") for name in TINY[key])]
KEYS += ["loss.beta", "loss.epsilon", "rewards.correct", "rewards.correct._component_", "group_size", "sharing"]
STRINGS = st.sampled_from(["${nothing}", "???", "auto", "cuda", "none", "fp32", "bf16"])
OVERRIDES = st.tuples(st.sampled_from(KEYS), fuzz.VALUES | STRINGS)


@given(st.lists(OVERRIDES, min_size=1, max_size=2, unique_by=lambda override: override[0].partition(".")[0]))
@fuzz.cases("options")
def test_fuzz_load_config_passes_or_names_the_option(overrides):
    cfg = OmegaConf.create(TINY)
    for key, value in overrides:
        OmegaConf.update(cfg, key, value, merge=False)
    try:
        load_config(cfg)
    except ValueError as error:
        names = [part for key, _ in overrides for part in key.split(".")]
        assert any(name in str(error).lower() for name in [*names, "nothing"])  # of ${nothing}


def token_ids(text: list[int] | str) -> list[int]:
    return list(text.encode()) if isinstance(text, str) else text


@given(fuzz.file_rows(), st.sampled_from(["\n", "\r\n", "\n \n"]), st.booleans())
@fuzz.cases("file")
def test_fuzz_read_rollouts_reads_what_was_written(tmp_path_factory, drawn, end, is_ascii):
    rows, pairs = drawn
    path = tmp_path_factory.getbasetemp() / "rollouts.jsonl"
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=is_ascii) for row in rows).encode())
    found, names = read_rollouts(path, encode=token_ids)
    assert len(names) == len(pairs)
    prompts = [found.prompts[group].tolist() for group in found.group_ids.tolist()]
    assert prompts == [token_ids(prompt) for prompt, _ in pairs]
    assert [tokens.tolist() for tokens in found.completions] == [token_ids(tokens) for _, tokens in pairs]
    assert len({tuple(prompt) for prompt in prompts}) == found.num_groups
    assert torch.equal(found.loss_mask, found.completion_mask)


@given(st.lists(fuzz.conversations(), min_size=1, max_size=3), st.booleans())
@fuzz.cases("conversations")
def test_fuzz_conversations_have_only_assistant_tokens_in_the_loss(drawn, per_turn):
    expected = []  # (text, loss mask, conversation)
    for number, conversation in enumerate(drawn):
        text = "T" * len(conversation.tools or [])
        mask, last = [False] * len(text), None
        for message in conversation.messages:
            content, is_answer = message["content"], message["role"] == "assistant"
            drawn_tokens = len(content.rstrip("$")) + 1  # sampling would have ended at the first of several ends
            text += fuzz.LetterChat.roles[message["role"]]
            mask = [*mask, False, *[is_answer] * drawn_tokens]
            if is_answer:
                turn = [False] * (len(mask) - drawn_tokens) + [True] * drawn_tokens
                last = (text + content + "$")[: len(mask)], turn if per_turn else mask, number
                expected += [last] if per_turn else []
            text += f"{content}$\n"
            mask = mask + [False] * (len(text) - len(mask))
        expected += [] if per_turn else [last]
    found, origin = conversation_rollouts(drawn, fuzz.LetterChat(), per_turn=per_turn)
    assert ["".join(map(chr, row.tolist())) for row in found.sequences] == [text for text, _, _ in expected]
    for row, start, (_, mask, _) in zip(found.loss_mask.tolist(), found.prompt_lens.tolist(), expected, strict=True):
        assert not any(mask[:start]) and mask[start]
        assert row == mask[start:] + [False] * (len(row) - len(mask) + start)
    assert origin.tolist() == [number for _, _, number in expected]
    assert found.rewards.tolist() == [drawn[number].reward for _, _, number in expected]
