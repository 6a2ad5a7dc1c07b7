"""Random cases of every claim, each against a slow and honest oracle; `fuzz.py` draws them and says how to get more."""

from __future__ import annotations

import json
import math
import random
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from fuzz import (
    AFTER,
    END,
    FIRST_LETTER,
    IN_THE_SUITE,
    LARGE_IDS,
    SEEDS,
    SHARES,
    SMALL_IDS,
    VALUES,
    LetterChat,
    cases,
    conversations,
    forests,
    groups,
    letters,
    long_forests,
    loss_batches,
    normal,
    role_token,
    rollouts,
    rough_lines,
    rough_transcripts,
    whole_rows,
)
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_masks import KV_TABLES, TABLES, by_block, listed, reachable
from test_sampling import as_lists, one_by_one, random_uniforms
from test_tree import assert_is_trie_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from baseline import VOCAB, in_float64, tiny_model, baseline_attention, baseline_logprobs

from flexpg.analysis.rollout_files import read_rollouts
from flexpg.backends.dispatch import attention
from flexpg.conversations import Conversation, conversation_rollouts, template_messages
from flexpg.integrations import torchtune as shared
from flexpg.logprobs import token_logprobs_and_entropies
from flexpg.losses import ImportanceSamplingLevel, LossType, grpo_loss, loss_normalizer
from flexpg.masks import block_mask, dense_mask
from flexpg.packing import MicroBatch, encoded_tokens, pack, runs
from flexpg.rollouts import Rollouts, ScaleRewards, group_advantages
from flexpg.sampling import SamplingParams, sample
from flexpg.training import setup as tune
from flexpg.training.rewards import named_rewards
from flexpg.tree import BLOCK, PrefixTree
from recipes.grpo import SETUP_ERRORS, GRPORecipe

TINY = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[1] / "recipes" / "configs" / "tiny_cpu.yaml"))


def assert_close(value: Tensor, expected: Tensor, error: float = 1e-12) -> None:
    """Up to round-off in float64."""
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= error * max(1.0, expected.abs().max().item())


def num_distinct(sequences: list[Tensor]) -> int:
    """Tokens that a trie of the sequences has."""
    return len({tuple(row[: t + 1]) for row in map(Tensor.tolist, sequences) for t in range(len(row))})


def test_the_shares_of_the_properties_are_the_suites_cases():
    assert sum(SHARES.values()) == IN_THE_SUITE


# ---- trees -----------------------------------------------------------------------------------------------------------


@given(sequences=forests(alphabets=(*SMALL_IDS, *LARGE_IDS)), order=st.randoms(use_true_random=False))
@cases("sequences")
def test_sequences_make_a_trie_in_any_order(sequences, order):
    tree = PrefixTree.from_sequences(sequences)
    assert_is_trie_of(tree, sequences)
    shuffled = order.sample(range(len(sequences)), len(sequences))
    again = PrefixTree.from_sequences([sequences[n] for n in shuffled])
    assert torch.equal(again.tokens, tree.tokens) and torch.equal(again.end, tree.end)
    assert torch.equal(again.node, tree.node[shuffled])


@given(groups())
@cases("groups")
def test_groups_stand_in_their_order_with_nothing_merged(drawn):
    prompts, completions = drawn
    tree = PrefixTree.from_groups(prompts, completions)
    row, places, own_places = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for tokens, kept in [(prompt, places), *((own, own_places) for own in group)]:
            kept.append(list(range(len(row), len(row) + len(tokens))))
            row += tokens
    assert tree.tokens[: tree.num_tokens].tolist() == row
    # Were each place's token another, larger than those before it, a trie would merge nothing and keep the order.
    owners = [prompt for prompt, group in zip(places, completions, strict=True) for _ in group]
    sequences = [prompt + own for prompt, own in zip(owners, own_places, strict=True)]
    own = iter(own_places)
    assert_is_trie_of(PrefixTree.from_groups(places, [[next(own) for _ in group] for group in completions]), sequences)
    bare = PrefixTree.from_lengths(list(map(len, prompts)), [list(map(len, group)) for group in completions])
    for name in ("end", "node", "lengths", "position_ids", "parent", "segments"):
        assert torch.equal(getattr(bare, name), getattr(tree, name))


