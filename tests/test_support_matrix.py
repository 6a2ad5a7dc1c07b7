"""The support matrix finds what is exact, what is refused and what is wrong; here for one type per mechanism."""

from __future__ import annotations

import re

import pytest
import support_matrix
import torch
from support_matrix import Row, all_types, check, rows, table

from flexpg.integrations.transformers import attention as flexpg_attention
from flexpg.integrations.transformers.image_checks import MEASURED

EXACT = ["beam", "deepseek_v3", "dots1", "gemma3n_text", "gemma4_text", "glm4_moe", "minimax_m2", "qwen3_vl_moe"]
REFUSED = ["bart", "falcon", "mamba", "minimax_m3_vl_text", "paligemma"]


@pytest.mark.parametrize("name", [name for name in EXACT if name in all_types()])
def test_type_with_a_mechanism_of_its_own_is_exact(name):
    row = check(name)
    assert (row.outcome, row.detail) == ("exact", "")
    assert max(row.errors) < support_matrix.FLOAT64_TOLERANCE
    assert row.sampled < 1e-6
    assert name != "qwen3_vl_moe" or max(row.images) < support_matrix.FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", [name for name in REFUSED if name in all_types()])
def test_type_that_would_be_inexact_is_refused(name):
    assert check(name).outcome == "refused"


def causal(q, k, v, mask, *, scale=None, **options):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def test_type_whose_completions_see_one_another_is_wrong(monkeypatch):
    monkeypatch.setattr(flexpg_attention, "attention", causal)
    row = check("llama")
    assert row.outcome == "WRONG" and max(row.errors) > 0.01


def test_type_that_crashes_or_hangs_ends_only_itself(monkeypatch):
    def failing(name: str) -> Row:
        if name == "hangs":
            torch.multiprocessing.Event().wait()
        raise SystemExit(3)

    monkeypatch.setattr(support_matrix, "check", failing)
    found = {row.name: row for row in rows(["hangs", "crashes"], timeout_s=2)}
    assert found["hangs"].detail == "not finished after 2 seconds"
    assert found["crashes"].detail == "the process crashed with exit code 3"
    assert "| crashes | the process crashed" in table([*found.values()])


def test_model_types_that_do_not_warn_with_images_are_those_of_the_docs():
    text = support_matrix.TABLE.read_text()
    section = text[text.index("\n## Images") : text.index("\n| types with text only")]
    assert set(re.findall(r"^\| (\w+) \| \d", section, re.MULTILINE)) == MEASURED
