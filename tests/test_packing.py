"""Micro-batches hold every rollout once, keep groups whole where they fit, and stay under the budget."""

import random

import pytest
import torch

from flexpg.packing import pack
from flexpg.rollouts import Rollouts


def random_rollouts(rng: random.Random) -> Rollouts:
    prompts = [torch.randint(0, 9, (rng.randint(1, 20),)) for _ in range(rng.randint(1, 6))]
    group_ids = [g for g in range(len(prompts)) for _ in range(rng.randint(1, 7))]
    rng.shuffle(group_ids)
    completions = [torch.randint(0, 9, (rng.randint(1, 12),)) for _ in group_ids]
    return Rollouts(prompts, completions, torch.tensor(group_ids), torch.ones(len(group_ids)))


@pytest.mark.parametrize("sharing", [True, False])
def test_every_rollout_is_in_one_micro_batch_and_none_is_over_the_budget(sharing):
    for seed in range(300):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rollouts, max_tokens = random_rollouts(rng), rng.randint(32, 120)
        batches = pack(rollouts, max_tokens, sharing=sharing)
        assert sorted(n for batch in batches for n in batch.indices) == list(range(len(rollouts)))
        for batch in batches:
            tokens = batch.tree.num_tokens if sharing else int(batch.tree.lengths.sum())
            assert tokens <= max_tokens
            for row, n in enumerate(batch.indices):
                node = batch.tree.node[row, : batch.tree.lengths[row]]
                assert torch.equal(batch.tree.tokens[node], rollouts.sequences[n])


def test_a_group_that_fits_is_not_torn_apart():
    for seed in range(300):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rollouts, max_tokens = random_rollouts(rng), rng.randint(40, 200)
        batches = pack(rollouts, max_tokens)
        for group, prompt in enumerate(rollouts.prompts):
            members = {n for n, g in enumerate(rollouts.group_ids.tolist()) if g == group}
            fits = len(prompt) + sum(len(rollouts.completions[n]) for n in members) <= max_tokens
            holders = [batch for batch in batches if members & set(batch.indices)]
            assert len(holders) == 1 or not fits


def test_groups_share_a_micro_batch_while_they_fit():
    completions = [torch.tensor([n, n]) for n in range(4)]
    rollouts = Rollouts([torch.arange(5)] * 2, completions, torch.tensor([0, 0, 1, 1]), torch.ones(4))
    assert [b.indices for b in pack(rollouts, 18)] == [[0, 1, 2, 3]]
    assert [b.indices for b in pack(rollouts, 17)] == [[0, 1], [2, 3]]


def test_an_oversized_group_is_split_and_its_prompt_encoded_once_per_part():
    completions = [torch.tensor([10 * n, 1]) for n in range(4)]
    rollouts = Rollouts([torch.arange(5)], completions, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert [(b.indices, b.tree.num_tokens) for b in pack(rollouts, 9)] == [([0, 1], 9), ([2, 3], 9)]
    assert [b.indices for b in pack(rollouts, 9, sharing=False)] == [[0], [1], [2], [3]]


def test_a_rollout_over_the_budget_is_refused_by_name():
    completions = [torch.tensor([1]), torch.arange(6)]
    rollouts = Rollouts([torch.arange(5)], completions, torch.zeros(2, dtype=torch.long), torch.ones(2))
    with pytest.raises(ValueError, match=r"rollout 1 of 2 has 5 \+ 6 tokens, over max_tokens=10; raise max_tokens"):
        pack(rollouts, 10)
