"""Functions and commands in several processes, as torchrun would start them.

run_processes(count, function, *args)       call a function on `count` ranks and return their results
start_process(function, *args)              start one process
start_command(main, arguments, printed)     start a command line
wait_until(condition, process, printed)     wait for something that a started command does

Processes are forked from a server that has imported what takes seconds, once per test session. It computes nothing
itself, so no thread is lost in the fork. `tests.mutations` has one session per test and sets TESTS_START_METHOD=fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

PRELOAD = [  # what files with tests of several ranks import: otherwise every rank does so again
    *("pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torchtune", "recipes.grpo"),
    *("hypothesis", "torchtune._cli.tune", "trl.trainer.grpo_trainer", "hf_models"),
]


def run_processes(count: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Return what `function(rank, *args)` returns on each of `count` ranks, which can form one process group.

    Args:
        count: Number of ranks.
        function: A module-level function; its arguments and results are pickled.
        args: The same for every rank.
        timeout_s: Seconds until all must be done.

    Raises:
        BaseException: What the first rank to fail raised, SystemExit too, with its traceback as the cause.
        RuntimeError: If a process was killed.
        TimeoutError: If a rank was not done in time.
    """
    # As in torchrun, the store is in the parent: at rank 0, another process could take its port first.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    address |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RESTART_COUNT": "0"}
    children, pipes = [], []
    try:
        for rank in range(count):
            pipe, child_pipe = multiprocessing.Pipe()
            variables = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(start_process(_report, child_pipe, variables, function, rank, args))
            child_pipe.close()
            pipes.append(pipe)
        results = _results(children, pipes, timeout_s)
        for pipe in pipes:
            with suppress(OSError):
                pipe.send_bytes(b"all have reported")  # closing it would not do: a forked rank has a copy of this end
            pipe.close()
        for child in children:
            child.join(10)
        return results
    finally:
        for child in children:
            child.kill()
            child.join()


def start_process(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start `function(*args)` in a process with this environment and one thread for tensors."""
    method = os.environ.get("TESTS_START_METHOD", "forkserver")
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(dict(os.environ), function, args), daemon=True)
    process.start()
    return process


def start_command(main: Callable[[], None], arguments: Sequence[str], printed: Path) -> BaseProcess:
    """Start `main()` as its command line would.

    Args:
        main: A module-level function that reads `sys.argv`.
        arguments: Those after the name of the command.
        printed: The file for stdout and stderr.
    """
    return start_process(_run_command, main, arguments, printed)


def wait_until(condition: Callable[[], bool], process: BaseProcess, printed: Path, timeout_s: float = 120) -> None:
    """Wait for a condition that a running command brings about, and fail with its output if it ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.is_alive(), printed.read_text()
        assert time.monotonic() < end, printed.read_text()
        time.sleep(0.02)


def _run_command(main: Callable[[], None], arguments: Sequence[str], printed: Path) -> None:
    with printed.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest captures, in a forked process
    sys.argv[1:] = arguments
    main()


def _run(environment: dict[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.clear()  # the server has the environment of the test that needed it first
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def _report(pipe: Connection, variables: dict[str, str], function: Callable[..., Any], rank: int, args: Any) -> None:
    """Send what the function returned or raised, and stay until the caller has heard from all ranks.

    Otherwise a rank that fails would make others fail because of its absence, before the reason is known.
    """
    os.environ.update(variables)
    try:
        report = pickle.dumps((function(rank, *args), None, ""))
    except BaseException as error:
        report = _pickled_error(error)
    pipe.send_bytes(report)
    with suppress(EOFError, ConnectionResetError):
        pipe.recv_bytes()


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        report = pickle.dumps((None, error, text))
        pickle.loads(report)  # exceptions with other arguments than a message can be pickled, but not all unpickled
    except Exception:
        report = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))
    return report


def _results(children: list[BaseProcess], pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in missing], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            names = ", ".join(map(str, missing))
            raise TimeoutError(f"ranks {names} of {len(pipes)} were not done after {timeout_s:g} seconds")
        for rank in missing:
            if pipes[rank] not in ready:
                continue
            try:
                results[rank], error, text = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise _crash(children, rank) from None
            if error is not None:
                others = {children[other].sentinel: other for other in missing if other != rank}
                if dead := wait(list(others), timeout=1.0):  # the error may be due to a crash that is not known yet
                    raise _crash(children, others[dead[0]])
                raise error from RuntimeError(f"on rank {rank} of {len(pipes)}:\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _crash(children: list[BaseProcess], rank: int) -> RuntimeError:
    children[rank].join()
    return RuntimeError(f"rank {rank} of {len(children)} died with exit code {children[rank].exitcode}")
