"""The numbers of a step are the ones that a hand would count."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from processes import run_processes

from flexpg.analysis.flops import ModelShape
from flexpg.packing import MicroBatch, pack
from flexpg.rollouts import Rollouts
from flexpg.training.metrics import cost_metrics, peak_memory_gib, rates, rollout_metrics, sharing_pays, summary


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


SHAPE = ModelShape(2, 8, 2, 1, 4, 16, vocab_size=10, layer_weights=600)


def test_costs_are_counted_with_and_without_sharing():
    batches = pack(rollouts_of(*TWO_GROUPS), 100)
    counted = {"tokens_unshared": 7 + 9 + 9, "tokens_prompts_once": 5 + 2 + 4 + 3 + 6, "tokens_recomputed": 0}
    trained = 5 + 1 + 1 + 3 + 6  # the row has both completions' 7 once, and the prompts' 1, 2, 3 too
    shared, unshared = (cost_metrics([batches], sharing, SHAPE) for sharing in (True, False))
    ratio = shared.pop("flop_ratio")
    # A row is 256 tokens long at least.
    assert shared == counted | {"tokens_trained": trained, "pads": 256 - trained}
    assert unshared == counted | {"tokens_trained": 25, "pads": 3 * 9 - 25, "flop_ratio": 1.0}
    pairs = sum(n + 1 for length in (7, 9, 9) for n in range(length))
    packed_pairs = sum(range(1, 6)) + 6 + 7 + (7 + 8 + 9) + sum(range(4, 10))
    assert ratio == pytest.approx((25 * 2 * 600 + pairs * 2 * 16) / (trained * 2 * 600 + packed_pairs * 2 * 16))


def test_a_prompt_that_a_run_encodes_once_is_counted_once():
    prompt, completions = list(range(10, 40)), [[n] * 5 for n in range(4)]
    rollouts = rollouts_of([prompt], completions, [0] * 4, [1.0] * 4)
    batches = pack(rollouts, 41)
    assert [(len(batch.indices), batch.prefix_tokens) for batch in batches] == [(2, 30), (2, 30)]
    metrics = cost_metrics([batches], True, SHAPE)
    assert (metrics["tokens_trained"], metrics["tokens_recomputed"]) == (30 + 4 * 5, 0)
    assert metrics["pads"] == 3 * 256 - 50  # the prompt's row, and one for each micro-batch's completions
    assert metrics["flop_ratio"] == pytest.approx(cost_metrics([pack(rollouts, 100)], True, SHAPE)["flop_ratio"])
    apart = [replace(batch, prefix_tokens=0, run=n) for n, batch in enumerate(batches)]
    metrics = cost_metrics([apart], True, SHAPE)
    assert (metrics["tokens_trained"], metrics["tokens_recomputed"], metrics["pads"]) == (80, 30, 2 * 256 - 80)


def test_rows_without_pads_count_those_of_a_prompt_alone():
    rollouts = rollouts_of([list(range(10, 40))], [[n] * 5 for n in range(4)], [0] * 4, [1.0] * 4)
    for budget, pads in ((100, 0), (41, 256 - 30)):
        assert cost_metrics([pack(rollouts, budget)], True, SHAPE, padded=False)["pads"] == pads


def test_a_run_without_a_prompt_on_this_process_encodes_an_idle_row():
    batches = pack(rollouts_of(*TWO_GROUPS), 100)
    run = [replace(batches[0], rank=rank, run=0) for rank in (0, 0, 1, 1)]
    trained = 4 * batches[0].tree.num_tokens
    assert cost_metrics([run], True, SHAPE)["pads"] == 4 * 256 + 2 * 256 - trained


def test_idle_micro_batches_count_in_what_is_encoded_alone():
    busy, idle = pack(rollouts_of([[1, 2, 3]], [[4, 4], [5]], [0, 0], [1.0, 0.0]), 100, world_size=2)
    assert idle.is_idle and not busy.is_idle
    metrics = cost_metrics([[busy, idle]], True, SHAPE)
    assert metrics.pop("flop_ratio") == pytest.approx((9 * 1200 + 25 * 32) / (8 * 1200 + (19 + 3) * 32))
    assert metrics == {
        "tokens_unshared": 9,
        "tokens_prompts_once": 6,
        "tokens_trained": 6 + 2,
        "tokens_recomputed": 0,
        "pads": 2 * 256 - 8,
    }


def test_mini_batches_cost_what_each_does_alone_even_if_each_is_one_run():
    prompt, completions = list(range(10, 40)), [[n] * 5 for n in range(8)]
    rollouts = rollouts_of([prompt, prompt[1:]], completions, [0] * 4 + [1] * 4, [1.0] * 8)
    minibatches = [pack(rollouts, 41, indices=range(first, first + 4)) for first in (0, 4)]
    both, *alone = (cost_metrics(each, True, SHAPE) for each in (minibatches, *([part] for part in minibatches)))
    for name in set(both) - {"flop_ratio"}:
        assert both[name] == alone[0][name] + alone[1][name], name
    assert both["tokens_trained"] == both["tokens_prompts_once"] == 30 + 29 + 8 * 5
    assert min(each["flop_ratio"] for each in alone) < both["flop_ratio"] < max(each["flop_ratio"] for each in alone)


def test_sharing_pays_by_what_it_saves():
    long = pack(rollouts_of([[1] * 40], [[2, 3], [4]], [0, 0], [1.0, 0.0]), 100)
    assert sharing_pays([long], SHAPE)[0] and "1.9 times fewer FLOPs" in sharing_pays([long], SHAPE)[1]
    short = pack(rollouts_of([[1]], [[2] * 30, [4] * 30], [0, 0], [1.0, 0.0]), 100)
    pays, why = sharing_pays([short], SHAPE)
    assert not pays and why.endswith("sharing would save only 1.2%")


def random_batches(rng: random.Random, world_size: int) -> list[MicroBatch]:
    groups = [group for group in range(6) for _ in range(rng.randint(1, 5))]
    completions = [[rng.randrange(50) for _ in range(rng.randint(1, 9))] for _ in groups]
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 20))] for _ in range(6)]
    return pack(rollouts_of(prompts, completions, groups, [1.0] * len(groups)), 80, world_size)


def test_any_number_of_processes_has_the_same_work_beside_what_is_encoded_again():
    differ = 0
    for seed in range(50):
        alone = cost_metrics([random_batches(random.Random(seed), 1)], True, SHAPE)
        for world_size in (2, 3, 4):
            batches = random_batches(random.Random(seed), world_size)
            metrics, idle = cost_metrics([batches], True, SHAPE), sum(batch.is_idle for batch in batches)
            for name in ("tokens_unshared", "tokens_prompts_once"):  # no group is over the budget
                assert metrics[name] == alone[name]
            again = metrics["tokens_recomputed"] - alone["tokens_recomputed"]
            assert metrics["tokens_trained"] - alone["tokens_trained"] == again + 2 * idle
            differ += again > 0
    assert differ > 10  # fewer tokens are merged


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
