"""A hundred random layouts in a row, as training has them: what is compiled for them, and how long it stalls.

    python -m benchmarks.shapes                    # CPU: fp32, forward
    python -m benchmarks.shapes --device cuda      # bf16, forward and backward
    python -m benchmarks.shapes --tiny             # seconds, to see that it works: graphs run as they are, uncompiled

Number and sizes of the groups and all lengths are drawn with a fixed seed. Every way is given the same layouts, the
same queries, keys and values, and the masks of `block_mask`:

- flexpg: `flexpg.attention(..., backend="flex")`.
- default: `torch.compile` of a function that calls `flex_attention`.
- static: the same with `dynamic=False`. It compiles for every length, and past torch's limit of 8 runs dense eager
  attention, silently but for a line in the log. On CPU it gets the first `static_layouts` only: 8 compiles and what
  comes then are enough to see it.

A sequence, and no alternation: what is compiled for a layout depends on those before it. The ways follow one another,
each with nothing compiled and with empty caches on disk, and `--turns` has no effect. Each layout is attended to twice,
one right behind the other, and the second call tells what the first would have taken without the compiler. Per way:

- layouts: how many it got through, of so many distinct lengths.
- compiles: graphs that were compiled; a forward and its backward are one.
- stalls: first calls that took over 10 times their second, and over 100 ms more. `stalled_s` is what they took more,
  all together, and `longest_stall_s` the worst of them.
- eager_calls: of both, those that ran uncompiled, and so densely.
- first_call_ms, second_call_ms: of each layout in turn; `first_calls_s` and `second_calls_s` are their sums.
- error: class and first line of what ended it, null if it got through. With torch 2.13 on CPU, the C++ that `default`
  generates for its second length does not compile; a GPU's memory may end `static`.
"""

from __future__ import annotations

import random
import time
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
from flexpg import PrefixTree, block_mask
from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask

HEAD_DIM = 64
SHORTEST_TOKENS = 300
STALL_FACTOR, STALL_S = 10, 0.1
ENDS = (BackendCompilerFailed, torch.OutOfMemoryError)  # inductor's own errors are of the first kind

Attend = Callable[[Tensor, Tensor, Tensor, TreeBlockMask], Tensor]


@dataclass(frozen=True)
class Case:
    """Layouts of up to so many tokens, and heads of queries and of keys."""

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
    """One to four groups each, of two to eight completions; the same ones every time."""
    rng = random.Random(0)
    for _ in range(case.layouts):
        groups = rng.randint(1, 4)
        tokens = rng.randint(SHORTEST_TOKENS, case.longest_tokens) // groups
        prompts = [rng.randint(tokens // 4, tokens * 3 // 4) for _ in range(groups)]
        yield PrefixTree.from_lengths(prompts, [parts(rng, tokens - prompt, rng.randint(2, 8)) for prompt in prompts])


def parts(rng: random.Random, total: int, count: int) -> list[int]:
    """Random lengths, 1 or more, that make up the total."""
    cuts = sorted(rng.sample(range(1, total), count - 1))
    return [stop - start for start, stop in pairwise([0, *cuts, total])]


def flexpg(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask) -> Tensor:
    """As in training, without the choice of a backend."""
    return attention(q, k, v, mask, backend="flex")


def plain(dynamic: bool | None, eager_calls: list[int]) -> Attend:
    """Compiled flex_attention, that adds its length to `eager_calls` whenever torch runs it in Python after all."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask) -> Tensor:
        if not torch.compiler.is_compiling():  # no part of what is compiled
            eager_calls.append(q.shape[2])
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    return torch.compile(attend, dynamic=dynamic)


def sequence(attend: Attend, case: Case, count: int, eager_calls: list[int], device: torch.device) -> dict[str, Any]:
    """What the first `count` layouts of a case cost a way that starts with nothing compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counters.clear()
    times, lengths, error = [], [], None  # (first, second) seconds
    with fresh_cache(), torch.set_grad_enabled(case.backward):
        for tree in islice(layouts(case), count):
            step = attention_step(attend, tree.to(device), case)
            try:
                times.append((seconds(step, device), seconds(step, device)))
            except ENDS as e:
                error = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
                break
            lengths.append(len(tree))
    first, second = [a for a, _ in times], [b for _, b in times]
    stalls = [a - b for a, b in times if a > STALL_FACTOR * b and a > b + STALL_S]
    return {
        "layouts": len(times),
        "distinct_lengths": len(set(lengths)),
        "compiles": counters["aot_autograd"]["ok"],  # unlike "unique_graphs", without what dense attention traces
        "stalls": len(stalls),
        "stalled_s": sum(stalls),
        "longest_stall_s": max(stalls, default=0.0),
        "eager_calls": len(eager_calls),
        "first_calls_s": sum(first),
        "second_calls_s": sum(second),
        "first_call_ms": [round(each * 1e3, 3) for each in first],
        "second_call_ms": [round(each * 1e3, 3) for each in second],
        "error": error,
    }


def attention_step(attend: Attend, tree: PrefixTree, case: Case) -> Callable[[], None]:
    """A forward, and a backward where the case has one; tensors and mask are made here."""
    device, mask = tree.end.device, block_mask(tree)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad = (
        torch.randn(1, heads, len(tree), HEAD_DIM, device=device, dtype=dtype)
        for heads in (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    )
    inputs = [x.requires_grad_(case.backward) for x in (q, k, v)]

    def step() -> None:
        out = attend(*inputs, mask)
        if case.backward:
            torch.autograd.grad(out, inputs, grad)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one call, until its result is there."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Every way through the layouts, from the same start."""
    default_calls, static_calls = [], []
    with nullcontext() if case.inductor else torch.compiler.set_stance(force_backend="aot_eager"):
        torch.compile(torch.neg)(torch.zeros(8, device=device))  # loads the compiler: seconds that belong to no way
        return {
            "tokens": [len(tree) for tree in layouts(case)],
            "ways": {
                "flexpg": sequence(flexpg, case, case.layouts, [], device),
                "default": sequence(plain(None, default_calls), case, case.layouts, default_calls, device),
                "static": sequence(plain(False, static_calls), case, case.static_layouts, static_calls, device),
            },
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("shapes", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
