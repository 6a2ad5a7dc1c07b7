"""Trials of FlexAttention's kernels: options, layouts and orders that might be faster than what flexpg asks for.

    python -m benchmarks.kernels --device cuda      # bf16; a compilation for each trial and head shape
    python -m benchmarks.kernels --tiny             # seconds on CPU, to see that it works; nothing is compiled then

Each trial computes attention of the same packed row, forward and backward, by turns with `default`, which is
flexpg.backends.dispatch's flex:

- blocks_of_128: q, k and v as [1, H, S / 128, 128, D], flattened in the compiled function: the kernels then know that
  the length is a multiple of 128, and may drop the checks at its end.
- static_length: compiled for this length alone, where nothing is left to know about it.
- max_autotune: torch's own search among tiles.
- forward_..., backward_...: tiles (queries, keys), stages and warps; a backward's tiles for dK and dV, the same swapped
  for dQ. torch's choices for an H100 in bf16 are among them (128, 128 forward for heads of 64, 128, 64 for those of
  128; 64, 128 backward).
- tma: Hopper's tensor memory accelerator; where the compiler cannot use it, it leaves it out in silence, and the ratio
  is 1.
- expanded_heads: keys and values copied for each query head.
- short_first, long_first: where completions differ in length, their order in the row.
- flash_split: segment by segment, see flash_split.py.
- cute: torch's BACKEND="FLASH", if the package it needs is there. On Hopper its gradients have been wrong
  (Dao-AILab/flash-attention#2623).
- causal: of one plain causal sequence with as many visible pairs; the others are compared to it per visible pair. The
  work on dK and dV is parallel over blocks of keys and key/value heads, and a prompt's columns are far longer than a
  completion's: a short prompt with many completions and few key/value heads shows what that costs.

A trial's outcome is "measured"; "refused", with the error; or "wrong", and then it is not timed, where its output or a
gradient is further from the default's than the tolerance. Differences are relative to the largest entry of the
default's, the largest of the four is given. `times_per_pair` is time over the default's.

On CPU, whose FlexAttention has no backward, trials are a forward alone, but for flash_split, which is compared in
float64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.attention import (
    QWEN_05B,
    QWEN_3B,
    TINY,
    Case,
    Inputs,
    Way,
    causal_length,
    causal_mask,
    causal_pairs,
    inputs_of,
    numbers,
    passes,
    tree_of,
)
from benchmarks.flash_split import FLASH, REFERENCE, calls, flash_split_attention, largest_difference
from benchmarks.record import run
from benchmarks.turns import by_turns
from benchmarks.update import uneven
from flexpg import PrefixTree, attention, block_mask, shared_cost
from flexpg.backends.flex import RECOMPILE_LIMIT
from flexpg.tree import BLOCK

CASES = {
    "cuda": [
        Case("uneven", 4096, uneven(512, 16), **QWEN_3B),
        Case("uneven", 4096, uneven(512, 16), **QWEN_05B),
        Case("group", 512, (512,) * 32, **QWEN_3B),
        Case("system", 1024, (256,) * 8, groups=4, system=2048, **QWEN_3B),
    ],
    "tiny": [
        Case("uneven", 96, (16, 9, 30), **TINY),
        Case("system", 40, (16, 9), groups=3, system=70, **TINY),
    ],
}
TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 2**-16}  # 4 and 128 times the rounding of the largest entry
EXACT = 1e-12  # of flash_split in float64

Options = dict[str, int | bool | str]


def backward_tiles(rows: int, columns: int) -> Options:
    """For dK and dV, and the same swapped for dQ, as torch's own configurations have them."""
    return {"bwd_BLOCK_M1": rows, "bwd_BLOCK_N1": columns, "bwd_BLOCK_M2": columns, "bwd_BLOCK_N2": rows}


OPTIONS: dict[str, Options] = {
    **{
        f"forward_tiles_{rows}_{columns}": {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": columns}
        for rows, columns in ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64))
    },
    **{f"forward_stages_{n}": {"fwd_num_stages": n} for n in (2, 3, 4)},
    **{f"forward_warps_{n}": {"fwd_num_warps": n} for n in (4, 8)},
    **{
        f"backward_tiles_{rows}_{columns}": backward_tiles(rows, columns)
        for rows, columns in ((128, 128), (64, 128), (64, 64), (32, 128), (32, 64))
    },
    **{f"backward_stages_{n}": {"bwd_num_stages": n} for n in (1, 2, 3)},
    **{f"backward_warps_{n}": {"bwd_num_warps": n} for n in (4, 8)},
    "tma": {"USE_TMA": True},
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """A way, and [S] which packed token of the default's row stands at each place of its own; None: the same one."""

    way: Way
    tokens: Tensor | None = None


def compiled(mask: BlockMask, options: Options | None = None, mode: str | None = None, dynamic: bool = True) -> Attend:
    """FlexAttention as flexpg compiles it, with kernel options, a mode of the compiler, or for one length alone.

    q, k and v may be [1, H, S / 128, 128, D] as well.
    """

    def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        if q.dim() == 5:
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        is_grouped = q.shape[1] != k.shape[1]
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=is_grouped, kernel_options=options)

    compiled_flex = torch.compile(flex, dynamic=dynamic, mode=mode, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for x in (q, k, v):
            for dim in {*range(x.dim())} - {2}:  # only the length is dynamic, as in flexpg
                torch._dynamo.mark_static(x, dim)
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled_flex(q, k, v, mask)

    return attend


def by_blocks(attend: Attend) -> Attend:
    """The same, which is given [1, H, S / 128, 128, D]."""
    return lambda *qkv: attend(*(x.unflatten(2, (-1, BLOCK)) for x in qkv))


def expanded(attend: Attend) -> Attend:
    """The same, which is given a key/value head for each query head."""
    return lambda q, k, v: attend(q, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)))


