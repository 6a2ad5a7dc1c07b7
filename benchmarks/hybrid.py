"""A GRPO update of one group on a hybrid of recurrent and attention layers, shaped like Qwen3.5.

    python -m benchmarks.hybrid                    # CPU, float32
    python -m benchmarks.hybrid --device cuda      # bfloat16
    python -m benchmarks.hybrid --tiny             # seconds, as a test

Three of four layers are GatedDeltaNet. One transformers model with the same weights computes the log-probabilities of
the completion tokens by:

- baseline: a right-padded batch through the model's own forward; logits of completion tokens only.
- flexpg.
- attention_only: as flexpg, but recurrent layers run along the packed sequence, which is what implementations that
  replace attention alone do. It is not timed; the difference to the baseline shows that it is wrong.

Only recurrent layers' reference implementations run on a CPU; on CUDA the kernels of flash-linear-attention are used if
they are installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

import flexpg
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from flexpg import PrefixTree, grpo_loss, token_logprobs
from flexpg.integrations import transformers as integration
from flexpg.integrations.transformers.recurrent import recurrent_modules


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


@contextmanager
def attention_only(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers ignore the tree inside."""
    modules = list(recurrent_modules(model))
    forwards = [module.forward for module in modules]
    try:
        for module in modules:
            module.forward = partial(_without_mask, module)
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def _without_mask(module: nn.Module, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    return type(module).forward(module, *args, **kwargs)


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of both implementations, the speed-up, and differences of log-probabilities."""
    model = build_model(case, device)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(8192, (case.prompt,), generator=draw)
    completions = [torch.randint(8192, (case.completion,), generator=draw) for _ in range(case.group)]
    advantages = torch.randn(case.group, generator=draw).to(device)
    batch = pad_sequence([torch.cat([prompt, own]) for own in completions], batch_first=True).to(device)  # [G, P + C]
    tree = PrefixTree.from_groups([prompt], [completions]).to(device)
    lens = torch.full((case.group,), case.prompt, device=device)
    mask = torch.ones(case.group, case.completion, dtype=torch.bool, device=device)
    output = integration.output(model)
    found: dict[str, Tensor] = {}

    def baseline() -> Tensor:
        hidden = integration.baseline_forward(model, batch)[:, case.prompt - 1 : -1]  # [G, C, E]
        scores = output(hidden.flatten(0, 1)).float().log_softmax(-1)
        return scores.gather(-1, batch[:, case.prompt :].flatten()[:, None]).view(case.group, -1)

    def shared() -> Tensor:
        return token_logprobs(integration.forward(model, tree), output, tree, prompt_lens=lens)

    def update(name: str) -> None:
        model.zero_grad()
        logprobs = {"baseline": baseline, "flexpg": shared}[name]()
        grpo_loss(logprobs, advantages, mask).backward()
        found[name] = logprobs.detach()

    times = alternate({name: partial(update, name) for name in ("baseline", "flexpg")}, repeats, device)
    with torch.no_grad(), attention_only(model):
        base_model = model.base_model
        packed = slice(tree.num_tokens if device.type == "cpu" else tree.padded_length)
        hidden = base_model(
            input_ids=tree.input_ids[:, packed],
            position_ids=tree.position_ids[None, packed],
            attention_mask=integration.mask_for(base_model, flexpg.block_mask(tree)),
            use_cache=False,
        ).last_hidden_state
        padded = nn.functional.pad(hidden, (0, 0, 0, tree.padded_length - hidden.shape[1]))
        found["attention_only"] = token_logprobs(padded, output, tree, prompt_lens=lens)
    differences = {name: (own - found["baseline"]).abs().max().item() for name, own in found.items()}
    return {
        "tokens_baseline": tree.baseline_tokens,
        "tokens_shared": tree.num_tokens,
        "token_ratio": tree.baseline_tokens / tree.num_tokens,
        "update_ms": {name: quartiles(own) for name, own in times.items()},
        "speedup": paired_ratio(times["baseline"], times["flexpg"]),
        "largest_difference": differences["flexpg"],
        "largest_difference_attention_only": differences["attention_only"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("hybrid", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
