"""vLLM as the engine that samples for a recipe, next to the trainer or as a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from flexpg.integrations.vllm.colocated import Colocated
from flexpg.integrations.vllm.requests import Output, Request, Transport
from flexpg.integrations.vllm.server import Server
from flexpg.sampling import Samples, SamplingParams

__all__ = ["Engine", "engine", "register"]

INITIAL = "default"  # vLLM's label for the weights that it was started with
POLL_S = 0.2
MIN_TEMPERATURE = 0.01  # vLLM samples at this one if it is lower, and not 0


def engine(
    path: str,
    mode: Literal["colocate", "server"] = "colocate",
    base_url: str = "http://localhost:8000",
    dtype: str = "auto",
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.3,
    timeout_s: float = 600.0,
) -> Engine:
    """Create an engine next to the trainer, one per rank, or connect to a server.

    Args:
        path: A checkpoint in Hugging Face format; a folder with safetensors.
        mode: "colocate" or "server".
        base_url: Address of the server.
        dtype: The dtype of the weights, as vLLM names it. This option and the next two are for "colocate"; a server has
            its own.
        max_model_len: Tokens of the longest sequence, prompt and completion; None for the model's own limit.
        gpu_memory_utilization: Fraction of the GPU for weights and cache.
        timeout_s: Seconds for a start of the engine, a step's samples, or new weights.

    Raises:
        ImportError: If vLLM is not installed, which a server does not need here.
        RuntimeError: If the engine does not start, or the server does not respond.
        ValueError: If `mode` is neither, or the folder has no safetensors.
    """
    checkpoint = Path(path)
    shapes = _shapes(checkpoint)
    if mode == "colocate":
        options: dict[str, Any] = {"dtype": dtype, "max_model_len": max_model_len}
        options["gpu_memory_utilization"] = gpu_memory_utilization
        return Engine(Colocated(checkpoint, options, timeout_s), shapes)
    if mode == "server":
        server = Engine(Server(base_url, checkpoint, timeout_s), shapes)
        server.load_initial_weights(checkpoint, timeout_s)
        return server
    raise ValueError(f"mode must be colocate or server, got {mode}")


def register() -> None:
    """Register how workers load weights; vLLM calls this in every process that it starts."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("flexpg", "flexpg.integrations.vllm.worker", "FolderEngine")


