"""The pieces of attention on a CPU, forward and backward of the bare kernels: would other pieces be faster?

    python -m benchmarks.pieces
    python -m benchmarks.pieces --tiny             # seconds, to see that it works

flexpg/backends/split.py computes a group as causal pieces, the prompt's and each completion's, and one rectangle: all
completions' queries, the prompt's keys. Beside what it does (left) stands what it might do:

- prompt whole, or cut into chunks of 512 tokens, where more of the work is in rectangles.
- completions one by one, or in one batch, which needs their lengths to be equal.
- rectangle with heads of queries in the kernel's batch, or folded into its sequence, so that keys are read once per
  key/value head; and with keys and values copied for every head, as most others have them.

Their rates are in FLOPs of visible pairs (12 D a pair and head; the scores that kernels compute twice not counted), and
`gflop_s.matmul` is what a matrix of the benchmarks' small model reaches, forward and backward: the machine's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import run
from benchmarks.turns import by_turns, median, ratio
from flexpg.backends.split import _flash, _flash_backward

CHUNK = 512


@dataclass(frozen=True)
class Case:
    """A group of completions of one length, in tokens."""

    prompt: int
    completion: int
    group: int
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64


CASES = {
    "cpu": [
        Case(1024, 64, 16),
        Case(1024, 16, 16),
        Case(2048, 128, 8),
        Case(300, 27, 16),
        Case(1024, 64, 16, 4, 2, 32),
    ],
    "tiny": [Case(600, 16, 4, 4, 2, 16)],
}

Piece = Callable[[], object]


def piece(queries: Tensor, keys: Tensor, is_causal: bool, copied: bool = False) -> Piece:
    """A kernel's forward and backward: queries [B, H, q, D], keys [B, H, k, D], which are the values too."""
    grad = torch.randn(queries.shape)

    def call() -> None:
        keys_and_values = [keys.contiguous(), keys.contiguous()] if copied else [keys, keys]
        out, lse = _flash(queries, *keys_and_values, 0.0, is_causal)
        _flash_backward(grad, queries, *keys_and_values, out, lse, 0.0, is_causal)

    return call


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Times of all, rates of what is done, and what the others would gain: above 1 is faster."""
    P, R, G, D, Hkv = case.prompt, case.completion, case.group, case.head_dim, case.kv_heads
    shared_by = case.heads // Hkv
    generator = torch.Generator().manual_seed(0)

    def queries(length: int, batch: int = 1) -> Tensor:
        return torch.randn(batch * Hkv, shared_by, length, D, generator=generator)

    def keys(length: int, batch: int = 1) -> Tensor:  # of a key/value head, not copied for its query heads
        one = torch.randn(batch * Hkv, 1, length, D, generator=generator)
        return one.expand(-1, shared_by, -1, -1)

    cuts = [*range(0, P, CHUNK), P]
    chunks = [piece(queries(stop - start), keys(stop - start), True) for start, stop in pairwise(cuts)]
    chunks += [piece(queries(P - stop), keys(CHUNK), False) for stop in cuts[1:-1]]
    folded = torch.randn(Hkv, 1, shared_by * G * R, D, generator=generator)
    ways: dict[str, list[Piece]] = {
        "prompt": [piece(queries(P), keys(P), True)],
        "prompt_in_chunks": chunks,
        "completions": [piece(queries(R), keys(R), True) for _ in range(G)],
        "completions_in_a_batch": [piece(queries(R, G), keys(R, G), True)],
        "rectangle": [piece(queries(G * R), keys(P), False)],
        "rectangle_folded": [piece(folded, keys(P)[:, :1], False)],
        "rectangle_copied_heads": [piece(queries(G * R), keys(P), False, copied=True)],
    }
    rows, weight = torch.randn(2048, 512, generator=generator), torch.randn(512, 1536, generator=generator)
    grad = torch.randn(2048, 1536, generator=generator)
    ways["matmul"] = [lambda: rows @ weight, lambda: grad @ weight.T, lambda: rows.T @ grad]
    times = by_turns({name: partial(_all, pieces) for name, pieces in ways.items()}, turns, device, calls=3)
    pairs = {"prompt": P * (P + 1) // 2, "completions": G * R * (R + 1) // 2, "rectangle": G * R * P}
    flops = {name: 12 * D * case.heads * count for name, count in pairs.items()} | {"matmul": 6 * rows.numel() * 1536}
    return {
        "call_ms": {name: median(each) for name, each in times.items()},
        "gflop_s": {name: median([count / ms / 1e6 for ms in times[name]]) for name, count in flops.items()},
        "gain": {name: ratio(times[name.split("_")[0]], times[name]) for name in ways if name not in flops},
    }


def _all(pieces: Sequence[Piece]) -> None:
    for call in pieces:
        call()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("pieces", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
