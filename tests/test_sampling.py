"""Sampling with one prefill draws what the baseline would, and returns the log-probabilities that training computes."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from baseline import VOCAB, Operators, in_float64, tiny_model
from oracles import sample_one_by_one, truncate
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flexpg
from flexpg import PrefixTree, Rollouts, SamplingParams, packed_logprobs, sampling
from flexpg.integrations.torchtune import decoder, output
from flexpg.sample_cache import SampleCache
from flexpg.sampling import Samples

G = 3
PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 20], [30])]
RAGGED = [torch.arange(n) for n in (4, 9, 20, 30, 7)]
STOPPING = SamplingParams(14, stop_tokens=range(0, VOCAB, 6))


def draw(model, params: SamplingParams, prompts=PROMPTS, group_size=G, seed=0, **options) -> Samples:
    return flexpg.sample(model, prompts, group_size, params, seed=seed, **options)


def as_lists(samples: Samples) -> list[list[int]]:
    return [tokens.tolist() for tokens in samples.completions]


def first_token_probabilities(model, temperature: float) -> Tensor:
    """Return [V] for the token after the first prompt, by torchtune's own forward."""
    with torch.no_grad():
        return (model(PROMPTS[0][None])[0, -1] / temperature).softmax(-1)


# Log-probabilities and greedy sampling


def rescore(model, samples: Samples, temperature: float) -> Tensor:
    """Compute [N, C] log-probabilities of the samples as training does."""
    groups = [samples.completions[i : i + G] for i in range(0, len(PROMPTS) * G, G)]
    rollouts = Rollouts.from_groups(PROMPTS, groups, [[1.0] * G] * len(PROMPTS))
    with torch.no_grad():
        ((_, logprobs),) = packed_logprobs(model, rollouts, max_tokens=1000, temperature=temperature)
    return logprobs


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 2.5}], ids=["1.0", "0.7", "2.5"]
)
@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "phi3", "gemma2"])
def test_sample_logprobs_are_those_of_the_training_forward(name, options):
    model = flexpg.enable(tiny_model(name))
    params = SamplingParams(max_new_tokens=15, stop_tokens=range(0, VOCAB, 5), **options)
    samples = draw(model, params)
    assert samples.logprobs.dtype == torch.float32
    assert len({len(tokens) for tokens in samples.completions}) > 1
    # Log-probabilities go down to -7, where float32 has steps of 5e-7: ten steps.
    assert (samples.logprobs - rescore(model, samples, params.temperature)).abs().max() < 5e-6


@pytest.mark.parametrize("name", ["llama3", "qwen2_tied", "gemma2"])
def test_sample_greedy_is_argmax_of_the_ordinary_forward(name):
    model = tiny_model(name)
    samples = draw(model, SamplingParams(max_new_tokens=12, temperature=0))
    expected = []
    for prompt in PROMPTS:
        tokens = prompt
        for _ in range(12):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens[None])[0, -1:].argmax(-1)])
        expected += [tokens[len(prompt) :].tolist()] * G
    assert as_lists(samples) == expected
    assert (samples.logprobs - rescore(model, samples, temperature=1)).abs().max() < 5e-6
    for one_token in ({"top_k": 1}, {"top_p": 1e-6}):
        assert as_lists(draw(model, SamplingParams(max_new_tokens=12, **one_token))) == expected


def test_sample_leaves_ordinary_forwards_bitwise_identical():
    model = tiny_model("gemma2")
    before = model(PROMPTS[0][None])
    draw(model, SamplingParams(max_new_tokens=2))
    assert torch.equal(model(PROMPTS[0][None]), before)


# Seeds


def test_seed_int_fixes_all_samples():
    model, params = tiny_model("llama3"), SamplingParams(max_new_tokens=6)
    state = torch.get_rng_state()
    samples = as_lists(draw(model, params, seed=1))
    assert samples == as_lists(draw(model, params, seed=1)) != as_lists(draw(model, params, seed=2))
    assert samples == as_lists(draw(model, params, seed=np.int64(1)))
    assert len({tuple(tokens) for tokens in samples[:G]}) == G  # the samples of a prompt differ
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_per_prompt_makes_samples_independent_of_other_prompts():
    model, params = tiny_model("llama3"), SamplingParams(max_new_tokens=6)
    samples = as_lists(draw(model, params, seed=[7, 8, 9]))
    assert as_lists(draw(model, params, PROMPTS[1:], seed=[8, 9])) == samples[G:]
    assert as_lists(draw(model, params, PROMPTS[::-1], seed=[9, 8, 7])) == samples[6:] + samples[3:6] + samples[:3]
    assert as_lists(draw(model, params, seed=[7, 1, 9]))[3:6] != samples[3:6]
    with pytest.raises(ValueError, match="seed must be an int or one int per prompt, got 2 for 3 prompts"):
        draw(model, params, seed=[7, 8])


