"""The numbers of a step are the ones that a hand would count."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from processes import run_processes

from flexpg.metrics import cost_metrics, peak_memory_gib, rates, rollout_metrics, summary
from flexpg.packing import MicroBatch, pack
from flexpg.rollouts import Rollouts


def rollouts_of(prompts: list[list[int]], completions: list[list[int]], groups: list[int], rewards: list[float]):
    prompts, completions = ([torch.tensor(tokens) for tokens in texts] for texts in (prompts, completions))
    return Rollouts(prompts, completions, torch.tensor(groups), torch.tensor(rewards))


def test_rewards_and_lengths_are_counted_per_group_and_a_group_of_one_has_no_spread():
    completions = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    rollouts = rollouts_of([[9]] * 3, completions, [1, 0, 0, 1, 2], [3.0, 2.0, 2.0, 1.0, 5.0])
    metrics = rollout_metrics(rollouts, torch.tensor([True, False, True, True, True]))
    assert metrics == pytest.approx(
        {
            "reward": 13 / 5,
            "reward_std": 2**0.5 / 3,  # groups 0 and 2 have none, that of 3 and 1 is unbiased
            "groups_without_spread": 2 / 3,
            "completion_tokens": 3.0,
            "truncated": 0.2,
        }
    )


# Groups 0 and 1 have prompts of 5 and 3 tokens; 0 has completions of 2 and 4 that begin alike, 1 has one of 6.
TWO_GROUPS = ([[1, 2, 3, 4, 5], [1, 2, 3]], [[7, 8], [7, 9, 9, 9], [6, 6, 6, 6, 6, 6]], [0, 0, 1], [1.0, 0.0, 1.0])


def test_costs_are_counted_with_and_without_sharing():
    batches = pack(rollouts_of(*TWO_GROUPS), 100)
    counted = {"tokens_unshared": 7 + 9 + 9, "tokens_prompts_once": 5 + 2 + 4 + 3 + 6}
    trained = 5 + 1 + 1 + 3 + 6  # the row has both completions' 7 once, and the prompts' 1, 2, 3 too
    # A row is 256 tokens long at least.
    assert cost_metrics(batches, sharing=True) == counted | {"tokens_trained": trained, "pads": 256 - trained}
    assert cost_metrics(batches, sharing=False) == counted | {"tokens_trained": 25, "pads": 3 * 9 - 25}


def test_idle_micro_batches_count_in_what_is_encoded_alone():
    busy, idle = pack(rollouts_of([[1, 2, 3]], [[4, 4], [5]], [0, 0], [1.0, 0.0]), 100, world_size=2)
    assert cost_metrics([idle], sharing=True) == {
        "tokens_unshared": 0,
        "tokens_prompts_once": 0,
        "tokens_trained": 4,
        "pads": 252,
    }
    assert cost_metrics([busy], sharing=True) == {
        "tokens_unshared": 9,
        "tokens_prompts_once": 6,
        "tokens_trained": 6,
        "pads": 250,
    }
    as_busy = replace(idle, rollouts=replace(idle.rollouts, loss_mask=None))
    assert cost_metrics([as_busy], sharing=True)["tokens_unshared"] == 4


def random_batches(rng: random.Random, world_size: int) -> list[MicroBatch]:
    groups = [group for group in range(6) for _ in range(rng.randint(1, 5))]
    completions = [[rng.randrange(50) for _ in range(rng.randint(1, 9))] for _ in groups]
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 20))] for _ in range(6)]
    return pack(rollouts_of(prompts, completions, groups, [1.0] * len(groups)), 80, world_size)


def test_costs_of_all_processes_add_up_to_those_of_one():
    differ = 0
    for seed in range(50):
        (alone,) = [cost_metrics(random_batches(random.Random(seed), 1), sharing=True)]
        for world_size in (2, 3, 4):
            batches = random_batches(random.Random(seed), world_size)
            parts = [cost_metrics([b for b in batches if b.rank == rank], sharing=True) for rank in range(world_size)]
            summed = {name: sum(part[name] for part in parts) for name in alone}
            assert summed == cost_metrics(batches, sharing=True)
            for name in ("tokens_unshared", "tokens_prompts_once"):  # no group is over the budget
                assert summed[name] == alone[name]
            differ += summed["tokens_trained"] != alone["tokens_trained"]
    assert differ > 10  # idle micro-batches are encoded, and fewer tokens are merged


def peaks(rank: int, device: str) -> list[float]:
    """GiB at first, with a quarter of one allocated, and with that freed."""
    device = torch.device(device)
    values = [peak_memory_gib(device)]
    quarter = torch.ones(2**26, device=device)
    values.append(peak_memory_gib(device))
    del quarter
    return [*values, peak_memory_gib(device)]


def test_the_peak_grows_by_what_is_allocated_and_does_not_fall(device):
    ((before, within, after),) = run_processes(1, peaks, device)
    assert 0.24 < within - before < 0.3 and within <= after < within + 0.05
    assert before < 4


STEP = {
    "reward": 0.25,
    "completion_tokens": 20.0,
    "sample_s": 1.0,
    "score_s": 0.5,
    "train_s": 2.0,
    "tokens_unshared": 3000.0,
    "tokens_prompts_once": 1200.0,
    "tokens_trained": 1000.0,
    "peak_memory_gib": 1.5,
}
LATER = {
    "reward": 0.75,
    "completion_tokens": 30.0,
    "sample_s": 3.0,
    "score_s": 1.5,
    "train_s": 4.0,
    "tokens_unshared": 5000.0,
    "tokens_prompts_once": 1300.0,
    "tokens_trained": 600.0,
    "peak_memory_gib": 1.25,
}


def test_the_summary_has_every_evaluation_means_of_times_and_tokens_and_the_highest_peak():
    history = [STEP, LATER]
    assert summary(history, {0: 0.1, 2: 0.6, 1: 0.9}).splitlines() == [
        "  step   held-out accuracy   reward   completion tokens",
        "     0               0.100",
        "     1               0.900    0.250                20.0",
        "     2               0.600    0.750                30.0",
        "seconds per step    6.00: sample 2.00, score 1.00, train 3.00",
        "tokens per step     4,000 with every prompt once per completion",
        "                    1,250 with every prompt once (3.2 x fewer)",
        "                    800 is what this run trained on (5.0 x fewer)",
        "peak memory         1.50 GiB",
    ]
    last = summary(history, {0: 0.1, 2: 0.6}).splitlines()[2]
    assert last == "     2               0.600    0.500                25.0"  # means over both steps


def test_rates_are_shares_and_ratios_of_the_sums():
    sums = {"tokens_unshared": 1000, "tokens_trained": 250, "pads": 50, "sample_s": 3.0, "score_s": 1.0, "train_s": 1.0}
    expected = {"sample_fraction": 0.6, "token_ratio": 4.0, "tokens_per_s": 200.0, "pad_waste": 50 / 300}
    assert rates(sums) == pytest.approx(expected)
