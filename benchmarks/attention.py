"""The attention operator, forward and backward, with the masks of GRPO.

    python -m benchmarks.attention                    # CPU, float32
    python -m benchmarks.attention --device cuda      # bfloat16
    python -m benchmarks.attention --tiny             # seconds, as a test; flex is not compiled

q is [1, Hq, S, D], k and v are [1, Hkv, S, D]. On the packed sequence of a case:

- flex: flexpg's compiled FlexAttention, whose mask_mod loads one number per score: end[kv].
- flex_create_block_mask: the same with the tables of torch's create_block_mask.
- flex_3_loads, flex_5_loads, flex_6_loads: the same with flexpg's tables and a mask_mod as other libraries write it,
  which loads that many numbers per score and knows prompts and completions only. Each is verified to be the same mask.
- split, on CPU: flexpg's backend for training there.
- sdpa_dense, on CPU: torch's SDPA with the whole mask.
- prefix_grouper, on CPU: the two calls of that package, for prompts and completions only.

On one causal sequence with as many visible pairs (its length is a multiple of 128):

- flex_causal: compiled FlexAttention; its mask_mod loads nothing.
- sdpa_causal: SDPA by FlashAttention.

Lengths differ, so times are compared per visible pair: `times_per_pair` is relative to flexpg's, which is flex for
other flex kernels and on CUDA, and split otherwise. Padding costs time and is not a pair. FlexAttention has no backward
on CPU and is timed there without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from prefix_grouper import PrefixGrouper
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.record import run
from benchmarks.timing import Times, alternate, paired_ratio, quartiles
from benchmarks.update import prefix_grouper_attention, uneven
from flexpg import PrefixTree, attention, block_mask, dense_mask
from flexpg.backends.flex import RECOMPILE_LIMIT, packed_flex_attention
from flexpg.masks import MaskMod
from flexpg.tree import BLOCK, MIN_BLOCKS


@dataclass(frozen=True)
class Case:
    """A packed sequence of equal groups, after a system prompt if it has a length; lengths in tokens."""

    kind: str
    prompt: int
    completions: tuple[int, ...] = ()
    groups: int = 1
    system: int = 0
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    flex: bool = True  # compiling each of its masks takes 15 s on CPU
    compiled: bool = True


CPU = dict(heads=8, kv_heads=2, head_dim=64)  # of the benchmarks' small model
QWEN_05B = dict(heads=14, kv_heads=2, head_dim=64)
QWEN_3B = dict(heads=16, kv_heads=2, head_dim=128)
TINY = dict(heads=2, kv_heads=1, head_dim=16, compiled=False)

CASES = {
    "cpu": [
        Case("group", 1024, (64,) * 8, **CPU),
        Case("uneven", 1024, uneven(64, 16), **CPU),
        Case("groups", 256, (64,) * 4, groups=3, **CPU, flex=False),
        Case("system", 128, (64,) * 4, groups=3, system=512, **CPU, flex=False),
        Case("chain", 1536, **CPU, flex=False),
        Case("group", 1024, (64,) * 8, heads=8, kv_heads=8, head_dim=64, flex=False),
        Case("group", 1024, (64,) * 8, heads=7, kv_heads=1, head_dim=64, flex=False),
        Case("group", 1024, (64,) * 8, heads=8, kv_heads=2, head_dim=128, flex=False),
    ],
    "cuda": [
        case
        for shape in (QWEN_05B, QWEN_3B)
        for case in (
            Case("group", 4096, (256,) * 16, **shape),
            Case("group", 16_384, (2048,) * 8, **shape),
            Case("group", 512, (512,) * 32, **shape),
            Case("uneven", 4096, uneven(512, 16), **shape),
            Case("groups", 2048, (256,) * 8, groups=4, **shape),
            Case("system", 1024, (256,) * 8, groups=4, system=2048, **shape),
            Case("chain", 8192, **shape),
        )
    ]
    + [
        Case("group", 4096, (256,) * 16, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for heads, kv_heads, head_dim in ((16, 16, 64), (16, 4, 64), (16, 16, 128), (32, 8, 128))
    ],
    "tiny": [
        Case("group", 96, (16,) * 4, **TINY),
        Case("groups", 60, (16, 9), groups=3, **TINY),
        Case("system", 40, (16, 9, 20), groups=2, system=70, **TINY),
        Case("chain", 300, **TINY),
    ],
}

FLOPS = {"forward": 4, "backward": 8, "both": 12}  # per visible pair, head, and entry of a head

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]  # q [1, Hq, S, D], k and v [1, Hkv, S, D]


@dataclass(frozen=True)
class Implementation:
    """An attention function, its inputs, and its visible pairs per head; without gradients it is a forward only."""

    attend: Attend
    inputs: Inputs
    pairs: int


def build_tree(case: Case) -> PrefixTree:
    """Return a tree whose segments are in the order of the case: each repeats a token larger than those before it."""
    system = [0] * case.system
    prompts = [[*system, *[1 + g] * case.prompt] for g in range(case.groups)]
    first = 1 + case.groups
    return PrefixTree.from_sequences(
        [[*prompt, *[first + n] * length] for prompt in prompts for n, length in enumerate(case.completions)] or prompts
    )


def random_inputs(case: Case, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return random q, k and v that require gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, case.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    return q, k, v


def causal_length(pairs: int) -> int:
    """Return the length, a multiple of 128, of a causal sequence with about that many visible pairs."""
    return max(MIN_BLOCKS, round(isqrt(2 * pairs) / BLOCK)) * BLOCK


def causal_pairs(length: int) -> int:
    """Return the visible pairs of a causal sequence."""
    return length * (length + 1) // 2


def causal_mask(length: int, device: torch.device) -> BlockMask:
    """Return FlexAttention's plain causal mask."""
    chain = PrefixTree.from_sequences([torch.zeros(length, dtype=torch.int64)]).to(device)
    return with_mask_mod(block_mask(chain), lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)


