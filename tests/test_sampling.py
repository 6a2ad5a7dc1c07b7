"""Sampling with one prefill draws what the plain model would, and reports what training will compute."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from unshared import VOCAB, LargestTensor, tiny_model

from flexpg.integrations.torchtune import decoder, forward, output
from flexpg.logprobs import token_logprobs
from flexpg.sampling import Samples, SamplingParams, sample
from flexpg.tree import PrefixTree

G = 3
PROMPTS = [torch.tensor(tokens) for tokens in ([5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 20], [30])]


def drawn(model, params: SamplingParams, prompts=PROMPTS, group_size=G, seed=0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return sample(decoder(model), output(model), prompts, group_size, params, generator)


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


def test_a_seed_fixes_the_samples_and_another_changes_them():
    model, params = tiny_model("llama3"), SamplingParams(max_new_tokens=6)
    assert as_lists(drawn(model, params, seed=1)) == as_lists(drawn(model, params, seed=1))
    assert as_lists(drawn(model, params, seed=1)) != as_lists(drawn(model, params, seed=2))
    samples = as_lists(drawn(model, params, seed=1))
    assert len({tuple(tokens) for tokens in samples}) == len(samples)  # nor are a prompt's samples copies


def test_the_likeliest_token_alone_is_greedy():
    model = tiny_model("llama3")
    greedy = drawn(model, SamplingParams(max_new_tokens=8, temperature=0))
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


def test_ordinary_calls_stay_bitwise_what_they_were():
    model = tiny_model("gemma2")
    before = model(PROMPTS[0][None])
    drawn(model, SamplingParams(max_new_tokens=2))
    assert torch.equal(model(PROMPTS[0][None]), before)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a whole number, 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; give 0 for greedy or a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; give a whole number, 1 or more, or None for all tokens"),
        ({"top_p": 0.0}, "top_p is 0.0; give a probability above 0, up to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 2.5}, "top_k is 2.5; give a whole number"),
    ],
)
def test_parameters_that_draw_nothing_are_refused(params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**{"max_new_tokens": 3} | params)


def test_a_group_of_none_and_an_empty_prompt_are_refused():
    model, params = tiny_model("llama3"), SamplingParams(max_new_tokens=2)
    with pytest.raises(ValueError, match="group_size is 0; give 1 completion per prompt or more"):
        drawn(model, params, group_size=0)
    with pytest.raises(ValueError, match="sequence 1 of 2 is empty"):
        drawn(model, params, prompts=[PROMPTS[0], PROMPTS[0][:0]])
