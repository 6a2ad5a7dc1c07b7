"""Faults that are made on purpose, and the tests that kill them.

    python -m tests.mutations                      every fault, the table, and exit status 1 where one survives
    python -m tests.mutations "plain causal mask"  some faults
    python -m tests.mutations --all-tests NAME     the whole suite but its longest tests against one fault: who kills it

mutations.txt holds them. A fault is one edit of the source, as someone might write it by mistake. Each is made in a
copy of the packages, and the test that is named beside it runs there, in a process forked from one that imported torch
and its kin once. A fault is killed when the test fails: an error of the test itself, or of the edit, is an error of the
table. First all these tests pass on a copy without an edit, so none of them passes on an empty run.

Most faults were others' before. Three of theirs were faults of tests, which no edit of the source can show: an
equivalence test on a tree without branches, and asserts that compare nothing, would kill nothing here; a test that ends
in a breakpoint is looked for in test_mutations.py.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EDITED = ("flexpg", "recipes")  # copied; the rest of the repository is linked
LIMIT_S = 300  # a killer takes seconds; one that hangs is an error of the table
SUITE_LIMIT_S = 3600
PRELOAD = (  # what takes seconds to import; nothing of it computes at import, so a fork loses no thread
    *("torch", "torch._dynamo", "torch.utils.checkpoint"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    *("torchtune.training", "torchtune.models.gemma2", "torchtune.models.qwen2", "torchtune.modules.peft"),
    *("transformers.masking_utils", "transformers.integrations.sdpa_attention", "hypothesis", "matplotlib.pyplot"),
    *("trl", "datasets", "peft"),
)


@dataclass(frozen=True)
class Fault:
    """One edit of the source.

    Attributes:
        name: the fault in its user's words.
        file: below the root.
        old: text that the file holds once.
        new: what stands there instead.
        killer: the test that fails then, below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    killer: str


# ---- the faults ------------------------------------------------------------------------------------------------------


def parsed(text: str) -> list[Fault]:
    """The faults of a text in the manner of mutations.txt.

    A file, then its faults: a name, what the file holds once, what stands there instead, and the test below tests/.
    """
    faults, file = [], ""
    for block in text.strip().split("\n\n"):
        if block.startswith("==== "):
            file = block.removeprefix("==== ")
            continue
        name, *edit, killer = block.splitlines()
        old, new = ("\n".join(line[2:] for line in edit if line[0] == sign) for sign in "-+")
        faults.append(Fault(name, file, old, new, killer.removeprefix("killed by ")))
    return faults


FAULTS = parsed((ROOT / "tests/mutations.txt").read_text())


# ---- a copy with the fault, and a test in it -------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the tests did in a copy.

    Attributes:
        passed: tests that passed.
        failed: tests that failed, with the name of what they raised.
        trouble: an error beside the tests, which says nothing about the fault, or "".
        seconds: of the process's own work.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    trouble: str = ""
    seconds: float = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if report.failed and call.when == "call" and not call.excinfo.errisinstance((NameError, ImportError)):
            self.failed[item.nodeid] = call.excinfo.typename
        elif report.failed:
            self.trouble = f"{item.nodeid} {report.outcome} at its {call.when}: {call.excinfo.exconly()}"
        elif report.passed and call.when == "call":
            self.passed.append(item.nodeid)
        return report


def make_copy(fault: Fault | None, folder: Path) -> None:
    """The repository in `folder`, with the fault's edit if there is one."""
    for path in ROOT.iterdir():
        if path.name in EDITED:
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    if fault is not None:
        (folder / fault.file).write_text(edited(fault))


def edited(fault: Fault) -> str:
    """The text of the fault's file with the fault."""
    text = (ROOT / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} holds {fault.old!r} {text.count(fault.old)} times; it needs one")
    return text.replace(fault.old, fault.new)


