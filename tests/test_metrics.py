"""Tests of the metrics of a step, compared with counts made by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from processes import run_processes

from flexpg.analysis.flops import ModelShape
from flexpg.micro_batches import MicroBatch
from flexpg.packing import pack
from flexpg.rollouts import Rollouts
from flexpg.training.episodes import Episode, Turn
from flexpg.training.metrics import (
    cost_metrics,
    episode_metrics,
    flop_ratio,
    format_summary,
    has_spread,
    peak_memory_gib,
    rates,
)

SHAPE = ModelShape(2, 8, 2, 1, 4, 16, vocab_size=10, layer_weights=600)


def make_rollouts(prompts: list[list[int]], completions: list[list[int]], groups: list[int], rewards: list[float]):
    prompts, completions = ([torch.tensor(tokens) for tokens in texts] for texts in (prompts, completions))
    return Rollouts(prompts, completions, torch.tensor(groups), torch.tensor(rewards))


def costs(minibatches: list[list[MicroBatch]], is_shared: bool = True, keep_padding: bool = True) -> dict[str, float]:
    return cost_metrics(minibatches, is_shared, SHAPE, keep_padding)


def test_episode_metrics_are_means_over_episodes_and_groups():
    def episode(*lengths: int, is_finished: bool = True) -> Episode:
        turns = [Turn(torch.ones(9), torch.ones(length), torch.zeros(length), is_finished) for length in lengths]
        return Episode(turns, is_finished=is_finished)

    groups = [[episode(1), episode(2, 3)], [episode(4), episode(5, is_finished=False)], [episode(6), episode(7)]]
    rewards = torch.tensor([[3.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    assert episode_metrics(groups, rewards) == pytest.approx(
        {
            "reward": 18 / 6,
            "reward_std": 2**0.5 / 3,  # that of 3 and 1 is unbiased
            "groups_without_spread": 2 / 3,
            "completion_tokens": 28 / 6,
            "truncated": 1 / 6,
            "turns": 7 / 6,
        }
    )
    assert has_spread(rewards).tolist() == [True, False, False]


# Groups 0 and 1 have prompts of 5 and 3 tokens; 0 has completions of 2 and 4 that start alike, 1 has one of 6.
TWO_GROUPS = ([[1, 2, 3, 4, 5], [1, 2, 3]], [[7, 8], [7, 9, 9, 9], [6, 6, 6, 6, 6, 6]], [0, 0, 1], [1.0, 0.0, 1.0])


def test_costs_with_sharing_and_of_the_baseline():
    batches = pack(make_rollouts(*TWO_GROUPS), 100)
    counted = {"tokens_baseline": 7 + 9 + 9, "tokens_prompts_once": 5 + 2 + 4 + 3 + 6, "tokens_recomputed": 0}
    encoded = 5 + 1 + 1 + 3 + 6  # both completions' 7 is encoded once, and so are both prompts' 1, 2, 3
    shared, baseline = costs([batches]), costs([batches], is_shared=False)
    ratio = shared.pop("flop_ratio")
    assert shared == counted | {"tokens_encoded": encoded, "padding": 256 - encoded}  # at least 256 tokens
    assert costs([batches], keep_padding=False)["padding"] == 0
    assert baseline == counted | {"tokens_encoded": 25, "padding": 3 * 9 - 25, "flop_ratio": 1.0}
    pairs = sum(n + 1 for length in (7, 9, 9) for n in range(length))
    packed_pairs = sum(range(1, 6)) + 6 + 7 + (7 + 8 + 9) + sum(range(4, 10))
    assert ratio == pytest.approx((25 * 2 * 600 + pairs * 2 * 16) / (encoded * 2 * 600 + packed_pairs * 2 * 16))


def test_cached_prompt_is_counted_once():
    rollouts = make_rollouts([list(range(10, 40))], [[n] * 5 for n in range(4)], [0] * 4, [1.0] * 4)
    batches = pack(rollouts, 41)
    assert [(len(batch.indices), batch.cached_tokens) for batch in batches] == [(2, 30), (2, 30)]
    metrics = costs([batches])
    assert (metrics["tokens_encoded"], metrics["tokens_recomputed"]) == (30 + 4 * 5, 0)
    assert metrics["padding"] == 3 * 256 - 50  # the prompt's own sequence, and one for each micro-batch's completions
    assert costs([batches], keep_padding=False)["padding"] == 256 - 30
    assert metrics["flop_ratio"] == pytest.approx(costs([pack(rollouts, 100)])["flop_ratio"])
    separate = [replace(batch, cached_tokens=0, cache_id=n) for n, batch in enumerate(batches)]
    metrics = costs([separate])
    assert (metrics["tokens_encoded"], metrics["tokens_recomputed"], metrics["padding"]) == (80, 30, 2 * 256 - 80)


def test_idle_micro_batch_counts_in_what_is_encoded_only():
    busy, idle = pack(make_rollouts([[1, 2, 3]], [[4, 4], [5]], [0, 0], [1.0, 0.0]), 100, world_size=2)
    assert idle.is_idle and not busy.is_idle
    metrics = costs([[busy, idle]])
    assert metrics.pop("flop_ratio") == pytest.approx((9 * 1200 + 25 * 32) / (8 * 1200 + (19 + 3) * 32))
    assert metrics == {
        "tokens_baseline": 9,
        "tokens_prompts_once": 6,
        "tokens_encoded": 6 + 2,
        "tokens_recomputed": 0,
        "padding": 2 * 256 - 8,
    }


def test_costs_of_minibatches_add_up():
    prompt, completions = list(range(10, 40)), [[n] * 5 for n in range(8)]
    rollouts = make_rollouts([prompt, prompt[1:]], completions, [0] * 4 + [1] * 4, [1.0] * 8)
    minibatches = [pack(rollouts, 41, indices=range(first, first + 4)) for first in (0, 4)]
    both, *single = (costs(each) for each in (minibatches, minibatches[:1], minibatches[1:]))
    for name in set(both) - {"flop_ratio"}:
        assert both[name] == single[0][name] + single[1][name], name
    assert both["tokens_encoded"] == both["tokens_prompts_once"] == 30 + 29 + 8 * 5
    ratios = sorted(each["flop_ratio"] for each in single)
    assert ratios[0] < both["flop_ratio"] < ratios[1]


def test_flop_ratio_is_large_for_long_prompts_and_near_1_for_short_ones():
    long = make_rollouts([[1] * 40], [[2, 3], [4]], [0, 0], [1.0, 0.0])
    short = make_rollouts([[1]], [[2] * 30, [4] * 30], [0, 0], [1.0, 0.0])
    assert flop_ratio([pack(long, 100)], SHAPE) == pytest.approx(1.9, abs=0.05)
    assert flop_ratio([pack(short, 100)], SHAPE) == pytest.approx(1.012, abs=5e-4)


def random_batches(rng: random.Random, world_size: int) -> list[MicroBatch]:
    groups = [group for group in range(6) for _ in range(rng.randint(1, 5))]
    completions = [[rng.randrange(50) for _ in range(rng.randint(1, 9))] for _ in groups]
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 20))] for _ in range(6)]
    return pack(make_rollouts(prompts, completions, groups, [1.0] * len(groups)), 80, world_size=world_size)


def test_work_on_several_ranks_differs_only_by_what_is_recomputed_or_idle():
    differ = 0
    for seed in range(50):
        single = costs([random_batches(random.Random(seed), 1)])
        for world_size in (2, 3, 4):
            batches = random_batches(random.Random(seed), world_size)
            metrics, idle = costs([batches]), sum(batch.is_idle for batch in batches)
            for name in ("tokens_baseline", "tokens_prompts_once"):  # no group exceeds the budget
                assert metrics[name] == single[name]
            again = metrics["tokens_recomputed"] - single["tokens_recomputed"]
            assert metrics["tokens_encoded"] - single["tokens_encoded"] == again + 2 * idle
            differ += again > 0
    assert differ > 10  # ranks merge fewer tokens


def measure_peaks(rank: int, device: str) -> list[float]:
    """Return the peak before a quarter of a GiB is allocated, with it, and after it is freed."""
    device = torch.device(device)
    values = [peak_memory_gib(device)]
    quarter = torch.ones(2**26, device=device)
    values.append(peak_memory_gib(device))
    del quarter
    return [*values, peak_memory_gib(device)]


def test_peak_memory_grows_by_what_is_allocated_and_stays(device):
    ((before, within, after),) = run_processes(1, measure_peaks, device)
    assert 0.24 < within - before < 0.3 and within <= after < within + 0.05
    assert before < 4


def step_metrics(reward: float, tokens: float, seconds: list[float], counts: list[float], peak: float):
    names = ("sample_s", "logprobs_s", "train_s", "tokens_baseline", "tokens_prompts_once", "tokens_encoded")
    values = dict(zip(names, [*seconds, *counts], strict=True))
    return {"reward": reward, "completion_tokens": tokens, "peak_memory_gib": peak} | values


def test_summary_has_every_evaluation_mean_costs_and_the_highest_peak():
    history = [
        step_metrics(0.25, 20.0, [1.0, 0.5, 2.0], [3000.0, 1200.0, 1000.0], 1.5),
        step_metrics(0.75, 30.0, [3.0, 1.5, 4.0], [5000.0, 1300.0, 600.0], 1.25),
    ]
    assert format_summary(history, {0: 0.1, 2: 0.6, 1: 0.9}).splitlines() == [
        "  step   held-out accuracy   reward   completion tokens",
        "     0               0.100",
        "     1               0.900    0.250                20.0",
        "     2               0.600    0.750                30.0",
        "seconds per step    6.00: sampling and rewards 2.00, old and reference log-probabilities 1.00, update 3.00",
        "tokens per step     4,000 with every prompt once per completion (baseline)",
        "                    1,250 with every prompt once (3.2x fewer)",
        "                    800 encoded in this run (5.0x fewer)",
        "peak memory         1.50 GiB",
    ]
    last = format_summary(history, {0: 0.1, 2: 0.6}).splitlines()[2]
    assert last == "     2               0.600    0.500                25.0"  # means over both steps


def test_rates_are_ratios_of_sums():
    sums = {"tokens_baseline": 1000, "tokens_encoded": 250, "padding": 50}
    seconds = {"sample_s": 3.0, "logprobs_s": 1.0, "train_s": 1.0}
    expected = {"sample_fraction": 0.6, "token_ratio": 4.0, "tokens_per_s": 200.0, "padding_fraction": 50 / 300}
    assert rates(sums | seconds) == pytest.approx(expected)
