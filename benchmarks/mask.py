"""Build time of a block mask: flexpg's, beside torch's own `create_block_mask`, eager and compiled.

    python -m benchmarks.mask                    # CPU
    python -m benchmarks.mask --device cuda
    python -m benchmarks.mask --tiny             # seconds, to see that it works

One group fills the packed row: a prompt of half of it, and eight completions of different lengths. By turns in one
process:

- tree: `PrefixTree.from_lengths(...)` on the device, which the masks below are given and do not build.
- flexpg: `block_mask(tree)`.
- eager: `create_block_mask(tree_mask_mod(tree.end), ...)`. It makes the whole [S, S] mask, and its peak is 10 bytes for
  each entry (measured on CPU, torch 2.13): 2.5 GiB at 16k tokens, 10 at 32k, 40 at 64k. Left out, and null, above 16k
  on CPU and above 64k on CUDA.
- compiled: `torch.compile(create_block_mask)`. It makes no [S, S] tensor, but still evaluates every entry. Left out,
  and null, above 32k on CPU, where a call takes seconds. Each size is compiled afresh, for itself alone; the call that
  compiles, with empty caches, is `compiled_first_call_ms`, and in no other time.

Every call is given a new `mask_mod`, as every training step has one. `equal_to_eager` and `equal_to_compiled`: whether
all eight block tables are those of `block_mask`, entry by entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.record import run
from benchmarks.turns import by_turns, median, ratio
from flexpg import PrefixTree, block_mask
from flexpg.masks import tree_mask_mod

TABLES = [
    f"{kind}{axis}_{what}" for kind in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]


@dataclass(frozen=True)
class Case:
    """A packed row of so many tokens, who builds its mask beside flexpg, and how often in a turn."""

    tokens: int
    eager: bool = True
    compiled: bool = True
    calls: int = 1


CASES = {
    "cpu": [
        *(Case(tokens, calls=8192 // tokens) for tokens in (1024, 2048, 4096, 8192)),
        Case(16_384),
        Case(32_768, eager=False),
        *(Case(tokens, eager=False, compiled=False, calls=10) for tokens in (65_536, 131_072, 262_144)),
    ],
    "cuda": [
        *(Case(tokens, calls=20) for tokens in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)),
        *(Case(tokens, eager=False, calls=20) for tokens in (131_072, 262_144)),
    ],
    "tiny": [Case(512, compiled=False, calls=2), Case(4096, eager=False, compiled=False)],
}


def group_lengths(tokens: int) -> tuple[int, list[int]]:
    """Of a prompt, half of the tokens but off the grid of blocks, and of completions: 1, 2, ... 8 parts of the rest."""
    prompt = tokens // 2 + 1
    return prompt, [(tokens - prompt) * parts // 36 for parts in range(1, 9)]


def are_equal(mask: BlockMask, other: BlockMask) -> bool:
    """All eight tables, in full."""
    return all(torch.equal(getattr(mask, name), getattr(other, name)) for name in TABLES)


def first_call_ms(way: Callable[[], BlockMask], device: torch.device) -> float:
    """Of a compiled function, with nothing compiled before and nothing found in a cache."""
    load_compiler(device)
    torch._dynamo.reset()  # else the second size would be compiled for all that follow
    with fresh_cache():
        start = time.perf_counter()
        way().kv_indices.sum().item()  # waits for it
        return (time.perf_counter() - start) * 1e3


@cache
def load_compiler(device: torch.device) -> None:
    """Once in a process, as it takes seconds that belong to no case."""
    torch.compile(torch.neg)(torch.zeros(8, device=device))


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Times, ratios, and whether the tables are the same."""
    prompt, completions = group_lengths(case.tokens)
    compiled_create = torch.compile(create_block_mask)

    def tree() -> PrefixTree:
        return PrefixTree.from_lengths([prompt], [completions]).to(device)

    row = tree()
    if len(row) != case.tokens:
        raise ValueError(f"{row} is padded to {len(row)} tokens; give a case whose group fills {case.tokens}")

    def flexpg() -> BlockMask:
        return block_mask(row)

    def eager() -> BlockMask:
        return create_block_mask(tree_mask_mod(row.end), None, None, len(row), len(row), device=device)

    def compiled() -> BlockMask:
        return compiled_create(tree_mask_mod(row.end), None, None, len(row), len(row), device=device)

    peers = {way.__name__: way for way, wanted in ((eager, case.eager), (compiled, case.compiled)) if wanted}
    compile_ms = first_call_ms(compiled, device) if case.compiled else None
    times = by_turns({"tree": tree, "flexpg": flexpg} | peers, turns, device, case.calls)
    return {
        f"{name}_ms": median(times[name]) if name in times else None for name in ("tree", "flexpg", "eager", "compiled")
    } | {
        "compiled_first_call_ms": compile_ms,
        "eager_over_flexpg": ratio(times["eager"], times["flexpg"]) if "eager" in times else None,
        "compiled_over_flexpg": ratio(times["compiled"], times["flexpg"]) if "compiled" in times else None,
        "equal_to_eager": are_equal(flexpg(), eager()) if "eager" in times else None,
        "equal_to_compiled": are_equal(flexpg(), compiled()) if "compiled" in times else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("mask", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
