"""The attention operator alone, forward and backward, over the masks that GRPO makes, by turns in one process.

    python -m benchmarks.attention                    # CPU, fp32
    python -m benchmarks.attention --device cuda      # bf16
    python -m benchmarks.attention --tiny             # seconds, to see that it works; flex is not compiled then

q is [1, Hq, S, D], k and v are [1, Hkv, S, D]. Over the packed row of the case:

- flex: flexpg.backends.dispatch's compiled FlexAttention. Its mask_mod reads one number for a pair: end[kv].
- flex_torch_tables: the same with the tables that torch's create_block_mask makes of the same mask_mod.
- flex_3_loads, flex_5_loads, flex_6_loads: the same with flexpg's tables, but a mask_mod as they are written elsewhere,
  which reads so many numbers for a pair; of prompts and completions alone, not of deeper trees. Each is checked to be
  the same mask.
- split, on CPU: flexpg.backends.dispatch's way to train there.
- sdpa_dense, on CPU: torch's SDPA with the whole mask.
- prefix_grouper, on CPU: the two calls of the package of that name, of prompts and completions alone.

Over one causal sequence of another length, with as many visible pairs as the row (its length is a multiple of 128):

- flex_causal: compiled FlexAttention; its mask_mod reads nothing.
- sdpa_causal: SDPA, by FlashAttention.

Lengths differ, so times are compared per visible pair: `times_per_pair` is a way's time per visible pair over flexpg's,
flex where the way is a flex or the device is CUDA, and split else. Pads are in the time and not in the pairs. On CPU,
FlexAttention has no backward, and is timed without gradients.
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
from benchmarks.turns import by_turns, median, ratio
from benchmarks.update import prefix_grouper_attention, uneven
from flexpg import PrefixTree, attention, block_mask, dense_mask, shared_cost
from flexpg.backends.flex import RECOMPILE_LIMIT, packed_flex_attention
from flexpg.masks import MaskMod
from flexpg.tree import BLOCK, MIN_BLOCKS


@dataclass(frozen=True)
class Case:
    """A packed row, lengths in tokens: equal groups, behind a system prompt where it has a length."""

    kind: str
    prompt: int
    completions: tuple[int, ...] = ()
    groups: int = 1
    system: int = 0
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    flex: bool = True  # a compilation for each of its masks takes 15 s on CPU
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

FLOPS = {"forward": 4, "backward": 8, "both": 12}  # of a visible pair, a head, and an entry of a head

Inputs = tuple[Tensor, Tensor, Tensor]  # q [1, Hq, S, D], k and v [1, Hkv, S, D]


@dataclass(frozen=True)
class Way:
    """An attention, its inputs, and how many pairs it has to compute for each head.

    Inputs that require no gradient make it a forward alone.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Inputs
    pairs: int


def tree_of(case: Case) -> PrefixTree:
    """Its segments stand in the order of the case: every one repeats a token of its own, larger than those before."""
    system = [0] * case.system
    prompts = [[*system, *[1 + g] * case.prompt] for g in range(case.groups)]
    first = 1 + case.groups
    return PrefixTree.from_sequences(
        [[*prompt, *[first + n] * length] for prompt in prompts for n, length in enumerate(case.completions)] or prompts
    )


