"""What runs in vLLM's workers: trained weights are read from a folder of safetensors.

vLLM finds it through the entry point in pyproject.toml (`vllm.general_plugins`), in every process that it starts. It is
chosen by `WeightTransferConfig(backend="flexpg")`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform


@dataclass
class FolderInfo(WeightTransferUpdateInfo):
    """An update.

    Attributes:
        folder: Safetensors under the names of the checkpoint, on a disk that the worker can read.
    """

    folder: str


class FolderEngine(WeightTransferEngine[WeightTransferInitInfo, FolderInfo]):
    """Weights from a folder of safetensors, through vLLM's layer-by-layer reloading.

    Raises:
        ValueError: If vLLM was started with options with which samples would be wrong.
    """

    init_info_cls = WeightTransferInitInfo
    update_info_cls = FolderInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        mode = str(vllm_config.model_config.logprobs_mode)
        if mode != "processed_logprobs":  # others ignore the temperature
            raise ValueError(f"logprobs_mode must be processed_logprobs, got {mode}; add --logprobs-mode")
        if current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
            # Compiled code keeps packed copies of the weights.
            raise ValueError("enforce_eager must be true on a CPU, got false; add --enforce-eager")
        self.is_broken = False

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Do nothing; a folder needs no connection."""

    def start_weight_update(self) -> None:
        """Begin an update.

        Raises:
            RuntimeError: If an earlier one failed, after which layers hold a mixture of weights.
        """
        if self.is_broken:
            raise RuntimeError("an earlier update of the weights failed")
        self.is_broken = True  # until it is finished
        self.expected = {name for name, _ in self.model.named_parameters()}  # tied ones once
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FolderInfo) -> None:
        """Load all weights of the model.

        Raises:
            ValueError: If the folder lacks some; vLLM would keep the old ones and log a warning.
        """
        loaded = self.model.load_weights(_weights(Path(update_info.folder), self.device))
        if missing := sorted(self.expected - set(loaded)):
            raise ValueError(
                f"{update_info.folder} must have all weights, got none for {missing[0]} ({len(missing)} such)"
            )

    def finish_weight_update(self) -> None:
        """End the update."""
        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU, vLLM multiplies with a packed copy of each weight. Reloading packs again what it loads, but not an
        # output layer that shares the weight of the embedding (vLLM 0.32).
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                if isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                    module.quant_method.process_weights_after_loading(module)
        self.is_broken = False

    def shutdown(self) -> None:
        """Do nothing; no connection is open."""


def _weights(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
