"""Sampling from transformers models returns the log-probabilities of each sequence on its own."""

from __future__ import annotations

import copy

import hf_models as hf
import pytest
import torch
import transformers
from cases import VOCAB
from torch import Tensor, nn

import flexpg
from flexpg import Rollouts, SamplingParams, packed_logprobs
from flexpg.integrations.transformers import attention as flexpg_attention
from flexpg.sampling import Samples

G = 3
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 20], [30], [5, 6, 7]]  # one begins another; one is one token
STOPPING = SamplingParams(15, stop_tokens=range(0, VOCAB, 9))
ATTENTION = ["llama", "qwen2", "gemma2", "qwen3_moe", "gpt2", "gpt_oss", "mimo_v2_flash", "llama4"]
RECURRENT = ["qwen3_5", "kimi_linear", "bamba", "falcon_h1", "mamba2", "lfm2", "minimax"]
COMPOSITE = ["gemma4", "qwen2_5_vl"]


def draw(model: nn.Module, params: SamplingParams = STOPPING, **options) -> Samples:
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    return flexpg.sample(model, prompts, G, params, **{"seed": 0, **options})


def rollouts_of(samples: Samples) -> Rollouts:
    groups = [samples.completions[first : first + G] for first in range(0, len(PROMPTS) * G, G)]
    return Rollouts.from_groups(PROMPTS, groups, [[0.0] * G] * len(PROMPTS))


@torch.no_grad()
def one_by_one(model: nn.Module, samples: Samples, temperature: float = 1.0) -> Tensor:
    """Compute the log-probabilities of samples [N, C], one sequence after the other, by the model's own forward."""
    found = torch.zeros_like(samples.logprobs)
    for n, completion in enumerate(samples.completions):
        prompt = torch.tensor(PROMPTS[n // G])
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores = (logits.float() / temperature).log_softmax(-1)
        found[n, : len(completion)] = scores.gather(-1, completion[:, None])[:, 0]
    return found


def without_placeholders(model: nn.Module) -> nn.Module:
    """Make the ids of images, which a sampler of text cannot continue from, improbable."""
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.arange(VOCAB, VOCAB + 8), -99))
    return model


@pytest.mark.parametrize("name", [*ATTENTION, *RECURRENT, *COMPOSITE])
def test_sampled_logprobs_equal_each_sequence_on_its_own(name):
    model = hf.tiny_model(name)
    model = without_placeholders(model) if name in COMPOSITE else model
    baseline = copy.deepcopy(model)
    samples = draw(model, SamplingParams(15, temperature=1.3, top_p=0.95, stop_tokens=range(0, VOCAB, 9)))
    torch.testing.assert_close(samples.logprobs, one_by_one(baseline, samples, 1.3), rtol=0, atol=3e-6)
    lengths = list(map(len, samples.completions))
    assert min(lengths) < 8 < max(lengths) and len({tuple(tokens.tolist()) for tokens in samples.completions}) > 8
    ((_, logprobs),) = packed_logprobs(model, rollouts_of(samples), max_tokens=1000, temperature=1.3)
    torch.testing.assert_close(samples.logprobs, logprobs.detach(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_5", "bamba"])
def test_samples_do_not_depend_on_what_is_decoded_together(name):
    model = hf.tiny_model(name)
    together = draw(model)
    for budget in (70, 24):  # a prompt at a time, or a sample at a time
        apart = draw(model, max_cache_tokens=budget)
        assert all(map(torch.equal, together.completions, apart.completions))
        torch.testing.assert_close(together.logprobs, apart.logprobs, rtol=0, atol=1e-5)


def test_greedy_samples_are_argmax_of_the_ordinary_forward():
    model = hf.tiny_model("qwen3_5")
    baseline = copy.deepcopy(model)
    for n, completion in enumerate(draw(model, SamplingParams(6, temperature=0)).completions):
        sequence = list(PROMPTS[n // G])
        for token in completion.tolist():
            with torch.no_grad():
                logits = baseline(input_ids=torch.tensor([sequence]), use_cache=False).logits
            assert token == int(logits[0, -1].argmax())
            sequence.append(token)


def test_sample_from_lora_adapters_uses_them():
    model = hf.with_lora(hf.tiny_model("qwen3_5"), target_modules=["q_proj", "in_proj_qkv"])
    merged = copy.deepcopy(model).merge_and_unload()
    samples = draw(model)
    torch.testing.assert_close(samples.logprobs, one_by_one(merged, samples), rtol=0, atol=1e-5)  # other rounding
    assert (samples.logprobs - one_by_one(model.unload(), samples)).abs().max() > 0.01


def test_sample_leaves_ordinary_forwards_bitwise_identical():
    model, ids = hf.tiny_model("bamba"), torch.arange(12)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        draw(model)
        assert torch.equal(before, model(input_ids=ids, use_cache=False).logits)


def test_sample_under_autocast_is_within_error_budget():
    model = hf.tiny_model("qwen3_5")
    baseline = copy.deepcopy(model)
    samples = draw(model, autocast_dtype=torch.bfloat16)
    exact = one_by_one(baseline, samples)
    with torch.autocast("cpu", torch.bfloat16):
        budget = (one_by_one(baseline, samples) - exact).norm()
    assert 0 < (samples.logprobs - exact).norm() < 1.5 * budget


def test_layer_that_drops_the_cache_of_a_single_token_raises(monkeypatch):
    forward = flexpg_attention.attention_forward

    def dropping(module, query, key, value, mask, **options):
        is_dropped = query.shape[2] == 1 and module.layer_idx == 0
        return forward(module, query, key, value, None if is_dropped else mask, **options)

    monkeypatch.setattr(flexpg_attention, "attention_forward", dropping)
    with pytest.raises(TypeError, match="1 of 2 layers used the sampler's cache for the newest token"):
        draw(hf.tiny_model("llama"))


def diff_llama() -> nn.Module:
    return hf.model_from_config(transformers.DiffLlamaConfig(**hf.SHAPE))


def with_dynamic_rope() -> nn.Module:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    return hf.tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: hf.tiny_model("llama"), {"compiled": True}, ValueError, "compiled must be False for transformers"),
        (diff_llama, {}, TypeError, "more than once per forward.*sample with model.generate"),
        (with_dynamic_rope, {}, ValueError, "RoPE scaling 'dynamic' depends on the longest sequence.* here 24"),
        (lambda: hf.tiny_model("llama", attention_dropout=0.1), {}, ValueError, "attention_dropout=0.1"),
        (lambda: hf.tiny_model("llama").model, {}, TypeError, "has no output layer"),
    ],
    ids=["compiled", "diffllama", "dynamic_rope", "dropout", "no_head"],
)
def test_sampling_that_would_be_inexact_raises(make, options, error, message):
    with pytest.raises(error, match=message):
        draw(make(), **options)
