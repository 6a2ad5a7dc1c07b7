"""The FLOP ratios of the Prefix Grouper paper (arXiv 2506.05433), baseline over shared: published, counted, measured.

    python -m benchmarks.paper_figure          # about five minutes on one core

Counted: `flexpg.analysis.flops` for the layers of Qwen2.5-7B, as the paper names no model; logits of completion tokens
are the same work in both and are counted separately. Measured: seconds of a forward and backward of a small model on
one core with prompts of 512 tokens, alternating in one process. The baseline is a fair one: the model's own forward on
a batch without padding, and logits of completion tokens only, computed by the same function as the shared ones.
Writes benchmarks/results/paper_figure_cpu.json, which docs/cost.md shows; docs/figures.py draws it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from benchmarks.models import hidden_states
from benchmarks.record import commit, save
from flexpg import PrefixTree, token_logprobs
from flexpg.analysis.flops import ModelShape, update_flops
from flexpg.analysis.torchtune_shape import shape_of
from flexpg.analysis.work import baseline_work, packed_work
from flexpg.integrations.torchtune import forward
from flexpg.packed_input import whole_sequence

GROUPS, RATIOS, PROMPTS = (2, 4, 8, 16), (0.5, 1, 2, 4, 8, 16, 32), (4096, 8192, 16384)
# Read off the paper's curves at P = 4096, a row per group size and a column per ratio; those at 8192 and 16384 are
# within about 5 %.
PUBLISHED = {
    2: (1.18, 1.33, 1.50, 1.67, 1.80, 1.89, 1.94),
    4: (1.24, 1.55, 1.98, 2.49, 3.00, 3.40, 3.67),
    8: (1.22, 1.64, 2.31, 3.28, 4.48, 5.66, 6.60),
    16: (1.72, 1.94, 2.72, 3.84, 5.90, 8.45, 10.98),
}
SHAPES = {
    "Qwen2.5-0.5B": ModelShape(24, 896, 14, 2, 64, 4864, 151_936, 2 * 896 * (896 + 128) + 3 * 896 * 4864),
    "Qwen2.5-7B": ModelShape(28, 3584, 28, 4, 128, 18_944, 152_064, 2 * 3584 * (3584 + 512) + 3 * 3584 * 18_944),
    "Llama-3.1-70B": ModelShape(80, 8192, 64, 8, 128, 28_672, 128_256, 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28_672),
}
NAMED = "Qwen2.5-7B"
# Small enough for several measurements of 28 updates of each kind; the prompt is twice as long as the width.
SMALL = dict(vocab_size=260, num_layers=2, num_heads=8, num_kv_heads=2, embed_dim=256, intermediate_dim=1024)
SMALL_PROMPT = 512


def counted_ratio(prompt: int, ratio: float, group: int, shape: ModelShape, with_output: bool = False) -> float:
    """Return the baseline's FLOPs over the shared update's, by the cost model."""
    completion = round(prompt / ratio)
    tree = PrefixTree.from_lengths([prompt], [[completion] * group])
    loss_tokens = group * completion if with_output else 0
    baseline = update_flops(baseline_work(tree), loss_tokens, shape)
    return baseline.total / update_flops(packed_work(tree), loss_tokens, shape).total


def flops_of(update: Callable[[], object]) -> int:
    """Count the FLOPs that run, by FlopCounterMode with the CPU's attention kernel, which it does not know."""
    with FlopCounterMode(display=False, custom_mapping=_flash_flops()) as counter:
        update()
    return counter.get_total_flops()


def _flash_flops() -> dict[object, Callable[..., int]]:
    """Return FLOPs of visible pairs, as in `flexpg.analysis.flops`: 4 D in the forward, 8 D in the backward."""

    def forward_flops(
        q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: object
    ) -> int:
        rows, columns = q.shape[-2], k.shape[-2]
        pairs = rows * (rows + 1) // 2 if is_causal else rows * columns
        return 4 * q.shape[-1] * pairs * q.shape[0] * q.shape[1]

    def backward_flops(grad: Tensor, *inputs: object, **_: object) -> int:
        q, k, v, _out, _lse, dropout, is_causal, *_rest = inputs
        return 2 * forward_flops(q, k, v, dropout, is_causal)

    forward_flops._get_raw = backward_flops._get_raw = True  # type: ignore[attr-defined]  # pass tensors, not shapes
    operators = torch.ops.aten
    return {
        operators._scaled_dot_product_flash_attention_for_cpu: forward_flops,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
    }


