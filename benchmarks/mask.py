"""Time to build a block mask: flexpg's, and torch's `create_block_mask`, eager and compiled.

    python -m benchmarks.mask                    # CPU
    python -m benchmarks.mask --device cuda
    python -m benchmarks.mask --tiny             # seconds, as a test

One group fills the packed sequence: a prompt of half of it and eight completions of different lengths. Alternating in
one process:

- tree: `PrefixTree.from_lengths(...)` on the device; the masks below are given it.
- flexpg: `block_mask(tree)`.
- eager: `create_block_mask(tree_mask_mod(tree.end), ...)`. It builds the whole [S, S] mask and needs 10 bytes for each
  entry (measured on CPU, torch 2.13): 2.5 GiB at 16k tokens, 10 at 32k, 40 at 64k. Skipped (null) above 16k on CPU and
  above 64k on CUDA.
- compiled: `torch.compile(create_block_mask)`. It builds no [S, S] tensor but still evaluates every entry. Skipped
  (null) above 32k on CPU, where a call takes seconds. Each size is compiled on its own; the call that compiles, with
  empty caches, is `compiled_first_call_ms` and in no other time.

Every call is given a new `mask_mod`, as in training. `equal_to_eager` and `equal_to_compiled`: whether all eight block
tables equal those of `block_mask`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.record import run
from benchmarks.timing import alternate, call_ms, paired_ratio, quartiles
from flexpg import PrefixTree, block_mask, tree_mask_mod

TABLES = [
    f"{kind}{axis}_{what}" for kind in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]


@dataclass(frozen=True)
class Case:
    """A packed length, what builds its mask besides flexpg, and calls per repeat."""

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
    """Return the lengths of a prompt, half of the tokens plus 1, and of completions: 1, 2, ... 8 parts of the rest."""
    prompt = tokens // 2 + 1
    return prompt, [(tokens - prompt) * parts // 36 for parts in range(1, 9)]


def are_equal(mask: BlockMask, other: BlockMask) -> bool:
    """Return whether all eight tables are equal."""
    return all(torch.equal(getattr(mask, name), getattr(other, name)) for name in TABLES)


def first_call_ms(create: Callable[[], BlockMask], device: torch.device) -> float:
    """Return the milliseconds of a compiled function's first call, with empty caches."""
    load_compiler(device)
    torch._dynamo.reset()  # or the second size would be compiled for all that follow
    with fresh_cache():
        return call_ms(create, device)


@cache
def load_compiler(device: torch.device) -> None:
    """Load the compiler once, which takes seconds that belong to no case."""
    torch.compile(torch.neg)(torch.zeros(8, device=device))


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return times, ratios, and whether the tables are equal."""
    prompt, completions = group_lengths(case.tokens)
    compiled_create = torch.compile(create_block_mask)

    def build_tree() -> PrefixTree:
        return PrefixTree.from_lengths([prompt], [completions]).to(device)

    tree = build_tree()
    size = tree.padded_length
    assert size == case.tokens, f"the group must fill {case.tokens} tokens, got {size}"

    def flexpg() -> BlockMask:
        return block_mask(tree)

    def eager() -> BlockMask:
        return create_block_mask(tree_mask_mod(tree.end), None, None, size, size, device=device)

    def compiled() -> BlockMask:
        return compiled_create(tree_mask_mod(tree.end), None, None, size, size, device=device)

    others = {"eager": eager} if case.eager else {}
    others |= {"compiled": compiled} if case.compiled else {}
    compile_ms = first_call_ms(compiled, device) if case.compiled else None
    times = alternate({"tree": build_tree, "flexpg": flexpg} | others, repeats, device, case.calls)
    numbers: dict[str, Any] = {"compiled_first_call_ms": compile_ms}
    for name in ("tree", "flexpg", "eager", "compiled"):
        numbers[f"{name}_ms"] = quartiles(times[name]) if name in times else None
    for name in ("eager", "compiled"):
        is_timed = name in times
        numbers[f"{name}_over_flexpg"] = paired_ratio(times[name], times["flexpg"]) if is_timed else None
        numbers[f"equal_to_{name}"] = are_equal(flexpg(), others[name]()) if is_timed else None
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("mask", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
