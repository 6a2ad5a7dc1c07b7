"""Tests of whole torchtune models; test_matrix.py compares every family with the baseline, over all kinds of trees."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from baseline import MAX_SEQ_LEN, baseline_logprobs, in_float64, tiny_model
from cases import VOCAB, Case, assert_within_budget, gradients, largest_error, three_levels, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchtune.generation import generate
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

import flexpg
from flexpg import SamplingParams, sampling
from flexpg.integrations.torchtune import forward, output
from flexpg.logprobs import token_logprobs

EOS = 2
PROMPT = tokens(20, 11)


def groups(*lengths: tuple[int, list[int]]) -> Case:
    """Build groups of (prompt length, completion lengths) with random tokens."""
    prompts = [tokens(prompt, g) for g, (prompt, _) in enumerate(lengths)]
    completions = [[tokens(n, 100 * g + i + 50) for i, n in enumerate(lens)] for g, (_, lens) in enumerate(lengths)]
    return Case.from_groups(prompts, completions)


CASES = {
    "group": groups((40, [9, 17, 3, 12])),
    "five_groups": groups((20, [5, 8]), (3, [4, 9, 2]), (31, [6]), (1, [7, 7]), (12, [10, 1])),
    "pad_and_eos_in_prompt": Case.from_groups([[5, 0, 0, EOS, 7, EOS, 0]], [[[0, 9, EOS], [8, 0, 0, EOS]]]),
    "equal_completions_not_merged": Case.from_groups([PROMPT], [[tokens(6, 12), tokens(6, 12), tokens(8, 13)]]),
    "packed_longer_than_max_seq_len": groups((100, [60, 80, 70]), (50, [90, 90])),
}


def shared_logprobs(model: nn.Module, case: Case) -> Tensor:
    hidden = forward(model, case.tree)
    return token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))


def results(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    return {"logprobs": logprobs.detach()} | gradients(model, logprobs)


def shared_results(model: nn.Module, case: Case) -> dict[str, Tensor]:
    return results(model, shared_logprobs(model, case))


def baseline_results(model: nn.Module, case: Case) -> dict[str, Tensor]:
    return results(model, baseline_logprobs(model, case.sequences, case.prompt_lens))


# Equality.


@pytest.mark.parametrize("case", CASES)
def test_forward_backward_equals_baseline(case):
    model = in_float64(tiny_model("llama3"))
    assert (CASES[case].tree.num_tokens > MAX_SEQ_LEN) == (case == "packed_longer_than_max_seq_len")
    assert largest_error(shared_results(model, CASES[case]), baseline_results(model, CASES[case])) < 1e-12


@pytest.mark.parametrize("case", [CASES["group"], three_levels()], ids=["group", "three_levels"])
def test_forward_gemma2_sliding_window_softcap_within_error_budget(case):
    truth = baseline_results(in_float64(tiny_model("gemma2")), case)
    model = tiny_model("gemma2")
    assert_within_budget(shared_results(model, case), baseline_results(model, case), truth)


def test_activation_checkpointing_gradients_are_bitwise_identical():
    case, model = three_levels(), tiny_model("qwen2")
    expected = shared_results(model, case)
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    values = shared_results(model, case)
    assert any("_checkpoint_wrapped_module" in name for name in values)
    assert all(map(torch.equal, values.values(), expected.values()))


def test_compiled_layers_equal_uncompiled():
    case, model = CASES["group"], in_float64(tiny_model("llama3_2"))
    expected = shared_results(model, case)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    assert largest_error(shared_results(model, case), expected) < 1e-12


# enable, and calls without flexpg.


def test_enable_twice_changes_nothing_more():
    model = tiny_model("llama3")
    assert flexpg.enable(model) is model
    forwards = [layer.attn.forward for layer in model.layers]
    flexpg.enable(model)
    assert [layer.attn.forward for layer in model.layers] == forwards


@pytest.mark.parametrize("name", ["llama3_2", "gemma2"])
def test_enable_leaves_ordinary_calls_bitwise_identical(name):
    model, batch = tiny_model(name), torch.tensor([tokens(15, 1), tokens(15, 2)])
    half = torch.ones(2, 15, 15, dtype=torch.bool).tril().triu(-4)
    positions = torch.arange(15).flip(0).expand(2, -1)

    def calls() -> list[Tensor]:
        return [model(batch), model(batch, mask=half), model(batch, mask=half, input_pos=positions)]

    before = calls()
    flexpg.enable(model)
    forward(model, CASES["group"].tree).sum().backward()
    assert all(map(torch.equal, calls(), before))


@pytest.mark.parametrize("with_kv_cache", [False, True])
def test_enable_leaves_torchtune_generation_bitwise_identical(with_kv_cache):
    model, prompt = tiny_model("llama3_2").eval(), torch.tensor([tokens(9, 1), tokens(9, 2)]) + 1
    if with_kv_cache:
        model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=30)

    def generated() -> tuple[Tensor, Tensor]:
        if with_kv_cache:
            model.reset_caches()
        rng = torch.Generator().manual_seed(5)
        return generate(model, prompt % VOCAB, max_generated_tokens=8, pad_id=-1, rng=rng)

    expected = generated()
    forward(flexpg.enable(model), CASES["group"].tree)
    assert all(map(torch.equal, generated(), expected))


def replace_forward(layers: nn.ModuleList) -> None:
    attn = layers[0].attn
    attn.forward = type(attn).forward.__get__(attn)


REFUSED: dict[str, tuple[Callable[[nn.ModuleList], None], type[Exception], str]] = {
    "attention_dropout": (
        lambda layers: setattr(layers[1].attn, "attn_dropout", 0.1),
        ValueError,
        "dropout must be 0, got 0.1: it would differ between the copies of a prefix",
    ),
    "dropout": (
        lambda layers: setattr(layers[0], "mlp", nn.Sequential(layers[0].mlp, nn.Dropout(0.2))),
        ValueError,
        "dropout must be 0, got 0.2",
    ),
    "other_layer": (
        lambda layers: layers.__setitem__(1, nn.Identity()),
        TypeError,
        "all 2 layers must be TransformerSelfAttentionLayers, got 1",
    ),
    "bidirectional": (
        lambda layers: setattr(layers[0].attn, "is_causal", False),
        TypeError,
        "model must have causal attention only",
    ),
    "replaced_forward": (replace_forward, TypeError, "the forward of a MultiHeadAttention has been replaced"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_enable_refuses_inexact_model(what):
    change, error, message = REFUSED[what]
    model = tiny_model("llama3")
    change(model.layers)
    with pytest.raises(error, match=re.escape(message)):
        flexpg.enable(model)


@pytest.mark.parametrize("what", ["attention_dropout", "dropout"])
def test_dropout_is_refused_in_training_and_allowed_in_eval(what):
    model = tiny_model("llama3")
    REFUSED[what][0](model.layers)
    assert forward(flexpg.enable(model.eval()), CASES["group"].tree).isfinite().all()
    with pytest.raises(ValueError, match="dropout must be 0"):
        forward(model.train(), CASES["group"].tree)


# Sampling.


def test_sample_refuses_completion_beyond_max_seq_len():
    model, prompt = tiny_model("llama3"), tokens(MAX_SEQ_LEN - 3, 1)
    assert len(flexpg.sample(model, [prompt], 2, SamplingParams(3, temperature=0)).completions) == 2
    with pytest.raises(ValueError, match=f"at most max_seq_len={MAX_SEQ_LEN} tokens, got {MAX_SEQ_LEN + 1}"):
        flexpg.sample(model, [prompt], 2, SamplingParams(4, temperature=0))


def test_sample_with_compiled_layers_does_not_recompile_every_step(monkeypatch):
    model, prompt = tiny_model("llama3"), tokens(20, 1)

    def completion(**options: bool | int) -> Tensor:
        return flexpg.sample(model, [prompt], 2, SamplingParams(12, temperature=0), **options).completions[0]

    expected = completion()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for layer in model.layers:
        layer.compile(backend=counter)
    assert torch.equal(completion(), expected)
    assert counter.frame_count <= 4 * len(model.layers)  # prefill and decoding, before and after the graph break
    assert torch.equal(completion(max_cache_tokens=20 + 12), expected)  # one sample after the other
    step = torch.compile(sampling._step, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: step)
    assert torch.equal(completion(compiled=True), expected)  # compiled layers within a compiled step