def _run_in_copy(pipe: Connection, folder: Path, options: list[str]) -> None:
    """In the child: the tests, as if the copy were the repository."""
    import torch

    torch.set_num_threads(1)
    with (folder / "printed.txt").open("wb") as printed:
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(folder)  # of processes that tests start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half a second each time
    sys.dont_write_bytecode = True  # the tests are linked: their compiled files belong to the repository
    outcome = Outcome()
    options = ["-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "pyproject.toml", "-o", "addopts=", *options]
    status = pytest.main(options, plugins=[outcome])
    source = getattr(sys.modules.get("flexpg"), "__file__", None)
    if source is not None and not source.startswith(str(folder)):
        outcome.trouble = f"flexpg came from {source} and not from the copy"
    elif not outcome.trouble and (status not in (0, 1) or (not outcome.passed and not outcome.failed)):
        outcome.trouble = f"pytest ended with status {int(status)}: {(folder / 'printed.txt').read_text()[-2000:]}"
    outcome.seconds = time.process_time()
    pipe.send(outcome)


def outcomes(
    jobs: Sequence[tuple[Fault | None, list[str]]], at_once: int, limit_s: int = LIMIT_S
) -> Iterator[tuple[int, Outcome]]:
    """What came of each job, a copy with a fault and options of pytest in it, by its number and as they end.

    All that run are given up when none of them ends for `limit_s`.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(enumerate(jobs)), {}
    with tempfile.TemporaryDirectory(prefix="flexpg-mutations-") as parent:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    number, (fault, options) = waiting.pop(0)
                    folder = Path(parent, str(number))
                    folder.mkdir()
                    make_copy(fault, folder)
                    pipe, its_pipe = context.Pipe(duplex=False)
                    child = context.Process(target=_run_in_copy, args=(its_pipe, folder, options))
                    child.start()
                    its_pipe.close()
                    running[pipe] = number, child, folder
                ready = wait(list(running), timeout=limit_s)
                for pipe in ready or list(running):
                    number, child, folder = running.pop(pipe)
                    yield number, _received(pipe, child, folder, limit_s if not ready else 0)
                    shutil.rmtree(folder)
        finally:
            for _, child, _ in running.values():
                child.kill()
                child.join()


def _received(pipe: Connection, child: multiprocessing.Process, folder: Path, late_s: int) -> Outcome:
    try:
        if late_s:
            child.kill()
            return Outcome(trouble=f"not done after {late_s} seconds")
        return pipe.recv()
    except EOFError:
        return Outcome(trouble=f"the process died: {(folder / 'printed.txt').read_text()[-2000:]}")
    finally:
        child.join()


# ---- the table -------------------------------------------------------------------------------------------------------


def table() -> str:
    """The faults as docs/correctness.md has them."""
    return "\n".join(["| fault | where | killed by |", "| --- | --- | --- |", *map(_row, FAULTS)])


def _row(fault: Fault) -> str:
    file, _, test = fault.killer.partition("::")
    return f"| {fault.name} | `{fault.file}` | `{file}`: `{test.partition('[')[0]}` |"


def check_baseline(faults: Sequence[Fault], at_once: int) -> None:
    """Runs the killers without a fault.

    Raises:
        SystemExit: one of them does not pass.
    """
    killers = [f"tests/{killer}" for killer in sorted({fault.killer for fault in faults})]
    shares = [killers[n::at_once] for n in range(min(at_once, len(killers)))]
    passed = 0
    for _, outcome in outcomes([(None, share) for share in shares], at_once):
        if outcome.failed or outcome.trouble:
            sys.exit(f"error: without a fault, too: {list(outcome.failed) or outcome.trouble}")
        passed += len(outcome.passed)
    if passed != len(killers):
        sys.exit(f"error: {passed} tests passed for {len(killers)} killers; each is to name one test")
    print(f"without a fault all {passed} tests pass\n", flush=True)


def run(faults: Sequence[Fault], at_once: int) -> bool:
    """Prints the table of these faults, and returns whether all of them were killed."""
    check_baseline(faults, at_once)
    killed, troubles = 0, []
    print("| fault | where | killed by | seconds |\n| --- | --- | --- | --- |")
    for number, outcome in outcomes([(fault, [f"tests/{fault.killer}"]) for fault in faults], at_once):
        fault = faults[number]
        error = next(iter(outcome.failed.values()), "AssertionError")
        how = "" if error == "AssertionError" else f"by a {error}, "
        verdict = f"{_row(fault)} {how}{outcome.seconds:.1f} |"
        if outcome.trouble:
            troubles.append(f"{fault.name}: {outcome.trouble}")
            verdict = f"| {fault.name} | `{fault.file}` | BROKEN | {outcome.seconds:.1f} |"
        elif not outcome.failed:
            verdict = f"| {fault.name} | `{fault.file}` | SURVIVES `{fault.killer}` | {outcome.seconds:.1f} |"
        killed += bool(outcome.failed) and not outcome.trouble
        print(verdict, flush=True)
    print("", *troubles, f"{killed} of {len(faults)} killed", sep="\n")
    return killed == len(faults)


def run_all_tests(fault: Fault) -> bool:
    """Prints every test of the suite that kills a fault, its longest ones left out."""
    options = ["tests", "-m", "not slow and not proof and not machines", "--ignore=tests/test_mutations.py"]
    ((_, outcome),) = outcomes([(fault, options)], at_once=1, limit_s=SUITE_LIMIT_S)
    for test, error in outcome.failed.items():
        print(f"{test}  {error}")
    print(outcome.trouble)
    print(f"{len(outcome.failed)} tests kill it, {len(outcome.passed)} pass, in {outcome.seconds:.0f} seconds")
    return bool(outcome.failed)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Make faults, and see who notices.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to make; all of them where none is named")
    parser.add_argument("-j", dest="at_once", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--all-tests", action="store_true", help="run the suite, but its longest tests, against one")
    parser.add_argument("--table", action="store_true", help="print what docs/correctness.md holds, and make no fault")
    options = parser.parse_args(arguments)
    by_name = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in options.names if name not in by_name]
    if unknown or options.at_once < 1 or (options.all_tests and len(options.names) != 1):
        parser.error(f"no fault is called {unknown[0]!r}" if unknown else "give -j 1 or more, --all-tests one NAME")
    if options.table:
        print(table())
        return
    chosen = [by_name[name] for name in options.names] or FAULTS
    for module in PRELOAD if len(chosen) > len(PRELOAD) else PRELOAD[:1]:  # for a few, it would cost more than it saves
        importlib.import_module(module)
    gc.freeze()  # or pytest's collections of garbage would look through all of it in each process
    sys.exit(0 if (run_all_tests(chosen[0]) if options.all_tests else run(chosen, options.at_once)) else 1)


if __name__ == "__main__":
    main()
