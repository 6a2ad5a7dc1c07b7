"""Sampling with one prefill draws what the plain model would, and reports what training will compute."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from baseline import VOCAB, LargestTensor, in_float64, tiny_model, baseline_hidden

from flexpg import sampling
from flexpg.integrations.torchtune import decoder, forward, output
from flexpg.logprobs import token_logprobs
from flexpg.sample_cache import SampleCache
from flexpg.sampling import Samples, SamplingParams, sample
from flexpg.tree import PrefixTree

G = 3
PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 20], [30])]


def random_uniforms(count: int, params: SamplingParams, seed: int = 0) -> Tensor:
    """[count, max_new_tokens] float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, params.max_new_tokens, dtype=torch.float64, generator=generator)


def drawn(model, params: SamplingParams, prompts=PROMPTS, group_size=G, seed=0, **options) -> Samples:
    uniforms = random_uniforms(len(prompts) * group_size, params, seed)
    return sample(decoder(model), output(model), prompts, group_size, params, uniforms, **options)


def as_lists(samples: Samples) -> list[list[int]]:
    return [tokens.tolist() for tokens in samples.completions]


def first_token_probabilities(model, temperature: float) -> Tensor:
    """[V] of the token after the first prompt, by the model as torchtune runs it."""
    with torch.no_grad():
        return (model(PROMPTS[0][None])[0, -1] / temperature).softmax(-1)


# ---- what training will compute --------------------------------------------------------------------------------------


def rescored(model, samples: Samples, temperature: float) -> Tensor:
    """[N, C] log-probabilities of the drawn tokens, as training computes them."""
    groups = [samples.completions[i : i + G] for i in range(0, len(PROMPTS) * G, G)]
    tree = PrefixTree.from_groups(PROMPTS, groups)
    prompt_lens = torch.tensor([len(prompt) for prompt in PROMPTS]).repeat_interleave(G)
    with torch.no_grad():
        return token_logprobs(
            forward(model, tree), output(model), tree, prompt_lens=prompt_lens, temperature=temperature
        )


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 2.5}])
@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "phi3", "gemma2"])
def test_a_samples_logprobs_are_those_of_the_training_forward(name, params):
    model = tiny_model(name)
    params = SamplingParams(max_new_tokens=15, stop_tokens=range(0, VOCAB, 5), **params)
    samples = drawn(model, params)
    assert samples.logprobs.dtype == torch.float32
    assert len({len(tokens) for tokens in samples.completions}) > 1
    # Log-probabilities go to -7, where float32 has steps of 5e-7: ten steps.
    assert (samples.logprobs - rescored(model, samples, params.temperature)).abs().max() < 5e-6
    assert (samples.logprobs - rescored(model, samples, 1.5 * params.temperature)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama3", "qwen2_tied", "gemma2"])
def test_greedy_is_the_plain_models_argmax_step_by_step(name):
    model = tiny_model(name)
    samples = drawn(model, SamplingParams(max_new_tokens=12, temperature=0))
    expected = []
    for prompt in PROMPTS:
        tokens = prompt
        for _ in range(12):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens[None])[0, -1:].argmax(-1)])
        expected += [tokens[len(prompt) :].tolist()] * G
    assert as_lists(samples) == expected
    assert (samples.logprobs - rescored(model, samples, temperature=1)).abs().max() < 5e-6


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_equal_numbers_fix_the_samples_and_others_change_them():
    model, params = tiny_model("llama3"), SamplingParams(max_new_tokens=6)
    assert as_lists(drawn(model, params, seed=1)) == as_lists(drawn(model, params, seed=1))
    assert as_lists(drawn(model, params, seed=1)) != as_lists(drawn(model, params, seed=2))
    uniforms = random_uniforms(4, params)
    uniforms[2] = uniforms[0]
    samples = as_lists(sample(decoder(model), output(model), PROMPTS[:1], 4, params, uniforms))
    assert samples[2] == samples[0]
    assert len({tuple(tokens) for tokens in samples}) == 3  # and the other siblings are no copies