def test_seed_none_reads_torchs_default_generator():
    model, params, samples = tiny_model("llama3"), SamplingParams(max_new_tokens=6), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        samples.append(as_lists(draw(model, params, seed=None)))
    assert samples[0] == samples[1] != samples[2] and as_lists(draw(model, params, seed=None)) != samples[2]


# Distribution


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Return how many standard deviations the statistic is above its mean, over tokens expected at least 5 times."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    freedom = int(often.sum()) - 1
    statistic = ((counts - expected)[often].square() / expected[often]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.8), (12, 0.7), (VOCAB, 0.5)])
def test_sample_frequencies_match_probabilities_with_top_k_and_top_p(top_k, top_p):
    model = tiny_model("llama3")
    params = SamplingParams(max_new_tokens=1, temperature=0.5, top_k=top_k, top_p=top_p)
    samples = draw(model, params, prompts=PROMPTS[:1], group_size=20_000)
    counts = torch.bincount(torch.cat(samples.completions), minlength=VOCAB)
    allowed = truncate(first_token_probabilities(model, 0.5), top_k, top_p)
    assert not counts[allowed == 0].any()
    assert chi_square(counts, allowed) < 4
    assert chi_square(counts, truncate(first_token_probabilities(model, 0.6), top_k, top_p)) > 20


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.6}], ids=["all", "top_k", "top_p"])
def test_draw_at_the_ends_of_the_unit_interval_is_an_allowed_token(options):
    logits = torch.tensor([-torch.inf, 1.0, -200.0, 1.2, 1.1, -torch.inf, -200.0]).expand(4, -1)
    uniforms = torch.tensor([0, 2**-1074, 0.999, 1 - 2**-53], dtype=torch.float64)
    token, logprob = sampling._draw(logits, SamplingParams(1, **options), uniforms)
    first = 3 if options else 1
    assert token.tolist() == [first, first, 4, 4]
    assert torch.equal(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_draw_resolves_150_000_equally_likely_tokens():
    size = 150_000
    number = torch.arange(size - 50, size)
    for share in (1e-4, 1 - 1e-4):  # of the token's width; sums in float32 would be off by up to 5e-3
        token, _ = sampling._draw(torch.zeros(50, size), SamplingParams(1), (number.double() + share) / size)
        assert torch.equal(token, number)


def test_draw_in_chunks_is_identical(monkeypatch):
    params = SamplingParams(1, temperature=0.7, top_k=20, top_p=0.9)
    logits, uniforms = torch.randn(23, VOCAB), torch.rand(23, dtype=torch.float64)
    whole = sampling._draw(logits, params, uniforms)
    monkeypatch.setattr(sampling, "DRAW_ELEMENTS", 3 * VOCAB)
    assert all(map(torch.equal, sampling._draw(logits, params, uniforms), whole))


# Whatever is decoded together


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_tied", "gemma2"])
@torch.no_grad()
def test_sample_matches_one_by_one_whatever_is_decoded_together(name, seed, monkeypatch):
    model, rng = tiny_model(name), random.Random(seed)
    model = in_float64(model) if name != "gemma2" else model
    prompts = [rng.choices(range(VOCAB), k=rng.randint(1, 30)) for _ in range(rng.randint(1, 6))]
    group_size, stops = rng.randint(1, 6), rng.sample(range(VOCAB), rng.choice([0, 5, 15]))
    params = SamplingParams(16, rng.choice([0.7, 1.0]), rng.choice([None, 9]), rng.choice([0.9, 1.0]), stops)
    uniforms = sampling._uniforms(seed, len(prompts), group_size, params)
    expected = sample_one_by_one(model, prompts, group_size, params, uniforms)
    for every in (1, 8, 100):  # at 100 nothing is dropped, and nothing ends early
        monkeypatch.setitem(sampling.CHECK_EVERY, "cpu", every)
        for budget in (None, 250, 100, 46):  # one wave, several, split groups, samples one by one
            samples = draw(model, params, prompts, group_size, seed, max_cache_tokens=budget)
            assert as_lists(samples) == expected
            assert samples.is_finished.tolist() == [tokens[-1] in stops for tokens in expected]
            assert samples.logprobs.shape[1] == max(map(len, expected))


def test_sample_ends_when_all_completions_are_finished():
    samples = draw(tiny_model("llama3"), SamplingParams(max_new_tokens=50, stop_tokens=range(VOCAB)))
    assert samples.logprobs.shape == (9, 1) and samples.is_finished.all()
    assert repr(samples) == "Samples(9 completions, 9 tokens, 0 truncated)"


# Work and memory


@pytest.mark.parametrize("group_size", [1, 2, 16])
def test_sample_prefills_shared_prompt_tokens_once(group_size):
    model, shared, numel = tiny_model("llama3"), list(range(40)) * 4, []
    prompts = [torch.tensor([*shared, *range(n, n + 10)]) for n in range(8)]
    model.tok_embeddings.register_forward_hook(lambda module, args, result: numel.append(args[0].numel()))
    draw(model, SamplingParams(max_new_tokens=4), prompts, group_size)
    assert PrefixTree.from_sequences(prompts).num_tokens == 160 + 8 * 10
    assert numel == [256] + [8 * group_size] * 3


def test_sample_kv_cache_of_a_prompt_is_not_copied_for_its_samples():
    model, prompt = tiny_model("llama3"), torch.arange(150) % VOCAB
    with Operators() as operators:
        draw(model, SamplingParams(max_new_tokens=3), [prompt], group_size=64)
    assert operators.largest < 64 * 2 * 150 * 8 / 2  # half of: samples, heads, prompt, head size


def sample_and_watch(model, watch, params, group_size, **options) -> Samples:
    """Sample completions of RAGGED and call `watch(tokens, cache)` after each step."""
    decode = decoder(model)

    def watching(tokens, position_ids, cache):
        hidden = decode(tokens, position_ids, cache)
        watch(tokens, cache)
        return hidden

    return sampling.sample_completions(watching, output(model), RAGGED, group_size, params, **{"seed": 0} | options)


def cached_tokens(cache: SampleCache) -> int:
    """Return the tokens whose keys and values each layer has stored, read off the tensors."""
    (prompt,), (samples,) = ({x.shape for pair in kv.values() for x in pair} for kv in (cache._prompts, cache._samples))
    return prompt[0] * prompt[2] + samples[0] * samples[1] * samples[3]


@pytest.mark.parametrize(
    ("budget", "waves"),
    [
        (None, [5 * 30 + 5 * 3 * 14]),
        (360, [5 * 30 + 5 * 3 * 14]),
        (359, [4 * 30 + 4 * 3 * 14, 4 + 3 * 14]),  # the longest four, then the shortest
        (150, [2 * 30 + 84, 2 * 9 + 84, 4 + 42]),
        (71, [30 + 28, 30 + 14, 20 + 42, 9 + 42, 7 + 42, 4 + 42]),  # the longest one's group does not fit
        (44, [30 + 14] * 3 + [20 + 14] * 3 + [9 + 28, 9 + 14, 7 + 28, 7 + 14, 4 + 28, 4 + 14]),
    ],
)
def test_sample_kv_cache_is_as_large_as_max_cache_tokens_allows(budget, waves):
    sizes = []
    options = {"max_cache_tokens": budget}
    sample_and_watch(
        tiny_model("llama3"), lambda _, cache: sizes.append(cached_tokens(cache)), SamplingParams(14), G, **options
    )
    assert sizes == [size for size in waves for _ in range(14)]


def test_sample_kv_cache_of_finished_samples_is_freed():
    params, steps = SamplingParams(14, stop_tokens=range(0, VOCAB, 3)), []

    def watch(tokens, cache):
        steps.append((len(tokens), len(cache.lengths), cached_tokens(cache)))

    samples = sample_and_watch(tiny_model("llama3"), watch, params, 8)
    sizes = torch.tensor([len(tokens) for tokens in samples.completions]).view(-1, 8)
    assert len(steps) == sizes.max()  # the prefill, and a step for every token but the first
    for step, (rows, prompts, cached) in enumerate(steps[1:], 1):
        live = (sizes > step).sum(1)
        assert rows < 2 * live.count_nonzero() * live.max()
        assert cached == prompts * 30 + rows * 14
    assert len({prompts for _, prompts, _ in steps}) > 1 and steps[-1][2] < steps[0][2] / 4


def test_sample_max_cache_tokens_below_one_sample_raises_before_prefill():
    model, calls = tiny_model("llama3"), []
    model.tok_embeddings.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=r"max_cache_tokens must be at least 44 for prompt 3 .* got 43"):
        draw(model, STOPPING, RAGGED, max_cache_tokens=43)
    with pytest.raises(ValueError, match=r"max_cache_tokens must be at least 142 for prompt 3 .* got 141"):
        draw(model, STOPPING, RAGGED, max_cache_tokens=141, compiled=True)  # with prompts padded to 128 tokens
    assert not calls


