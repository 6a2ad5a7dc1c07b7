"""A hundred random layouts in sequence, as in training: how often FlexAttention compiles for them, and for how long.

    python -m benchmarks.shapes                    # CPU: float32, forward
    python -m benchmarks.shapes --device cuda      # bfloat16, forward and backward
    python -m benchmarks.shapes --tiny             # seconds, as a test: graphs are not compiled by inductor

The number and sizes of groups and all lengths are drawn with a fixed seed. All implementations get the same layouts,
queries, keys and values, and the masks of `block_mask`:

- flexpg: `flexpg.attention(..., backend="flex")`.
- default: `torch.compile` of a function that calls `flex_attention`.
- static: the same with `dynamic=False`. It compiles for every length and, past torch's limit of 8, runs dense eager
  attention with only a line in the log. On CPU it gets the first `static_layouts` only, which is enough to see it.

Implementations run one after another, each with nothing compiled and empty caches, because what is compiled for a
layout depends on those before it; --repeats has no effect. Each layout is computed twice, and the second call shows
what the first would have taken without compiling. Per implementation:

- layouts: how many it computed, with so many distinct lengths.
- compiles: graphs that were compiled; a forward and its backward are one.
- stalls: first calls that took over 10 times as long as their second and over 100 ms more. `stalled_s` is the sum of
  the excess and `longest_stall_s` the largest.
- eager_calls: calls of both that ran uncompiled, and so densely.
- first_call_ms, second_call_ms: of each layout; `first_calls_s` and `second_calls_s` are their sums.
- error: type and first line of what ended it, or null. With torch 2.13 on CPU, the C++ that `default` generates for its
  second length does not compile; a GPU's memory may end `static`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.record import run
from benchmarks.timing import call_ms
from flexpg import PrefixTree, attention, block_mask
from flexpg.masks import TreeBlockMask

HEAD_DIM = 64
SHORTEST_TOKENS = 300
STALL_FACTOR, STALL_MS = 10, 100
ENDS = (BackendCompilerFailed, torch.OutOfMemoryError)  # inductor's own errors are of the first type

Attend = Callable[[Tensor, Tensor, Tensor, TreeBlockMask], Tensor]


@dataclass(frozen=True)
class Case:
    """Layouts of up to `longest_tokens` tokens, and query and key/value heads."""

    layouts: int
    static_layouts: int
    longest_tokens: int
    heads: tuple[int, int]
    backward: bool = False  # FlexAttention has none on CPU
    inductor: bool = True


CASES = {
    "cpu": [Case(layouts=100, static_layouts=20, longest_tokens=4096, heads=(8, 2))],
    "cuda": [Case(layouts=100, static_layouts=100, longest_tokens=32_768, heads=(14, 2), backward=True)],
    "tiny": [Case(layouts=4, static_layouts=4, longest_tokens=1024, heads=(2, 1), inductor=False)],
}


def layouts(case: Case) -> Iterator[PrefixTree]:
    """Yield trees of one to four groups of two to eight completions each, always the same."""
    rng = random.Random(0)
    for _ in range(case.layouts):
        groups = rng.randint(1, 4)
        tokens = rng.randint(SHORTEST_TOKENS, case.longest_tokens) // groups
        prompts = [rng.randint(tokens // 4, tokens * 3 // 4) for _ in range(groups)]
        completions = [random_lengths(rng, tokens - prompt, rng.randint(2, 8)) for prompt in prompts]
        yield PrefixTree.from_lengths(prompts, completions)


def random_lengths(rng: random.Random, total: int, count: int) -> list[int]:
    """Return random lengths of at least 1 with this sum."""
    cuts = sorted(rng.sample(range(1, total), count - 1))
    return [stop - start for start, stop in pairwise([0, *cuts, total])]


def flexpg(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask) -> Tensor:
    """Compute attention as in training."""
    return attention(q, k, v, mask, backend="flex")


def compiled_flex(dynamic: bool | None, eager_calls: list[int]) -> Attend:
    """Compile flex_attention; whenever torch runs it uncompiled, its length is added to `eager_calls`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask) -> Tensor:
        if not torch.compiler.is_compiling():  # not part of what is compiled
            eager_calls.append(q.shape[2])
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    return torch.compile(attend, dynamic=dynamic)


def run_layouts(attend: Attend, case: Case, count: int, eager_calls: list[int], device: torch.device) -> dict[str, Any]:
    """Compute the first `count` layouts of a case from a state in which nothing is compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counters.clear()
    first, second, lengths, error = [], [], [], None
    with fresh_cache(), torch.set_grad_enabled(case.backward):
        for tree in islice(layouts(case), count):
            step = attention_step(attend, tree.to(device), case)
            try:
                times = call_ms(step, device), call_ms(step, device)
            except ENDS as e:
                error = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
                break
            first.append(times[0])
            second.append(times[1])
            lengths.append(tree.padded_length)
    stalls = [a - b for a, b in zip(first, second, strict=True) if a > STALL_FACTOR * b and a > b + STALL_MS]
    return {
        "layouts": len(first),
        "distinct_lengths": len(set(lengths)),
        "compiles": counters["aot_autograd"]["ok"],  # unlike "unique_graphs", without those of dense attention
        "stalls": len(stalls),
        "stalled_s": sum(stalls) / 1e3,
        "longest_stall_s": max(stalls, default=0.0) / 1e3,
        "eager_calls": len(eager_calls),
        "first_calls_s": sum(first) / 1e3,
        "second_calls_s": sum(second) / 1e3,
        "first_call_ms": [round(each, 3) for each in first],
        "second_call_ms": [round(each, 3) for each in second],
        "error": error,
    }


def attention_step(attend: Attend, tree: PrefixTree, case: Case) -> Callable[[], None]:
    """Return a function that computes a forward and, if the case has one, a backward."""
    device, mask = tree.end.device, block_mask(tree)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad = (
        torch.randn(1, heads, tree.padded_length, HEAD_DIM, device=device, dtype=dtype)
        for heads in (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    )
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def step() -> None:
        out = attend(*inputs, mask)
        if case.backward:
            torch.autograd.grad(out, inputs, grad)

    return step


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the results of each implementation, each from the same state."""
    default_calls, static_calls = [], []
    with nullcontext() if case.inductor else torch.compiler.set_stance(force_backend="aot_eager"):
        torch.compile(torch.neg)(torch.zeros(8, device=device))  # loads the compiler, which takes seconds
        default, static = compiled_flex(None, default_calls), compiled_flex(False, static_calls)
        return {
            "tokens": [tree.padded_length for tree in layouts(case)],
            "implementations": {
                "flexpg": run_layouts(flexpg, case, case.layouts, [], device),
                "default": run_layouts(default, case, case.layouts, default_calls, device),
                "static": run_layouts(static, case, case.static_layouts, static_calls, device),
            },
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("shapes", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