def test_the_likeliest_token_alone_is_greedy():
    model = tiny_model("llama3")
    greedy = drawn(model, SamplingParams(max_new_tokens=8, temperature=0))
    uniforms = torch.full((len(PROMPTS) * G, 8), torch.nan, dtype=torch.float64)  # not read
    for unread in (None, uniforms):
        params = SamplingParams(max_new_tokens=8, temperature=0)
        assert as_lists(sample(decoder(model), output(model), PROMPTS, G, params, unread)) == as_lists(greedy)
    for only_one in ({"top_k": 1}, {"top_p": 1e-6}):
        assert as_lists(drawn(model, SamplingParams(max_new_tokens=8, **only_one))) == as_lists(greedy)


def kept(probabilities: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities after top-k and then top-p, token by token from the likeliest."""
    order = probabilities.argsort(descending=True).tolist()[:top_k]
    total, chosen = sum(probabilities[token].item() for token in order), []
    for token in order:
        chosen.append(token)
        if sum(probabilities[token].item() for token in chosen) / total >= top_p:
            break
    truncated = torch.zeros_like(probabilities)
    truncated[chosen] = probabilities[chosen]
    return truncated / truncated.sum()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the statistic is above its mean, over tokens expected at least five times."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    freedom = int(often.sum()) - 1
    statistic = ((counts - expected)[often].square() / expected[often]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.8), (12, 0.7), (VOCAB, 0.5)])
def test_tokens_are_drawn_as_often_as_they_are_likely_and_excluded_ones_never(top_k, top_p):
    model = tiny_model("llama3")
    params = SamplingParams(max_new_tokens=1, temperature=0.5, top_k=top_k, top_p=top_p)
    samples = drawn(model, params, prompts=PROMPTS[:1], group_size=20_000)
    counts = torch.bincount(torch.cat(samples.completions), minlength=VOCAB)
    probabilities = first_token_probabilities(model, 0.5)
    allowed = kept(probabilities, top_k, top_p)
    assert not counts[allowed == 0].any()
    assert chi_square(counts, allowed) < 4
    assert chi_square(counts, kept(first_token_probabilities(model, 0.6), top_k, top_p)) > 20


LARGEST = 1 - 2**-53  # below 1


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.6}])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_token_that_are_allowed(options):
    logits = torch.tensor([-torch.inf, 1.0, -200.0, 1.2, 1.1, -torch.inf, -200.0]).expand(4, -1)
    uniforms = torch.tensor([0, 2**-1074, 0.999, LARGEST], dtype=torch.float64)
    token, logprob = sampling._draw(logits, SamplingParams(1, **options), uniforms)
    first = 3 if options else 1
    assert token.tolist() == [first, first, 4, 4]
    assert torch.equal(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_the_last_of_150_000_even_tokens_are_told_apart():
    size = 150_000
    number = torch.arange(size - 50, size)
    for share in (1e-4, 1 - 1e-4):  # of the token's width: sums in float32 would be off by up to 5e-3
        token, _ = sampling._draw(torch.zeros(50, size), SamplingParams(1), (number.double() + share) / size)
        assert torch.equal(token, number)


def test_rows_are_drawn_alike_however_many_at_a_time(monkeypatch):
    params = SamplingParams(1, temperature=0.7, top_k=20, top_p=0.9)
    logits, uniforms = torch.randn(23, VOCAB), random_uniforms(23, params)[:, 0]
    whole = sampling._draw(logits, params, uniforms)
    monkeypatch.setattr(sampling, "DRAW_ELEMENTS", 3 * VOCAB)
    assert all(torch.equal(x, y) for x, y in zip(sampling._draw(logits, params, uniforms), whole, strict=True))


def one_by_one(model, prompts: list[Tensor], group_size: int, params: SamplingParams, uniforms: Tensor) -> list[list]:
    """Slow and honest: every rollout alone, its whole sequence through the plain model at each step."""
    completions = []
    for n, numbers in enumerate(uniforms.tolist()):
        prompt, completion = prompts[n // group_size].tolist(), []
        for number in numbers:
            logits = model.output(baseline_hidden(model, prompt + completion))[-1]
            allowed = kept((logits / params.temperature).softmax(-1), params.top_k, params.top_p)
            completion.append(int((allowed.cumsum(0) <= number).sum()))
            if completion[-1] in params.stop_tokens:
                break
        completions.append(completion)
    return completions


def random_prompts(rng: random.Random) -> list[Tensor]:
    return [torch.tensor(rng.choices(range(VOCAB), k=rng.randint(1, 30))) for _ in range(rng.randint(1, 6))]


BUDGETS = (None, 250, 100, 46)  # one wave, several, split groups, samples one by one


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_tied", "gemma2"])
@torch.no_grad()
def test_samples_are_those_of_the_unshared_loop_whatever_is_decoded_side_by_side(name, seed, monkeypatch):
    model, rng = tiny_model(name), random.Random(seed)
    model = in_float64(model) if name != "gemma2" else model
    prompts, group_size = random_prompts(rng), rng.randint(1, 6)
    stops = rng.sample(range(VOCAB), rng.choice([0, 5, 15]))
    params = SamplingParams(16, rng.choice([0.7, 1.0]), rng.choice([None, 9]), rng.choice([0.9, 1.0]), stops)
    uniforms = random_uniforms(len(prompts) * group_size, params, seed)
    expected = one_by_one(model, prompts, group_size, params, uniforms)
    for every in (1, 8, 100):  # at 100 nothing is dropped, and nothing ends early
        monkeypatch.setitem(sampling.CHECK_EVERY, "cpu", every)
        for budget in BUDGETS:
            samples = sample(
                decoder(model), output(model), prompts, group_size, params, uniforms, max_cache_tokens=budget
            )
            assert as_lists(samples) == expected
            assert samples.is_finished.tolist() == [row[-1] in stops for row in expected]
            assert samples.logprobs.shape[1] == max(map(len, expected))


RAGGED = [torch.arange(n) for n in (4, 9, 20, 30, 7)]
STOPPING = SamplingParams(14, stop_tokens=range(0, VOCAB, 6))


def test_a_waves_prompts_in_the_wrong_order_or_finished_rows_kept_for_live_ones_show(monkeypatch):
    model, budget = tiny_model("llama3"), 200
    right = as_lists(drawn(model, STOPPING, RAGGED, max_cache_tokens=budget))
    from_sequences, live_first = PrefixTree.from_sequences, sampling._live_first
    for where, name, wrong in [
        (PrefixTree, "from_sequences", lambda prompts: from_sequences(prompts[::-1])),
        (sampling, "_live_first", lambda is_finished, *size: live_first(~is_finished, *size)),
    ]:
        with monkeypatch.context() as mistake:
            mistake.setattr(where, name, wrong)
            assert as_lists(drawn(model, STOPPING, RAGGED, max_cache_tokens=budget)) != right


def test_stop_tokens_end_completions_and_stay_as_their_last_token():
    model, stops = tiny_model("llama3"), list(range(6))
    whole = drawn(model, SamplingParams(max_new_tokens=10), group_size=20)
    samples = drawn(model, SamplingParams(max_new_tokens=10, stop_tokens=stops), group_size=20)
    assert set(samples.is_finished.tolist()) == {False, True}
    for n, (tokens, uncut) in enumerate(zip(as_lists(samples), as_lists(whole), strict=True)):
        assert tokens == uncut[: len(tokens)]
        assert not set(tokens[:-1]) & set(stops)
        assert samples.is_finished[n] == (tokens[-1] in stops)
        assert samples.is_finished[n] or len(tokens) == 10
        assert samples.logprobs[n, : len(tokens)].all() and not samples.logprobs[n, len(tokens) :].any()


def test_sampling_ends_when_all_are_finished():
    samples = drawn(tiny_model("llama3"), SamplingParams(max_new_tokens=50, stop_tokens=range(VOCAB)))
    assert samples.logprobs.shape == (9, 1) and samples.is_finished.all()
    assert not drawn(tiny_model("llama3"), SamplingParams(max_new_tokens=2)).is_finished.any()


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 2, 16])
def test_prompts_are_prefilled_once_with_what_they_share_encoded_once(group_size):
    model, shared = tiny_model("llama3"), list(range(40)) * 4
    prompts = [torch.tensor([*shared, *range(n, n + 10)]) for n in range(8)]
    passed = []
    model.tok_embeddings.register_forward_hook(lambda module, args, result: passed.append(args[0].numel()))
    drawn(model, SamplingParams(max_new_tokens=4), prompts, group_size)
    packed = PrefixTree.from_sequences(prompts)
    assert packed.num_tokens == 160 + 8 * 10 and len(packed) == 256
    assert passed == [256] + [8 * group_size] * 3


def test_a_prompts_keys_are_not_copied_for_its_samples():
    model, prompt = tiny_model("llama3"), torch.arange(150) % VOCAB
    with LargestTensor() as largest:
        drawn(model, SamplingParams(max_new_tokens=3), [prompt], group_size=64)
    keys = 64 * 2 * 150 * 8  # samples, heads, prompt, head size
    assert largest.numel < keys / 2


def watched(model, watch):
    """A decoder that calls `watch(tokens, cache)` after each of its steps."""
    decode = decoder(model)

    def watching(tokens, position_ids, cache):
        hidden = decode(tokens, position_ids, cache)
        watch(tokens, cache)
        return hidden

    return watching


def slots(cache: SampleCache) -> int:
    """Tokens whose keys and values each layer holds, read off the tensors."""
    (prompt,), (own,) = ({x.shape for pair in kept.values() for x in pair} for kept in (cache._prompts, cache._samples))
    return prompt[0] * prompt[2] + own[0] * own[1] * own[3]


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
def test_the_cache_holds_what_the_budget_allows_and_waves_are_as_large_as_fit(budget, waves):
    model, params, held = tiny_model("llama3"), SamplingParams(14), []
    decode = watched(model, lambda tokens, cache: held.append(slots(cache)))
    sample(decode, output(model), RAGGED, G, params, random_uniforms(15, params), max_cache_tokens=budget)
    assert held == [size for size in waves for _ in range(14)]


def test_finished_rows_stop_costing_and_their_keys_are_released():
    model, params, steps = tiny_model("llama3"), SamplingParams(14, stop_tokens=range(0, VOCAB, 3)), []
    uniforms = random_uniforms(len(RAGGED) * 8, params)
    decode = watched(model, lambda tokens, cache: steps.append((len(tokens), len(cache.lengths), slots(cache))))
    samples = sample(decode, output(model), RAGGED, 8, params, uniforms)
    sizes = torch.tensor([len(tokens) for tokens in samples.completions]).view(-1, 8)
    assert len(steps) == sizes.max()  # the prefill, and a step for every token but the first
    for step, (rows, prompts, held) in enumerate(steps[1:], 1):
        live = (sizes > step).sum(1)
        assert rows < 2 * live.count_nonzero() * live.max()
        assert held == prompts * 30 + rows * 14
    assert len({prompts for _, prompts, _ in steps}) > 1 and steps[-1][2] < steps[0][2] / 4


def test_ordinary_calls_stay_bitwise_what_they_were():
    model = tiny_model("gemma2")
    before = model(PROMPTS[0][None])
    drawn(model, SamplingParams(max_new_tokens=2))
    assert torch.equal(model(PROMPTS[0][None]), before)


# ---- compiled steps, low precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_cache_of_fixed_shape_attends_as_one_that_grows(window, softcap):
    tree, generator = PrefixTree.from_sequences(RAGGED[:3]), torch.Generator().manual_seed(0)
    grows, fixed = (SampleCache(tree, 4, 8, compiled) for compiled in (False, True))

    def attended(batch: int, length: int) -> list[Tensor]:
        shapes = [(batch, heads, length, 8) for heads in (4, 2, 2)]
        q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
        return [cache.attend("layer", q, k, v, window=window, softcap=softcap) for cache in (grows, fixed)]

    assert torch.equal(*attended(1, len(tree)))
    grows.is_filled = fixed.is_filled = True
    rows = 12
    for step in range(6):
        first, second = attended(rows, 1)
        assert first.shape == (rows, 4, 1, 8) and (first - second).abs().max() < 1e-14
        for cache in (grows, fixed):
            cache.advance()
            if step == 2:
                cache.select(torch.tensor([[2], [0]]), torch.tensor([[3, 1, 0], [0, 2, 1]]))
                rows = 6
    assert fixed._prompts["layer"][0].shape[2] == 128 and grows._prompts["layer"][0].shape[2] == 20
    fixed.step -= 1  # a token is overwritten
    assert (torch.sub(*attended(rows, 1))).abs().max() > 1e-3


def counted(monkeypatch, backend: str) -> CompileCounterWithBackend:
    """Compiles of the decoding step from now on."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(sampling._step, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: step)
    return counter


@pytest.mark.slow
def test_compiled_steps_draw_the_same_and_compile_once_for_each_shape(monkeypatch):
    model = tiny_model("gemma2")
    counter, shapes = counted(monkeypatch, "aot_eager"), Counter()
    next_logits = sampling._next_logits

    def spied(decoder, output, token, cache):
        shapes[token.shape] += 1
        return next_logits(decoder, output, token, cache)

    params = replace(STOPPING, stop_tokens=range(0, VOCAB, 12))
    expected = as_lists(drawn(model, params, RAGGED, 6))
    monkeypatch.setattr(sampling, "_next_logits", spied)
    for budget in (None, None, 430):  # prompts are padded to 128 tokens
        samples = drawn(model, params, RAGGED, 6, compiled=True, max_cache_tokens=budget)
        assert as_lists(samples) == expected
    assert counter.frame_count == len(shapes) > 3
    assert shapes.total() > 5 * len(shapes)


def test_what_is_compiled_has_few_shapes_as_they_are_halved(monkeypatch):
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: sampling._step)
    model, prompts, samples = tiny_model("llama3"), set(), set()

    def watch(tokens, cache):
        if cache.is_filled:
            prompts.add(len(cache.lengths))
            samples.add(len(tokens) // len(cache.lengths))

    for seed in range(12):
        uniforms = random_uniforms(len(RAGGED) * 7, STOPPING, seed)
        sample(watched(model, watch), output(model), RAGGED, 7, STOPPING, uniforms, compiled=True)
    assert prompts <= {5, 3, 2, 1} and {7, 4, 2} <= samples <= {1, 7, 4, 2}


@pytest.mark.slow
def test_steps_compiled_by_inductor_draw_the_same():
    model, params = tiny_model("llama3"), SamplingParams(10)
    expected = drawn(model, params)
    samples = drawn(model, params, compiled=True)
    assert as_lists(samples) == as_lists(expected)
    assert (samples.logprobs - expected.logprobs).abs().max() < 5e-6


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_a_float32_model_samples_under_autocast(name):
    model, dtypes = tiny_model(name), set()
    uniforms = random_uniforms(len(RAGGED) * 4, STOPPING)
    decode = watched(model, lambda tokens, cache: dtypes.update(x.dtype for x in next(iter(cache._samples.values()))))
    with torch.autocast("cpu", torch.bfloat16):
        samples = sample(decode, output(model), RAGGED, 4, STOPPING, uniforms)
    assert dtypes == {torch.bfloat16}
    assert samples.logprobs.isfinite().all() and samples.logprobs.dtype == torch.float32
    assert all(0 <= int(row.min()) and int(row.max()) < VOCAB for row in samples.completions)
    exact = drawn(model, STOPPING, RAGGED, 4).logprobs[:, 0]
    assert (samples.logprobs[:, 0] - exact).abs().median() < 0.05


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_a_budget_in_which_one_sample_does_not_fit_is_refused_before_anything_is_computed():
    model, calls = tiny_model("llama3"), []
    model.tok_embeddings.register_forward_hook(lambda *args: calls.append(args))
    message = (
        "prompt 3 of 5 needs 44 tokens in the cache for one sample (30 and 14 new ones); raise max_cache_tokens=43"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        drawn(model, STOPPING, RAGGED, max_cache_tokens=43)
    with pytest.raises(ValueError, match=re.escape("needs 142 tokens in the cache for one sample (128 and 14 new")):
        drawn(model, STOPPING, RAGGED, max_cache_tokens=141, compiled=True)
    assert not calls


def test_logits_that_are_not_finite_are_refused():
    model = tiny_model("llama3")
    with torch.no_grad():
        model.norm.scale[3] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="some log-probabilities are not finite, so the model's"):
            drawn(model, SamplingParams(4, temperature))
