"""Whole torchtune models: a shared forward and backward is the unshared loop's, and every known mistake shows.

That every family does so, over all shapes of trees, stands in test_matrix.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from cases import Case, grouped, three_levels, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchtune.generation import generate
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing
from baseline import MAX_SEQ_LEN, VOCAB, in_float64, relative_error, tiny_model, baseline_logprobs

from flexpg import sampling
from flexpg.integrations import torchtune as flexpg_torchtune
from flexpg.integrations.torchtune import forward, output
from flexpg.logprobs import token_logprobs
from flexpg.masks import block_mask
from flexpg.sampling import SamplingParams, sample
from flexpg.tree import PrefixTree

EOS = 2


def groups(*lengths: tuple[int, list[int]]) -> Case:
    """Random tokens for groups of (prompt length, completion lengths)."""
    prompts = [tokens(prompt, g) for g, (prompt, _) in enumerate(lengths)]
    completions = [[tokens(n, 100 * g + i + 50) for i, n in enumerate(own)] for g, (_, own) in enumerate(lengths)]
    return grouped(prompts, completions)


PROMPT = tokens(20, 11)
CASES = {
    "group": groups((40, [9, 17, 3, 12])),
    "three levels": three_levels(),
    "five groups in a row": groups((20, [5, 8]), (3, [4, 9, 2]), (31, [6]), (1, [7, 7]), (12, [10, 1])),
    "pad id and eos id in the prompt": grouped([[5, 0, 0, EOS, 7, EOS, 0]], [[[0, 9, EOS], [8, 0, 0, EOS]]]),
    "equal completions, not merged": grouped([PROMPT], [[tokens(6, 12), tokens(6, 12), tokens(8, 13)]]),
}


def shared_logprobs(model, case: Case, **where) -> Tensor:
    """[N, C] from one packed row; `where` replaces the tree or the mask, for mistakes that `forward` would refuse."""
    hidden = forward(model, case.tree)
    if where:
        tree = where.get("tree", case.tree)
        hidden = flexpg_torchtune._hidden(model, tree.tokens[None], tree.position_ids[None], where["mask"])
    return token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))


def gradients(model, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently, so that a token in another's place shows."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=logprobs.dtype)
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad((weights * logprobs).sum(), parameters.values()), strict=True))


def largest_error(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(relative_error(values[name], expected[name]) for name in expected)


def assert_equal_to_unshared(model, case: Case, logprob_error: float, gradient_error: float) -> None:
    expected = baseline_logprobs(model, case.sequences, case.prompt_lens)
    expected_gradients = gradients(model, expected)
    logprobs = shared_logprobs(model, case)
    assert (logprobs - expected).abs().max() < logprob_error
    assert largest_error(gradients(model, logprobs), expected_gradients) < gradient_error


# ---- equal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logprobs_and_every_gradient_are_the_unshared_loops(case):
    assert_equal_to_unshared(in_float64(tiny_model("llama3_2")), CASES[case], logprob_error=1e-12, gradient_error=1e-12)


@pytest.mark.parametrize("case", ["group", "three levels"])
def test_gemma2_with_window_and_softcap_is_the_unshared_loops_in_float32(case):
    # Its log-probabilities go to -7, where float32 has steps of 5e-7: ten steps. Gradients: some tens of 6e-8.
    assert_equal_to_unshared(tiny_model("gemma2"), CASES[case], logprob_error=5e-6, gradient_error=3e-6)


def test_a_packed_row_may_be_longer_than_the_context_that_its_sequences_need():
    case = groups((100, [60, 80, 70]), (50, [90, 90]))
    assert case.tree.num_tokens > MAX_SEQ_LEN >= case.tree.max_length
    assert_equal_to_unshared(in_float64(tiny_model("llama3")), case, logprob_error=1e-12, gradient_error=1e-12)


def test_a_changed_completion_leaves_all_other_rollouts_bitwise_the_same():
    model, prompts = tiny_model("llama3_2"), [tokens(30, 1), tokens(21, 2)]
    completions = [[tokens(12, 3), tokens(9, 4), tokens(14, 5)], [tokens(7, 6), tokens(13, 7)]]
    before = shared_logprobs(model, grouped(prompts, completions))
    completions[0][1] = [(token + 1) % VOCAB for token in completions[0][1]]
    after = shared_logprobs(model, grouped(prompts, completions))
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(after[others], before[others])
    assert (after[1, :9] - before[1, :9]).abs().min() > 1e-3


# ---- in a training run ---------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_gradient():
    case, model = CASES["three levels"], tiny_model("qwen2")
    expected = gradients(model, shared_logprobs(model, case))
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    values = gradients(model, shared_logprobs(model, case))
    assert any("_checkpoint_wrapped_module" in name for name in values)
    for gradient, before in zip(values.values(), expected.values(), strict=True):
        assert torch.equal(gradient, before)


def test_compiled_layers_give_the_same_logprobs_and_gradients():
    case, model = CASES["group"], in_float64(tiny_model("llama3_2"))
    logprobs = shared_logprobs(model, case)
    expected = gradients(model, logprobs)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    compiled = shared_logprobs(model, case)
    assert (compiled - logprobs).abs().max() < 1e-12
    assert largest_error(gradients(model, compiled), expected) < 1e-12


@pytest.mark.parametrize("name", ["llama3_2", "gemma2"])
def test_ordinary_calls_stay_bitwise_what_they_were(name):
    model, batch = tiny_model(name), torch.tensor([tokens(15, 1), tokens(15, 2)])
    half = torch.ones(2, 15, 15, dtype=torch.bool).tril().triu(-4)
    positions = torch.arange(15).flip(0).expand(2, -1)

    def calls() -> list[Tensor]:
        return [model(batch), model(batch, mask=half), model(batch, mask=half, input_pos=positions)]

    before = calls()
    forward(model, CASES["group"].tree).sum().backward()
    for value, expected in zip(calls(), before, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("with_cache", [False, True])
def test_torchtunes_own_generation_stays_what_it_was(with_cache):
    model, prompt = tiny_model("llama3_2").eval(), torch.tensor([tokens(9, 1), tokens(9, 2)]) + 1
    if with_cache:
        model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=30)

    def generated() -> tuple[Tensor, Tensor]:
        if with_cache:
            model.reset_caches()
        rng = torch.Generator().manual_seed(5)
        return generate(model, prompt % VOCAB, max_generated_tokens=8, pad_id=-1, rng=rng)

    expected = generated()
    forward(model, CASES["group"].tree)
    for value, before in zip(generated(), expected, strict=True):
        assert torch.equal(value, before)


# ---- the mistakes that are known, each far outside the tolerance -----------------------------------------------------


def chain(tree: PrefixTree) -> PrefixTree:
    """The row as if it were one sequence: everything before a token is its ancestor."""
    end = tree.end.clone()
    end[: tree.num_tokens] = tree.num_tokens
    return replace(tree, end=end)


def at_positions(tree: PrefixTree, position_ids: Tensor) -> PrefixTree:
    """The tree with other positions, where it keeps its own once they are derived."""
    wrong = replace(tree)
    vars(wrong)["position_ids"] = position_ids
    return wrong


def mistaken_mask(case: Case) -> dict:
    return {"mask": block_mask(chain(case.tree))}


def mistaken_positions(case: Case) -> dict:
    flat = torch.arange(len(case.tree)).clamp(max=MAX_SEQ_LEN - 1)  # a pad has to find its rotation too
    return {"tree": at_positions(case.tree, flat), "mask": block_mask(case.tree)}


def mistaken_end(case: Case) -> dict:
    """The first completion's subtree reaches one token into the second completion."""
    start, stop, _ = case.tree.segments[1].tolist()
    end = case.tree.end.clone()
    end[start:stop] += 1
    return {"mask": block_mask(replace(case.tree, end=end))}


