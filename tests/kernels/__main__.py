"""FlexAttention's GPU kernels, interpreted, against float64: `make kernels`.

    python -m tests.kernels                     all checks
    python -m tests.kernels bf16 mutations      those whose name has one of these words

Output and the gradients of q, k, v and sinks of our attention and block masks are compared with dense attention in
float64. A relative error must be within the rounding of the dtype. Wrong block tables must be noticed, and one GRPO
update of a small model must equal the baseline's.
"""

from __future__ import annotations

from tests.kernels import interpreter  # isort: skip  # before torch

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flexpg.backends.flex import packed_flex_attention
from flexpg.context_parallel import cut
from flexpg.masks import TreeBlockMask, block_mask, dense_mask
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 2e-6, F16: 8e-4, BF16: 6e-3}  # relative norms: 1.5 to 2 roundings of the dtype
TABLES = [
    f"{full}{side}_{table}" for full in ("", "full_") for side in ("kv", "q") for table in ("num_blocks", "indices")
]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        tree: The packed sequence.
        dtype: Of q, k and v.
        heads: Query and key/value heads.
        dim: D.
        window: Sliding window, or None.
        chunk: Positions of a chunk, or None.
        softcap: Softcap of the scores, or None.
        has_sinks: Whether there are attention sinks.
        first: The first query, after a cached prompt.
        in_inference_mode: Whether the mask is built in inference mode.
        has_images: Whether image blocks are bidirectional.
    """

    tree: PrefixTree
    dtype: torch.dtype = BF16
    heads: tuple[int, int] = (2, 1)
    dim: int = 64
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    first: int = 0
    in_inference_mode: bool = False
    has_images: bool = False

    def mask(self) -> TreeBlockMask:
        with torch.inference_mode(self.in_inference_mode):
            return block_mask(
                self.tree, self.window, first_query=self.first, chunk=self.chunk, bidirectional=self.has_images
            )


def branching(count: int = 10, seed: int = 1) -> PrefixTree:
    """Return a tree that branches at many depths."""
    draw = torch.Generator().manual_seed(seed)
    sequences = []
    for n in range(count):
        start = torch.randint(0, 2, (60,), generator=draw).cumsum(0) // 9
        sequences.append(torch.cat([start, torch.full((int(torch.randint(1, 60, (1,), generator=draw)),), 100 + n)]))
    return PrefixTree.from_sequences(sequences)


def image_tree(lengths: tuple[int, int, int]) -> PrefixTree:
    """Return the tree of a prompt of text, an image and text, with two completions."""
    types = torch.repeat_interleave(torch.tensor([0, 1, 0]), torch.tensor(lengths))
    pixels = {"pixel_values": torch.ones(1, 3, 2, 2), "mm_token_type_ids": types}
    rollouts = Rollouts.from_groups(
        [torch.ones_like(types)], [[[2] * 30, [3] * 20]], [[0.0, 1.0]], prompt_inputs=[pixels]
    )
    return rollouts.tree


GROUPS = PrefixTree.from_lengths([100, 40], [[30, 20, 50], [10, 40]])  # 290 tokens in three blocks
ONE = PrefixTree.from_lengths([200], [[30, 20]])  # 250 of 256
BORDERS = [PrefixTree.from_lengths([128], [[127, 1]]), PrefixTree.from_lengths([127], [[1, 129]])]
FULL = PrefixTree.from_lengths([260], [[90, 30]])  # 380 of 384, with full blocks

CASES = {
    "f32": Case(ONE, F32, heads=(1, 1)),  # slow: float32 has blocks of 16 by 16
    "f32 gqa window softcap": Case(ONE, F32, heads=(2, 1), window=50, softcap=2.0),
    "f16": Case(GROUPS, F16),
    "f16 d128 gqa 4:1": Case(ONE, F16, heads=(4, 1), dim=128),
    "f16 sinks": Case(ONE, F16, has_sinks=True),
    "bf16": Case(GROUPS),
    "bf16 d80 three heads": Case(ONE, heads=(3, 3), dim=80),
    "bf16 d128 gqa": Case(FULL, heads=(4, 2), dim=128),
    "bf16 d256": Case(ONE, dim=256),
    "bf16 window": Case(FULL, window=150),
    "bf16 chunk": Case(FULL, chunk=96),
    "bf16 softcap": Case(GROUPS, softcap=2.0),
    "bf16 sinks window": Case(GROUPS, heads=(4, 2), window=50, has_sinks=True),
    "bf16 first_query": Case(GROUPS, first=128),
    "bf16 first_query window": Case(FULL, heads=(4, 2), window=150, first=256, softcap=2.0),
    "bf16 range": Case(cut(GROUPS, 256), first=128),  # of a rank, with context parallelism
    "bf16 branching": Case(branching(), heads=(2, 2)),
    "bf16 branching first_query": Case(branching(seed=2), heads=(3, 1), window=30, first=128),
    "bf16 borders 128": Case(BORDERS[0]),
    "bf16 borders 127": Case(BORDERS[1]),
    "bf16 inference_mode": Case(ONE, in_inference_mode=True),
    "bf16 images": Case(image_tree((60, 150, 20)), has_images=True),
    "bf16 images window": Case(image_tree((60, 150, 20)), window=90, has_images=True),
}


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v and maybe sinks, and a gradient of the output."""
    torch.manual_seed(0)
    length, (queries, keys) = case.tree.padded_length, case.heads
    shapes = [(queries, length - case.first), (keys, length), (keys, length)]
    tensors = [torch.randn(1, *shape, case.dim).to(case.dtype) for shape in shapes]
    tensors += [torch.randn(queries)] * case.has_sinks
    return tensors, torch.randn_like(tensors[0])