# ---- masks and attention ---------------------------------------------------------------------------------------------


@given(sequences=long_forests(), data=st.data())
@cases("mask")
def test_masks_and_their_tables_show_ancestors_alone(sequences, data):
    tree = PrefixTree.from_sequences(sequences)
    size, visible, index = len(tree), reachable(tree), torch.arange(len(tree))
    assert torch.equal(dense_mask(tree.end), visible)
    first = data.draw(st.sampled_from(range(0, size, BLOCK)), label="first query")
    mask = block_mask(tree, first_query=first)
    expected = create_block_mask(mask.mask_mod, None, None, size - first, size, device="cpu")
    assert torch.equal(mask.mask_mod(None, None, index[: size - first, None], index), visible[first:])
    for name in (name for pair in TABLES for name in pair):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    window = data.draw(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 999]), label="window")
    mask, position_ids = block_mask(tree, window), tree.position_ids
    blocks = by_block(visible & (position_ids[:, None] - position_ids < window))
    partial, full = (listed(mask, *names) for names in KV_TABLES)
    assert (partial + full).max() == 1 and (partial + full).bool()[blocks.any(-1)].all()
    assert blocks.all(-1)[full.bool()].all()


@given(
    sequences=forests(lengths=st.integers(1, 40), max_runs=3, max_count=5),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]),
    width=st.sampled_from([1, 2, 5, 8, 16]),
    options=st.sampled_from([{"backend": "split"}, {"backend": "dense"}])
    | st.fixed_dictionaries({}, optional={"window": st.integers(1, 60), "softcap": st.sampled_from([0.7, 2.0])}),
    is_padded=st.booleans(),
    data=st.data(),
)
@cases("attention")
def test_every_token_attends_as_if_its_sequence_were_alone(sequences, heads, width, options, is_padded, data):
    tree = PrefixTree.from_sequences(sequences)
    length = len(tree) if is_padded else tree.num_tokens
    first = data.draw(st.sampled_from(range(0, tree.num_tokens, BLOCK)), label="first query")
    seed, weights = data.draw(SEEDS, label="seed"), torch.zeros(1, heads[0], length, width, dtype=torch.float64)
    weights[:, :, first : tree.num_tokens] = normal(seed, 1, heads[0], tree.num_tokens - first, width)
    q, k, v = (
        normal(seed + 1 + n, 1, h, length, width).requires_grad_() for n, h in enumerate((heads[0], *heads[1:] * 2))
    )
    out = attention(q[:, :, first:], k, v, block_mask(tree, first_query=first), **options)
    plain = {name: value for name, value in options.items() if name != "backend"}
    expected = baseline_attention(q, k, v, tree.node, **plain)
    assert_close(out[:, :, : tree.num_tokens - first], expected[:, :, first : tree.num_tokens])
    ours = torch.autograd.grad((out * weights[:, :, first:]).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, expected_grad in zip(ours, theirs, strict=True):
        assert_close(grad, expected_grad)


# ---- packing ---------------------------------------------------------------------------------------------------------


def size_of(drawn: Rollouts, indices: list[int], sharing: bool) -> int:
    """Tokens of a row."""
    own = [drawn.sequences[n] for n in indices]
    return num_distinct(own) if sharing else sum(map(len, own))


def assert_is_packed(batches: list[MicroBatch], drawn: Rollouts, chosen: list[int], budget: int, sharing: bool) -> None:
    """Every rollout once and as it was, no row over the budget, groups whole where they fit, idle ones untrained."""
    busy = [batch for batch in batches if not batch.is_idle]
    assert sorted(n for batch in busy for n in batch.indices) == sorted(chosen)
    for batch in batches:
        rows = batch.rollouts.sequences
        assert [batch.tree.tokens[node[node >= 0]].tolist() for node in batch.tree.node] == [
            row.tolist() for row in rows
        ]
        if batch.is_idle:
            assert not batch.rollouts.trained.any() and not batch.prefix_tokens
            continue
        assert size_of(drawn, batch.indices, sharing) <= budget
        assert all(map(torch.equal, rows, (drawn.sequences[n] for n in batch.indices)))
        longest = batch.rollouts.trained.shape[1]
        assert torch.equal(batch.rollouts.trained, drawn.trained[batch.indices, :longest])
    for group in range(drawn.num_groups):
        members = {n for n in chosen if drawn.group_ids[n] == group}
        if members and size_of(drawn, list(members), sharing) <= budget:
            assert any(members <= set(batch.indices) for batch in busy)


@given(rollouts(SMALL_IDS[2:]), st.sampled_from([1, 2, 3, 5]), st.sampled_from([True, True, False]), st.data())
@cases("pack")
def test_packing_gives_every_rollout_to_one_process_once(drawn, world_size, sharing, data):
    everything, longest = list(range(len(drawn))), max(map(len, drawn.sequences))
    of_groups = [size_of(drawn, (drawn.group_ids == g).nonzero().flatten().tolist(), True) for g in drawn.group_ids]
    tight = st.sampled_from([longest, *(size for size in of_groups if size > longest)])
    max_tokens = data.draw(tight | st.integers(longest, longest + 12), label="max_tokens")
    chosen = data.draw(st.none() | st.lists(st.sampled_from(everything), min_size=1, unique=True), label="indices")
    arguments = drawn, max_tokens, world_size, sharing, chosen
    batches, chosen = pack(*arguments), everything if chosen is None else chosen
    assert_is_packed(batches, drawn, chosen, max_tokens, sharing)
    assert [(b.rank, b.run, b.indices) for b in batches] == [(b.rank, b.run, b.indices) for b in pack(*arguments)]
    by_rank = [[run for run in runs(batches) if run[0].rank == rank] for rank in range(world_size)]
    assert len({tuple(map(len, own)) for own in by_rank}) == 1
    if not sharing:
        return
    encoded = 0
    for run in runs(batches):
        waiting = max(batch.prefix_tokens for batch in run)
        prompts = {tuple(batch.rollouts.prompts[0].tolist()) for batch in run if batch.prefix_tokens}
        assert len(prompts) == (waiting > 0) and all(len(prompt) == waiting for prompt in prompts)
        sizes = [num_distinct(batch.rollouts.sequences) - batch.prefix_tokens for batch in run]
        assert max(sizes) + waiting <= max_tokens
        encoded += sum(sizes) + waiting
    idle = sum(batch.is_idle for batch in batches)
    assert encoded_tokens(batches) == encoded <= size_of(drawn, chosen, sharing=False) + 2 * idle


@given(rollouts(), st.data())
@cases("budget")
def test_a_rollout_over_the_budget_is_named(drawn, data):
    lengths = list(map(len, drawn.sequences))
    budget = data.draw(st.integers(1, max(lengths) - 1), label="max_tokens")
    with pytest.raises(ValueError, match=f"has .* tokens, over max_tokens={budget}; raise") as caught:
        pack(drawn, budget, data.draw(st.integers(1, 3), label="world_size"))
    number, prompt, own = map(int, re.match(r"rollout (\d+) of \d+ has (\d+) \+ (\d+) ", str(caught.value)).groups())
    assert prompt + own == lengths[number] > budget and own == len(drawn.completions[number])


# ---- losses ----------------------------------------------------------------------------------------------------------


def loss_by_hand(batch: dict, options: dict) -> tuple[float, list[list[float]]]:
    """The loss and its gradient, token by token in Python's floats."""
    mask, old, beta = batch["mask"].tolist(), batch["old_logprobs"], options["beta"]
    tables = [batch["logprobs"], batch["logprobs"] if old is None else old, batch["ref_logprobs"]]
    policy, old, ref = (table.tolist() for table in tables)
    low, high = 1 - options["epsilon"], 1 + options["epsilon_high"]
    counts = [sum(row) for row in mask]
    per_token = 1 / {"grpo": len(mask), "dr_grpo": 9 * len(mask)}.get(options["loss_type"], sum(counts))
    total, gradient = 0.0, [[0.0] * len(row) for row in mask]
    for n, advantage in enumerate(batch["advantages"].tolist()):
        trained = [t for t, is_trained in enumerate(mask[n]) if is_trained]
        weight = per_token / counts[n] if options["loss_type"] == "grpo" and trained else per_token
        distances = {t: policy[n][t] - old[n][t] for t in trained}
        if options["importance_sampling_level"] == "sequence" and trained:
            distances = dict.fromkeys(trained, sum(distances.values()) / len(trained))
        for t in trained:
            ratio, kl = math.exp(distances[t]), ref[n][t] - policy[n][t]
            clipped = min(max(ratio, low), high)
            total += weight * (-min(ratio * advantage, clipped * advantage) + beta * (math.exp(kl) - kl - 1))
            is_free = ratio * advantage <= clipped * advantage
            gradient[n][t] = weight * (-ratio * advantage * is_free + beta * (1 - math.exp(kl)))
    return total, gradient


def loss_and_gradient(batch: dict, rows: list[int], **options) -> tuple[float, Tensor]:
    """Of some rollouts of a batch."""
    part = {name: table if table is None else table[rows] for name, table in batch.items()}
    part["logprobs"] = part["logprobs"].clone().requires_grad_()
    loss, metrics = grpo_loss(**part, **options)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    return loss.item(), part["logprobs"].grad


@given(
    loss_batches(),
    st.fixed_dictionaries(
        {
            "loss_type": st.sampled_from(get_args(LossType)),
            "importance_sampling_level": st.sampled_from(get_args(ImportanceSamplingLevel)),
            "beta": st.sampled_from([0.0, 0.3]),
            "epsilon": st.sampled_from([0.0, 0.1, 0.3]),
            "epsilon_high": st.sampled_from([0.0, 0.2, 0.5]),
        }
    ),
    st.data(),
)
@cases("loss")
def test_micro_batches_sum_to_the_loss_that_a_hand_gets(batch, options, data):
    loss, gradient = loss_by_hand(batch, options)
    everything = list(range(len(batch["mask"])))
    order = data.draw(st.permutations(everything), label="order")
    whole = loss_and_gradient(batch, order, max_completion_length=9, **options)
    assert whole[0] == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert_close(whole[1], torch.tensor(gradient, dtype=torch.float64)[order])
    cut = data.draw(st.integers(0, len(order) - 1), label="cut")
    parts = [part for part in (order[:cut], order[cut:]) if part]
    normalizer = loss_normalizer(batch["mask"], options["loss_type"], 9)
    losses, gradients = zip(
        *(loss_and_gradient(batch, part, normalizer=normalizer, **options) for part in parts), strict=True
    )
    assert sum(losses) == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert_close(torch.cat(gradients), whole[1])


def spread(values: list[Fraction]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


LARGEST = torch.finfo(torch.float32).max / 2  # so that a distance is a float32 as well
REWARDS = st.floats(-1e3, 1e3, width=32) | st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@given(
    st.lists(st.tuples(st.integers(-2, 3), REWARDS), min_size=1, max_size=10),
    st.sampled_from(get_args(ScaleRewards)),
    st.sampled_from([(torch.float32, 1e-6), (torch.float64, 1e-8)]),
    st.randoms(use_true_random=False),
)
@example([(0, 1e20), (0, 0.0)], "group", (torch.float32, 1e-6), random.Random(0))  # squared beyond float32: were 0
@cases("advantages")
def test_advantages_are_distances_from_the_mean_of_the_group(drawn, scale_rewards, precision, order):
    dtype, error = precision
    ids, rewards = (torch.tensor(column) for column in zip(*drawn, strict=True))
    rewards, expected = rewards.to(dtype), []
    exact = list(map(Fraction, rewards.tolist()))
    for (group, _), reward in zip(drawn, exact, strict=True):
        own = [other for (its, _), other in zip(drawn, exact, strict=True) if its == group]
        scale = {"none": 1.0, "group": spread(own) + 1e-4, "batch": spread(exact) + 1e-4}[scale_rewards]
        expected.append(float(reward - sum(own) / len(own)) / scale)
    advantages = group_advantages(rewards, ids, scale_rewards)
    assert advantages.dtype == dtype
    assert_close(advantages.double(), torch.tensor(expected, dtype=torch.float64), error)
    shuffled = order.sample(range(len(drawn)), len(drawn))
    assert_close(group_advantages(rewards[shuffled], ids[shuffled], scale_rewards), advantages[shuffled], error)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@given(rollouts(), st.integers(1, 40), st.sampled_from([0.5, 1.0, 1.7]), st.sampled_from([None, 0.8]), SEEDS)
@cases("logprobs")
def test_log_probabilities_are_those_of_each_sequence_on_its_own(drawn, chunk_tokens, temperature, softcap, seed):
    tree = PrefixTree.from_sequences(drawn.sequences)
    leaves = normal(seed, 1, len(tree), 3).requires_grad_(), normal(seed + 1, 50, 3).requires_grad_()

    def output(rows: Tensor) -> Tensor:
        logits = rows @ leaves[1].T
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    expected = [torch.zeros(drawn.trained.shape, dtype=torch.float64) for _ in range(2)]
    for n, tokens in enumerate(drawn.sequences):
        scores = (output(leaves[0][0, tree.node[n, : len(tokens)]]) / temperature).log_softmax(-1)  # [T, V]
        for t in drawn.trained[n].nonzero().flatten().tolist():
            at = int(drawn.prompt_lens[n]) + t
            expected[0][n, t] = scores[at - 1, tokens[at]]
            expected[1][n, t] = -(scores[at - 1].exp() * scores[at - 1]).sum()
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    found = token_logprobs_and_entropies(
        leaves[0], output, tree, prompt_lens=drawn.prompt_lens, mask=drawn.loss_mask, **options
    )
    weights = normal(seed + 2, *drawn.trained.shape)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    if drawn.trained.any():
        theirs = torch.autograd.grad((expected[0] * weights).sum(), leaves)
        for grad, expected_grad in zip(torch.autograd.grad((found[0] * weights).sum(), leaves), theirs, strict=True):
            assert_close(grad, expected_grad)


MODELS = st.sampled_from(["llama3_2", "qwen2_tied", "mistral", "phi3"])


@cache
def model_of(name: str):
    return in_float64(tiny_model(name))


@given(MODELS, rollouts(SMALL_IDS[2:]), st.integers(0, 12), st.integers(1, 3), SEEDS)
@cases("model")
def test_packed_models_have_the_log_probabilities_and_gradients_of_the_unshared_loop(
    name, drawn, room, world_size, seed
):
    model, weights = model_of(name), normal(seed, *drawn.trained.shape) * drawn.trained
    sequences = [row.tolist() for row in drawn.sequences]
    expected = baseline_logprobs(model, sequences, drawn.prompt_lens.tolist()) * drawn.trained
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    logprobs = torch.full_like(expected, float("nan"))
    model.zero_grad()
    for run in runs(pack(drawn, max(map(len, sequences)) + room, world_size)):
        with shared.encode_run(model, run) as prefix:
            for batch in run:
                own, _ = shared.logprobs(model, batch, prefix=prefix)
                (own * weights[batch.indices, : own.shape[1]]).sum().backward()
                if not batch.is_idle:
                    logprobs[batch.indices] = F.pad(own.detach(), (0, expected.shape[1] - own.shape[1]))
    assert_close(logprobs, expected)
    for parameter, grad in zip(model.parameters(), theirs, strict=True):
        assert_close(parameter.grad, grad)


@given(MODELS, forests(max_count=3, alphabets=SMALL_IDS[1:]), st.integers(1, 4), st.integers(0, 80), SEEDS)
@cases("sampling")
@torch.no_grad()
def test_samples_are_those_of_the_unshared_loop_whatever_the_cache_holds(name, prompts, group_size, room, seed):
    model, prompts, rng = model_of(name), [torch.tensor(prompt) for prompt in prompts], random.Random(seed)
    stops = rng.sample(range(VOCAB), rng.choice([0, 10, 25]))
    params = SamplingParams(6, rng.choice([0.7, 1.0]), rng.choice([None, 9]), rng.choice([0.9, 1.0]), stops)
    uniforms = random_uniforms(len(prompts) * group_size, params, seed)
    budget = max(map(len, prompts)) + params.max_new_tokens + room
    samples = sample(
        shared.decoder(model), shared.output(model), prompts, group_size, params, uniforms, max_cache_tokens=budget
    )
    assert as_lists(samples) == one_by_one(model, prompts, group_size, params, uniforms)


# ---- what users write ------------------------------------------------------------------------------------------------

KEYS = list(TINY)
KEYS += [f"{key}.{name}" for key in ("loss", "sampling", "test_reward") for name in TINY[key]]
KEYS += ["rewards.correct", "rewards.correct.function", "rewards.correct.weight"]
REFERENCES = st.sampled_from(["${seed}", "${nothing}", "???", "auto", "cuda", "cpu:x", "none", "fp32", "bf16"])
OVERRIDES = st.tuples(st.sampled_from(KEYS), VALUES | REFERENCES)


def set_up(cfg: DictConfig) -> None:
    """The recipe's setup as far as it takes no time."""
    GRPORecipe(cfg)
    tune.component("sampling", cfg, stop_tokens=[])
    named_rewards(cfg.rewards)
    named_rewards({"test_reward": cfg.test_reward})


@given(st.lists(OVERRIDES, min_size=1, max_size=2, unique_by=lambda override: override[0].partition(".")[0]))
@example([("output_dir", 5)])  # was refused without its name
@example([("loss.beta", 10**400)])  # too large for a float, which was an OverflowError
@example([("device", "cpu:x")])  # which torch itself refuses
@cases("options")
def test_options_of_any_value_pass_or_are_refused_by_name(overrides):
    cfg = OmegaConf.create(TINY)
    for key, value in overrides:
        OmegaConf.update(cfg, key, value, merge=False)
    try:
        set_up(cfg)
    except SETUP_ERRORS as error:
        parts = [part for key, _ in overrides for part in key.split(".")]
        assert any(part in str(error) for part in [*parts, "nothing", "reward"]), error  # of ${nothing}, of `rewards`


def token_ids(text: list[int] | str) -> list[int]:
    return list(text.encode()) if isinstance(text, str) else text


@given(whole_rows(), st.sampled_from(["\n", "\r\n", "\n \n"]), st.booleans())
@cases("lines")
def test_a_file_of_rollouts_is_read_as_it_was_written(tmp_path_factory, drawn, end, is_ascii):
    rows, pairs = drawn
    path = tmp_path_factory.getbasetemp() / "whole.jsonl"
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=is_ascii) for row in rows).encode())
    found, names = read_rollouts(path, encode=token_ids)
    assert len(names) == len(pairs)
    prompts = [found.prompts[group].tolist() for group in found.group_ids.tolist()]
    assert prompts == [token_ids(prompt) for prompt, _ in pairs]
    assert [own.tolist() for own in found.completions] == [token_ids(own) for _, own in pairs]
    assert len({tuple(prompt) for prompt in prompts}) == found.num_groups
    assert torch.equal(found.trained, found.completion_mask)