# Compiled steps, low precision


@pytest.mark.slow
def test_sample_compiled_is_identical_and_compiles_once_per_shape(monkeypatch):
    torch._dynamo.reset()
    counter, shapes = CompileCounterWithBackend("aot_eager"), Counter()
    step = torch.compile(sampling._step, fullgraph=True, dynamic=False, backend=counter)
    next_logits = sampling._next_logits

    def count_shapes(decoder, output, token, cache):
        shapes[token.shape] += 1
        return next_logits(decoder, output, token, cache)

    model, params = tiny_model("gemma2"), replace(STOPPING, stop_tokens=range(0, VOCAB, 12))
    expected = as_lists(draw(model, params, RAGGED, 6))
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: step)
    monkeypatch.setattr(sampling, "_next_logits", count_shapes)
    for budget in (None, None, 430):  # prompts are padded to 128 tokens
        assert as_lists(draw(model, params, RAGGED, 6, compiled=True, max_cache_tokens=budget)) == expected
    assert counter.frame_count == len(shapes) > 3
    assert shapes.total() > 5 * len(shapes)


def test_sample_compiled_halves_shapes_so_that_there_are_few(monkeypatch):
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: sampling._step)
    model, prompts, samples = tiny_model("llama3"), set(), set()

    def watch(tokens, cache):
        if cache.is_filled:
            prompts.add(len(cache.lengths))
            samples.add(len(tokens) // len(cache.lengths))

    for seed in range(12):
        sample_and_watch(model, watch, STOPPING, 7, compiled=True, seed=seed)
    assert prompts <= {5, 3, 2, 1} and {7, 4, 2} <= samples <= {1, 7, 4, 2}


@pytest.mark.slow
def test_sample_compiled_by_inductor_is_identical():
    model, params = tiny_model("llama3"), SamplingParams(10)
    expected, samples = draw(model, params), draw(model, params, compiled=True)
    assert as_lists(samples) == as_lists(expected)
    assert (samples.logprobs - expected.logprobs).abs().max() < 5e-6


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_sample_autocast_stores_a_bfloat16_kv_cache(name):
    model, dtypes = tiny_model(name), set()
    with torch.autocast("cpu", torch.bfloat16):
        samples = sample_and_watch(
            model, lambda _, cache: dtypes.update(x.dtype for x in next(iter(cache._samples.values()))), STOPPING, 4
        )
    assert dtypes == {torch.bfloat16}
    assert as_lists(draw(model, STOPPING, RAGGED, 4, autocast_dtype=torch.bfloat16)) == as_lists(samples)
    assert samples.logprobs.isfinite().all() and samples.logprobs.dtype == torch.float32
    assert all(0 <= int(tokens.min()) and int(tokens.max()) < VOCAB for tokens in samples.completions)
    exact = draw(model, STOPPING, RAGGED, 4).logprobs[:, 0]
    assert (samples.logprobs[:, 0] - exact).abs().median() < 0.05


# Errors


def test_sample_nan_logits_raise():
    model = tiny_model("llama3")
    with torch.no_grad():
        model.norm.scale[3] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="logits are NaN or Inf while sampling"):
            draw(model, SamplingParams(4, temperature))


