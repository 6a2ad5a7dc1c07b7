"""Models that compute in float64 throughout: float32_is_float64()."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Let models compute in float64 what they convert to float32, such as norms, recurrent states and routers."""
    before = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = before
