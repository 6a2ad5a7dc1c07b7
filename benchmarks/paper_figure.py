"""The FLOP ratios of the Prefix Grouper paper (arXiv 2506.05433), unshared over shared: published, counted, measured.

    python -m benchmarks.paper_figure                      # everything; about five minutes on one core
    python -m benchmarks.paper_figure --picture-only       # draws docs/paper_figure.png from the last results

Counted: `flexpg.analysis.flops` for the layers of Qwen2.5-7B, as the paper names no model; logits of completion tokens
are the same work both ways, and are counted apart. Measured: seconds of a forward and backward of a small model on one core,
prompts of 512 tokens, both ways by turns in one process. The unshared way is a fair one: the model's own forward on a
batch without padding, and logits of completion tokens alone, made by the same function as the shared ones.
Writes benchmarks/results/paper_figure_cpu.json, which docs/cost.md quotes, and the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from benchmarks.record import RESULTS, save
from flexpg.analysis.flops import ModelShape, update_flops
from flexpg.analysis.torchtune_shape import shape_of
from flexpg.integrations import torchtune as shared
from flexpg.logprobs import token_logprobs
from flexpg.tree import PrefixTree

PICTURE = Path("docs/paper_figure.png")
GROUPS, RATIOS, PROMPTS = (2, 4, 8, 16), (0.5, 1, 2, 4, 8, 16, 32), (4096, 8192, 16384)
# Read off the paper's curves at P = 4096, a row per group size and a column per ratio; those at 8192 and 16384 lie
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
# Small enough to measure 28 updates both ways, several times; the prompt is twice its width.
SMALL = dict(vocab_size=260, num_layers=2, num_heads=8, num_kv_heads=2, embed_dim=256, intermediate_dim=1024)
SMALL_PROMPT = 512


def counted_ratio(prompt: int, ratio: float, group: int, shape: ModelShape, with_output: bool = False) -> float:
    """FLOPs of the unshared update over the shared one's, by the cost model."""
    completion = round(prompt / ratio)
    tree = PrefixTree.from_lengths([prompt], [[completion] * group])
    predicted = group * completion if with_output else 0
    before = update_flops(tree.baseline_tokens, tree.baseline_pairs, predicted, shape)
    return before.total / update_flops(tree.num_tokens, tree.num_pairs, predicted, shape).total


def flops_of(update: Callable[[], object]) -> int:
    """FLOPs that run, FlopCounterMode's with the attention kernel of the CPU, which it does not know."""
    with FlopCounterMode(display=False, custom_mapping=_flash_flops()) as counter:
        update()
    return counter.get_total_flops()


