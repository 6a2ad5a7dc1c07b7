"""The benchmarks compare like with like, run, and are what README and docs show."""

import json

import pytest
import torch

from benchmarks import attention, kernels, mask, memory, pieces, scaling, shapes, tables, update
from benchmarks.models import decoder
from benchmarks.record import TRIALS
from benchmarks.turns import by_turns, median, ratio
from benchmarks.update import Case, Group, Way, ways

CPU = torch.device("cpu")
CASES = [Case(40, (9, 9, 9), "tiny"), Case(40, (3, 12, 7), "tiny", checkpointing=True)]


def logprobs_and_gradients(model, group, way):
    logprobs = update.update(model, group, way)
    return logprobs, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def differences(case, changed=None):
    """Of every way from the unshared one, in float64: the largest log-probability's, and the gradient's, relative."""
    model = decoder(case.model, CPU, torch.float64)
    group = Group(case, model.tok_embeddings.num_embeddings, CPU)
    found = {name: logprobs_and_gradients(model, group, way) for name, way in (changed or ways(model, group)).items()}
    logprobs, gradient = found["unshared"]
    return {
        name: max(((a - logprobs).norm() / logprobs.norm()).item(), ((b - gradient).norm() / gradient.norm()).item())
        for name, (a, b) in found.items()
    }


@pytest.mark.parametrize("case", CASES, ids=["equal", "uneven"])
def test_every_way_of_the_update_has_the_same_log_probabilities_and_gradients(case):
    rounded = {"torchtune", "prefix_grouper"}  # their logits are float32
    for name, difference in differences(case).items():
        assert difference < (1e-5 if name in rounded else 1e-12), name


def test_a_way_that_forgets_its_attention_shows():
    model = decoder("tiny", CPU, torch.float64)
    found = ways(model, Group(CASES[0], model.tok_embeddings.num_embeddings, CPU))
    found["prefix_grouper_tuned"] = Way(found["prefix_grouper_tuned"].logprobs)  # plain causal over the packed row
    assert differences(CASES[0], found)["prefix_grouper_tuned"] > 1e-3


def test_masks_of_more_loads_are_the_same_mask_and_a_wrong_one_is_refused():
    case = attention.CASES["tiny"][1]
    assert case.groups == 3
    tree = attention.tree_of(case)
    flex = attention.block_mask(tree)
    mods = attention.mask_mods_by_loads(tree)
    for mask_mod in mods.values():
        attention.check(tree, attention.with_mask_mod(flex, mask_mod))
    with pytest.raises(AssertionError):
        attention.check(tree, attention.with_mask_mod(flex, lambda b, h, q, kv: mods[3](b, h, q, kv) | (q == kv + 1)))


TABLES = {
    update: ["update_cpu", "update_cpu.short", "update_cpu.nothing_shared"],
    attention: ["attention_cpu"],
    pieces: ["pieces_cpu"],
    kernels: ["kernels_cuda"],
    mask: ["mask_cpu"],
    shapes: ["shapes_cpu"],
    memory: ["memory_cpu.peaks", "memory_cpu.groups"],
    scaling: ["scaling_cpu.growth", "scaling_cpu.parallel"],
}


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", TABLES, ids=lambda module: module.__name__.split(".")[1])
def test_a_benchmark_runs_and_its_tables_are_made(benchmark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmark.main(["--tiny", "--turns", "2"])
    (path,) = (tmp_path / TRIALS).iterdir()
    result = json.loads(path.read_text())
    assert {"command", "turns", "cases", "machine", "versions", "commit"} == set(result)
    for name in TABLES[benchmark]:
        header, _, *rows = tables.TABLES[name](result).splitlines()
        assert rows and all(row.count("|") == header.count("|") for row in rows), name


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path):
    assert tables.page(path.read_text()) == path.read_text(), "write them anew: python -m benchmarks.tables"


def test_results_name_their_machine_and_come_from_a_commit():
    for path in tables.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert {"command", "machine", "versions", "commit"} <= set(result), path.name
        assert not result["commit"].endswith("-dirty"), path.name


def test_turns_alternate_and_the_first_does_not_count():
    order = []
    times = by_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU, calls=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"
    assert [len(each) for each in times.values()] == [3, 3]


def test_a_ratio_is_the_median_of_ratios():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])["median"] == 3.0
    assert median([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 4.0}
