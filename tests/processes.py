"""A function on several processes at once, as torchrun would start them.

The processes are forked from a server that has imported what takes seconds, once per test session. It computes nothing
itself, so no thread is lost in the fork.
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

PRELOAD = ["pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torchtune", "recipes.grpo"]


def run_processes(count: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """What `function(rank, *args)` returns in each of `count` processes, which can join one process group.

    Args:
        count: processes to start; each has torchrun's variables in its environment, beside the caller's.
        function: of a test file, not of a function in it; its arguments and results are pickled.
        args: the same for every process.
        timeout_s: seconds until all must be done.

    Raises:
        BaseException: what the first process to fail has raised, SystemExit too, with its traceback as the cause.
        RuntimeError: a process died without a word.
        TimeoutError: a process was not done in time.
    """
    # As torchrun does, the store stands here: with one at rank 0, its port could be taken before it listens there.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    address |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RESTART_COUNT": "0"}
    children, pipes = [], []
    try:
        for rank in range(count):
            pipe, its_pipe = multiprocessing.Pipe()
            variables = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(start_process(_report, its_pipe, variables, function, rank, args))
            its_pipe.close()
            pipes.append(pipe)
        results = _results(children, pipes, timeout_s)
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join(10)
        return results
    finally:
        for child in children:
            child.kill()
            child.join()


def start_process(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process that has started on `function(*args)`, with this one's environment and with one thread for tensors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(dict(os.environ), function, args), daemon=True)
    process.start()
    return process


def start_command(main: Callable[[], None], arguments: Sequence[str], printed: Path) -> BaseProcess:
    """A process that has started on `main()` as its command line does, with what it prints in a file.

    Args:
        main: of a module; it reads `sys.argv`.
        arguments: those after the command's own name.
        printed: of stdout and stderr.
    """
    return start_process(_as_command, main, arguments, printed)


def _as_command(main: Callable[[], None], arguments: Sequence[str], printed: Path) -> None:
    with printed.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv[1:] = arguments
    main()


def _run(environment: dict[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.clear()  # the server has the environment of the test that needed it first
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def _report(pipe: Connection, variables: dict[str, str], function: Callable[..., Any], rank: int, args: Any) -> None:
    """Sends what the function returned or raised, and stays until the caller has heard from all.

    So a process that fails does not make others fail of its absence, before the reason is known.
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
        pickle.loads(report)  # an exception with arguments of its own may be pickled and not come back
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
            raise TimeoutError(f"process {names} of {len(pipes)} (from 0) was not done after {timeout_s:g} seconds")
        for rank in missing:
            if pipes[rank] not in ready:
                continue
            try:
                results[rank], error, text = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise _death(children, rank) from None
            if error is not None:
                others = {children[other].sentinel: other for other in missing if other != rank}
                if dead := wait(list(others), timeout=1.0):  # it may have failed of a death that is not known yet
                    raise _death(children, others[dead[0]])
                raise error from RuntimeError(f"in process {rank} of {len(pipes)} (from 0):\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _death(children: list[BaseProcess], rank: int) -> RuntimeError:
    children[rank].join()
    return RuntimeError(f"process {rank} of {len(children)} (from 0) died with exit code {children[rank].exitcode}")
