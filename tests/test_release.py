"""Version, changelog and citation agree, and docs/migration.md has a successor for every public name of 0.1.0."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import flexpg

ROOT = Path(__file__).parent.parent
MIGRATION = (ROOT / "docs/migration.md").read_text()
OLD_NAMES = """
Conversation Cost EncodedPrefix Flops MicroBatch ModelShape PrefixTree Report Rollouts Samples SamplingParams SelfCheck
SelfCheckError TreeBlockMask activation_bytes attention block_mask conversation_rollouts dense_cost dense_mask
group_advantages group_block_mask group_cost grpo_loss loss_normalizer pack recomputed_tokens report runs sample
self_check shared_cost token_logprobs token_logprobs_and_entropies tree_mask_mod update_flops
""".split()  # flexpg.__all__ of 0.1.0
ROWS = re.findall(r"(?m)^\| (.+) \| (.+) \|$", MIGRATION)
CODE = re.compile(r"`([^`]+)`")


def names(cell: str) -> list[str]:
    """Return the dotted names of a table's cell, without their arguments."""
    return [match[0] for text in CODE.findall(cell) if (match := re.match(r"(?:_component_: )?([A-Za-z_.]+\w)", text))]


def exists(name: str) -> bool:
    """Return whether a dotted name can be imported, or is an attribute of one that can."""
    first, *rest = name.split(".")
    found, path = (importlib.import_module("flexpg"), "flexpg") if first == "flexpg" else (getattr(flexpg, first), "")
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part):
            if is_dataclass(found) and part in {field.name for field in fields(found)}:
                return True
            try:
                found = importlib.import_module(path)
            except ImportError:
                return False
        else:
            found = getattr(found, part)
    return True


NEW_NAMES = sorted({name for _, new in ROWS for name in names(new) if re.match(r"flexpg\.|[A-Z]\w+\.", name)})


@pytest.mark.parametrize("name", NEW_NAMES)
def test_new_name_of_the_migration_page_exists(name):
    assert exists(name)


def test_every_public_name_of_0_1_0_is_kept_or_on_the_migration_page():
    old = {name for cell, _ in ROWS for name in names(cell)}
    assert not set(OLD_NAMES) - set(flexpg.__all__) - old


def test_new_training_loop_of_the_migration_page_runs():
    diff = re.search(r"(?s)```diff\n(.*?)```", MIGRATION)[1]
    loop = "".join(line[2:] + "\n" for line in diff.splitlines() if line.startswith("+ "))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "recipes/assets/tiny", dtype=torch.float32).train()
    rollouts = flexpg.Rollouts.from_groups([[1, 2, 3]], [[[4, 5], [6]]], [[1, 0]])
    names = {"flexpg": flexpg, "model": model, "rollouts": rollouts, "max_tokens": 256}
    exec(loop, names | {"advantages": flexpg.group_advantages(rollouts)})
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_version_of_package_changelog_and_citation_is_one():
    version, date = re.search(r"(?m)^## ([\d.]+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text()).groups()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {version}\ndate-released: {date}\n" in citation
    assert flexpg.__version__ == version or flexpg.__version__.endswith(".dev0")