def with_mask_mod(mask: BlockMask, mask_mod: MaskMod) -> BlockMask:
    """Return the same tables with another mask_mod of the same mask, so that kernels differ in nothing else."""
    return BlockMask(
        mask.seq_lengths,
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
    )


def torch_block_mask(tree: PrefixTree) -> BlockMask:
    """Return the mask with torch's tables; compiled on CUDA, where it would need the whole mask in int64."""
    device, mask_mod, size = tree.end.device, block_mask(tree).mask_mod, tree.padded_length
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return create(mask_mod, 1, 1, size, size, device=device)


def mask_mods_by_loads(tree: PrefixTree) -> dict[int, MaskMod]:
    """Return the mask of prompts and completions as other libraries write it, by the numbers that it loads per score.

    Three: the segments of query and key, and the query's prompt. Five: group and segment of both, and whether the key
    is in a prompt. Six: group, completion (0 in a prompt) and position of both.
    """
    starts, stops, _ = tree.segments.unbind(1)
    is_prompt = tree.position_ids[starts] == 0  # [K]
    group = is_prompt.cumsum(0) - 1
    # A padding token is a group of its own.
    padding = torch.arange(tree.padded_length - tree.num_tokens, device=starts.device) + len(starts)

    def by_token(of_segments: Tensor, of_padding: Tensor) -> Tensor:
        return torch.cat([of_segments.repeat_interleave(stops - starts), of_padding]).to(torch.int32)

    number = torch.arange(len(starts), device=starts.device)
    segment = by_token(number, padding)
    prompt_segment = by_token(number[is_prompt][group], padding)
    group_id = by_token(group, padding)
    completion = by_token(torch.where(is_prompt, 0, number), padding)
    in_prompt = by_token(is_prompt, torch.zeros_like(padding)).bool()
    position = tree.position_ids.to(torch.int32)

    def three(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        key_segment = segment[kv]
        return (kv <= q) & ((key_segment == segment[q]) | (key_segment == prompt_segment[q]))

    def five(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (group_id[q] == group_id[kv]) & ((segment[q] == segment[kv]) | in_prompt[kv])

    def six(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        key_completion = completion[kv]
        is_own = (key_completion == 0) | (key_completion == completion[q])
        return (position[kv] <= position[q]) & (group_id[q] == group_id[kv]) & is_own

    return {3: three, 5: five, 6: six}


def check_mask(tree: PrefixTree, mask: BlockMask) -> None:
    """Raise if a mask_mod is not the tree's mask."""
    index = torch.arange(tree.padded_length, device=tree.end.device)
    zero = index.new_zeros(())
    assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None, :]), dense_mask(tree.end))


def flex_implementations(
    case: Case, tree: PrefixTree, inputs: Inputs, causal_inputs: Inputs
) -> dict[str, Implementation]:
    """Return compiled FlexAttention with each mask, all through the same function."""
    mask, scale, pairs = block_mask(tree), case.head_dim**-0.5, tree.num_pairs
    length, device = causal_inputs[0].shape[2], tree.end.device
    others = {"flex_create_block_mask": torch_block_mask(tree)}
    if not case.system:
        for loads, mask_mod in mask_mods_by_loads(tree).items():
            others[f"flex_{loads}_loads"] = with_mask_mod(mask, mask_mod)
    for other in others.values():
        check_mask(tree, other)

    def flex(other: BlockMask) -> Attend:
        return lambda q, k, v: packed_flex_attention(q, k, v, other, scale, None)

    if device.type == "cpu":
        inputs, causal_inputs = (tuple(x.detach() for x in each) for each in (inputs, causal_inputs))
    return {
        "flex": Implementation(lambda q, k, v: attention(q, k, v, mask, backend="flex"), inputs, pairs),
        **{name: Implementation(flex(other), inputs, pairs) for name, other in others.items()},
        "flex_causal": Implementation(flex(causal_mask(length, device)), causal_inputs, causal_pairs(length)),
    }