class Engine:
    """An inference engine; see `flexpg.training.engines.Engine`.

    Args:
        transport: How vLLM is reached.
        shapes: The shapes of the weights by name, as in the checkpoint.
    """

    def __init__(self, transport: Transport, shapes: dict[str, list[int]]) -> None:
        self.is_shared = transport.is_shared
        self.max_model_len = transport.max_model_len
        self._transport = transport
        self._shapes = shapes
        self._seen = 0  # the newest version that it had
        # Other ranks learn of the versions that rank 0 loads into a server as they sample.
        self._is_loader = not self.is_shared or os.environ.get("RANK", "0") == "0"

    @property
    def version(self) -> int:
        """The version of the weights that the engine samples from, by its own account."""
        return self._number(self._transport.version())

    def sample(
        self, prompts: Sequence[Tensor], group_size: int, params: SamplingParams, seeds: Sequence[int] | None
    ) -> Samples:
        """Sample completions of every prompt, as `flexpg.sample` does.

        Args:
            prompts: P tensors of token ids, 1-D int64.
            group_size: G, completions per prompt.
            params: How tokens are sampled, without top-k and top-p.
            seeds: One per prompt; None if the temperature is 0.

        Returns:
            Completions and log-probabilities on the prompts' device.

        Raises:
            ValueError: If vLLM's log-probabilities would not be the trainer's, or a sequence is too long for it.
            RuntimeError: If the engine fails, does not respond, or has other weights than those that were loaded.
        """
        self._check_params(params, max(map(len, prompts)))
        self._check_version(self.version)
        is_greedy = params.temperature == 0
        given = [None] * len(prompts) if is_greedy or seeds is None else seeds
        count = 1 if is_greedy else group_size
        requests = [Request(p.tolist(), count, seed, params) for p, seed in zip(prompts, given, strict=True)]
        groups = self._transport.generate(requests)
        outputs = [output for group in groups for output in (group * group_size if is_greedy else group)]
        for label in set().union(*(output.versions for output in outputs)):
            self._check_version(self._number(label))
        return _samples(outputs, params, prompts[0].device)

    def load_weights(self, folder: Path, version: int) -> None:
        """Replace the weights, and drop everything that was computed from the old ones.

        Args:
            folder: Safetensors in the format of the checkpoint, on a disk that vLLM can read.
            version: The new value of `version`.

        Raises:
            ValueError: If the folder has no safetensors, or weights that the checkpoint has not; the engine is
                unchanged.
            RuntimeError: If they were not loaded, after which the engine refuses to sample.
        """
        for name, shape in _shapes(folder).items():
            # Some write the output layer, although it is tied.
            if name != "lm_head.weight" and shape != self._shapes.get(name):
                raise ValueError(
                    f"{name} in {folder} must have the shape of the checkpoint's, {self._shapes.get(name)}, got {shape}"
                )
        self._transport.set_version(f"incomplete {version}")  # until all has been loaded
        self._transport.load(folder, str(version))
        if (own_version := self.version) != version:
            raise RuntimeError(f"{self._transport.name} must have weights of version {version}, got {own_version}")
        self._seen = version

    def load_initial_weights(self, checkpoint: Path, timeout_s: float) -> None:
        """Give a server that an earlier run has loaded weights into those of the checkpoint again; all ranks call it.

        Args:
            checkpoint: The folder that the server was started with.
            timeout_s: Seconds that other ranks wait for rank 0.

        Raises:
            RuntimeError: If they were not loaded.
        """
        if self._is_loader and self._transport.version() not in (INITIAL, "0"):
            self.load_weights(checkpoint, 0)
        end = monotonic() + timeout_s
        while (label := self._transport.version()) not in (INITIAL, "0"):
            if monotonic() > end:
                raise RuntimeError(f"{self._transport.name} has weights of version {label}; {self._transport.remedy}")
            sleep(POLL_S)

    def close(self) -> None:
        """End the engine; a server goes on."""
        self._transport.close()

    def _number(self, label: str) -> int:
        if label != INITIAL and not label.isdecimal():
            raise RuntimeError(
                f"{self._transport.name} has no complete weights (version {label!r}); {self._transport.remedy}"
            )
        return 0 if label == INITIAL else int(label)

    def _check_version(self, version: int) -> None:
        if version < self._seen or (self._is_loader and version != self._seen):
            raise RuntimeError(
                f"{self._transport.name} must have weights of version {self._seen}, got {version}: it was started "
                f"again, or another run uses it; {self._transport.remedy}"
            )
        self._seen = version

    def _check_params(self, params: SamplingParams, longest: int) -> None:
        if params.top_k is not None or params.top_p != 1:
            raise ValueError(
                f"top_k must be None and top_p 1 with vLLM, whose log-probabilities are those of the tokens that they "
                f"leave, got {params.top_k} and {params.top_p}"
            )
        if 0 < params.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE} with vLLM, got {params.temperature}")
        if longest + params.max_new_tokens > self.max_model_len:
            raise ValueError(
                f"max_model_len must be at least {longest + params.max_new_tokens}, for a prompt of {longest} tokens "
                f"and max_new_tokens={params.max_new_tokens}, got {self.max_model_len}"
            )


def _samples(outputs: Sequence[Output], params: SamplingParams, device: torch.device) -> Samples:
    completions = [torch.tensor(output.tokens) for output in outputs]
    logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(output.logprobs) for output in outputs], batch_first=True)
    if not logprobs.isfinite().all():
        raise FloatingPointError("log-probabilities of vLLM are NaN or Inf; the model's weights probably are too")
    last = torch.stack([tokens[-1] for tokens in completions])
    is_finished = torch.isin(last, torch.tensor(list(params.stop_tokens), dtype=torch.int64))
    return Samples([tokens.to(device) for tokens in completions], logprobs.to(device), is_finished.to(device))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of all weights in a folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"path must be a folder with safetensors, got {folder}")
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    return shapes
