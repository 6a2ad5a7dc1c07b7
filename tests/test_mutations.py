"""The table of mutations: every edit applies, every test exists, and a harmless edit survives."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.mutations import MUTATIONS, ROOT, main, mutated, parse, table

TESTS = ROOT / "tests"


def test_every_mutation_is_one_edit_that_changes_the_code():
    unchanged = {file: ast.dump(ast.parse((ROOT / file).read_text())) for file in {m.file for m in MUTATIONS}}
    for mutation in MUTATIONS:
        compile(mutated(mutation), mutation.file, "exec")
        assert ast.dump(ast.parse(mutated(mutation))) != unchanged[mutation.file], mutation.name


def test_mutations_have_distinct_names_and_edits():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) == len({(m.file, m.old, m.new) for m in MUTATIONS})
    assert len(MUTATIONS) >= 150 and len({m.file for m in MUTATIONS}) >= 25


def test_every_mutation_names_a_test_of_this_suite():
    functions = {
        path.name: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in TESTS.glob("test_*.py")
    }
    for mutation in MUTATIONS:
        file, _, test = mutation.test.partition("::")
        assert test.partition("[")[0] in functions[file], mutation.test


def test_docs_contain_the_table():
    page = (ROOT / "docs/correctness.md").read_text()
    assert f"<!-- mutations -->\n{table()}\n<!-- end -->" in page, "python -m tests.mutations --table prints it"


# The runner

KILLED = "the standard deviation is the biased one"
CANARIES = """
==== flexpg/rollouts.py

a docstring is edited
- Rollouts, the container
+ Rollouts, a container
killed by test_advantages.py::test_group_advantages_by_hand

an import is misspelled
- import torch
- from torch import Tensor
+ import tohrch
+ from torch import Tensor
killed by test_advantages.py::test_group_advantages_by_hand
"""
SCRIPT = f"""
from tests import mutations

mutations.MUTATIONS += mutations.parse({CANARIES!r})
mutations.main([{KILLED!r}, *(mutation.name for mutation in mutations.parse({CANARIES!r}))])
"""


@pytest.mark.slow
def test_runner_reports_killed_surviving_and_broken_mutations(tmp_path):
    before = (ROOT / "flexpg/rollouts.py").read_text()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    output = result.stdout
    assert result.returncode == 1 and "all 1 tests pass without a mutation" in output, output + result.stderr
    assert f"| {KILLED} | `flexpg/advantages.py` | `test_advantages.py`: `test_group_advantages_by_hand` |" in output
    assert "| a docstring is edited | `flexpg/rollouts.py` | SURVIVES" in output
    assert "| an import is misspelled | `flexpg/rollouts.py` | ERROR" in output
    assert "No module named 'tohrch'" in output and output.endswith("1 of 3 killed\n")
    assert not list(tmp_path.glob("flexpg-mutations-*")) and (ROOT / "flexpg/rollouts.py").read_text() == before


def test_edit_of_text_that_does_not_occur_once_raises():
    for old in ("no such text", "return"):
        (mutation,) = parse(f"==== flexpg/masks.py\n\nsome name\n- {old}\n+ else\nkilled by nobody")
        count = (ROOT / mutation.file).read_text().count(old)
        with pytest.raises(ValueError, match=f"some name: '{old}' must occur once in flexpg/masks.py, got {count} "):
            mutated(mutation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["no such name"], "no mutation is called 'no such name'"), (["--all-tests"], "--all-tests needs one NAME")],
)
def test_command_that_names_no_mutation_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
