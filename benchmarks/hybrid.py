"""A GRPO update of one group on a hybrid of recurrent and attention layers, shaped like Qwen3.5.

    python -m benchmarks.hybrid                    # CPU, float32
    python -m benchmarks.hybrid --device cuda      # bfloat16
    python -m benchmarks.hybrid --tiny             # seconds, as a test

Three of four layers are GatedDeltaNet. One transformers model with the same weights computes the log-probabilities of
the completion tokens by:

- baseline: a right-padded batch through the model's own forward; logits of completion tokens only.
- flexpg.
- prefix_grouper: the package of that name from PyPI, with `enable_gqa` and flexpg's log-probabilities. It replaces
  attention alone, so recurrent layers run along the packed sequence, and pass their states from completion to
  completion: the difference to the baseline shows that its log-probabilities are wrong here.

The bound is the cost model's: FLOPs of the baseline over those of flexpg.

Only recurrent layers' reference implementations run on a CPU; on CUDA the kernels of flash-linear-attention are used if
they are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from prefix_grouper import PrefixGrouper
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flexpg
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from benchmarks.update import prefix_grouper_attention
from flexpg import PrefixTree, grpo_loss, token_logprobs
from flexpg.analysis.flops import update_flops
from flexpg.analysis.transformers_shape import shape_of
from flexpg.analysis.work import baseline_work, packed_work
from flexpg.integrations import transformers as integration
from flexpg.packed_input import whole_sequence


@dataclass(frozen=True)
class Case:
    """One update: lengths in tokens, and the model's width and layers."""

    prompt: int
    completion: int
    group: int
    width: int = 256
    layers: int = 4


CASES = {
    "cpu": [Case(1024, 64, 8), Case(1024, 128, 8), Case(2048, 128, 8)],
    "cuda": [Case(4096, 512, 8, 1024, 24), Case(16_384, 1024, 8, 1024, 24)],
    "tiny": [Case(96, 16, 3, 64)],
}
IMPLEMENTATIONS = ("baseline", "prefix_grouper", "flexpg")


def build_model(case: Case, device: torch.device) -> nn.Module:
    """Return a model with random weights: GatedDeltaNet, and attention in every fourth layer."""
    heads = case.width // 64
    config = Qwen3_5TextConfig(
        vocab_size=8192,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config)
    return flexpg.enable(model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).train())


def prefix_grouper_hidden(model: Any, grouper: PrefixGrouper, tree: PrefixTree) -> Tensor:
    """Return hidden states [1, T, E] of a packed sequence by PrefixGrouper's attention; other layers do not change."""
    attend = prefix_grouper_attention(grouper, expanded=False)

    def forward(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        return attend(q, k, v), None

    ALL_ATTENTION_FUNCTIONS["prefix_grouper"] = forward
    tokens, before = slice(tree.num_tokens), model.config._attn_implementation
    model.set_attn_implementation("prefix_grouper")
    try:
        hidden: Tensor = model.base_model(
            input_ids=tree.input_ids[:, tokens], position_ids=tree.position_ids[None, tokens], use_cache=False
        ).last_hidden_state
    finally:
        model.set_attn_implementation(before)
    return hidden


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of all implementations, the speed-ups, the bound and differences of log-probabilities."""
    model = build_model(case, device)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(8192, (case.prompt,), generator=draw)
    completions = [torch.randint(8192, (case.completion,), generator=draw) for _ in range(case.group)]
    advantages = torch.randn(case.group, generator=draw).to(device)
    batch = pad_sequence([torch.cat([prompt, c]) for c in completions], batch_first=True).to(device)  # [G, P + C]
    tree = PrefixTree.from_groups([prompt], [completions]).to(device)
    lens = torch.full((case.group,), case.prompt, device=device)
    mask = torch.ones(case.group, case.completion, dtype=torch.bool, device=device)
    grouper = PrefixGrouper([[case.prompt, *[case.completion] * case.group]], device=device)
    output = integration.output(model)
    found: dict[str, Tensor] = {}

    def baseline() -> Tensor:
        hidden = integration.baseline_forward(model, batch)[:, case.prompt - 1 : -1]  # [G, C, E]
        scores = output(hidden.flatten(0, 1)).float().log_softmax(-1)
        return scores.gather(-1, batch[:, case.prompt :].flatten()[:, None]).view(case.group, -1)

    def shared() -> Tensor:
        return token_logprobs(integration.forward(model, tree), output, tree, prompt_lens=lens)

    def prefix_grouper() -> Tensor:
        hidden = prefix_grouper_hidden(model, grouper, tree)
        return token_logprobs(whole_sequence(hidden, tree), output, tree, prompt_lens=lens)

    implementations = dict(zip(IMPLEMENTATIONS, (baseline, prefix_grouper, shared), strict=True))

    def update(name: str) -> None:
        model.zero_grad()
        logprobs = implementations[name]()
        grpo_loss(logprobs, advantages, mask).backward()
        found[name] = logprobs.detach()

    times = alternate({name: partial(update, name) for name in IMPLEMENTATIONS}, repeats, device)
    shape, loss_tokens = shape_of(model), case.group * case.completion
    flops = [update_flops(work, loss_tokens, shape).total for work in (baseline_work(tree), packed_work(tree))]
    differences = {name: (logprobs - found["baseline"]).abs().max().item() for name, logprobs in found.items()}
    return {
        "tokens_baseline": tree.baseline_tokens,
        "tokens_shared": tree.num_tokens,
        "token_ratio": tree.baseline_tokens / tree.num_tokens,
        "update_ms": {name: quartiles(values) for name, values in times.items()},
        "bound": flops[0] / flops[1],
        "speedup_over": {name: paired_ratio(times[name], times["flexpg"]) for name in ("baseline", "prefix_grouper")},
        "largest_difference": {name: differences[name] for name in ("flexpg", "prefix_grouper")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("hybrid", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
