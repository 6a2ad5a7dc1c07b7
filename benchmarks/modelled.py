"""What the cost model says about published sizes of models, for the pages of docs; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from flexpg import PrefixTree
from flexpg.analysis.flops import activation_bytes, update_flops
from flexpg.analysis.ranks import context_parallel_bytes, largest_prompt
from flexpg.analysis.transformers_shape import shape_of
from flexpg.analysis.work import Work, baseline_work, packed_work

Rows = tuple[Sequence[str], list[list[object]]]

GIB = 2**30


def qwen3(width: int, intermediate: int, layers: int, heads: int) -> Qwen3Config:
    """Return the configuration of a dense Qwen3."""
    return Qwen3Config(
        vocab_size=151_936,
        head_dim=128,
        num_key_value_heads=8,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


MODELS: dict[str, PretrainedConfig] = {  # the sizes that their publishers give
    "Qwen2.5 0.5B": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "Qwen3 1.7B": qwen3(2048, 6144, 28, 16),
    "Qwen3 4B": qwen3(2560, 9728, 36, 32),
    "Qwen3 8B": qwen3(4096, 12_288, 36, 32),
    "Qwen3 14B": qwen3(5120, 17_408, 40, 40),
    "Qwen3 32B": qwen3(5120, 25_600, 64, 64),
    "Llama 3.1 70B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
GROUPS = {  # prompt, completion, G
    "512 + 8 x 2,048": (512, 2048, 8),
    "1,024 + 8 x 1,024": (1024, 1024, 8),
    "4,096 + 8 x 512": (4096, 512, 8),
    "4,096 + 16 x 256": (4096, 256, 16),
    "16,384 + 8 x 1,024": (16_384, 1024, 8),
    "32,768 + 16 x 512": (32_768, 512, 16),
}
PEAKS = ("1,024 + 8 x 1,024", "4,096 + 8 x 512", "16,384 + 8 x 1,024")


def works(name: str) -> tuple[Work, Work, Work, int]:
    """Return the work of a group in the baseline, shared, and of one of its sequences, and a completion's tokens."""
    prompt, completion, size = GROUPS[name]
    tree = PrefixTree.from_lengths([prompt], [[completion] * size])
    one = PrefixTree.from_lengths([prompt], [[completion]])
    return baseline_work(tree), packed_work(tree), baseline_work(one), completion


def savings() -> Rows:
    """Return the FLOPs of an update, baseline / shared, by model and group."""
    rows: list[list[object]] = []
    by_group = {name: works(name) for name in GROUPS}
    tokens = [f"{base.num_tokens / shared.num_tokens:.2f}" for base, shared, _, _ in by_group.values()]
    for model, config in MODELS.items():
        shape = shape_of(config)
        ratios = []
        for name, (base, shared, _, completion) in by_group.items():
            loss_tokens = GROUPS[name][2] * completion
            flops = [update_flops(work, loss_tokens, shape).total for work in (base, shared)]
            ratios.append(f"{flops[0] / flops[1]:.2f}")
        rows.append([model, *ratios])
    rows.append(["*tokens encoded*", *(f"*{ratio}*" for ratio in tokens)])
    return ["model", *GROUPS], rows


def memory() -> Rows:
    """Return activations of a group in one micro-batch, baseline and shared, and of one sequence, in GiB."""
    rows: list[list[object]] = []
    for model, config in MODELS.items():
        shape = shape_of(config)
        for name in PEAKS:
            base, shared, one, completion = works(name)
            size = GROUPS[name][2]
            counts = [(base, size), (shared, size), (one, 1)]
            peaks = [
                activation_bytes(work.num_tokens, n * completion, shape, activation_checkpointing=True) / GIB
                for work, n in counts
            ]
            rows.append([model, name, *(f"{peak:.1f}" for peak in peaks)])
    return ["model", "group", "baseline", "shared", "one sequence of the baseline"], rows


def context_parallel() -> Rows:
    """Return activations per rank, and the longest prompt within 40 GiB."""
    rows: list[list[object]] = []
    for name in ("Qwen3 4B", "Qwen3 32B"):
        shape = shape_of(MODELS[name])
        for ranks in (1, 2, 4, 8):
            peak = context_parallel_bytes(131_072 + 8 * 1024, 8 * 1024, shape, ranks)
            longest = largest_prompt([1024] * 8, shape, ranks, 40 * GIB)
            rows.append([name, ranks, f"{peak / GIB:,.1f}", f"{longest:,}"])
    return ["model", "ranks", "activations per rank, GiB", "longest prompt within 40 GiB"], rows