def interpreted(case: Case, mask: TreeBlockMask, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return output and gradients by the interpreted kernels."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    q, k, v, *sinks = leaves
    out = packed_flex_attention(q, k, v, mask, case.dim**-0.5, case.softcap, *sinks)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(case: Case, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the same by dense attention in float64."""
    leaves = [x.double().requires_grad_() for x in tensors]
    q, k, v, *sinks = leaves
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * case.dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    position = case.tree.position_ids
    visible = dense_mask(case.tree.end, case.tree.block_end if case.has_images else None)
    if case.window is not None:
        visible = visible & (position[:, None] - position[None, :] < case.window)
    if case.chunk is not None:
        visible = visible & (position[:, None] // case.chunk == position[None, :] // case.chunk)
    scores = scores.masked_fill(~visible[case.first :], -torch.inf)
    for sink in sinks:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
    out = scores.softmax(-1)[..., : k.shape[2]] @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def errors(case: Case, mask: TreeBlockMask | None = None) -> dict[str, float]:
    """Return the relative errors of output and gradients."""
    tensors, grad = inputs(case)
    found = interpreted(case, case.mask() if mask is None else mask, tensors, grad)
    wanted = exact(case, tensors, grad)
    names = ("out", "dq", "dk", "dv", "dsinks")
    return {
        name: ((ours.double() - other).norm() / other.norm()).item()
        for name, ours, other in zip(names, found, wanted, strict=False)
    }


def check_case(case: Case) -> str:
    """Compare one case.

    Raises:
        AssertionError: If an error is larger than the rounding of the dtype allows.
    """
    found = errors(case)
    text = "  ".join(f"{name} {error:.1e}" for name, error in found.items())
    assert max(found.values()) < TOLERANCE[case.dtype], text
    return text


def check_mutations() -> str:
    """Check that each block table matters: a wrong one gives a wrong output or gradient, or a wrong address.

    Raises:
        AssertionError: If a mutation of a table has no effect.
    """
    case, noticed = Case(PrefixTree.from_lengths([400], [[90, 20]])), []  # four blocks, partial and full ones
    for name in TABLES:
        mask = case.mask()
        table = getattr(mask, name)
        # One block less in each row that has any; or another block first.
        wrong = table - (table > 0).to(table.dtype) if name.endswith("num_blocks") else table.roll(1, -1)
        assert not torch.equal(wrong, table), name
        setattr(mask, name, wrong.contiguous())
        try:
            found = errors(case, mask)
        except interpreter.KernelError:
            noticed.append(f"{name} by an address")
            continue
        wrong_parts = [part for part, error in found.items() if not error < TOLERANCE[case.dtype]]
        assert wrong_parts, f"a wrong {name} gives right results: {found}"
        noticed.append(f"{name} by {', '.join(wrong_parts)}")
    mask = case.mask()
    mask.kv_indices = mask.kv_indices + 9
    try:
        errors(case, mask)
    except interpreter.KernelError:
        return "; ".join([*noticed, "an index past the end by its address"])
    raise AssertionError("a kernel may read past the end of its tensors")


def check_recompilation() -> str:
    """Count the graphs of 100 layouts: one per configuration without gradients, two (forward and backward) with them.

    Raises:
        AssertionError: If a layout was compiled again.
    """
    configurations = {
        "bf16": Case(ONE),
        "bf16 window": Case(ONE, window=20),
        "bf16 softcap sinks": Case(ONE, softcap=2.0, has_sinks=True),
        "f16 gqa d128": Case(ONE, F16, heads=(4, 2), dim=128),
        "f32": Case(ONE, F32),
    }
    draw, counts = torch.Generator().manual_seed(0), []
    interpreter.runs_kernels = False
    try:
        for name, case in configurations.items():
            torch._dynamo.reset()
            for with_grad, allowed in ((False, 1), (True, 2)):
                before = len(interpreter.graphs)
                for _ in range(10):
                    sizes = torch.randint(1, 700, (4,), generator=draw).tolist()
                    window = None if case.window is None else sizes[3]
                    smaller = replace(case, tree=PrefixTree.from_lengths(sizes[:1], [sizes[1:3]]), window=window)
                    tensors, grad = inputs(smaller)
                    if with_grad:
                        interpreted(smaller, smaller.mask(), tensors, grad)
                    else:
                        q, k, v, *sinks = tensors
                        with torch.no_grad():
                            packed_flex_attention(q, k, v, smaller.mask(), 1.0, smaller.softcap, *sinks)
                found = len(interpreter.graphs) - before
                assert found <= allowed, f"{name}, gradients {with_grad}: {found} graphs for 10 layouts"
                counts.append(found)
    finally:
        interpreter.runs_kernels = True
        torch._dynamo.reset()
    return f"{sum(counts)} graphs for {10 * len(counts)} layouts in {len(counts)} configurations"


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: TreeBlockMask, **options) -> Tensor:
    """Compute attention as the dispatcher does on CUDA, for a model that leaves out padding on a CPU."""
    window, sinks, scale = (options.get(name) for name in ("window", "sinks", "scale"))
    mask = mask if window is None else mask.for_window(window)
    length = q.shape[2]
    q, k, v = (
        torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[2]))
        for x, size in ((q, mask.shape[-2]), (k, mask.shape[-1]), (v, mask.shape[-1]))
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return packed_flex_attention(q, k, v, mask, scale, options.get("softcap"), sinks)[:, :, :length]


def check_model() -> str:
    """Compare a GRPO update of a small Qwen2 with that of the baseline.

    Raises:
        AssertionError: If log-probabilities or gradients differ by more than float32 rounding.
    """
    import copy

    import transformers

    import flexpg
    from flexpg.integrations.transformers import attention as integration

    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=100,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    baseline = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 64, (size,), generator=draw) for size in (120, 40)]
    completions = [[torch.randint(0, 64, (size,), generator=draw) for size in sizes] for sizes in ((20, 30), (9, 14))]
    rollouts = flexpg.Rollouts.from_groups(prompts, completions, [[1.0, 0.0], [0.0, 1.0]])
    advantages = flexpg.group_advantages(rollouts)
    integration.attention = padded_attention
    flexpg.enable(model)
    for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=1000):
        flexpg.grpo_loss(logprobs, advantages[batch.indices], batch.loss_mask).backward()
    table = torch.zeros_like(logprobs)
    for n, sequence in enumerate(rollouts.sequences):
        scores = baseline(sequence[None]).logits[0].log_softmax(-1)
        first, length = int(rollouts.prompt_lens[n]), len(rollouts.completions[n])
        table[n, :length] = scores[first - 1 : -1].gather(-1, sequence[first:, None])[:, 0]
    flexpg.grpo_loss(table, advantages, rollouts.loss_mask).backward()
    difference = (logprobs - table).detach()[rollouts.loss_mask].abs().max().item()
    worst = max(
        ((ours.grad - other.grad).norm() / other.grad.norm()).item()
        for ours, other in zip(model.parameters(), baseline.parameters(), strict=True)
    )
    text = f"log-probabilities within {difference:.1e}, gradients within {worst:.1e}"
    assert difference < 5e-6 and worst < 5e-5, text
    return text


CHECKS: dict[str, Callable[[], str]] = {name: partial(check_case, case) for name, case in CASES.items()}
CHECKS |= {"mutations": check_mutations, "recompilation": check_recompilation, "model": check_model}


def main() -> None:
    """Run the checks, print a line for each, and exit with status 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="run the checks whose name has one of these words")
    words = parser.parse_args().words
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    failed = 0
    for name, check in CHECKS.items():
        if words and not set(words) & set(name.split()):
            continue
        start = time.perf_counter()
        try:
            result = check()
        except (AssertionError, interpreter.KernelError) as error:
            result, failed = f"FAILED: {error}", failed + 1
        print(f"{name:<28} {time.perf_counter() - start:5.1f} s  {result}", flush=True)
    print(f"{len(interpreter.graphs)} graphs compiled; {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