@pytest.mark.parametrize("mistake", [mistaken_mask, mistaken_positions, mistaken_end])
def test_a_plain_causal_mask_flat_positions_or_an_end_off_by_one_shows(mistake):
    model, case = in_float64(tiny_model("llama3")), CASES["group"]
    expected = baseline_logprobs(model, case.sequences, case.prompt_lens)
    wrong = shared_logprobs(model, case, **mistake(case))
    assert (wrong - expected).abs().max() > 1e-2
    assert largest_error(gradients(model, wrong), gradients(model, expected)) > 1e-2


def test_a_window_in_packed_indices_shows():
    model, case = tiny_model("gemma2"), CASES["group"]
    expected = baseline_logprobs(model, case.sequences, case.prompt_lens)
    mask = block_mask(at_positions(case.tree, torch.arange(len(case.tree))))
    wrong = shared_logprobs(model, case, mask=mask)
    assert (wrong - expected).abs().max() > 1e-2


def predicted_at(model, case: Case, shift: Tensor | int) -> Tensor:
    """[N, C] log-probability of every completion token of a case whose completions all have C tokens."""
    (prompt_len,) = set(case.prompt_lens)
    hidden = forward(model, case.tree)[0]
    target = case.tree.node[:, prompt_len:]
    at = case.tree.parent[target] if shift == "parent" else target - 1
    scores = output(model)(hidden[at]).log_softmax(-1)
    return scores.gather(-1, case.tree.tokens[target][..., None])[..., 0]


def test_prediction_at_the_packed_index_before_shows():
    model, case = in_float64(tiny_model("llama3")), groups((20, [6, 6, 6]))
    expected = baseline_logprobs(model, case.sequences, case.prompt_lens)
    assert (predicted_at(model, case, "parent") - expected).abs().max() < 1e-12
    wrong = predicted_at(model, case, "index before")
    assert (wrong - expected)[1:, 0].abs().min() > 1e-2  # the first token of every completion but the first
    assert (wrong - expected)[:, 1:].abs().max() < 1e-12