def inputs_of(case: Case, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random q, k and v that require gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, case.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    return q, k, v


def causal_length(pairs: int) -> int:
    """Tokens of a causal sequence with about so many visible pairs: a multiple of 128."""
    return max(MIN_BLOCKS, round(isqrt(2 * pairs) / BLOCK)) * BLOCK


def causal_pairs(length: int) -> int:
    """Visible pairs of a causal sequence."""
    return length * (length + 1) // 2


def causal_mask(length: int, device: torch.device) -> BlockMask:
    """FlexAttention's plain causal mask."""
    chain = PrefixTree.from_sequences([torch.zeros(length, dtype=torch.int64)]).to(device)
    return with_mask_mod(block_mask(chain), lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)


def with_mask_mod(mask: BlockMask, mask_mod: MaskMod) -> BlockMask:
    """The same tables with another mask_mod of the same mask, so that kernels differ in nothing else."""
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


def torch_mask(tree: PrefixTree) -> BlockMask:
    """The tree's mask with tables by torch; compiled on CUDA, or it would hold the whole mask in int64."""
    device, mask_mod = tree.end.device, block_mask(tree).mask_mod
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return make(mask_mod, 1, 1, len(tree), len(tree), device=device)


def mask_mods_by_loads(tree: PrefixTree) -> dict[int, MaskMod]:
    """The mask of prompts and completions as others write it, by the numbers that it reads for a pair.

    Three: the segment of either, and the prompt's of the query. Five: group and segment of either, and whether the key
    is of a prompt. Six: group, completion (0 in a prompt) and position of either.
    """
    starts, stops, _ = tree.segments.unbind(1)
    is_prompt = tree.position_ids[starts] == 0  # [K]
    group = is_prompt.cumsum(0) - 1
    pads = torch.arange(len(tree) - tree.num_tokens, device=starts.device) + len(starts)  # a pad is a group of its own

    def by_token(of_segments: Tensor, of_pads: Tensor) -> Tensor:
        return torch.cat([of_segments.repeat_interleave(stops - starts), of_pads]).to(torch.int32)

    number = torch.arange(len(starts), device=starts.device)
    segment = by_token(number, pads)
    prompt_segment = by_token(number[is_prompt][group], pads)
    group_id = by_token(group, pads)
    completion = by_token(torch.where(is_prompt, 0, number), pads)
    in_prompt = by_token(is_prompt, torch.zeros_like(pads)).bool()
    position = tree.position_ids.to(torch.int32)

    def three(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        of_key = segment[kv]
        return (kv <= q) & ((of_key == segment[q]) | (of_key == prompt_segment[q]))

    def five(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (group_id[q] == group_id[kv]) & ((segment[q] == segment[kv]) | in_prompt[kv])

    def six(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        of_key = completion[kv]
        is_own = (of_key == 0) | (of_key == completion[q])
        return (position[kv] <= position[q]) & (group_id[q] == group_id[kv]) & is_own

    return {3: three, 5: five, 6: six}


def check(tree: PrefixTree, mask: BlockMask) -> None:
    """Fails where a mask_mod is not the tree's mask, for any pair."""
    index = torch.arange(len(tree), device=tree.end.device)
    nothing = index.new_zeros(())
    assert torch.equal(mask.mask_mod(nothing, nothing, index[:, None], index[None, :]), dense_mask(tree.end))


def flex_ways(case: Case, tree: PrefixTree, inputs: Inputs, causal_inputs: Inputs) -> dict[str, Way]:
    """Compiled FlexAttention by every mask; all go through the same call of it."""
    mask, scale, pairs = block_mask(tree), case.head_dim**-0.5, shared_cost(tree).attention_pairs
    length, device = causal_inputs[0].shape[2], tree.end.device
    others = {"flex_torch_tables": torch_mask(tree)}
    if not case.system:
        for loads, mask_mod in mask_mods_by_loads(tree).items():
            others[f"flex_{loads}_loads"] = with_mask_mod(mask, mask_mod)
    for other in others.values():
        check(tree, other)

    def by(other: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: packed_flex_attention(q, k, v, other, scale, None)

    if device.type == "cpu":
        inputs, causal_inputs = (tuple(x.detach() for x in each) for each in (inputs, causal_inputs))
    return {
        "flex": Way(lambda q, k, v: attention(q, k, v, mask, backend="flex"), inputs, pairs),
        **{name: Way(by(other), inputs, pairs) for name, other in others.items()},
        "flex_causal": Way(by(causal_mask(length, device)), causal_inputs, causal_pairs(length)),
    }


def cpu_ways(case: Case, tree: PrefixTree, inputs: Inputs) -> dict[str, Way]:
    """What trains on a CPU."""
    mask, visible, pairs = block_mask(tree), dense_mask(tree.end), shared_cost(tree).attention_pairs
    ways = {
        "split": Way(lambda q, k, v: attention(q, k, v, mask, backend="split"), inputs, pairs),
        "sdpa_dense": Way(lambda q, k, v: sdpa(q, k, v, attn_mask=visible, enable_gqa=True), inputs, pairs),
    }
    if case.completions and not case.system:
        ways["prefix_grouper"] = Way(_grouped(case, tree), inputs, pairs)
    return ways


def _grouped(case: Case, tree: PrefixTree) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PrefixGrouper's attention, a group for a batch entry; [1, Hq, tokens, D], without the row's pads."""
    by_group = prefix_grouper_attention(PrefixGrouper([[case.prompt, *case.completions]] * case.groups), expanded=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[0, :, : tree.num_tokens].unflatten(1, (case.groups, -1)).transpose(0, 1) for x in (q, k, v))
        return by_group(*batch).flatten(0, 1).transpose(0, 1)[None]

    return attend


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of one causal sequence, by FlashAttention, or not at all."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def passes(ways: Mapping[str, Way]) -> dict[str, Callable[[], object]]:
    """Each way's forward, under its name, and where it has a backward, both, as NAME+backward; gradients are new."""

    def forward(way: Way) -> Callable[[], object]:
        return lambda: way.attend(*way.inputs)

    def both(way: Way) -> Callable[[], object]:
        grad = torch.randn_like(way.attend(*way.inputs).detach())  # with gradients, or it would be compiled once more
        return lambda: torch.autograd.grad(way.attend(*way.inputs), way.inputs, grad)

    trained = {f"{name}+backward": both(way) for name, way in ways.items() if way.inputs[0].requires_grad}
    return {name: forward(way) for name, way in ways.items()} | trained


def by_pass(name: str, times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """A way's turns; its backward is the time of both less that of the forward in the same turn."""
    if f"{name}+backward" not in times:
        return {"forward": times[name]}
    forward, both = times[name], times[f"{name}+backward"]
    return {"forward": forward, "backward": [b - f for b, f in zip(both, forward, strict=True)], "both": both}


def numbers(
    ways: Mapping[str, Way], times: Mapping[str, list[float]], case: Case, reference: Callable[[str], str]
) -> dict[str, Any]:
    """Of each way that did not run out of memory, and of its passes: how long, how long per pair, and how fast."""
    turns = {name: by_pass(name, times) for name in ways if name in times}
    per_pair = {  # ms of a million
        name: {which: [ms / ways[name].pairs * 1e6 for ms in values] for which, values in passes.items()}
        for name, passes in turns.items()
    }
    result = {}
    for name, passes in turns.items():
        row = result[name] = {"visible_pairs": ways[name].pairs}
        other = per_pair[reference(name)]
        for which, values in passes.items():
            flops = FLOPS[which] * case.head_dim * case.heads * ways[name].pairs
            row[f"{which}_ms"] = median(values)
            row[f"{which}_ms_per_million_pairs"] = median(per_pair[name][which])
            row[f"{which}_tflop_per_s"] = median([flops / ms / 1e9 for ms in values])
            if reference(name) != name and which in other:
                row[f"{which}_times_per_pair"] = ratio(per_pair[name][which], other[which])
    return result


def difference(ways: Mapping[str, Way], names: list[str], num_tokens: int) -> float:
    """The largest of the outputs of ways over the same row, from the first one's."""
    first, *others = (ways[name].attend(*ways[name].inputs).detach()[:, :, :num_tokens] for name in names)
    return max((other.float() - first.float()).abs().max().item() for other in others)


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """All ways that the case and the device have."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tree = tree_of(case).to(device)
    length = causal_length(shared_cost(tree).attention_pairs)
    inputs, causal_inputs = (inputs_of(case, size, device, dtype) for size in (len(tree), length))
    if device.type == "cuda":
        torch._dynamo.reset()  # what other shapes of heads have compiled would count towards torch's limit
    with nullcontext() if case.compiled else torch.compiler.set_stance("force_eager"):
        ways = flex_ways(case, tree, inputs, causal_inputs) if case.flex else {}
        if device.type == "cpu":
            ways |= cpu_ways(case, tree, inputs)
        same_row = [name for name in ways if name != "flex_causal"]
        largest = difference(ways, same_row, tree.num_tokens)
        ways["sdpa_causal"] = Way(sdpa_causal, causal_inputs, causal_pairs(length))
        calls = 10 if device.type == "cuda" else 1  # some take a fraction of a millisecond there
        times = by_turns(passes(ways), turns, device, calls)
    trained = "split" if device.type == "cpu" else "flex"
    return {
        "packed_tokens": len(tree),
        "causal_tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "largest_difference": largest,
        "ways": numbers(ways, times, case, lambda name: "flex" if name.startswith("flex") else trained),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run("attention", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
