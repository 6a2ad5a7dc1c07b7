"""Costs are counts of the real masks."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper_figure import GROUPS, NAMED, PROMPTS, PUBLISHED, RATIOS, SHAPES, counted_ratio
from flexpg.analysis.flops import (
    Cost,
    Flops,
    ModelShape,
    activation_bytes,
    dense_cost,
    group_cost,
    shared_cost,
    update_flops,
)
from flexpg.masks import dense_mask
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

ROOT = Path(__file__).parent.parent
SHAPE = ModelShape(3, 8, 2, 1, 4, 16, vocab_size=50, layer_weights=576, last_weights=128)


def test_costs_count_the_pairs_of_the_masks():
    for seed in range(100):
        rng = random.Random(seed)
        sequences = [[rng.randrange(2) for _ in range(rng.randint(1, 30))] for _ in range(rng.randint(1, 8))]
        tree = PrefixTree.from_sequences(sequences)
        visible = dense_mask(tree.end[: tree.num_tokens])
        assert shared_cost(tree) == Cost(tree.num_tokens, int(visible.sum()))
        causal = sum(int(torch.ones(len(s), len(s)).tril().sum()) for s in sequences)
        assert dense_cost(tree) == Cost(sum(map(len, sequences)), causal)


def test_a_group_costs_its_prompt_once_and_its_completions_in_full_even_if_they_are_equal():
    same = torch.tensor([7, 7])
    rollouts = Rollouts([torch.arange(3)], [same, same], torch.tensor([0, 0]), torch.ones(2))
    assert group_cost(rollouts) == Cost(3 + 2 + 2, 1 + 2 + 3 + (4 + 5) + (4 + 5))
    assert shared_cost(PrefixTree.from_sequences(rollouts.sequences)) == Cost(5, 15)


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_flops_are_those_counted_by_hand():
    cost, predicted = Cost(tokens=10, attention_pairs=40), 6
    forward = Flops(linear=3 * 10 * 2 * 576, attention=3 * 40 * 2 * (4 + 4) * 2, output=6 * 2 * 8 * 50)
    flops = update_flops(cost, predicted, SHAPE)
    assert flops == Flops(3 * forward.linear, 3 * forward.attention, 4 * forward.output)
    assert flops.total == flops.linear + flops.attention + flops.output
    once = update_flops(cost, predicted, SHAPE, recomputed_output=False)
    assert once == replace(flops, output=3 * forward.output)
    again = update_flops(cost, predicted, SHAPE, activation_checkpointing=True)
    assert again.linear == flops.linear + 3 * 10 * 2 * (576 - 128)
    assert (again.attention, again.output) == (4 * forward.attention, flops.output)


def test_flops_are_added_up_over_micro_batches():
    first, second = Cost(10, 40), Cost(7, 20)
    whole = update_flops(first + second, 5, SHAPE).total
    assert whole == update_flops(first, 3, SHAPE).total + update_flops(second, 2, SHAPE).total


def test_checkpointing_keeps_a_layers_input_alone():
    cost = Cost(tokens=1000, attention_pairs=0)

    def growth(**options) -> int:
        """Bytes of one layer more."""
        sizes = [activation_bytes(cost, 1, replace(SHAPE, num_layers=n), **options) for n in (10, 11)]
        return sizes[1] - sizes[0]

    assert growth(itemsize=2, activation_checkpointing=True) == 1000 * 2 * 8
    assert growth(itemsize=4, activation_checkpointing=True) == 1000 * 4 * 8
    # In float32: two norms of three tensors, q, k, v, output and logsumexp, and four tensors in the MLP.
    assert growth(itemsize=4) == 1000 * 4 * (6 * 8 + (8 + 4 + 4 + 8 + 2) + 4 * 16)
    # In bfloat16 a norm's input, and the logsumexp, are in float32.
    assert growth(itemsize=2) == 1000 * (2 * 8 * (4 + 2 + 2) + 2 * (8 + 4 + 4 + 8) + 4 * 2 + 2 * 4 * 16)
    assert growth(itemsize=4, expanded_kv=True) == growth(itemsize=4) + 1000 * 4 * 2 * 4


def test_logits_take_memory_a_chunk_at_a_time():
    wide = replace(SHAPE, vocab_size=100_000)
    sizes = [activation_bytes(Cost(4096, 0), predicted, wide, itemsize=4) for predicted in (1024, 2048, 4096)]
    a_chunks_gradient = 4 * 8 * 100_000
    assert sizes[1] - sizes[0] == a_chunks_gradient + 1024 * 4 * 8
    assert sizes[2] - sizes[1] == 2048 * 4 * 8


# ---- docs/cost.md --------------------------------------------------------------------------------------------------

DOCUMENT = ROOT / "docs/cost.md"
RESULT = json.loads((ROOT / "benchmarks/results/paper_figure_cpu.json").read_text())


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(snippet, {})
    assert capsys.readouterr().out.count("FLOPs") == 2


def test_the_page_quotes_the_committed_benchmark():
    document = " ".join(DOCUMENT.read_text().split())
    assert {(cell["group"], cell["ratio"]) for cell in RESULT["cells"]} == {(g, r) for g in GROUPS for r in RATIOS}
    largest = max(cell["counted_4096"] / cell["counted_4096_with_output"] for cell in RESULT["cells"])
    assert f"up to {largest - 1:.0%} higher" in document
    assert f"Log-probabilities add up to the same within {RESULT['largest_logprob_difference']:.0e}" in document
    saved = sorted(cell["measured_seconds"] / cell["measured_flops"] for cell in RESULT["cells"])
    assert f"ratio of seconds is {saved[0]:.2f} to {saved[-1]:.2f} times that of FLOPs" in document


def test_the_cost_model_is_what_the_committed_benchmark_says():
    for cell in RESULT["cells"]:
        group, ratio = cell["group"], cell["ratio"]
        assert cell["published"] == PUBLISHED[group][RATIOS.index(ratio)]
        assert cell["measured_flops"] == cell["counted_here"]
        for prompt in PROMPTS:
            counted = counted_ratio(prompt, ratio, group, SHAPES[NAMED])
            assert cell[f"counted_{prompt}"] == pytest.approx(counted)


def test_published_cells_that_are_not_reproduced_are_named():
    """Within 5 % at P = 4096 but for those that the page lists; three of them no decoder at all can reach."""
    apart, beyond = [], []
    for cell in RESULT["cells"]:
        difference = cell["published"] / cell["counted_4096"] - 1
        if abs(difference) > 0.05:
            apart.append(f"| {cell['group']} | {cell['ratio']:g} | {difference:+.0%} |")
        if cell["published"] > cell["tokens"] * 1.005:  # read off to two decimals
            beyond.append((cell["group"], cell["ratio"]))
    document = DOCUMENT.read_text()
    assert all(row in document for row in apart)
    assert beyond == [(16, 0.5), (16, 1), (16, 2)]
