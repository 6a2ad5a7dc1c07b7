"""The parts of split attention on a CPU, forward and backward of the bare kernels: would other parts be faster?

    python -m benchmarks.split_parts
    python -m benchmarks.split_parts --tiny             # seconds, as a test

flexpg/backends/split.py computes a group as causal parts, the prompt's and each completion's, and one rectangle: the
queries of all completions with the keys of the prompt. Alternatives to what it does:

- the prompt in chunks of 512 tokens, so that more of the work is in rectangles.
- completions in one batch instead of one by one, which needs equal lengths.
- the rectangle with query heads folded into its sequence instead of the kernel's batch, so that keys are read once per
  key/value head; or with keys and values expanded to all heads, as most libraries do.

Rates are in FLOPs of visible pairs (12 D per pair and head, without the scores that kernels recompute).
`gflop_s.matmul` is what a matrix product of the benchmarks' small model reaches, forward and backward: the limit.
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
from benchmarks.timing import alternate, paired_ratio, quartiles
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

Part = Callable[[], object]


def part(queries: Tensor, keys: Tensor, is_causal: bool, expanded: bool = False) -> Part:
    """Return a kernel's forward and backward: queries [B, H, q, D], keys [B, H, k, D], which are also the values."""
    grad = torch.randn(queries.shape)

    def call() -> None:
        keys_and_values = [keys.contiguous(), keys.contiguous()] if expanded else [keys, keys]
        out, lse = _flash(queries, *keys_and_values, 0.0, is_causal)
        _flash_backward(grad, queries, *keys_and_values, out, lse, 0.0, is_causal)

    return call


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return times of all parts, rates of split's own, and the gain of the alternatives: above 1 is faster."""
    P, R, G, D, Hkv = case.prompt, case.completion, case.group, case.head_dim, case.kv_heads
    per_kv_head = case.heads // Hkv
    generator = torch.Generator().manual_seed(0)

    def queries(length: int, batch: int = 1) -> Tensor:
        return torch.randn(batch * Hkv, per_kv_head, length, D, generator=generator)

    def keys(length: int, batch: int = 1) -> Tensor:  # of a key/value head, not copied for its query heads
        one = torch.randn(batch * Hkv, 1, length, D, generator=generator)
        return one.expand(-1, per_kv_head, -1, -1)

    cuts = [*range(0, P, CHUNK), P]
    chunks = [part(queries(stop - start), keys(stop - start), True) for start, stop in pairwise(cuts)]
    chunks += [part(queries(P - stop), keys(CHUNK), False) for stop in cuts[1:-1]]
    folded = torch.randn(Hkv, 1, per_kv_head * G * R, D, generator=generator)
    parts: dict[str, list[Part]] = {
        "prompt": [part(queries(P), keys(P), True)],
        "prompt_in_chunks": chunks,
        "completions": [part(queries(R), keys(R), True) for _ in range(G)],
        "completions_batched": [part(queries(R, G), keys(R, G), True)],
        "rectangle": [part(queries(G * R), keys(P), False)],
        "rectangle_folded": [part(folded, keys(P)[:, :1], False)],
        "rectangle_expanded_heads": [part(queries(G * R), keys(P), False, expanded=True)],
    }
    rows, weight = torch.randn(2048, 512, generator=generator), torch.randn(512, 1536, generator=generator)
    grad = torch.randn(2048, 1536, generator=generator)
    parts["matmul"] = [lambda: rows @ weight, lambda: grad @ weight.T, lambda: rows.T @ grad]
    times = alternate({name: partial(_call_all, each) for name, each in parts.items()}, repeats, device, calls=3)
    pairs = {"prompt": P * (P + 1) // 2, "completions": G * R * (R + 1) // 2, "rectangle": G * R * P}
    flops = {name: 12 * D * case.heads * count for name, count in pairs.items()} | {"matmul": 6 * rows.numel() * 1536}
    return {
        "call_ms": {name: quartiles(values) for name, values in times.items()},
        "gflop_s": {name: quartiles([count / ms / 1e6 for ms in times[name]]) for name, count in flops.items()},
        "gain": {name: paired_ratio(times[name.split("_")[0]], times[name]) for name in parts if name not in flops},
    }


def _call_all(parts: Sequence[Part]) -> None:
    for call in parts:
        call()


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("split_parts", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