@given(
    rough_lines(),
    st.sampled_from([None, token_ids]),
    st.sampled_from([LetterChat(), LetterChat(), None]),
    st.sampled_from([False, False, True]),
    st.sampled_from([None, 50]),
)
@example(content=b'{"\\ud800": 1}', encode=None, chat=None, per_turn=False, vocab_size=None)  # could not be printed
@cases("broken lines")
def test_a_file_of_anything_is_read_or_refused_by_line(tmp_path_factory, content, encode, chat, per_turn, vocab_size):
    path = tmp_path_factory.getbasetemp() / "rough.jsonl"

    def read(content: bytes) -> tuple[Rollouts, list[str]]:
        path.write_bytes(content)
        return read_rollouts(path, encode=encode, chat=chat, per_turn=per_turn, vocab_size=vocab_size)

    def is_empty(content: bytes) -> bool:
        return not content.removeprefix(b"\xef\xbb\xbf").strip()

    try:
        found, names = read(content)
    except ValueError as error:
        assert str(error).encode()  # it can be printed
        if is_empty(content):
            assert str(error).startswith(f"{path} is empty")
            return
        number = int(re.match(rf"{re.escape(str(path))}, line (\d+): .", str(error))[1])
        lines = content.split(b"\n")[:number]  # all is well up to the one that is named
        with pytest.raises(ValueError, match=f"line {number}: "):
            read(b"\n".join(lines))
        if not is_empty(b"\n".join(lines[:-1])):
            read(b"\n".join(lines[:-1]))
    else:
        assert len(found) == len(names)


