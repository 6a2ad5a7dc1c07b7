"""Samplers that are servers on this machine, for a recipe that samples ahead.

start_vllm(path, log)    vLLM in float32 on one thread
stop_vllm(process)       end it
ProcessEngine            `flexpg.sample` in a process of its own, where vLLM is not installed
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import flexpg
from flexpg.sampling import Samples, SamplingParams

START_S = 600.0  # on a busy machine
DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def start_vllm(path: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start vLLM with a checkpoint, and return its process and address as soon as it answers.

    Args:
        path: The checkpoint.
        log: The file that its output is written to.

    Raises:
        RuntimeError: If it ends or does not answer within START_S seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    # On a CPU, vLLM 0.32 fails where it splits a prompt that has a seed.
    command += ["--no-enable-chunked-prefill", "--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", '{"backend": "flexpg"}']
    with log.open("wb") as output:
        variables = DEFAULTS | os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
    end = time.monotonic() + START_S
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                stop_vllm(process)
                raise RuntimeError(f"vLLM did not start: {log.read_text()}") from None
            time.sleep(0.5)


def stop_vllm(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and the processes of its engine, which would go on without it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class ProcessEngine:
    """`flexpg.sample` in a process of one thread; see `flexpg.training.engines.Engine`.

    Args:
        path: A checkpoint.
    """

    is_shared = True
    max_model_len = None

    def __init__(self, path: str) -> None:
        self.version = 0
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._child = context.Process(target=_serve, args=(child_pipe, path), daemon=True)
        self._child.start()
        child_pipe.close()

    def sample(
        self, prompts: Sequence[Tensor], group_size: int, params: SamplingParams, seeds: Sequence[int] | None
    ) -> Samples:
        """Sample completions of every prompt."""
        return self._call("sample", list(prompts), group_size, params, seeds)

    def load_weights(self, folder: Path, version: int) -> None:
        """Replace the weights."""
        self._call("load", str(folder))
        self.version = version

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._child.join()

    def _call(self, *request: Any) -> Any:
        self._pipe.send_bytes(pickle.dumps(request))
        return pickle.loads(self._pipe.recv_bytes())


def _serve(pipe: Connection, path: str) -> None:
    torch.set_num_threads(1)
    model = _load(path)
    while True:
        try:
            name, *args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the trainer has closed it, or has ended
            return
        if name == "load":
            model, result = _load(*args), None
        else:
            prompts, group_size, params, seeds = args
            result = flexpg.sample(model, prompts, group_size, params, seed=seeds)
        pipe.send_bytes(pickle.dumps(result))


def _load(path: str) -> torch.nn.Module:
    return flexpg.enable(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).eval()
