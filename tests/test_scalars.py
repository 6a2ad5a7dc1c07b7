"""Numbers from numpy, as data sets and samplers hold them, mean at every door what Python's own mean."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from baseline import tiny_model

from flexpg import (
    ModelShape,
    PrefixTree,
    Rollouts,
    SamplingParams,
    block_mask,
    grpo_loss,
    loss_normalizer,
    pack,
    report,
    sample,
)
from flexpg.integrations import torchtune
from flexpg.training.rewards import Reward

LOGPROBS = torch.tensor([[0.0, -0.5], [-1.0, -0.2]])
MASK = torch.ones(2, 2).bool()


def loss(number):
    options = {"epsilon": number(0.25), "epsilon_high": number(0.5), "beta": number(0.125)}
    tables = LOGPROBS, LOGPROBS - 0.4, torch.tensor([1.0, -1.0]), MASK
    return grpo_loss(*tables, ref_logprobs=LOGPROBS - 0.1, **options)[0]


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction])
def test_a_loss_takes_any_real_number(number):
    assert torch.equal(loss(number), loss(float))


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_a_length_is_any_whole_number(whole):
    assert loss_normalizer(MASK, "dr_grpo", whole(9)) == 18


@pytest.mark.parametrize("whole", [np.int64, np.uint8])
def test_a_window_is_any_whole_number_and_is_kept_as_pythons(whole):
    tree = PrefixTree.from_lengths([whole(200)], [[whole(100), whole(3)]])
    ours, theirs = block_mask(tree, whole(130)), block_mask(tree, 130)
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks) and torch.equal(ours.kv_indices, theirs.kv_indices)
    assert type(ours.window) is int and ours.for_window(whole(7)) is ours.for_window(7)


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction])
def test_completions_are_drawn_with_any_real_number(number):
    model = tiny_model("llama3")

    def drawn(number, whole):
        params = SamplingParams(whole(2), number(0.5), whole(3), number(0.75), [whole(7)])
        uniforms = torch.linspace(0, 0.9, 8, dtype=torch.float64).view(4, 2)
        samples = sample(torchtune.decoder(model), torchtune.output(model), [[1, 2], [3]], whole(2), params, uniforms)
        return *samples.completions, samples.logprobs

    ours, theirs = drawn(number, np.int64), drawn(float, int)
    assert len(ours) == len(theirs) == 5 and all(map(torch.equal, ours, theirs))


def test_budgets_and_weights_are_any_number():
    prompts, completions = [torch.tensor([1, 2])], [torch.tensor([3]), torch.tensor([4, 5])]
    rollouts = Rollouts(prompts, completions, torch.tensor([0, 0]), torch.tensor([0.0, 1.0]))
    assert [batch.indices for batch in pack(rollouts, np.int64(8), np.int32(1))] == [[0, 1]]
    shape = ModelShape(2, 8, 2, 1, 4, 16, 50, 576)
    assert list(report(rollouts, shape, max_tokens=[np.int64(8)]).by_max_tokens) == [8]
    assert Reward("exact", float, np.float32(0.5)).weight == 0.5
