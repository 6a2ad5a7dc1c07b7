"""The cache that a recurrent layer of transformers gets for one call.

transformers' own cache writes states in place, which autograd does not allow; this one keeps the tensors that it is
given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

States = dict[tuple[str, int], Tensor]  # (kind, number of the state) -> [B, ...]


class SegmentStates:
    """A cache for one call of a recurrent layer: it holds the parents' states, and keeps the segments' own.

    It has the methods of transformers' Cache that recurrent layers call.
    """

    def __init__(self, previous: States | None) -> None:
        self.previous = previous or {}
        self.final: States = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution, [B, E, K]."""
        return self.previous.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a recurrence."""
        return self.previous.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the inputs of a convolution after those before the segment; keep the last ones."""
        before = self.get_conv_state(layer_idx, state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], -1)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        missing = max(0, size - inputs.shape[-1])
        self.final["conv", state_idx] = nn.functional.pad(inputs, (missing, 0))[..., -size:]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state of a recurrence."""
        self.final["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return the state of MiniMax's lightning attention."""
        return self.previous.get(("linear", 0))

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep the state of MiniMax's lightning attention."""
        self.final["linear", 0] = linear_cache

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether the segment continues another."""
        return bool(self.previous)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return True, so that a layer does not take its in-place kernel for one token."""
        return True
