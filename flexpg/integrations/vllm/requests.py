"""Requests to vLLM and what they return, whether in this process or over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexpg.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """Completions of one prompt.

    Attributes:
        prompt: Token ids.
        count: Number of completions.
        seed: The seed of the first completion; those of the others follow. None for greedy sampling.
        params: How tokens are sampled.
    """

    prompt: list[int]
    count: int
    seed: int | None
    params: SamplingParams

    def sampling_params(self) -> dict[str, Any]:
        """Return arguments of vLLM's SamplingParams."""
        return {
            "n": self.count,
            "temperature": float(self.params.temperature),
            "max_tokens": self.params.max_new_tokens,
            "stop_token_ids": list(self.params.stop_tokens),
            "ignore_eos": True,  # the stop tokens are those of the recipe
            "seed": self.seed,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }


@dataclass(frozen=True)
class Output:
    """One completion.

    Attributes:
        tokens: Ids, with the stop token if one was sampled.
        logprobs: One per token.
        versions: Labels of the weights that they were sampled from.
    """

    tokens: list[int]
    logprobs: list[float]
    versions: set[str]


class Transport(Protocol):
    """How an engine is reached."""

    is_shared: bool
    name: str  # in errors
    remedy: str  # in errors
    max_model_len: int

    def version(self) -> str:
        """Return the label of the weights."""

    def set_version(self, label: str) -> None:
        """Set the label of the weights."""

    def load(self, folder: Path, label: str) -> None:
        """Load weights from a folder, label them, and drop cached keys and values."""

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Return the completions of each request."""

    def close(self) -> None:
        """Release the engine."""