def cpu_implementations(case: Case, tree: PrefixTree, inputs: Inputs) -> dict[str, Implementation]:
    """Return what has a backward on a CPU."""
    mask, visible, pairs = block_mask(tree), dense_mask(tree.end), tree.num_pairs
    found = {
        "split": Implementation(lambda q, k, v: attention(q, k, v, mask, backend="split"), inputs, pairs),
        "sdpa_dense": Implementation(lambda q, k, v: sdpa(q, k, v, attn_mask=visible, enable_gqa=True), inputs, pairs),
    }
    if case.completions and not case.system:
        found["prefix_grouper"] = Implementation(_grouped_attention(case, tree), inputs, pairs)
    return found


def _grouped_attention(case: Case, tree: PrefixTree) -> Attend:
    """Return PrefixGrouper's attention with a batch entry per group; [1, Hq, tokens, D] without the padding."""
    attend = prefix_grouper_attention(PrefixGrouper([[case.prompt, *case.completions]] * case.groups), expanded=False)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[0, :, : tree.num_tokens].unflatten(1, (case.groups, -1)).transpose(0, 1) for x in (q, k, v))
        return attend(*batch).flatten(0, 1).transpose(0, 1)[None]

    return grouped


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute SDPA of one causal sequence by FlashAttention, or raise."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def passes(implementations: Mapping[str, Implementation]) -> dict[str, Callable[[], object]]:
    """Return each forward, and as NAME+backward both passes where there is a backward."""

    def forward(each: Implementation) -> Callable[[], object]:
        return lambda: each.attend(*each.inputs)

    def both(each: Implementation) -> Callable[[], object]:
        grad = torch.randn_like(each.attend(*each.inputs).detach())  # with gradients, or it would compile once more
        return lambda: torch.autograd.grad(each.attend(*each.inputs), each.inputs, grad)

    trained = {name: each for name, each in implementations.items() if each.inputs[0].requires_grad}
    return {name: forward(each) for name, each in implementations.items()} | {
        f"{name}+backward": both(each) for name, each in trained.items()
    }


def times_by_pass(name: str, times: Times) -> dict[str, list[float]]:
    """Return an implementation's times; the backward is both passes minus the forward of the same repeat."""
    if f"{name}+backward" not in times:
        return {"forward": times[name]}
    forward, both = times[name], times[f"{name}+backward"]
    return {"forward": forward, "backward": [b - f for b, f in zip(both, forward, strict=True)], "both": both}


def summarize(
    implementations: Mapping[str, Implementation], times: Times, case: Case, reference: Callable[[str], str]
) -> dict[str, Any]:
    """Return times, times per pair and rates of each implementation that did not run out of memory, by pass."""
    by_name = {name: times_by_pass(name, times) for name in implementations if name in times}
    per_pair = {  # ms per million
        name: {which: [ms / implementations[name].pairs * 1e6 for ms in values] for which, values in own_passes.items()}
        for name, own_passes in by_name.items()
    }
    result = {}
    for name, own_passes in by_name.items():
        row = result[name] = {"visible_pairs": implementations[name].pairs}
        other = per_pair[reference(name)]
        for which, values in own_passes.items():
            flops = FLOPS[which] * case.head_dim * case.heads * implementations[name].pairs
            row[f"{which}_ms"] = quartiles(values)
            row[f"{which}_ms_per_million_pairs"] = quartiles(per_pair[name][which])
            row[f"{which}_tflop_per_s"] = quartiles([flops / ms / 1e9 for ms in values])
            if reference(name) != name and which in other:
                row[f"{which}_times_per_pair"] = paired_ratio(per_pair[name][which], other[which])
    return result


def largest_difference(implementations: Sequence[Implementation], num_tokens: int) -> float:
    """Return the largest difference of outputs on the same packed sequence to the first one's."""
    first, *others = (each.attend(*each.inputs).detach()[:, :, :num_tokens] for each in implementations)
    return max((other.float() - first.float()).abs().max().item() for other in others)


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the results of all implementations of the case and the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tree = build_tree(case).to(device)
    length = causal_length(tree.num_pairs)
    inputs, causal_inputs = (random_inputs(case, size, device, dtype) for size in (tree.padded_length, length))
    if device.type == "cuda":
        torch._dynamo.reset()  # what was compiled for other heads would count towards torch's limit
    with nullcontext() if case.compiled else torch.compiler.set_stance("force_eager"):
        found = flex_implementations(case, tree, inputs, causal_inputs) if case.flex else {}
        if device.type == "cpu":
            found |= cpu_implementations(case, tree, inputs)
        difference = largest_difference([out for name, out in found.items() if name != "flex_causal"], tree.num_tokens)
        found["sdpa_causal"] = Implementation(sdpa_causal, causal_inputs, causal_pairs(length))
        calls = 10 if device.type == "cuda" else 1  # some take a fraction of a millisecond there
        times = alternate(passes(found), repeats, device, calls)
    trained = "split" if device.type == "cpu" else "flex"
    return {
        "packed_tokens": tree.padded_length,
        "causal_tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "largest_difference": difference,
        "implementations": summarize(found, times, case, lambda name: "flex" if name.startswith("flex") else trained),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("attention", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
