"""Options of FlexAttention's kernels, layouts and orders that might be faster than what flexpg uses.

    python -m benchmarks.kernels --device cuda      # bfloat16; a compilation for each trial and head shape
    python -m benchmarks.kernels --tiny             # seconds on CPU, as a test; nothing is compiled

Each trial computes attention of the same packed sequence, forward and backward, alternating with `default`, flexpg's
flex backend:

- blocks_of_128: q, k and v as [1, H, S / 128, 128, D], flattened in the compiled function, so that kernels know that
  the length is a multiple of 128 and may drop boundary checks.
- static_length: compiled for this length only.
- max_autotune: torch's own search over tiles.
- forward_..., backward_...: tiles (queries, keys), stages and warps; tiles of the backward for dK and dV, swapped for
  dQ. torch's choices for an H100 in bfloat16 are among them (forward 128, 128 for heads of 64 and 128, 64 for heads of
  128; backward 64, 128).
- tma: Hopper's tensor memory accelerator; where the compiler cannot use it, it ignores the option, and the ratio is 1.
- expanded_heads: keys and values copied for each query head.
- short_first, long_first: the order of completions of different lengths.
- flash_split: segment by segment, see flash_split.py.
- cute: torch's BACKEND="FLASH", if its package is installed. On Hopper its gradients have been wrong
  (Dao-AILab/flash-attention#2623).
- causal: one plain causal sequence with as many visible pairs; the others are compared with it per visible pair. The
  work on dK and dV is parallel over blocks of keys and key/value heads, and a prompt's columns are much longer than a
  completion's: a short prompt with many completions and few key/value heads shows what that costs.

The outcome of a trial is "measured"; "refused", with the error; or "wrong", and then not timed, if its output or a
gradient differs from the default's by more than the tolerance, relative to the largest entry. `times_per_pair` is the
time relative to the default's. On CPU, where FlexAttention has no backward, trials are forwards only, except for
flash_split, which is also compared in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    Attend,
    Case,
    Implementation,
    Inputs,
    build_tree,
    causal_length,
    causal_mask,
    causal_pairs,
    passes,
    random_inputs,
    summarize,
)
from benchmarks.flash_split import FLASH, REFERENCE, flash_split_attention, largest_difference, plan_calls
from benchmarks.record import run
from benchmarks.timing import alternate
from benchmarks.update import uneven
from flexpg import PrefixTree, attention, block_mask
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
TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 2**-16}  # 4 and 128 roundings of the largest entry
EXACT = 1e-12  # for flash_split in float64

Options = dict[str, int | bool | str]


def backward_tiles(rows: int, columns: int) -> Options:
    """Return tiles for dK and dV, and the same swapped for dQ, as in torch's own configurations."""
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

REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, ImportError)  # of torch or its compiler


@dataclass(frozen=True)
class Trial:
    """An implementation, and [S] the default's packed index of each of its tokens; None if they are the same."""

    implementation: Implementation
    order: Tensor | None = None