def _flash_flops() -> dict[object, Callable[..., int]]:
    """Of visible pairs alone, as in `flexpg.analysis.flops`: 4 D in the forward, 8 D in the backward."""

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: object) -> int:
        rows, columns = q.shape[-2], k.shape[-2]
        pairs = rows * (rows + 1) // 2 if is_causal else rows * columns
        return 4 * q.shape[-1] * pairs * q.shape[0] * q.shape[1]

    def backward(grad: Tensor, *inputs: object, **_: object) -> int:
        q, k, v, _out, _lse, dropout, is_causal, *_rest = inputs
        return 2 * forward(q, k, v, dropout, is_causal)

    forward._get_raw = backward._get_raw = True  # type: ignore[attr-defined]  # hand over tensors, not their shapes
    operators = torch.ops.aten
    return {
        operators._scaled_dot_product_flash_attention_for_cpu: forward,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def updates(
    model: TransformerDecoder, prompt: int, completion: int, group: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One update unshared and shared: gradients are made anew, and the sum of all log-probabilities is given back."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.tok_embeddings.num_embeddings
    prefix = torch.randint(vocab, (prompt,), generator=generator)
    completions = list(torch.randint(vocab, (group, completion), generator=generator))
    tree = PrefixTree.from_groups([prefix], [completions])
    apart = PrefixTree.from_groups([prefix] * group, [[each] for each in completions])  # one behind the other
    rows = torch.stack([torch.cat([prefix, each]) for each in completions])  # [G, T]
    prompt_lens = torch.full((group,), prompt)

    def unshared_hidden() -> Tensor:
        hidden = model.tok_embeddings(rows)
        for layer in model.layers:
            hidden = layer(hidden)
        hidden = model.norm(hidden).flatten(0, 1)  # [G * T, E]
        return torch.nn.functional.pad(hidden, (0, 0, 0, apart.padded_length - len(hidden)))[None]

    def update(hidden: Callable[[], Tensor], of: PrefixTree) -> Tensor:
        model.zero_grad()
        logprobs = token_logprobs(hidden(), shared.output(model), of, prompt_lens=prompt_lens).sum()
        logprobs.backward()
        return logprobs.detach()

    return partial(update, unshared_hidden, apart), partial(update, partial(shared.forward, model, tree), tree)


def main() -> None:
    """Runs, prints, and writes the result with machine, versions and commit; draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of short updates; of long ones three")
    parser.add_argument("--picture-only", action="store_true")
    args = parser.parse_args()
    if not args.picture_only:
        torch.set_num_threads(1)
        save("paper_figure_cpu", torch.device("cpu"), results(args.repeats))
    draw(json.loads((RESULTS / "paper_figure_cpu.json").read_text()))


def results(repeats: int) -> dict[str, object]:
    """Everything that docs/cost.md quotes."""
    torch.manual_seed(0)
    model = qwen2(**SMALL, max_seq_len=4 * SMALL_PROMPT)
    cells = [cell(model, group, ratio, repeats) for group in GROUPS for ratio in RATIOS]
    return {
        "model_of_the_counts": NAMED,
        "model_of_the_measurement": SMALL,
        "prompt_tokens_measured": SMALL_PROMPT,
        "cells": cells,
        "largest_logprob_difference": max(one.pop("logprob_difference") for one in cells),
    }


def cell(model: TransformerDecoder, group: int, ratio: float, repeats: int) -> dict[str, object]:
    """One group size and one prefix/completion ratio."""
    completion = round(SMALL_PROMPT / ratio)
    unshared, packed = updates(model, SMALL_PROMPT, completion, group)
    values: list[Tensor] = []
    flops = [
        flops_of(lambda update=update: values.append(update())) for update in (unshared, packed)
    ]  # warms both, too
    turns = [(seconds(unshared), seconds(packed))]
    turns += [(seconds(unshared), seconds(packed)) for _ in range((repeats if sum(turns[0]) < 1.5 else 3) - 1)]
    tree = PrefixTree.from_lengths([SMALL_PROMPT], [[completion] * group])
    shape = shape_of(model)
    work = ((tree.baseline_tokens, tree.baseline_pairs), (tree.num_tokens, tree.num_pairs))
    counted = [update_flops(*each, group * completion, shape).total for each in work]
    result = {
        "group": group,
        "ratio": ratio,
        "published": PUBLISHED[group][RATIOS.index(ratio)],
        **{f"counted_{prompt}": counted_ratio(prompt, ratio, group, SHAPES[NAMED]) for prompt in PROMPTS},
        "counted_4096_with_output": counted_ratio(4096, ratio, group, SHAPES[NAMED], with_output=True),
        "tokens": tree.baseline_tokens / tree.num_tokens,
        "counted_here": counted[0] / counted[1],
        "measured_flops": flops[0] / flops[1],
        "measured_seconds": statistics.median(slow / fast for slow, fast in turns),
        "update_s_unshared": statistics.median(slow for slow, _ in turns),
        "update_s_shared": statistics.median(fast for _, fast in turns),
        "turns": len(turns),
        "logprob_difference": ((values[1] - values[0]) / values[0]).abs().item(),
    }
    print(result, flush=True)
    return result


def seconds(update: Callable[[], object]) -> float:
    """Of one call, on one thread: its own time, whatever else the machine does."""
    start = time.process_time()
    update()
    return time.process_time() - start


def draw(result: dict) -> None:
    """A panel per group size: published dots, the cost model's line, our measured crosses."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GROUPS), figsize=(13, 3.6), layout="constrained")
    for axis, group in zip(axes, GROUPS, strict=True):
        cells = [one for one in result["cells"] if one["group"] == group]
        lines = [[one[f"counted_{prompt}"] for one in cells] for prompt in PROMPTS]
        axis.fill_between(RATIOS, *lines[::2], color="tab:blue", alpha=0.25, linewidth=0)
        axis.plot(
            RATIOS, lines[0], color="tab:blue", label=f"FLOPs, cost model ({NAMED}; line P = 4,096, band to 16,384)"
        )
        axis.plot(RATIOS, PUBLISHED[group], "o", color="black", markersize=4, label="FLOPs, the paper (P = 4,096)")
        measured = [one["measured_seconds"] for one in cells]
        label = f"seconds, measured (small model, one core, P = {result['prompt_tokens_measured']})"
        axis.plot(RATIOS, measured, "x", color="tab:red", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        axis.set_ylim(0, 1.07 * max(*PUBLISHED[group], *lines[0], *measured))
        axis.set_title(f"G = {group}")
        axis.set_xlabel("prefix / completion tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("unshared / shared")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
