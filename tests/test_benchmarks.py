"""The benchmarks compare like with like, run, and are what README and docs show."""

import json
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from baseline import in_float64

from benchmarks import attention, kernels, mask, memory, pieces, scaling, shapes, tables, update
from benchmarks.models import decoder
from benchmarks.record import TRIALS, run
from benchmarks.turns import by_turns, median, ratio
from benchmarks.update import Case, Group, Way, ways

CPU = torch.device("cpu")
CASES = [Case(40, (9, 9, 9), "tiny"), Case(40, (3, 12, 7), "tiny", checkpointing=True)]


def logprobs_and_gradients(model, group, way):
    logprobs = update.update(model, group, way)
    return logprobs, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def differences(case, without_attention=()):
    """Of every way from the unshared one, in float64: the larger of the log-probabilities' and the gradient's."""
    model = in_float64(decoder(case.model, CPU, torch.float32))
    group = Group(case, model.tok_embeddings.num_embeddings, CPU)
    compared = ways(model, group)
    for name in without_attention:  # plain causal attention over the packed row is left
        compared[name] = Way(compared[name].logprobs)
    found = {name: logprobs_and_gradients(model, group, way) for name, way in compared.items()}
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
    names = ("prefix_grouper", "prefix_grouper_tuned")
    found = differences(CASES[0], without_attention=names)
    assert all(found[name] > 1e-3 for name in names)


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
    assert {"command", "turns", "cases", "failed", "machine", "versions", "commit"} == set(result)
    assert result["command"].endswith("--tiny --turns 2") and not result["failed"]
    for name in TABLES[benchmark]:
        header, _, *rows = tables.TABLES[name](result).splitlines()
        assert rows and all(row.count("|") == header.count("|") for row in rows), name


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path):
    assert tables.page(path.read_text()) == path.read_text(), "write them anew: python -m benchmarks.tables"


def test_a_table_says_what_was_measured():
    def times(middle):
        return {"low_quartile": middle - 0.25, "median": middle, "high_quartile": middle + 0.5}

    case = {"prompt": 2048, "completions": [16, 128], "model": "3B", "checkpointing": True, "bound": 4.0}
    speedups = {"unshared": 5.0, "packed": 3.0, "prefix_grouper": 1.5, "prefix_grouper_tuned": 1.25}  # torchtune: none
    case |= {"update_ms": {"flexpg": times(1500.0)}, "speedup_over": {way: times(x) for way, x in speedups.items()}}
    assert tables.update({"cases": [case]}).splitlines()[2] == (
        "| 2,048 + 2 x 16 to 128, 3B, checkpointing | 1.50 | 4.00 | 0.75 | **5.00** (4.75 to 5.50) | "
        "**3.00** (2.75 to 3.50) | - | **1.50** (1.25 to 2.00) | **1.25** (1.00 to 1.75) |"
    )


def test_the_picture_is_that_of_the_committed_results():
    with Image.open(tables.PICTURE) as picture:
        assert picture.text["Description"] == tables.digest(tables.result_of("update_cpu"))


def test_a_case_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Number:
        value: int

    def measured(case, device, turns):
        if case.value == 2:
            raise RuntimeError("no kernel for 2")
        return {"double": 2 * case.value}

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1 of its cases failed"):
        run("numbers", "", {"tiny": [Number(1), Number(2), Number(3)]}, measured, ["--tiny"])
    result = json.loads((tmp_path / TRIALS / "numbers_cpu.json").read_text())
    assert result["cases"] == [{"value": 1, "double": 2}, {"value": 3, "double": 6}]
    assert result["failed"] == [{"value": 2, "error": "RuntimeError: no kernel for 2"}]


def test_one_turn_is_refused(capsys):
    with pytest.raises(SystemExit):
        pieces.main(["--tiny", "--turns", "1"])
    assert "--turns is 1; a median with quartiles needs 2 or more" in capsys.readouterr().err


def test_results_name_their_machine_and_come_from_a_commit():
    for path in tables.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert {"command", "machine", "versions", "commit"} <= set(result), path.name
        assert not result["commit"].endswith("-dirty"), path.name


def test_masks_were_equal_to_torchs_where_both_were_made():
    cases = tables.result_of("mask_cpu")["cases"]
    compared = [case[f"equal_to_{peer}"] for case in cases for peer in ("eager", "compiled")]
    assert compared.count(True) >= 8 and False not in compared


def test_turns_alternate_and_the_first_does_not_count():
    order = []
    times = by_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU, calls=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"
    assert [len(each) for each in times.values()] == [3, 3]


def test_a_ratio_is_the_median_of_ratios():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])["median"] == 3.0
    assert median([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 4.0}
