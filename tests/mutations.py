"""Mutations: known bugs that are injected one at a time, each with the test that detects it.

    python -m tests.mutations                      run all, print the table, exit with status 1 if one survives
    python -m tests.mutations "plain causal mask"  run some
    python -m tests.mutations --tests-passed       run all, after a run of the whole suite has passed
    python -m tests.mutations --every 10 --from 1  run a tenth of them: CI takes another one for every commit
    python -m tests.mutations --all-tests NAME     run the whole suite against one, and print which tests fail

They are in mutations.txt. A mutation is one edit of the source, as someone might make it by mistake; most are faults of
other trainers. Each is applied to a copy of the packages, and its test runs there, in a process that is forked from one
in which the other packages that the tests import are loaded. A mutation is killed if the test fails with an error of
its own: a test that cannot be collected or set up, or an edit that breaks an import, is an error of the table. Before
that, all the tests must pass without a mutation.

Most of a mutation's time is what pytest does around its test, so it is told to do little: see `PYTEST`.
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
COPIED = ("flexpg", "recipes")  # the rest of the repository is linked
TIMEOUT_S = 300  # tests take seconds; one that takes longer is an error of the table
SUITE_TIMEOUT_S = 3600
PYTEST = (
    *("-p", "no:cacheprovider", "-c", "pyproject.toml", "-o", "addopts="),
    "--assert=plain",  # an AssertionError without its values: the assertions of a file take long to rewrite
    "--tb=native",  # pytest's own tracebacks look for the source of all modules
    *("-p", "no:unraisableexception", "-p", "no:threadexception"),  # they collect garbage ten times
)


@dataclass(frozen=True)
class Mutation:
    """One edit of the source.

    Attributes:
        name: The bug in a few words.
        file: The path of the edited file in the repository.
        old: Text that occurs once in the file.
        new: What replaces it.
        test: The test that must fail, below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


def parse(text: str) -> list[Mutation]:
    """Parse text in the format of mutations.txt.

    A file's path, then its mutations: a name, lines of old and new text after "- " and "+ ", and the test.
    """
    mutations, file = [], ""
    for block in text.strip().split("\n\n"):
        if block.startswith("==== "):
            file = block.removeprefix("==== ")
            continue
        name, *edit, test = block.splitlines()
        old, new = ("\n".join(line[2:] for line in edit if line[0] == sign) for sign in "-+")
        mutations.append(Mutation(name, file, old, new, test.removeprefix("killed by ")))
    return mutations


MUTATIONS = parse((ROOT / "tests/mutations.txt").read_text())


def mutated(mutation: Mutation) -> str:
    """Return the text of the file with the mutation.

    Raises:
        ValueError: If the file does not contain the old text exactly once.
    """
    text = (ROOT / mutation.file).read_text()
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} must occur once in {mutation.file}, got {count} times")
    return text.replace(mutation.old, mutation.new)


# Tests in a copy of the repository


@dataclass
class Outcome:
    """What the tests did in a copy of the repository; a pytest plugin that records it.

    Attributes:
        passed: Tests that passed.
        failed: Tests that failed, with the type of the exception.
        error: An error outside the tests, which says nothing about the mutation, or "".
        seconds: CPU time of the process.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if report.failed and call.when == "call" and not call.excinfo.errisinstance((NameError, ImportError)):
            self.failed[item.nodeid] = call.excinfo.typename
        elif report.failed:
            self.error = f"{item.nodeid} {report.outcome} in its {call.when}: {call.excinfo.exconly()}"
        elif report.passed and call.when == "call":
            self.passed.append(item.nodeid)
        return report


def preload(test_modules: Sequence[str]) -> None:
    """Import test modules and then forget all modules of this repository, so that those of other packages are loaded.

    A process with threads must not be forked: torch gets none.
    """
    import torch

    torch.set_num_threads(1)
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "tests"))
    for name in test_modules:
        importlib.import_module(name)
    sys.path.pop(0)
    local = {path.stem for path in (*ROOT.glob("*/"), *ROOT.glob("tests/*.py"))}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in local:
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # keeps the imported objects out of the garbage collections of every process


def make_copy(mutation: Mutation | None, folder: Path) -> None:
    """Copy the repository to `folder`, with the mutation if there is one."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    if mutation is not None:
        (folder / mutation.file).write_text(mutated(mutation))


