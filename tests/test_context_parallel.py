"""One packed sequence over several ranks: log-probabilities and gradients are those of one rank."""

from __future__ import annotations

import random
from dataclasses import replace

import hf_models as hf
import pytest
import torch
import torch.distributed as dist
from baseline import in_float64, tiny_model
from cases import largest_error
from processes import run_processes
from test_packed_logprobs import checkpoint_layers, packed_update
from torch import Tensor, nn

import flexpg
from flexpg import Rollouts

PROMPT, BUDGET = 300, 480  # tokens; a budget in which the first group's prompt is cached
WHOLE = 4000


def make_rollouts() -> Rollouts:
    """Return two groups over several blocks of 128 tokens, with completions that begin alike and masked tokens."""
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return [rng.randrange(50) for _ in range(length)]

    start = draw(90)
    completions = [[[*start, *draw(60)], [*start, *draw(9)], draw(100), draw(40)], [draw(33), draw(3)]]
    rewards = [[1.0] * len(group) for group in completions]
    rollouts = Rollouts.from_groups([draw(PROMPT), draw(70)], completions, rewards)
    is_tool = torch.rand(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    return replace(rollouts, loss_mask=rollouts.completion_mask & ~is_tool)


def make_model(name: str) -> nn.Module:
    """Return an enabled model in float64."""
    kind, _, options = name.partition(" ")
    if kind == "torchtune":
        model = in_float64(tiny_model(options or "llama3_2", max_seq_len=512))
    else:
        model = hf.tiny_model(kind)
        model = hf.in_float64(hf.with_lora(model) if "lora" in options else model)
    if "checkpointing" in options:
        checkpoint_layers(model)
    return flexpg.enable(model)


def updates(rank: int, cases: list[tuple[str, int]]) -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    rollouts = make_rollouts()
    found = [
        packed_update(make_model(name), rollouts, max_tokens=max_tokens, context_parallel=dist.group.WORLD)
        for name, max_tokens in cases
    ]
    dist.destroy_process_group()
    return found


CASES = [("torchtune", WHOLE), ("torchtune", BUDGET), ("qwen2", WHOLE), ("qwen2", BUDGET), ("qwen2 lora", BUDGET)]
CASES += [("qwen2 checkpointing", WHOLE)]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_context_parallel_equals_one_rank(size):
    expected = [packed_update(make_model(name), make_rollouts(), max_tokens=budget) for name, budget in CASES]
    for found in run_processes(size, updates, CASES):
        for case, own, single in zip(CASES, found, expected, strict=True):
            assert largest_error(own, single) < 1e-12, case