def test_a_dropped_first_completion_token_shows():
    model, case = in_float64(tiny_model("llama3")), CASES["group"]
    expected = baseline_logprobs(model, case.sequences, case.prompt_lens)
    hidden = forward(model, case.tree)
    mask = (expected != 0).index_fill(1, torch.tensor(0), False)
    wrong = token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens), mask=mask)
    assert (wrong - expected)[:, 1:].abs().max() < 1e-12
    assert largest_error(gradients(model, wrong), gradients(model, expected)) > 1e-2


def test_a_prefix_that_is_weighted_once_per_sibling_shows():
    model, case = in_float64(tiny_model("llama3")), CASES["group"]
    expected = gradients(model, baseline_logprobs(model, case.sequences, case.prompt_lens))
    hidden = forward(model, case.tree)
    siblings = torch.zeros(len(case.tree)).index_add(0, case.tree.node[case.tree.node >= 0], torch.ones(201))
    assert siblings.max() == len(case.sequences)
    hidden.register_hook(lambda gradient: gradient * siblings[:, None].double())
    logprobs = token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))
    wrong = gradients(model, logprobs)
    assert largest_error(wrong, expected) > 1e-2


# ---- refused -------------------------------------------------------------------------------------------------------


def refuses(error: type[Exception], message: str, model, tree: PrefixTree) -> None:
    with pytest.raises(error, match=re.escape(message)):
        forward(model, tree)


def test_dropout_is_refused_in_training_and_allowed_in_evaluation():
    tree = CASES["group"].tree
    model = tiny_model("llama3")
    model.layers[1].attn.attn_dropout = 0.1
    refuses(ValueError, "attn_dropout=0.1; sharing is exact without: set it to 0", model, tree)
    assert forward(model.eval(), tree).isfinite().all()
    model = tiny_model("llama3")
    model.layers[0].mlp = nn.Sequential(model.layers[0].mlp, nn.Dropout(0.2))
    refuses(ValueError, "the model has dropout 0.2, which would differ per copy of a prefix", model, tree)
    assert forward(model.eval(), tree).isfinite().all()


def test_models_of_another_kind_are_refused():
    tree = CASES["group"].tree
    model = tiny_model("llama3")
    model.layers[1] = nn.Identity()
    refuses(TypeError, "1 of the model's layers are not plain self-attention layers", model, tree)
    model = tiny_model("llama3")
    model.layers[0].attn.is_causal = False
    refuses(TypeError, "attention that is not causal", model, tree)


def test_the_sampler_refuses_a_completion_that_would_not_fit():
    model, prompt = tiny_model("llama3"), torch.tensor(tokens(MAX_SEQ_LEN - 3, 1))

    def drawn(max_new_tokens):
        params, output = SamplingParams(max_new_tokens, temperature=0), flexpg_torchtune.output(model)
        return sample(flexpg_torchtune.decoder(model), output, [prompt], 2, params, None)

    assert len(drawn(3).completions) == 2
    with pytest.raises(ValueError, match=f"{MAX_SEQ_LEN + 1} tokens is longer than the model's max_seq_len"):
        drawn(4)


def test_another_trees_mask_is_refused_even_where_the_lengths_agree():
    tree, other = CASES["group"].tree, PrefixTree.from_sequences([[1, 2, 3]])
    with pytest.raises(ValueError, match="the mask was made for another tree"):
        forward(tiny_model("llama3"), tree, block_mask(other))


def test_a_forward_that_something_else_replaced_is_refused():
    model = tiny_model("llama3")
    attn = model.layers[0].attn
    attn.forward = type(attn).forward.__get__(attn)
    refuses(TypeError, "something else has replaced the forward of a MultiHeadAttention", model, CASES["group"].tree)


def test_compiled_layers_sample_without_compiling_at_every_step(monkeypatch):
    model = tiny_model("llama3")
    prompt = torch.tensor(tokens(20, 1))
    params = SamplingParams(12, temperature=0)

    def drawn(**options):
        output = flexpg_torchtune.output(model)
        return sample(flexpg_torchtune.decoder(model), output, [prompt], 2, params, None, **options).completions[0]

    plain = drawn()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for layer in model.layers:
        layer.compile(backend=counter)
    assert torch.equal(drawn(), plain)
    assert counter.frame_count <= 4 * len(model.layers)  # prefill and decoding, before and after the graph break
    assert torch.equal(drawn(max_cache_tokens=20 + 12), plain)  # one sample after the other
    step = torch.compile(sampling._step, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(sampling, "_compiled_step", lambda mode: step)
    assert torch.equal(drawn(compiled=True), plain)  # compiled layers within a compiled step
