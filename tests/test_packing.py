"""Micro-batches contain every rollout once, keep whole groups where they fit, and stay within the token budget."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexpg.analysis.work import encoded_work, recomputed_tokens
from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.packing import PAIRS_PER_TOKEN, pack
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

DATA = Path(__file__).parents[2] / "shared/data"


def random_rollouts(seed: int) -> Rollouts:
    """Return up to six groups of up to seven rollouts in any order, with some tokens out of the loss."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def draw(longest: int) -> torch.Tensor:
        return torch.randint(0, 9, (rng.randint(1, longest),), generator=generator)

    prompts = [draw(20) for _ in range(rng.randint(1, 6))]
    group_ids = [g for g in range(len(prompts)) for _ in range(rng.randint(1, 7))]
    rng.shuffle(group_ids)
    completions = [draw(12) for _ in group_ids]
    rollouts = Rollouts(prompts, completions, torch.tensor(group_ids), torch.ones(len(group_ids)))
    counts = torch.rand(rollouts.completion_mask.shape, generator=generator) < 0.7
    return replace(rollouts, loss_mask=counts & rollouts.completion_mask)


def one_group(prompt: list[int], completions: list[list[int]]) -> Rollouts:
    return Rollouts.from_groups([prompt], [completions], [[1.0] * len(completions)])