@given(st.lists(conversations(), min_size=1, max_size=3), st.booleans())
@cases("transcripts")
def test_transcripts_train_what_the_assistant_wrote(drawn, per_turn):
    expected = []  # (tokens, trained, conversation)
    for number, conversation in enumerate(drawn):
        tokens, whole = [FIRST_LETTER] * len(conversation.tools or []), None
        trained = [False] * len(tokens)
        for message in conversation.messages:
            is_answer, own = message["role"] == "assistant", letters(message)
            tokens, trained = (
                [*tokens, role_token(message["role"]), *own, END],
                [*trained, False, *[is_answer] * (len(own) + 1)],
            )
            if is_answer:
                alone = [False] * (len(tokens) - len(own) - 1) + [True] * (len(own) + 1)
                whole = tokens, alone if per_turn else trained, number
                expected += [whole] if per_turn else []
            tokens, trained = [*tokens, AFTER], [*trained, False]
        expected += [] if per_turn else [whole]
    found, origin = conversation_rollouts(drawn, LetterChat(), per_turn=per_turn)
    assert [row.tolist() for row in found.sequences] == [tokens for tokens, _, _ in expected]
    starts = found.prompt_lens.tolist()
    for row, start, (_, trained, _) in zip(found.trained.tolist(), starts, expected, strict=True):
        assert not any(trained[:start]) and trained[start]
        assert row == trained[start:] + [False] * (len(row) - len(trained) + start)
    assert origin.tolist() == [number for _, _, number in expected]
    assert found.rewards.tolist() == [drawn[number].reward for _, _, number in expected]


@given(rough_transcripts(), VALUES | st.floats(-1, 1), st.booleans())
@cases("broken transcripts")
def test_a_transcript_of_anything_is_read_or_refused_by_message(messages, reward, per_turn):
    try:
        conversation = Conversation(template_messages(messages), reward)
        found, origin = conversation_rollouts([conversation], LetterChat(), per_turn=per_turn)
    except (TypeError, ValueError) as error:
        assert re.match(r"conversation 0 of 1\b|message \d+ ", str(error)), error
    else:
        assert len(found) == len(origin) and any(message["role"] == "assistant" for message in messages)
