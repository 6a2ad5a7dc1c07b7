"""Benchmarks compare equal computations and run; tables and figures are those of the committed results."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass

import pytest
import torch
from baseline import in_float64
from PIL import Image

from benchmarks import attention, registers, sampling, tables
from benchmarks.__main__ import BENCHMARKS
from benchmarks.models import build_decoder
from benchmarks.record import TINY_RESULTS, run
from benchmarks.timing import alternate, paired_ratio, quartiles
from benchmarks.update import Case, Group, implementations, update

CPU = torch.device("cpu")
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted(tables.RESULTS.glob("*.json"))}
CASES = [Case(40, (9, 9, 9), "tiny"), Case(40, (3, 12, 7), "tiny", checkpointing=True)]


@pytest.mark.parametrize("case", CASES, ids=["equal", "uneven"])
def test_update_implementations_have_equal_logprobs_and_gradients(case):
    model = in_float64(build_decoder(case.model, CPU))
    group = Group(case, model.tok_embeddings.num_embeddings, CPU)
    found = {}
    for name, implementation in implementations(model, group).items():
        logprobs = update(model, group, implementation)
        found[name] = logprobs, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for name, values in found.items():
        tolerance = 1e-5 if name in ("torchtune", "prefix_grouper") else 1e-12  # the logits of these are float32
        for value, expected in zip(values, found["baseline"], strict=True):
            assert (value - expected).norm() <= tolerance * expected.norm(), name


def test_masks_of_several_loads_are_the_same_mask():
    case = attention.CASES["tiny"][1]
    assert case.groups == 3
    tree = attention.build_tree(case)
    for mask_mod in attention.mask_mods_by_loads(tree).values():
        attention.check_mask(tree, attention.with_mask_mod(attention.block_mask(tree), mask_mod))


def test_samplers_agree_and_their_bytes_are_those_of_keys_and_values():
    case = sampling.Case(prompt=20, group=3, completion=5, width=64, layers=2)
    samplers = sampling.build_samplers(case, CPU)
    prompts = torch.arange(40).view(2, 20)
    sampling.check_greedy(samplers, prompts)
    per_token = 2 * case.layers * 64 * 4  # keys and values of one head of 64 in float32
    for name, sampler in samplers.items():
        samples = sampler.sample(prompts, case.group, 0)
        assert samples.shape == (6, 5) and len(samples.unique(dim=0)) > 1, name
        shared, stored = (2 * 20, 6 * 5) if name == "flexpg" else (0, 6 * (20 + 5 - 1))  # the last token is not stored
        assert sampler.cache_bytes(prompts, case.group) == per_token * (shared + stored), name
    samplers["transformers"].model.lm_head.weight.data.neg_()
    with pytest.raises(RuntimeError, match="greedy tokens of transformers differ from flexpg's at 0"):
        sampling.check_greedy(samplers, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kinds in BENCHMARKS.items() if "tiny" in kinds])
def test_benchmark_runs_and_its_tables_are_made(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"benchmarks.{name}").main(["--tiny", "--repeats", "2"])
    (path,) = (tmp_path / TINY_RESULTS).iterdir()
    result = json.loads(path.read_text())
    assert {"command", "repeats", "cases", "failed", "machine", "versions", "commit"} == set(result)
    assert result["command"].endswith("--tiny --repeats 2") and not result["failed"]
    made = [make(result) for key, make in tables.TABLES.items() if key.partition(".")[0] == name]
    for header, _, *rows in map(str.splitlines, made):
        assert rows and all(row.count("|") == header.count("|") for row in rows)
    assert made


def test_registers_names_the_private_parts_that_a_version_lacks(monkeypatch):
    registers.check_private()
    monkeypatch.setattr(
        registers, "PRIVATE", {"torch.gone": ("own",), "torch._inductor.graph": ("GraphLowering.gone",)}
    )
    with pytest.raises(
        ImportError, match=r"lack torch\.gone\.own, torch\._inductor\.graph\.GraphLowering\.gone, which"
    ):
        registers.check_private()


def test_run_keeps_the_results_of_other_cases_if_one_fails(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Number:
        value: int

    def measure(case, device, repeats):
        if case.value == 2:
            raise RuntimeError("no kernel for 2")
        return {"double": 2 * case.value}

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1 of its cases failed"):
        run("numbers", "", {"tiny": [Number(1), Number(2), Number(3)]}, measure, ["--tiny"])
    result = json.loads((tmp_path / TINY_RESULTS / "numbers_cpu.json").read_text())
    assert result["cases"] == [{"value": 1, "double": 2}, {"value": 3, "double": 6}]
    assert result["failed"] == [{"value": 2, "error": "RuntimeError: no kernel for 2"}]


def test_alternate_reverses_the_order_and_drops_the_warm_up():
    order = []
    times = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU, calls=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"
    assert [len(values) for values in times.values()] == [3, 3]


def test_paired_ratio_is_a_median_of_ratios():
    assert paired_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])["median"] == 3.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 4.0}


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path):
    assert tables.rewritten(path.read_text()) == path.read_text(), "run python -m benchmarks.tables"


@pytest.mark.parametrize("name", ["update", "paper_figure"])
def test_figures_are_those_of_the_committed_results(name):
    checksum = hashlib.sha256((tables.RESULTS / f"{name}_cpu.json").read_bytes()).hexdigest()
    with Image.open(tables.ROOT / f"docs/{name}.png") as figure:
        assert figure.text["Description"] == checksum, f"run python -m docs.figures {name}"


@pytest.mark.parametrize("name", RESULTS)
def test_results_name_their_machine_and_a_clean_commit(name):
    assert {"command", "machine", "versions", "commit"} <= set(RESULTS[name])
    assert RESULTS[name]["commit"] and not RESULTS[name]["commit"].endswith("-dirty")


def test_block_masks_of_the_committed_results_equal_torchs():
    compared = [case[f"equal_to_{other}"] for case in RESULTS["mask_cpu"]["cases"] for other in ("eager", "compiled")]
    assert compared.count(True) >= 8 and False not in compared