def updates(
    model: TransformerDecoder, prompt: int, completion: int, group: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return the baseline's update and the shared one: they compute gradients and return summed log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.tok_embeddings.num_embeddings
    prefix = torch.randint(vocab, (prompt,), generator=generator)
    completions = list(torch.randint(vocab, (group, completion), generator=generator))
    tree = PrefixTree.from_groups([prefix], [completions])
    not_shared = PrefixTree.from_groups([prefix] * group, [[each] for each in completions])
    batch = torch.stack([torch.cat([prefix, each]) for each in completions])  # [G, T]
    prompt_lens = torch.full((group,), prompt)

    def baseline_hidden() -> Tensor:
        return whole_sequence(hidden_states(model, batch).flatten(0, 1)[None], not_shared)

    def update(hidden: Callable[[], Tensor], packed: PrefixTree) -> Tensor:
        model.zero_grad()
        logprobs = token_logprobs(hidden(), model.output, packed, prompt_lens=prompt_lens).sum()
        logprobs.backward()
        return logprobs.detach()

    return partial(update, baseline_hidden, not_shared), partial(update, partial(forward, model, tree), tree)


def cell(model: TransformerDecoder, group: int, ratio: float, repeats: int) -> dict[str, object]:
    """Return the results of one group size and one ratio of prefix to completion."""
    completion = round(SMALL_PROMPT / ratio)
    both = updates(model, SMALL_PROMPT, completion, group)
    logprobs: list[Tensor] = []
    flops = [flops_of(lambda update=update: logprobs.append(update())) for update in both]  # also a warm-up
    seconds = [[cpu_seconds(update) for update in both]]
    seconds += [[cpu_seconds(update) for update in both] for _ in range((repeats if sum(seconds[0]) < 1.5 else 3) - 1)]
    tree = PrefixTree.from_lengths([SMALL_PROMPT], [[completion] * group])
    shape = shape_of(model)
    counted = [update_flops(work, group * completion, shape).total for work in (baseline_work(tree), packed_work(tree))]
    result = {
        "group": group,
        "ratio": ratio,
        "published": PUBLISHED[group][RATIOS.index(ratio)],
        **{f"counted_{prompt}": counted_ratio(prompt, ratio, group, SHAPES[NAMED]) for prompt in PROMPTS},
        "counted_4096_with_output": counted_ratio(4096, ratio, group, SHAPES[NAMED], with_output=True),
        "tokens": tree.baseline_tokens / tree.num_tokens,
        "counted_here": counted[0] / counted[1],
        "measured_flops": flops[0] / flops[1],
        "measured_seconds": statistics.median(slow / fast for slow, fast in seconds),
        "update_s_baseline": statistics.median(slow for slow, _ in seconds),
        "update_s_shared": statistics.median(fast for _, fast in seconds),
        "repeats": len(seconds),
        "logprob_difference": ((logprobs[1] - logprobs[0]) / logprobs[0]).abs().item(),
    }
    print(result, flush=True)
    return result


def cpu_seconds(update: Callable[[], object]) -> float:
    """Return the CPU time of one call, on one thread, on which other load has little effect."""
    start = time.process_time()
    update()
    return time.process_time() - start


def main() -> None:
    """Run everything, and save the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of short updates; long ones are repeated three times")
    args = parser.parse_args()
    commit()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = qwen2(**SMALL, max_seq_len=4 * SMALL_PROMPT)
    cells = [cell(model, group, ratio, args.repeats) for group in GROUPS for ratio in RATIOS]
    result = {
        "counted_model": NAMED,
        "measured_model": SMALL,
        "measured_prompt_tokens": SMALL_PROMPT,
        "cells": cells,
        "largest_logprob_difference": max(entry.pop("logprob_difference") for entry in cells),
    }
    save("paper_figure_cpu", torch.device("cpu"), result)


if __name__ == "__main__":
    main()