def trials(case: Case, tree: PrefixTree, inputs: Inputs, flex_inputs: Inputs) -> dict[str, Trial]:
    """All of them, the default first; `flex_inputs` require no gradient where flex has none to give."""
    mask, pairs, device = block_mask(tree), shared_cost(tree).attention_pairs, tree.end.device
    attends = {
        "default": lambda q, k, v: attention(q, k, v, mask, backend="flex"),
        "blocks_of_128": by_blocks(compiled(mask)),
        "static_length": compiled(mask, dynamic=False),
        "max_autotune": compiled(mask, mode="max-autotune-no-cudagraphs"),
        "expanded_heads": expanded(compiled(mask)),
        **{name: compiled(mask, options) for name, options in OPTIONS.items()},
    }
    found = {name: Trial(Way(attend, flex_inputs, pairs)) for name, attend in attends.items()}
    if len(set(case.completions)) > 1:
        found["short_first"] = ordered(case, tree, flex_inputs, sorted(case.completions))
        found["long_first"] = ordered(case, tree, flex_inputs, sorted(case.completions, reverse=True))
    plan, kernels = calls(tree), FLASH if device.type == "cuda" else REFERENCE
    found["flash_split"] = Trial(Way(lambda *qkv: flash_split_attention(*qkv, tree, plan, kernels), inputs, pairs))
    found["cute"] = Trial(Way(compiled(mask, {"BACKEND": "FLASH"}), flex_inputs, pairs))
    return found


def ordered(case: Case, tree: PrefixTree, inputs: Inputs, completions: Sequence[int]) -> Trial:
    """The case with its completions, and their queries, keys and values, in another order in the row."""
    other = tree_of(replace(case, completions=tuple(completions))).to(tree.end.device)
    # The nth sequence of a length takes the place of the nth of that length: every group has the same lengths.
    before, after = (each.node[each.lengths.sort(stable=True).indices] for each in (tree, other))
    tokens = torch.arange(len(tree), device=tree.end.device)
    tokens[after[after >= 0]] = before[before >= 0]
    moved = tuple(x.detach()[:, :, tokens].requires_grad_(x.requires_grad) for x in inputs)
    mask = block_mask(other)
    way = Way(lambda q, k, v: attention(q, k, v, mask, backend="flex"), moved, shared_cost(other).attention_pairs)
    return Trial(way, tokens)


def results(way: Way) -> list[Tensor]:
    """The output and, where the inputs require them, the gradients of q, k and v, if the output's is the output."""
    out = way.attend(*way.inputs)
    if not way.inputs[0].requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, way.inputs, out.detach())]


def tried(trial: Trial, expected: Sequence[Tensor], tolerance: float) -> dict[str, Any]:
    """Whether a trial runs, and gives what is expected of it."""
    try:
        found = results(trial.way)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        ImportError,
    ) as error:  # a refusal is a result: of torch, its compiler, or for want of memory
        return {"outcome": "refused", "error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    if trial.tokens is not None:
        expected = [x[:, :, trial.tokens] for x in expected]
    differences = [
        (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        for ours, theirs in zip(found, expected, strict=False)  # on CPU the default has no gradients
    ]
    largest = torch.stack(differences).max().item()  # NaN if one is, and so beyond the tolerance
    return {"outcome": "measured" if largest <= tolerance else "wrong", "max_difference": largest}


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Every trial's outcome."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tree = tree_of(case).to(device)
    length = causal_length(shared_cost(tree).attention_pairs)
    inputs, causal_inputs = (inputs_of(case, size, device, dtype) for size in (len(tree), length))
    flex_inputs = inputs
    if device.type == "cpu":
        flex_inputs, causal_inputs = (tuple(x.detach() for x in each) for each in (inputs, causal_inputs))
    torch._dynamo.reset()  # what the cases before have compiled would count towards torch's limit
    with nullcontext() if case.compiled else torch.compiler.set_stance("force_eager"):
        found = trials(case, tree, inputs, flex_inputs)
        expected = results(found["default"].way)
        outcomes = {name: tried(trial, expected, TOLERANCE[dtype]) for name, trial in found.items()}
        ways = {name: found[name].way for name, outcome in outcomes.items() if outcome["outcome"] == "measured"}
        ways["causal"] = Way(compiled(causal_mask(length, device)), causal_inputs, causal_pairs(length))
        times = by_turns(passes(ways), turns, device, calls=10 if device.type == "cuda" else 1)
    timed = numbers(ways, times, case, lambda name: "default")
    exact = largest_difference(tree, case.heads, case.kv_heads, case.head_dim) if device.type == "cpu" else None
    assert exact is None or exact <= EXACT, f"flash_split differs by {exact} from dense attention in float64"
    return {
        "packed_tokens": len(tree),
        "causal_tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": TOLERANCE[dtype],
        "flash_split_difference_in_float64": exact,
        "trials": {name: outcomes.get(name, {}) | timed.get(name, {}) for name in (*outcomes, "causal")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run("kernels", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