def indices_of(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def busy(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [batch for batch in batches if not batch.is_idle]


# Every rollout once, within the budget


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_pack_places_every_rollout_once_within_the_budget(world_size, sharing):
    num_idle = 0
    for seed in range(100):
        rollouts, max_tokens = random_rollouts(seed), random.Random(seed).randint(32, 120)
        batches = pack(rollouts, max_tokens, world_size=world_size, sharing=sharing)
        per_rank = [sum(batch.rank == rank for batch in batches) for rank in range(world_size)]
        assert len(set(per_rank)) == 1 and len(batches) == sum(per_rank)
        num_idle += len(batches) - len(busy(batches))
        times_in_loss = torch.zeros_like(rollouts.loss_mask, dtype=torch.long)
        for batch in batches:
            if batch.is_idle:
                assert batch.tree.num_tokens == 2 and not batch.loss_mask.any() and not batch.cached_tokens
                continue
            indices = batch.indices.tolist()
            assert indices == sorted(indices)
            assert (batch.tree.num_tokens if sharing else batch.tree.baseline_tokens) <= max_tokens
            times_in_loss[batch.indices, : batch.loss_mask.shape[1]] += batch.loss_mask
            for row, n in enumerate(indices):
                nodes = batch.tree.node[row, : batch.tree.lengths[row]]
                assert torch.equal(batch.tree.tokens[nodes], rollouts.sequences[n])
                assert torch.equal(batch.rollouts.sequences[row], rollouts.sequences[n])
        assert sorted(n for indices in indices_of(busy(batches)) for n in indices) == list(range(len(rollouts)))
        assert torch.equal(times_in_loss, rollouts.loss_mask.long())
    assert (num_idle > 0) == (world_size > 1)


def test_pack_idle_micro_batch_is_of_another_ranks_rollout():
    num_idle = 0
    for seed in range(100):
        batches = pack(random_rollouts(seed), random.Random(seed).randint(32, 120), world_size=3)
        for idle in (batch for batch in batches if batch.is_idle):
            of_rank = [batch for batch in busy(batches) if batch.rank == idle.rank]
            assert idle.indices.item() not in torch.cat([torch.tensor([]), *(batch.indices for batch in of_rank)])
            num_idle += 1
    assert num_idle > 30


def test_pack_keeps_groups_that_fit_whole():
    for seed in range(300):
        rollouts, max_tokens = random_rollouts(seed), random.Random(seed).randint(40, 200)
        batches = pack(rollouts, max_tokens)
        for group, prompt in enumerate(rollouts.prompts):
            members = set((rollouts.group_ids == group).nonzero().flatten().tolist())
            fits = len(prompt) + sum(len(rollouts.completions[n]) for n in members) <= max_tokens
            assert sum(bool(members & set(indices)) for indices in indices_of(batches)) == 1 or not fits


def test_pack_puts_groups_together_while_they_fit():
    rollouts = Rollouts.from_groups([range(5), range(1, 6)], [[[0, 0], [1, 1]], [[2, 2], [3, 3]]], [[1.0] * 2] * 2)
    assert indices_of(pack(rollouts, 18)) == [[0, 1, 2, 3]]
    assert indices_of(pack(rollouts, 17)) == [[0, 1], [2, 3]]


def test_pack_indices_packs_a_part_as_if_it_were_all():
    for seed in range(50):
        rollouts, rng = random_rollouts(seed), random.Random(seed)
        chosen = sorted(rng.sample(range(len(rollouts)), rng.randint(1, len(rollouts))))
        part, alone = pack(rollouts, 60, world_size=3, indices=chosen), pack(rollouts.select(chosen), 60, world_size=3)
        assert indices_of(part) == [[chosen[i] for i in indices] for indices in indices_of(alone)]
        assert all(torch.equal(a.tree.end, b.tree.end) for a, b in zip(part, alone, strict=True))
    with pytest.raises(ValueError, match=r"indices must be from 0 to \d, each at most once, got \[0, 1, 0\]"):
        pack(rollouts, 60, indices=[0, 1, 0])
    for wrong in ([len(rollouts)], [-1]):
        with pytest.raises(ValueError, match="indices must be from 0 to"):
            pack(rollouts, 60, indices=wrong)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        pack(rollouts, 60, world_size=0)
    with pytest.raises(ValueError, match="indices must name at least one rollout"):
        pack(rollouts, 60, indices=[])


def test_pack_counts_images_of_equal_prompts_each():
    def picture(value: float) -> dict:
        return {"pixel_values": torch.full((1, 3, 2, 2), value), "mm_token_type_ids": [0, *[1] * 20]}

    for second, expected in ((1.0, [[0, 1, 2, 3]]), (2.0, [[0, 1], [2, 3]])):
        rollouts = Rollouts.from_groups(
            [[3, *[50] * 20]] * 2, [[[4], [5]]] * 2, [[0.0, 1.0]] * 2, prompt_inputs=[picture(1.0), picture(second)]
        )
        batches = pack(rollouts, max_tokens=30)
        assert [batch.indices.tolist() for batch in batches] == expected
        assert all(batch.tree.num_tokens <= 30 for batch in batches)


def test_pack_rollout_over_the_budget_raises():
    rollouts = Rollouts.from_groups([range(5), range(3)], [[[1]], [[1, 2], [1, 2, 3]]], [[1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"max_tokens must hold every rollout, got 5 for rollout 0 of 5 \+ 1 tokens"):
        pack(rollouts, 5)


def test_pack_is_deterministic():  # every rank computes the plan of all
    for seed in range(20):
        plans = [pack(random_rollouts(seed), 60, world_size=3) for _ in range(2)]
        assert indices_of(plans[0]) == indices_of(plans[1])


# Oversized groups


def test_pack_oversized_group_has_its_prompt_in_every_part():
    rollouts = one_group([0, 1, 2, 3, 4], [[10 * n, 1] for n in range(4)])
    batches = pack(rollouts, 9)
    assert indices_of(batches) == [[0, 2], [1, 3]]
    assert [(batch.tree.num_tokens, batch.cached_tokens) for batch in batches] == [(9, 5), (9, 5)]
    work = encoded_work(batches)
    assert (work.num_tokens, work.num_pairs) == (5 + 8, 15 + 4 * (6 + 7))
    assert indices_of(pack(rollouts, 9, sharing=False)) == [[0], [1], [2], [3]]


def test_pack_oversized_group_has_parts_of_even_size():
    rollouts = one_group([0, 1, 2, 3], [[n, 1] for n in range(10)])
    assert [len(batch.indices) for batch in pack(rollouts, 4 + 2 * 8)] == [5, 5]
    assert [len(batch.indices) for batch in pack(rollouts, 4 + 2 * 4)] == [4, 3, 3]


def fewest_parts(sizes: list[int], room: int) -> int:
    """Return the fewest parts, by trying every way to fill them."""
    best = len(sizes)

    def fill(n: int, sums: list[int]) -> None:
        nonlocal best
        if len(sums) >= best:
            return
        if n == len(sizes):
            best = len(sums)
            return
        for part in range(len(sums)):
            if sums[part] + sizes[n] <= room:
                fill(n + 1, [*sums[:part], sums[part] + sizes[n], *sums[part + 1 :]])
        fill(n + 1, [*sums, sizes[n]])

    fill(0, [])
    return best


def test_pack_oversized_group_has_nearly_the_fewest_parts():
    # First-fit decreasing needs at most 11/9 of the fewest, and 6/9 of a part (Dósa).
    more = []
    for seed in range(300):
        rng = random.Random(seed)
        lengths, prompt = [rng.randint(1, 12) for _ in range(rng.randint(3, 9))], list(range(rng.randint(1, 20)))
        room = rng.randint(max(lengths), 24)
        batches = pack(one_group(prompt, [[n] * length for n, length in enumerate(lengths)]), len(prompt) + room)
        more.append(len(batches) - fewest_parts(lengths, room))
    assert min(more) == 0 and max(more) <= 1 and sum(more) <= 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_by_cache_is_alike_on_all_ranks_and_fits_the_budget(world_size):
    sizes, num_cached, num_mixed = set(), 0, 0
    for seed in range(150):
        rollouts, max_tokens = random_rollouts(seed), random.Random(seed).randint(32, 60)
        batches = pack(rollouts, max_tokens, world_size=world_size)
        by_rank = [by_cache(batch for batch in batches if batch.rank == rank) for rank in range(world_size)]
        assert len({tuple(map(len, of_rank)) for of_rank in by_rank}) == 1
        assert sum(map(len, by_cache(batches))) == len(batches)
        for series in by_cache(batches):
            sizes.add(len(series))
            prompts = [batch.rollouts.prompts[0] for batch in series if batch.cached_tokens]
            cached_tokens = max(batch.cached_tokens for batch in series)
            assert len(prompts) != 1 and all(torch.equal(prompt, prompts[0]) for prompt in prompts)
            for batch in series:
                assert batch.cached_tokens in (0, len(batch.rollouts.prompts[0]))
                assert not batch.cached_tokens or batch.rollouts.num_groups == 1
                # The cached prompt is in memory while the others of the series are encoded.
                assert batch.tree.num_tokens - batch.cached_tokens + cached_tokens <= max_tokens
            num_cached += bool(prompts)
            num_mixed += bool(prompts) and any(not batch.cached_tokens and not batch.is_idle for batch in series)
    assert {1, 2} <= sizes and num_cached > 20 and (num_mixed > 0 or world_size != 2)


def test_pack_oversized_groups_over_two_ranks():
    completions = [[n] * 10 for n in range(40)]
    one = one_group(list(range(50, 60)), completions)
    prompts = [range(50 + g, 60 + g) for g in range(4)]
    four = Rollouts.from_groups(prompts, [completions[g : g + 10] for g in range(0, 40, 10)], [[1.0] * 10] * 4)
    for rollouts, sizes, encoded in ((one, [4], 2), (four, [2, 2], 4)):  # a group on both ranks; two groups on each
        batches = pack(rollouts, 60, world_size=2)
        assert [[len(s) for s in by_cache(batches) if s[0].rank == rank] for rank in range(2)] == [sizes, sizes]
        assert encoded_work(batches).num_tokens == encoded * 10 + 400
        assert recomputed_tokens(batches) == 10 * (encoded - rollouts.num_groups)


# Balance over ranks


def work_of(batches: list[MicroBatch], sharing: bool) -> float:
    tokens = sum(batch.tree.num_tokens if sharing else batch.tree.baseline_tokens for batch in batches)
    pairs = sum(batch.tree.num_pairs if sharing else batch.tree.baseline_pairs for batch in batches)
    return tokens + pairs / PAIRS_PER_TOKEN


def least_makespan(costs: list[float], world_size: int) -> float:
    """Return the least work of the busiest rank, by trying every assignment."""
    work, best = [0.0] * world_size, sum(costs)

    def assign(n: int) -> None:
        nonlocal best
        if max(work) >= best:
            return
        if n == len(costs):
            best = max(work)
            return
        for rank in range(min(n + 1, world_size)):
            work[rank] += costs[n]
            assign(n + 1)
            work[rank] -= costs[n]

    assign(0)
    return best


@pytest.mark.parametrize("sharing", [True, False])
def test_pack_busiest_rank_is_within_grahams_bound(sharing):
    # Largest first on m ranks: at most 4/3 - 1/(3 m) of the least, doi.org/10.1137/0117039, theorem 2.
    for seed in range(60):
        rollouts, world_size = random_rollouts(seed), 2 + seed % 3
        batches = busy(pack(rollouts, 1000, world_size=world_size, sharing=sharing))
        work = [work_of([batch for batch in batches if batch.rank == rank], sharing) for rank in range(world_size)]
        groups = [rollouts.select((rollouts.group_ids == g).nonzero().flatten()) for g in range(rollouts.num_groups)]
        costs = [work_of(pack(group, 10**6), sharing) for group in groups]
        best = least_makespan(costs, world_size)
        assert max(work) <= (4 / 3 - 1 / (3 * world_size)) * best * (1 + 1e-9)


def test_pack_work_counts_attention_pairs():
    # 12,000 tokens in one sequence are more work than 6 x 2,200; by tokens the last group would go to the other rank.
    lengths, groups = [12000, *[2200] * 6, 1000], [0, *[1] * 6, 2]
    completions = [torch.full((length - 1,), n) for n, length in enumerate(lengths)]
    rollouts = Rollouts([torch.tensor([9])] * 3, completions, torch.tensor(groups), torch.ones(8))
    batches = pack(rollouts, 20000, world_size=2)
    assert [(batch.rank, batch.indices.tolist()) for batch in batches] == [(0, [0]), (1, [1, 2, 3, 4, 5, 6, 7])]


# Sharing between groups


def least_tokens(rollouts: Rollouts, max_tokens: int) -> tuple[int, int]:
    """Return a lower bound: every token once, in sequences that all hold what all rollouts begin with."""
    tree = PrefixTree.from_sequences(rollouts.sequences)
    common = int((tree.end[: int(tree.lengths.min())] == tree.num_tokens).int().cumprod(0).sum())
    count = -(-(tree.num_tokens - common) // (max_tokens - common))
    return tree.num_tokens + common * (count - 1), count


def assert_near_optimal(rollouts: Rollouts, max_tokens: int, more: float) -> None:
    """Check that tokens are within 5 percent of the least, and micro-batches within a factor of the fewest."""
    batches, (least, count) = pack(rollouts, max_tokens), least_tokens(rollouts, max_tokens)
    assert least <= sum(batch.tree.num_tokens for batch in batches) < 1.05 * least
    assert count <= len(batches) <= max(more * count, count + 2)
    assert sorted(n for indices in indices_of(batches) for n in indices) == list(range(len(rollouts)))


def test_pack_shares_a_system_prompt_of_all_groups():
    prompts = [[*range(40), *[group] * 3] for group in range(5)]
    rollouts = Rollouts.from_groups(prompts, [[[2 * g] * 2, [2 * g + 1] * 2] for g in range(5)], [[1.0] * 2] * 5)
    (batch,) = pack(rollouts, 75)
    assert batch.tree.num_tokens == 40 + 5 * 3 + 10 * 2
    assert len(pack(rollouts, 74)) == 2 and recomputed_tokens(pack(rollouts, 74)) == 40


@pytest.mark.slow
@pytest.mark.parametrize(("system", "group_size", "max_tokens"), [(1000, 1, 8192), (200, 8, 4096)])
def test_pack_10k_rollouts_is_fast_and_within_5_percent_of_optimal(system, group_size, max_tokens):
    rng, count = np.random.default_rng(0), 10000 // group_size
    start = rng.integers(1000, size=system)
    prompts = [torch.from_numpy(np.append(start, rng.integers(1000, size=n))) for n in rng.integers(20, 400, count)]
    completions = [torch.from_numpy(rng.integers(1000, size=n)) for n in rng.integers(1, 300, 10000)]
    rollouts = Rollouts(prompts, completions, torch.arange(count).repeat_interleave(group_size), torch.ones(10000))
    began = time.thread_time()  # without other threads, which wait actively for work
    pack(rollouts, max_tokens)
    assert time.thread_time() - began < 8.0  # about 1 on a quiet machine, 2.4 on a busy one
    assert_near_optimal(rollouts, max_tokens, more=1.05 if group_size == 1 else 1.5)  # groups are large items


def conversations(count: int, turns: int) -> Rollouts:
    """Return one rollout per turn, whose prompt is its history; all begin with a system prompt; shuffled."""
    rng = random.Random(0)

    def draw(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(99) for _ in range(rng.randint(shortest, longest))]

    system, pairs = draw(100, 100), []
    for _ in range(count):
        history = system
        for _ in range(turns):
            pairs.append((history + draw(5, 40), draw(5, 20)))
            history = pairs[-1][0] + pairs[-1][1]
    rng.shuffle(pairs)
    prompts, completions = zip(*pairs, strict=True)
    return Rollouts.from_groups(prompts, [[completion] for completion in completions], [[1.0]] * len(pairs))


def test_pack_shuffled_conversations_are_within_5_percent_of_optimal():
    assert_near_optimal(conversations(60, 12), 2000, more=1.05)


@pytest.mark.parametrize("world_size", [2, 8])
def test_pack_conversations_stay_on_one_rank_with_even_work(world_size):
    rollouts = conversations(64, 8)
    batches = pack(rollouts, 2000, world_size=world_size)
    work = [sum(batch.tree.num_tokens for batch in batches if batch.rank == rank) for rank in range(world_size)]
    assert max(work) < 1.1 * sum(work) / world_size
    # Assigned one by one, histories would be encoded on every rank: at least 3 times as many tokens.
    assert sum(work) < 1.3 * least_tokens(rollouts, 2000)[0]


def gsm8k_solutions() -> tuple[list[str], list[list[str]]]:
    lines = [json.loads(line) for line in (DATA / "gsm8k/example_model_solutions.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name not in ("question", "ground_truth")]
    return [line["question"] for line in lines], [[str(line[name]) for name in names] for line in lines]


def tau_bench_conversations() -> tuple[list[str], list[list[str]]]:
    entries = json.loads((DATA / "tau_bench/gpt-4o-airline.json").read_text())
    texts = [[str(message["content"]) for message in entry["traj"]] for entry in entries]
    return ["\n".join(lines[:2]) for lines in texts], [["\n".join(lines[2:])] for lines in texts]


@pytest.mark.skipif(not DATA.exists(), reason="the real data are not next to the repository")
@pytest.mark.parametrize(
    ("read", "max_tokens", "more"), [(gsm8k_solutions, 4096, 1.15), (tau_bench_conversations, 65536, 1.0)]
)
def test_pack_real_data_is_within_5_percent_of_optimal(read, max_tokens, more):
    prompts, completions = read()
    byte_ids = [[list(text.encode()) for text in group] for group in completions]
    rewards = [[1.0] * len(group) for group in completions]
    rollouts = Rollouts.from_groups([list(prompt.encode()) for prompt in prompts], byte_ids, rewards)
    assert_near_optimal(rollouts, max_tokens, more)