def _run_in_copy(pipe: Connection, folder: Path, options: list[str]) -> None:
    """Run pytest in the child process, with the copy as the repository."""
    import torch

    torch.set_num_threads(1)
    with (folder / "output.txt").open("wb") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(folder)  # of processes that tests start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # saves half a second per process
    # A fork would lose the threads of autograd on a GPU, and of what other tests have run before.
    if len(options) == 1 and not torch.cuda.is_available():
        os.environ["TESTS_START_METHOD"] = "fork"
    sys.dont_write_bytecode = True  # tests/ is linked: its compiled files belong to the repository
    outcome = Outcome()
    status = pytest.main([*PYTEST, f"--rootdir={folder}", *options], plugins=[outcome])
    source = getattr(sys.modules.get("flexpg"), "__file__", None)
    if source is not None and not source.startswith(str(folder)):
        outcome.error = f"flexpg was imported from {source} instead of the copy"
    elif not outcome.error and (status not in (0, 1) or (not outcome.passed and not outcome.failed)):
        outcome.error = f"pytest exited with status {int(status)}: {(folder / 'output.txt').read_text()[-2000:]}"
    outcome.seconds = time.process_time()
    pipe.send(outcome)


def outcomes(
    jobs: Sequence[tuple[Mutation | None, list[str]]], num_processes: int, timeout_s: int = TIMEOUT_S
) -> Iterator[tuple[int, Outcome]]:
    """Run jobs, each a mutation and pytest options, and yield (number of the job, outcome) as they finish.

    If none finishes for `timeout_s` seconds, all that run are killed.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(enumerate(jobs)), {}
    with tempfile.TemporaryDirectory(prefix="flexpg-mutations-") as parent:
        try:
            while waiting or running:
                while waiting and len(running) < num_processes:
                    number, (mutation, options) = waiting.pop(0)
                    folder = Path(parent, str(number))
                    folder.mkdir()
                    make_copy(mutation, folder)
                    pipe, child_pipe = context.Pipe(duplex=False)
                    child = context.Process(target=_run_in_copy, args=(child_pipe, folder, options))
                    child.start()
                    child_pipe.close()
                    running[pipe] = number, child, folder
                ready = wait(list(running), timeout=timeout_s)
                for pipe in ready or list(running):
                    number, child, folder = running.pop(pipe)
                    yield number, _receive(pipe, child, folder, 0 if ready else timeout_s)
                    shutil.rmtree(folder)
        finally:
            for _, child, _ in running.values():
                child.kill()
                child.join()


def _receive(pipe: Connection, child: multiprocessing.Process, folder: Path, expired_s: int) -> Outcome:
    try:
        if expired_s:
            child.kill()
            return Outcome(error=f"not finished after {expired_s} seconds")
        return pipe.recv()
    except EOFError:
        return Outcome(error=f"the process crashed: {(folder / 'output.txt').read_text()[-2000:]}")
    finally:
        child.join()


# The table


def table() -> str:
    """Return the mutations as a Markdown table, the one in docs/correctness.md."""
    return "\n".join(["| mutation | file | killed by |", "| --- | --- | --- |", *map(_row, MUTATIONS)])


def _row(mutation: Mutation) -> str:
    file, _, test = mutation.test.partition("::")
    return f"| {mutation.name} | `{mutation.file}` | `{file}`: `{test.partition('[')[0]}` |"


def check_tests_pass(mutations: Sequence[Mutation], num_processes: int) -> None:
    """Run the tests of these mutations without a mutation: those that may start ranks alone, as with a mutation.

    Raises:
        SystemExit: If one of them does not pass.
    """
    tests = [f"tests/{test}" for test in sorted({mutation.test for mutation in mutations})]
    alone = [test for test in tests if "import run_processes" in (ROOT / test.partition("::")[0]).read_text()]
    others = [test for test in tests if test not in alone]
    shares = [*([test] for test in alone), *(others[n::num_processes] for n in range(min(num_processes, len(others))))]
    passed = 0
    for _, outcome in outcomes([(None, share) for share in shares], num_processes):
        if outcome.failed or outcome.error:
            sys.exit(f"error: fails without a mutation: {list(outcome.failed) or outcome.error}")
        passed += len(outcome.passed)
    if passed != len(tests):
        sys.exit(f"error: {passed} tests passed for {len(tests)} entries; each entry must name one test")
    print(f"all {passed} tests pass without a mutation\n", flush=True)


def run(mutations: Sequence[Mutation], num_processes: int) -> bool:
    """Print the table of these mutations, and return whether all were killed."""
    num_killed, errors = 0, []
    print("| mutation | file | killed by | seconds |\n| --- | --- | --- | --- |")
    jobs = [(mutation, [f"tests/{mutation.test}"]) for mutation in mutations]
    for number, outcome in outcomes(jobs, num_processes):
        mutation = mutations[number]
        exception = next(iter(outcome.failed.values()), "AssertionError")
        how = "" if exception == "AssertionError" else f"by {exception}, "
        result = f"{_row(mutation)} {how}{outcome.seconds:.1f} |"
        if outcome.error:
            errors.append(f"{mutation.name}: {outcome.error}")
            result = f"| {mutation.name} | `{mutation.file}` | ERROR | {outcome.seconds:.1f} |"
        elif not outcome.failed:
            result = f"| {mutation.name} | `{mutation.file}` | SURVIVES `{mutation.test}` | {outcome.seconds:.1f} |"
        num_killed += bool(outcome.failed) and not outcome.error
        print(result, flush=True)
    print("", *errors, f"{num_killed} of {len(mutations)} killed", sep="\n")
    return num_killed == len(mutations)


def run_all_tests(mutation: Mutation) -> bool:
    """Print every test of the suite that kills a mutation, except the slowest tests."""
    options = [
        "tests",
        "-m",
        "not slow and not proof and not distributed and not vllm",
        "--ignore=tests/test_mutations.py",
    ]
    ((_, outcome),) = outcomes([(mutation, options)], num_processes=1, timeout_s=SUITE_TIMEOUT_S)
    for test, exception in outcome.failed.items():
        print(f"{test}  {exception}")
    print(outcome.error)
    print(f"{len(outcome.failed)} tests fail, {len(outcome.passed)} pass, in {outcome.seconds:.0f} seconds")
    return bool(outcome.failed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description="Inject known bugs, and see which test detects each."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to run (default: all)")
    parser.add_argument("-j", dest="num_processes", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--all-tests", action="store_true", help="run the suite, except its slowest tests, against one")
    parser.add_argument("--tests-passed", action="store_true", help="do not run the tests without a mutation first")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="run one of K mutations")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="the first of them, modulo K")
    parser.add_argument("--table", action="store_true", help="print the table of docs/correctness.md and run nothing")
    options = parser.parse_args(arguments)
    by_name = {mutation.name: mutation for mutation in MUTATIONS}
    for name in options.names:
        if name not in by_name:
            parser.error(f"no mutation is called {name!r}")
    if options.all_tests and len(options.names) != 1:
        parser.error("--all-tests needs one NAME")
    if options.table:
        print(table())
        return
    chosen = [by_name[name] for name in options.names] or MUTATIONS[options.first % options.every :: options.every]
    if len(chosen) > 9:  # for a few it would cost more than it saves
        preload(sorted({Path(mutation.test.partition("::")[0]).stem for mutation in chosen}))
    if options.all_tests:
        sys.exit(not run_all_tests(chosen[0]))
    if not options.tests_passed:
        check_tests_pass(chosen, options.num_processes)
    sys.exit(not run(chosen, options.num_processes))


if __name__ == "__main__":
    main()
