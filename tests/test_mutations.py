"""The table of faults is one of faults: each edit is one, each killer is there, and what changes nothing survives."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.mutations import FAULTS, ROOT, edited, main, parsed, table

TESTS = ROOT / "tests"


def test_every_fault_is_one_edit_that_changes_what_the_file_does():
    unedited = {file: ast.dump(ast.parse((ROOT / file).read_text())) for file in {fault.file for fault in FAULTS}}
    for fault in FAULTS:
        compile(edited(fault), fault.file, "exec")
        assert ast.dump(ast.parse(edited(fault))) != unedited[fault.file], fault.name


def test_every_fault_has_a_name_of_its_own_and_an_edit_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == len({(f.file, f.old, f.new) for f in FAULTS})
    assert len(FAULTS) >= 40 and len({fault.file for fault in FAULTS}) >= 10


def test_every_killer_is_a_test_of_this_suite():
    functions = {
        path.name: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in TESTS.glob("test_*.py")
    }
    for fault in FAULTS:
        file, _, test = fault.killer.partition("::")
        assert test.partition("[")[0] in functions[file], fault.killer


def test_the_page_holds_the_table():
    page = (ROOT / "docs/correctness.md").read_text()
    assert f"<!-- mutations -->\n{table()}\n<!-- end -->" in page, "python -m tests.mutations --table prints it"


def stops_for_a_debugger(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
        else:
            modules = set()
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "breakpoint"
        if is_call or modules & {"pdb", "ipdb"}:
            return True
    return False


def test_no_test_stops_for_a_debugger():
    assert not [path.name for path in TESTS.glob("*.py") if stops_for_a_debugger(path.read_text())]
    for source in ("breakpoint()", "import pdb", "def f():\n    from pdb import set_trace"):
        assert stops_for_a_debugger(source)


# ---- the machinery ---------------------------------------------------------------------------------------------------

KILLED = "the standard deviation is the biased one"
OTHERS = """
==== flexpg/rollouts.py

a docstring says something else
- Rollouts: the door
+ Rollouts: a door
killed by test_rollouts.py::test_advantages_are_what_a_hand_gets

a module is misspelt
- import torch
- from torch import Tensor
+ import tohrch
+ from torch import Tensor
killed by test_rollouts.py::test_advantages_are_what_a_hand_gets
"""
AS_A_USER = f"""
from tests import mutations

mutations.FAULTS += mutations.parsed({OTHERS!r})
names = [{KILLED!r}, *(fault.name for fault in mutations.parsed({OTHERS!r}))]
for chosen in (names[:1], names):
    try:
        mutations.main(chosen)
    except SystemExit as end:
        print("status", end.code)
"""


def test_a_fault_is_killed_a_harmless_edit_survives_and_a_broken_one_is_no_fault(tmp_path):
    before = (ROOT / "flexpg/rollouts.py").read_text()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", AS_A_USER]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120).stdout
    killed = f"| {KILLED} | `flexpg/rollouts.py` | `test_rollouts.py`: `test_advantages_are_what_a_hand_gets` |"
    assert printed.count("without a fault all 1 tests pass") == 2 and printed.count(killed) == 2, printed
    assert "| a docstring says something else | `flexpg/rollouts.py` | SURVIVES" in printed
    assert "| a module is misspelt | `flexpg/rollouts.py` | BROKEN" in printed
    assert "No module named 'tohrch'" in printed
    assert "1 of 1 killed\nstatus 0\n" in printed and printed.endswith("1 of 3 killed\nstatus 1\n")
    assert not list(tmp_path.glob("flexpg-mutations-*"))
    assert (ROOT / "flexpg/rollouts.py").read_text() == before


def test_an_edit_of_what_is_not_there_or_there_twice_is_refused():
    for old in ("no such text", "return"):
        (fault,) = parsed(f"==== flexpg/masks.py\n\nsome name\n- {old}\n+ else\nkilled by nobody")
        count = (ROOT / fault.file).read_text().count(old)
        with pytest.raises(ValueError, match=f"some name: flexpg/masks.py holds '{old}' {count} times; it needs one"):
            edited(fault)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such fault"], "no fault is called 'no such fault'"),
        (["--all-tests"], "give -j 1 or more, --all-tests one NAME"),
        (["-j", "0"], "give -j 1 or more"),
    ],
)
def test_a_call_that_names_no_fault_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
