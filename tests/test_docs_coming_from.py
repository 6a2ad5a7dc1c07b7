"""The options that docs/coming_from.md names exist: those of the recipe, and those of TRL's GRPOConfig."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flexpg.training.config import GRPOConfig, LossConfig, SamplingConfig

PAGE = (Path(__file__).parent.parent / "docs/coming_from.md").read_text(encoding="utf-8")
NESTED = {"loss": LossConfig, "sampling": SamplingConfig}


def columns(table: str) -> tuple[list[str], list[str]]:
    """Return the names in the first two columns of a table: the other library's and the recipe's."""
    (text,) = re.findall(rf"<!-- compared: {table} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    rows = [line.split("|")[1:3] for line in text.splitlines()[2:]]
    theirs, ours = (re.findall(r"`([^`]+)`", " ".join(cells)) for cells in zip(*rows, strict=True))
    return theirs, ours


def missing(options: list[str]) -> list[str]:
    """Return those that are no options of the recipe."""
    found = []
    for option in options:
        first, _, second = option.partition(".")
        owner = NESTED[first] if second else GRPOConfig
        if (second or first) not in {field.name for field in fields(owner)}:
            found.append(option)
    return found


@pytest.mark.parametrize(("table", "least"), [("trl", 30), ("verl", 30)])
def test_options_of_the_recipe_exist(table, least):
    options = columns(table)[1]
    assert len(options) >= least
    assert not missing(options)
    assert missing([*options, "loss.gamma", "batch_size"]) == ["loss.gamma", "batch_size"]


def test_options_of_trl_exist():
    trl = pytest.importorskip("trl")
    options = columns("trl")[0][1:]  # without the header
    known = {field.name for field in fields(trl.GRPOConfig)}
    assert len(options) >= 30
    assert set(options) <= known and "num_generation" not in known


def test_defaults_that_the_page_compares():
    defaults = OmegaConf.structured(GRPOConfig)
    assert (defaults.group_size, defaults.loss.epsilon_high, defaults.loss.delta) == (16, 0.28, None)
    assert defaults.sampling.top_k is None and defaults.sharing == "auto" and defaults.param_dtype == "fp32"