def compile_flex(
    mask: BlockMask, options: Options | None = None, mode: str | None = None, dynamic: bool = True
) -> Attend:
    """Compile FlexAttention as flexpg does, with kernel options, a mode of the compiler, or for one length only.

    q, k and v may also be [1, H, S / 128, 128, D].
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


def in_blocks(attend: Attend) -> Attend:
    """Pass q, k and v as [1, H, S / 128, 128, D]."""
    return lambda *qkv: attend(*(x.unflatten(2, (-1, BLOCK)) for x in qkv))


def expand_heads(attend: Attend) -> Attend:
    """Pass a key/value head for each query head."""
    return lambda q, k, v: attend(q, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)))


def build_trials(case: Case, tree: PrefixTree, inputs: Inputs, flex_inputs: Inputs) -> dict[str, Trial]:
    """Return all trials, the default first; `flex_inputs` require no gradient where flex has no backward."""
    mask, pairs, device = block_mask(tree), tree.num_pairs, tree.end.device
    attends = {
        "default": lambda q, k, v: attention(q, k, v, mask, backend="flex"),
        "blocks_of_128": in_blocks(compile_flex(mask)),
        "static_length": compile_flex(mask, dynamic=False),
        "max_autotune": compile_flex(mask, mode="max-autotune-no-cudagraphs"),
        "expanded_heads": expand_heads(compile_flex(mask)),
        **{name: compile_flex(mask, options) for name, options in OPTIONS.items()},
        "cute": compile_flex(mask, {"BACKEND": "FLASH"}),
    }
    trials = {name: Trial(Implementation(attend, flex_inputs, pairs)) for name, attend in attends.items()}
    if len(set(case.completions)) > 1:
        trials["short_first"] = reordered(case, tree, flex_inputs, sorted(case.completions))
        trials["long_first"] = reordered(case, tree, flex_inputs, sorted(case.completions, reverse=True))
    plan, kernels = plan_calls(tree), FLASH if device.type == "cuda" else REFERENCE
    flash = Implementation(lambda *qkv: flash_split_attention(*qkv, tree, plan, kernels), inputs, pairs)
    return trials | {"flash_split": Trial(flash)}


def reordered(case: Case, tree: PrefixTree, inputs: Inputs, completions: Sequence[int]) -> Trial:
    """Return the case with its completions, and their queries, keys and values, in another order."""
    other = build_tree(replace(case, completions=tuple(completions))).to(tree.end.device)
    # The nth sequence of a length takes the place of the nth of that length: every group has the same lengths.
    before, after = (each.node[each.lengths.sort(stable=True).indices] for each in (tree, other))
    order = torch.arange(tree.padded_length, device=tree.end.device)
    order[after[after >= 0]] = before[before >= 0]
    moved = tuple(x.detach()[:, :, order].requires_grad_(x.requires_grad) for x in inputs)
    mask = block_mask(other)
    return Trial(
        Implementation(lambda q, k, v: attention(q, k, v, mask, backend="flex"), moved, other.num_pairs), order
    )


def outputs(implementation: Implementation) -> list[Tensor]:
    """Return the output and, if the inputs require them, the gradients of q, k and v for half the square of it."""
    out = implementation.attend(*implementation.inputs)
    if not implementation.inputs[0].requires_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, implementation.inputs, out.detach())]


def outcome_of(trial: Trial, expected: Sequence[Tensor], tolerance: float) -> dict[str, Any]:
    """Return whether a trial runs and computes what is expected."""
    try:
        found = outputs(trial.implementation)
    except REFUSALS as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    if trial.order is not None:
        expected = [x[:, :, trial.order] for x in expected]
    differences = [
        (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        for ours, theirs in zip(found, expected, strict=False)  # on CPU the default has no gradients
    ]
    largest = torch.stack(differences).max().item()  # NaN if one is, and so above the tolerance
    return {"outcome": "measured" if largest <= tolerance else "wrong", "max_difference": largest}


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return every trial's outcome and times."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tree = build_tree(case).to(device)
    length = causal_length(tree.num_pairs)
    inputs, causal_inputs = (random_inputs(case, size, device, dtype) for size in (tree.padded_length, length))
    flex_inputs = inputs
    if device.type == "cpu":
        flex_inputs, causal_inputs = (tuple(x.detach() for x in each) for each in (inputs, causal_inputs))
    torch._dynamo.reset()  # what earlier cases compiled would count towards torch's limit
    with nullcontext() if case.compiled else torch.compiler.set_stance("force_eager"):
        trials = build_trials(case, tree, inputs, flex_inputs)
        expected = outputs(trials["default"].implementation)
        outcomes = {name: outcome_of(trial, expected, TOLERANCE[dtype]) for name, trial in trials.items()}
        timed = {
            name: trials[name].implementation for name, outcome in outcomes.items() if outcome["outcome"] == "measured"
        }
        timed["causal"] = Implementation(compile_flex(causal_mask(length, device)), causal_inputs, causal_pairs(length))
        times = alternate(passes(timed), repeats, device, calls=10 if device.type == "cuda" else 1)
    results = summarize(timed, times, case, lambda name: "default")
    exact = largest_difference(tree, case.heads, case.kv_heads, case.head_dim) if device.type == "cpu" else None
    assert exact is None or exact <= EXACT, f"flash_split differs by {exact} from dense attention in float64"
    return {
        "packed_tokens": tree.padded_length,
        "causal_tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": TOLERANCE[dtype],
        "flash_split_difference_in_float64": exact,
        "trials": {name: outcomes.get(name, {}) | results.get(name, {}) for name in (*outcomes, "causal")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("kernels", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