@pytest.mark.parametrize("group_size", [0, -1, 2.0, [4]], ids=str)
def test_sample_group_size_below_one_raises(group_size):
    with pytest.raises(ValueError, match=re.escape(f"group_size must be an integer of at least 1, got {group_size}")):
        draw(tiny_model("llama3"), SamplingParams(4), group_size=group_size)


@pytest.mark.parametrize("stop_tokens", [5, "</s>", None, [None], [1.5], ["</s>"]], ids=str)
def test_sampling_params_stop_tokens_that_are_no_ids_raise(stop_tokens):
    with pytest.raises(ValueError, match=re.escape(f"stop_tokens must be a list of token ids, got {stop_tokens!r}")):
        SamplingParams(4, stop_tokens=stop_tokens)


@pytest.mark.parametrize("convert", [list, set, np.array, torch.tensor, iter])
def test_sampling_params_take_stop_tokens_of_any_collection(convert):
    assert sorted(map(int, SamplingParams(4, stop_tokens=convert([5, 6])).stop_tokens)) == [5, 6]


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"max_new_tokens": 8.0}, {"temperature": -1}, {"top_k": 0}, {"top_k": 0.5}, {"top_p": 0}],
    ids=str,
)
def test_sampling_params_out_of_range_raise(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        SamplingParams(**{"max_new_tokens": 4} | options)
