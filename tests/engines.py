"""Inference engines for recipes in tests: they sample with flexpg from a copy of the checkpoint's model.

CheckpointEngine    an engine as vLLM is one, with `log`, the version of the weights at every `sample`
StaleEngine         reports new versions and keeps the first weights
BrokenEngine        raises on one rank, at a call of `sample` or when it gets a version of the weights
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import flexpg
from flexpg.sampling import Samples, SamplingParams


class CheckpointEngine:
    def __init__(self, path: str, is_shared: bool = True, max_model_len: int | None = None) -> None:
        self.is_shared, self.version, self.max_model_len = is_shared, 0, max_model_len
        self.log: list[int] = []
        self.is_closed = False
        self.read(Path(path))

    def read(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = flexpg.enable(model).eval()

    def sample(
        self, prompts: Sequence[Tensor], group_size: int, params: SamplingParams, seeds: Sequence[int] | None
    ) -> Samples:
        self.log.append(self.version)
        return flexpg.sample(self.model, prompts, group_size, params, seed=seeds)

    def load_weights(self, folder: Path, version: int) -> None:
        self.read(folder)
        self.version = version

    def close(self) -> None:
        self.is_closed = True


class StaleEngine(CheckpointEngine):
    def load_weights(self, folder: Path, version: int) -> None:
        self.version = version


class BrokenEngine(CheckpointEngine):
    def __init__(
        self,
        path: str,
        is_shared: bool = True,
        broken_call: int | None = None,
        broken_version: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(path, is_shared)
        is_broken = int(os.environ.get("RANK", "0")) == rank
        self.broken_call, self.broken_version = (broken_call, broken_version) if is_broken else (None, None)

    def sample(self, *args: object) -> Samples:
        if len(self.log) == self.broken_call:
            raise ConnectionError("the engine at localhost:8000 does not answer")
        return super().sample(*args)

    def load_weights(self, folder: Path, version: int) -> None:
        if version == self.broken_version:
            raise RuntimeError("the engine refuses these weights")
        super().load_weights(folder, version)
