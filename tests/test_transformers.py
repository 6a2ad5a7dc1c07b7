"""Whole transformers models, unmodified: a packed row gives the unshared values, and ordinary calls stay the same.

That every family does so, over all shapes of trees, stands in test_matrix.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import accelerate
import peft
import pytest
import torch
import transformers
from cases import VOCAB, Case, grouped, three_levels, tokens
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from baseline import relative_error

from flexpg.integrations import transformers as integration
from flexpg.integrations.transformers import NAME, forward, output, register
from flexpg.logprobs import token_logprobs
from flexpg.masks import block_mask
from flexpg.packing import pack, runs
from flexpg.rollouts import Rollouts
from flexpg.tree import PrefixTree

WINDOW = 7
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **SPECIAL}
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# Windows shorter than the sequences, softcaps that bend and multipliers other than 1, or they would do nothing here.
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE, **ONE_OF_EACH, use_sliding_window=True, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8),
    "gemma2": transformers.Gemma2Config(
        **SHAPE,
        **ONE_OF_EACH,
        head_dim=8,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **ONE_OF_EACH, head_dim=8, query_pre_attn_scalar=6),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=WINDOW),
    "phi3": transformers.Phi3Config(**SHAPE),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "granite": transformers.GraniteConfig(
        **SHAPE, attention_multiplier=0.3, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0
    ),
    "smollm3": transformers.SmolLM3Config(**SHAPE),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.25, use_qk_norm=True),
    "gpt2": transformers.GPT2Config(**GPT2, attn_pdrop=0.0),
}
SLOW_EXPERTS = {"_experts_implementation": "eager"}  # one after the other, as torch's grouped product has no float64
ORDINARY = {"gemma2": "eager"}  # what "flexpg" stands in for; sdpa has no softcap
EXPERT_MODELS = ["mixtral", "qwen3_moe"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


CASES = {
    "groups": grouped(
        [tokens(20, 11), tokens(1, 12), tokens(31, 13)],
        [[tokens(5, 14), tokens(9, 15), tokens(1, 16)], [tokens(8, 17), tokens(4, 18)], [tokens(12, 19)]],
    ),
    "three levels": three_levels(),
}


def loaded(name: str, implementation: str = NAME, **changes) -> transformers.PreTrainedModel:
    """A family's small model in training mode, of equal weights in every implementation.

    Its every parameter matters: no norm weight of 1 and no bias of 0.
    """
    config = copy.deepcopy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    return built(config, implementation)


def built(config: transformers.PretrainedConfig, implementation: str = NAME) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # a model keeps its config and writes to it
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.train()


def pair(name: str, **changes) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """The model with "flexpg", and its twin with what transformers itself would use."""
    return loaded(name, **changes), loaded(name, ORDINARY.get(name, "sdpa"), **changes)


class Float64Norm(nn.Module):
    """A norm of transformers without its round to float32: RMSNorm, Gemma's with 1 + weight, Cohere's with a mean."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = vars(norm)["eps"] if "eps" in vars(norm) else vars(norm)["variance_epsilon"]
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        self.is_centred = type(norm).__name__ == "CohereLayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + self.weight)


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, where its norms would compute in float32 all the same."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") or type(child).__name__ == "CohereLayerNorm":
                setattr(module, name, Float64Norm(child))
    return model


def baseline_logprobs(model: nn.Module, case: Case) -> Tensor:
    """[N, C] log-probabilities of the completions, 0 beyond their length: one sequence after the other."""
    rows = []
    for row, prompt_len in zip(case.sequences, case.prompt_lens, strict=True):
        ids = torch.tensor([row], device=model.device)
        logits = model(input_ids=ids).logits[0]  # [T, V]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        rows.append(scores[prompt_len - 1 : -1].gather(-1, ids[0, prompt_len:, None])[:, 0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def shared_logprobs(model: nn.Module, case: Case, **mistaken) -> Tensor:
    """[N, C] from one packed row; `mistaken` is the tree or the mask of a forward that is to be wrong."""
    hidden = forward(model, mistaken.get("tree", case.tree), mistaken.get("mask"))
    return token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently, so that a token in another's place shows."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    (weights.to(logprobs) * logprobs).sum().backward()  # not autograd.grad, which reentrant checkpoints refuse
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def largest_error(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(values) == list(expected)
    return max(relative_error(values[name], expected[name]) for name in expected)


def assert_equal_to_unshared(
    model: nn.Module, ordinary: nn.Module, case: Case, logprob_error: float, gradient_error: float
) -> None:
    expected, logprobs = baseline_logprobs(ordinary, case), shared_logprobs(model, case)
    assert (logprobs - expected).abs().max() < logprob_error
    assert largest_error(gradients(model, logprobs), gradients(ordinary, expected)) < gradient_error


# ---- equal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_float64_models_of_this_file_are_the_models(name):
    batch = torch.tensor([tokens(25, 1)])
    expected = pair(name)[1](input_ids=batch).logits
    logits = in_float64(pair(name, **SLOW_EXPERTS)[1])(input_ids=batch).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "qwen3_moe"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    model, case = loaded(name), CASES["three levels"]
    expected = gradients(model, shared_logprobs(model, case))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # a reentrant checkpoint needs an input that requires grad, as everywhere
    counted = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: counted.append(1))
    values = gradients(model, shared_logprobs(model, case))
    assert len(counted) == 2  # once more in the backward
    for parameter, before in expected.items():
        assert torch.equal(values[parameter], before)


def with_lora(model: nn.Module, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:  # zero at first, and so would be the gradient of lora_A
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_an_adapters_gradients_are_the_unshared_models(name, checkpointing):
    model, ordinary = (in_float64(with_lora(each)) for each in pair(name))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert len(gradients(model, shared_logprobs(model, CASES["groups"]))) == 8
    assert_equal_to_unshared(model, ordinary, CASES["groups"], logprob_error=1e-12, gradient_error=1e-12)


ADAPTERS = {
    "DoRA": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 5, 8]},
    "an output layer of its own": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_gradients_are_the_unshared_models(kind):
    model, ordinary = (in_float64(with_lora(each, **ADAPTERS[kind])) for each in pair("llama"))
    assert_equal_to_unshared(model, ordinary, CASES["groups"], logprob_error=1e-12, gradient_error=1e-12)


def test_a_model_whose_layers_send_their_inputs_to_a_device_is_exact():
    """As accelerate's hooks do in a model that `device_map` spread over devices."""
    model, ordinary = (in_float64(each) for each in pair("mistral"))
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert_equal_to_unshared(model, ordinary, CASES["groups"], logprob_error=1e-12, gradient_error=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_bfloat16_strays_no_further_from_float64_than_the_unshared_models(name, device):
    case = replace(CASES["three levels"], tree=CASES["three levels"].tree.to(device))
    changes = {"head_dim": 16}  # the least that FlexAttention's kernels take
    model, ordinary = (each.bfloat16().to(device) for each in pair(name, **changes))
    exact = in_float64(loaded(name, "sdpa", **changes).bfloat16()).to(device)
    truth, unshared, shared = (
        baseline_logprobs(exact, case),
        baseline_logprobs(ordinary, case),
        shared_logprobs(model, case),
    )
    assert shared.dtype == torch.float32
    assert relative_error(shared, truth) < 1.5 * relative_error(unshared, truth)
    # Of all parameters together: a bias of 16 rounded numbers strays by a factor of 1.8 this way or that by chance.
    true_gradient, value, other = (
        torch.cat([gradient.double().flatten() for gradient in gradients(*run).values()])
        for run in ((exact, truth), (model, shared), (ordinary, unshared))
    )
    assert relative_error(value, true_gradient) < 1.5 * relative_error(other, true_gradient)


def test_a_mask_that_is_at_hand_serves_policy_and_reference():
    case = CASES["groups"]
    mask = block_mask(case.tree)
    for model in (loaded("qwen2"), loaded("mistral"), loaded("qwen2")):
        assert torch.equal(shared_logprobs(model, case, mask=mask), shared_logprobs(model, case))


def test_a_changed_completion_leaves_all_other_rollouts_bitwise_the_same():
    model, prompts = loaded("llama"), [tokens(30, 1), tokens(21, 2)]
    completions = [[tokens(12, 3), tokens(9, 4), tokens(14, 5)], [tokens(7, 6), tokens(13, 7)]]
    before = shared_logprobs(model, grouped(prompts, completions))
    completions[0][1] = [(token + 1) % VOCAB for token in completions[0][1]]
    after = shared_logprobs(model, grouped(prompts, completions))
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(after[others], before[others])
    assert (after[1, :9] - before[1, :9]).abs().min() > 1e-3


@pytest.mark.parametrize("max_tokens", [400, 70], ids=["one row", "a run behind its prompt"])
def test_packed_rollouts_are_scored_as_each_alone_at_a_temperature(max_tokens):
    model, ordinary = (in_float64(own) for own in pair("llama"))
    completions = [torch.tensor(tokens(4 + n, 60 + n)) for n in range(8)]
    mask = torch.ones(8, 11, dtype=torch.bool) & (torch.arange(11) < torch.arange(4, 12)[:, None])
    mask[2, 1] = False  # a tool's token
    rollouts = Rollouts([torch.tensor(tokens(30, 59))], completions, torch.zeros(8, dtype=int), torch.zeros(8), mask)
    expected = torch.zeros(8, 11, dtype=torch.float64)
    for n, sequence in enumerate(rollouts.sequences):
        scores = (ordinary(input_ids=sequence[None]).logits[0] / 0.7).log_softmax(-1)
        expected[n, : 4 + n] = scores[29:-1].gather(-1, sequence[30:, None])[:, 0]
    expected = expected.where(mask, 0)
    assert (integration.logprobs_alone(model, rollouts, 0.7) - expected).abs().max() < 1e-12
    (run,) = runs(pack(rollouts, max_tokens))
    assert (len(run) > 1) == (max_tokens == 70)
    with torch.no_grad(), integration.encode_run(model, run) as prefix:
        for batch in run:
            found, _ = integration.logprobs(model, batch, 0.7, prefix)
            assert (found - expected[batch.indices, : found.shape[1]]).abs().max() < 1e-12


# ---- the mistakes that are known, each far outside the tolerance ----------------------------------------------------


def with_positions(tree: PrefixTree, position_ids: Tensor) -> PrefixTree:
    """The tree with other positions, where it keeps its own once they are derived."""
    wrong = replace(tree)
    vars(wrong)["position_ids"] = position_ids
    return wrong


def plain_causal_mask(tree: PrefixTree) -> dict:
    """Everything before a token is its ancestor, at the positions of the tree."""
    end = tree.end.clone()
    end[: tree.num_tokens] = tree.num_tokens
    return {"tree": with_positions(replace(tree, end=end), tree.position_ids)}


def end_off_by_one(tree: PrefixTree) -> dict:
    """The first completion's subtree reaches one token into the second completion."""
    start, stop, _ = tree.segments[1].tolist()
    end = tree.end.clone()
    end[start:stop] += 1
    return {"tree": with_positions(replace(tree, end=end), tree.position_ids)}


def flat_positions(tree: PrefixTree) -> dict:
    return {"tree": with_positions(tree, torch.arange(len(tree)))}


def window_in_packed_indices(tree: PrefixTree) -> dict:
    mask = block_mask(tree)
    mask._windowed[WINDOW] = block_mask(with_positions(tree, torch.arange(len(tree))), WINDOW)
    return {"mask": mask}


@pytest.mark.parametrize("mistake", [plain_causal_mask, end_off_by_one, flat_positions])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_plain_causal_mask_an_end_off_by_one_or_flat_positions_show(name, mistake):
    model, case = loaded(name), CASES["groups"]
    right, wrong = shared_logprobs(model, case), shared_logprobs(model, case, **mistake(case.tree))
    assert (wrong - right).abs().max() > 1e-2
    assert largest_error(gradients(model, wrong), gradients(model, right)) > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "mistral", "mixtral"])
def test_a_window_in_packed_indices_shows(name):
    model, case = loaded(name), CASES["groups"]
    right = shared_logprobs(model, case)
    assert (shared_logprobs(model, case, **window_in_packed_indices(case.tree)) - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "mistral", "mixtral"])
def test_without_its_window_a_model_is_another(name):
    case, model = CASES["groups"], loaded(name)
    wide = loaded(name, sliding_window=200)
    assert (shared_logprobs(wide, case) - shared_logprobs(model, case)).abs().max() > 1e-2


def test_prediction_at_the_packed_index_before_shows():
    model, ordinary = (in_float64(each) for each in pair("llama"))
    case = grouped([tokens(20, 1)], [[tokens(6, seed) for seed in (2, 3, 4)]])
    expected, target = baseline_logprobs(ordinary, case), case.tree.node[:, 20:]  # [N, C] each

    def predicted_at(index: Tensor) -> Tensor:
        scores = output(model)(forward(model, case.tree)[0, index.flatten()]).log_softmax(-1)
        return scores.gather(-1, case.tree.tokens[target].flatten()[:, None]).view_as(target)

    assert (predicted_at(case.tree.parent[target]) - expected).abs().max() < 1e-12
    wrong = predicted_at(target - 1)
    assert (wrong - expected)[1:, 0].abs().min() > 1e-2  # the first token of every completion but the first
    assert (wrong - expected)[:, 1:].abs().max() < 1e-12


# ---- all other calls are what they were --------------------------------------------------------------------------


def batch(padding: str) -> dict[str, Tensor]:
    """Four rows of unequal lengths, most longer than the window, padded at one side. The pad id also stands inside."""
    rows = [tokens(length, 30 + length) for length in (12, 5, 9, 1)]
    rows[0][3] = rows[2][5] = SPECIAL["pad_token_id"]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 0, padding)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0, padding)
    return {"input_ids": ids, "attention_mask": mask}


def padded(model: nn.Module, padding: str) -> list[Tensor]:
    return [model(**batch(padding)).logits]


def unpadded(model: nn.Module) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokens(15, 1), tokens(15, 2)])).logits]


def with_labels(model: nn.Module) -> list[Tensor]:
    ids = batch("right")
    model.zero_grad()
    out = model(**ids, labels=ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100))
    out.loss.backward()
    return [out.loss, out.logits, *(parameter.grad for parameter in model.parameters())]


def continued(model: nn.Module) -> list[Tensor]:
    """A prefill of ten tokens, then three at once and one more, with the cache."""
    ids = torch.tensor([tokens(14, 3), tokens(14, 4)])
    outs = [model(input_ids=ids[:, :10], use_cache=True)]
    for start, stop in ((10, 13), (13, 14)):
        outs.append(model(input_ids=ids[:, start:stop], past_key_values=outs[-1].past_key_values, use_cache=True))
    return [out.logits for out in outs]


def other_documents(model: nn.Module) -> list[Tensor]:
    """Transformers' own packed rows: without a mask, positions that start again stand for another document."""
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    return [model(input_ids=torch.tensor([tokens(20, 5)]), position_ids=positions, use_cache=False).logits]


def generated(model: nn.Module, do_sample: bool, cache: str | None) -> list[Tensor]:
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0} if do_sample else {"do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    return [model.eval().generate(**batch("left"), **options, min_new_tokens=10, max_new_tokens=10, pad_token_id=0)]


CALLS: dict[str, Callable] = {
    "right-padded": lambda model: padded(model, "right"),
    "left-padded": lambda model: padded(model, "left"),
    "without mask": unpadded,
    "loss and gradients": with_labels,
    "continued from a cache": continued,
    "packed documents": other_documents,
    "greedy": lambda model: generated(model, do_sample=False, cache=None),
    "greedy, static cache": lambda model: generated(model, do_sample=False, cache="static"),
    "sampled": lambda model: generated(model, do_sample=True, cache=None),
    "sampled, static cache": lambda model: generated(model, do_sample=True, cache="static"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2"])
def test_every_ordinary_call_is_bitwise_that_of_the_models_own_attention(name, call):
    model, ordinary = pair(name)
    for value, expected in zip(CALLS[call](model), CALLS[call](ordinary), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_dropout_of_an_ordinary_batch_is_that_of_the_models_own_attention(name):
    logits = []
    for model in pair(name, attention_dropout=0.3):
        torch.manual_seed(7)
        logits.append(model(**batch("right")).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], loaded(name)(**batch("right")).logits)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_ordinary_batch_is_masked(padding):
    model, ids = loaded("llama"), batch(padding)
    logits = model(**ids).logits
    ids["input_ids"] = ids["input_ids"].where(ids["attention_mask"] == 1, 9)
    real = ids["attention_mask"].bool()
    assert torch.equal(model(**ids).logits[real], logits[real])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_shared_forward_leaves_ordinary_calls_bitwise_what_they_were(name):
    model = loaded(name)
    before = [call for calls in (unpadded(model), padded(model, "left"), continued(model)) for call in calls]
    shared_logprobs(model, CASES["groups"]).sum().backward()
    after = [call for calls in (unpadded(model), padded(model, "left"), continued(model)) for call in calls]
    for value, expected in zip(after, before, strict=True):
        assert torch.equal(value, expected)


# ---- the output layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_output_gives_the_models_own_logits(name):
    model, ids = loaded(name), torch.tensor([tokens(15, 1)])
    expected = model(input_ids=ids).logits[0]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    assert torch.equal(output(model)(hidden), expected)
    assert torch.equal(model(input_ids=ids).logits[0], expected)


@pytest.mark.parametrize(("name", "setting"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_what_an_architecture_does_to_its_logits_is_not_missed(name, setting):
    model = loaded(name)
    hidden = model.base_model(input_ids=torch.tensor([tokens(15, 1)])).last_hidden_state[0]
    assert (output(model)(hidden) - model.lm_head(hidden)).abs().max() > 1e-2, setting


def test_output_leaves_the_model_as_it_was_also_when_it_raises():
    model, ids = loaded("llama"), torch.tensor([tokens(15, 1)])
    expected = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        output(model)(torch.zeros(3, 5))
    assert "forward" not in vars(model.base_model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_forward_that_someone_else_put_there_stays_there():
    """As accelerate's hooks do."""
    model, ids = loaded("llama"), torch.tensor([tokens(15, 1)])
    decoder, calls = model.base_model, []
    plain = decoder.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    decoder.forward = counted
    expected = model(input_ids=ids).logits[0]
    assert torch.equal(output(model)(decoder(input_ids=ids).last_hidden_state[0]), expected)
    assert decoder.forward is counted
    assert len(calls) == 2


# ---- loading and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_a_loaded_model_may_be_set_to_flexpg_and_back(name):
    model, ordinary = pair(name)
    expected, before = shared_logprobs(model, CASES["groups"]), padded(ordinary, "left")[0]
    ordinary.set_attn_implementation(NAME)
    assert torch.equal(shared_logprobs(ordinary, CASES["groups"]), expected)
    ordinary.set_attn_implementation(ORDINARY.get(name, "sdpa"))
    assert torch.equal(padded(ordinary, "left")[0], before)


def test_a_saved_checkpoint_does_not_ask_for_flexpg(tmp_path):
    model = loaded("qwen2")
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(unpadded(plain)[0], unpadded(model)[0])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert torch.equal(shared_logprobs(again, CASES["groups"]), shared_logprobs(model, CASES["groups"]))


def test_registering_twice_is_harmless():
    model = loaded("llama")
    expected = shared_logprobs(model, CASES["groups"])
    register()
    register()
    assert torch.equal(shared_logprobs(model, CASES["groups"]), expected)


def test_importing_alone_registers_nothing(monkeypatch):
    interfaces = AttentionInterface, AttentionMaskInterface
    for interface in interfaces:
        monkeypatch.delitem(interface._global_mapping, NAME)
    spec = importlib.util.spec_from_file_location("flexpg_once_more", integration.__file__)
    once_more = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, once_more)  # where a dataclass looks for its module
    spec.loader.exec_module(once_more)
    assert not any(NAME in interface().valid_keys() for interface in interfaces)
    once_more.register()
    assert all(NAME in interface().valid_keys() for interface in interfaces)


# ---- refused -------------------------------------------------------------------------------------------------------


def refuses(error: type[Exception], message: str, model: nn.Module, tree: PrefixTree, mask=None) -> None:
    with pytest.raises(error, match=re.escape(message)):
        forward(model, tree, mask)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HYBRID = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": VOCAB}
NO_INTERFACE = "does not use transformers' attention interface; it would not see the mask"
ARCHITECTURES = {
    "positions from the padding id on": (
        transformers.RobertaConfig(**(SHAPE | {"num_key_value_heads": None}), is_decoder=True, **NO_DROPOUT),
        "RobertaForCausalLM counts positions from its padding id on",
    ),
    "sinks": (transformers.GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4), "has attention sinks"),
    "chunked attention": (
        transformers.Llama4TextConfig(**SHAPE, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
        "has layers of chunked_attention, which carry what they saw past the mask",
    ),
    "recurrent layers": (transformers.RecurrentGemmaConfig(**SHAPE), "RecurrentGemmaForCausalLM has "),
    "convolutions": (
        transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
        "has layers of conv, which carry what they saw past the mask",
    ),
    "mamba": (transformers.MambaConfig(**HYBRID), NO_INTERFACE),
    "mamba beside attention": (transformers.FalconH1Config(**SHAPE), NO_INTERFACE),
    "mamba between attention": (transformers.JambaConfig(**SHAPE), NO_INTERFACE),
    "gated delta net": (transformers.Qwen3NextConfig(**SHAPE, head_dim=8, num_experts=4), NO_INTERFACE),
    "alibi": (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), NO_INTERFACE),
    "bidirectional": (
        transformers.Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True),
        "Gemma3Attention is not causal; a prefix can be shared in causal models only",
    ),
}


@pytest.mark.parametrize("what", ARCHITECTURES)
def test_an_architecture_that_sees_past_the_mask_is_refused(what):
    config, message = ARCHITECTURES[what]
    refuses(TypeError, message, built(config), CASES["groups"].tree)


def test_attention_sinks_are_refused_in_an_ordinary_batch_too():
    with pytest.raises(TypeError, match='sinks, which "flexpg" and sdpa have not; use attn_implementation="eager"'):
        built(ARCHITECTURES["sinks"][0])(input_ids=torch.tensor([[3, 4, 5]]))


def test_attention_to_chosen_keys_is_refused_in_an_ordinary_batch_too():
    config = transformers.DeepseekV32Config(
        **(SHAPE | {"num_key_value_heads": 4}),
        index_topk=4,
        index_n_heads=2,
        index_head_dim=8,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
    )
    with pytest.raises(TypeError, match='picks the keys it attends to, which "flexpg" does not'):
        built(config)(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]))


def encoder_decoder() -> nn.Module:
    text = {**SHAPE, "head_dim": 8, "sliding_window": WINDOW}
    config = transformers.T5GemmaConfig(encoder=text, decoder=text, vocab_size=VOCAB)
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=NAME)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=NAME)


def with_images() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SHAPE, "head_dim": 8}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=NAME)


def with_virtual_tokens() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(loaded("llama"), config)


def with_a_module_dropout() -> nn.Module:
    model = loaded("llama")
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, nn.Dropout(0.2))
    return model


def with_a_layer_that_hides_its_window() -> nn.Module:
    model = loaded("qwen2")
    model.model.layers[0].self_attn.sliding_window = None  # its layer_type still says "sliding_attention"
    return model


def with_a_layer_that_attends_by_itself() -> nn.Module:
    """As architectures do that call torch's attention themselves."""
    model = loaded("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (attention.o_proj(attention.q_proj(hidden_states)), None)
    return model


def with_a_position_bias() -> nn.Module:
    """Handed on to the attention interface, as T5's relatives do."""
    model = loaded("llama")
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_bias": torch.zeros(1)}), with_kwargs=True
    )
    return model


def with_a_convolution() -> nn.Module:
    model = loaded("llama")
    model.model.layers[0].mixer = nn.Conv1d(32, 32, 4)
    return model


def with_a_bidirectional_layer() -> nn.Module:
    model = loaded("llama")
    model.model.layers[1].self_attn.is_causal = False
    return model


REFUSED_MODELS = {
    "encoder-decoder": (encoder_decoder, TypeError, "is an encoder-decoder; a prefix can be shared in decoders only"),
    "t5": (t5, TypeError, NO_INTERFACE),
    "images": (with_images, TypeError, "reads more than text; a prefix can be shared in its language model only"),
    "prompt tuning": (with_virtual_tokens, ValueError, "the adapter (PROMPT_TUNING) adds virtual tokens"),
    "lora dropout": (lambda: with_lora(loaded("llama"), lora_dropout=0.1), ValueError, "has dropout 0.1"),
    "dropout": (with_a_module_dropout, ValueError, "model.layers.1.mlp.1 has dropout 0.2, which would differ per copy"),
    "attention dropout": (
        lambda: loaded("llama", attention_dropout=0.3),
        ValueError,
        "self_attn has attention_dropout=0.3, which would differ per copy of a prefix; load the model with",
    ),
    "a wrapper": (lambda: nn.DataParallel(loaded("llama")), TypeError, "model is of type DataParallel; give a"),
    "sdpa": (
        lambda: loaded("llama", "sdpa"),
        ValueError,
        'LlamaForCausalLM has attn_implementation="sdpa"; call register() of flexpg.integrations.transformers and '
        'model.set_attn_implementation("flexpg")',
    ),
    "hidden window": (
        with_a_layer_that_hides_its_window,
        TypeError,
        "Qwen2ForCausalLM has sliding_window=7 and 0 of its layers hand it on to the attention",
    ),
    "own attention": (with_a_layer_that_attends_by_itself, TypeError, "1 of the 2 layers of LlamaForCausalLM attend"),
    "position bias": (with_a_position_bias, TypeError, "LlamaAttention adds a position bias to its scores"),
    "a convolution": (with_a_convolution, TypeError, "has convolutions over the row (a state-space layer)"),
    "bidirectional layer": (with_a_bidirectional_layer, TypeError, "LlamaAttention is not causal"),
}


@pytest.mark.parametrize("what", REFUSED_MODELS)
def test_a_model_in_which_sharing_is_not_exact_is_refused(what):
    make, error, message = REFUSED_MODELS[what]
    refuses(error, message, make(), CASES["groups"].tree)


@pytest.mark.parametrize("what", ["lora dropout", "dropout", "attention dropout"])
def test_dropout_is_allowed_in_evaluation(what):
    model = REFUSED_MODELS[what][0]().eval()
    assert forward(model, CASES["groups"].tree).isfinite().all()


def test_another_trees_mask_is_refused_even_where_the_lengths_agree():
    other = block_mask(PrefixTree.from_sequences([[1, 2, 3]]))
    refuses(ValueError, "the mask was made for another tree", loaded("llama"), CASES["groups"].tree, other)


def test_a_model_without_an_output_layer_has_hidden_states_and_no_output():
    config = copy.deepcopy(CONFIGS["llama"])
    model = transformers.AutoModel.from_config(config, attn_implementation=NAME)
    assert forward(model, CASES["groups"].tree).shape == (1, len(CASES["groups"].tree), 32)
    with pytest.raises(TypeError, match="LlamaModel has no output layer; load it with AutoModelForCausalLM"):
        output(model)


# ---- exact, or refused in words: never in silence ------------------------------------------------------------------


# The first 24 positions are turned by the short factors, unless the sequence is longer: then all by the long ones.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 8.0]}
LONGROPE |= {"original_max_position_embeddings": 24, "rope_theta": 10000.0, "factor": 4.0}
NO_JITTER = {"input_jitter_noise": 0.0, "router_jitter_noise": 0.0}
GEMMA4 = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
FOUR_LAYERS = {**SHAPE, "num_hidden_layers": 4, "sliding_window": WINDOW}
FOUR_LAYERS |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
UNUSUAL = {
    "qwen2_moe, windows in the mask alone": transformers.Qwen2MoeConfig(
        **SHAPE, **ONE_OF_EACH, **EXPERTS, shared_expert_intermediate_size=16, use_sliding_window=True
    ),
    "phimoe, windows in the mask alone": transformers.PhimoeConfig(
        **SHAPE, **NO_JITTER, num_local_experts=4, sliding_window=WINDOW
    ),
    "mixtral, noise in training": transformers.MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5),
    "starcoder2, dropout without a module": transformers.Starcoder2Config(**SHAPE, residual_dropout=0.2),
    "phi3, rotation by the longest sequence": transformers.Phi3Config(
        **SHAPE, rope_parameters=LONGROPE, original_max_position_embeddings=24
    ),
    "llama, rotation by the longest sequence": transformers.LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 24}, rope_parameters=DYNAMIC
    ),
    "llama, yarn": transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "deepseek_v3, values narrower than keys": transformers.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
    ),
    "afmoe, views of the attention's output": transformers.AfmoeConfig(
        **SHAPE, **ONE_OF_EACH, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "gemma4, inputs of every layer": transformers.Gemma4TextConfig(**FOUR_LAYERS, **GEMMA4, num_kv_shared_layers=0),
    "opt, a decoder within its decoder": transformers.OPTConfig(vocab_size=VOCAB, **OPT, dropout=0.0),
}
UNUSUAL_BUT_REFUSED = {
    "qwen2_moe, windows in the mask alone": "Qwen2MoeForCausalLM has sliding_window=7 and 0 of its layers hand it on",
    "phimoe, windows in the mask alone": "PhimoeForCausalLM has sliding_window=7 and 0 of its layers hand it on",
    "mixtral, noise in training": "the forward of MixtralForCausalLM drew random numbers",
    "starcoder2, dropout without a module": "the forward of Starcoder2ForCausalLM drew random numbers",
    "phi3, rotation by the longest sequence": "rotary scaling 'longrope' turns all tokens of a row by",
    "llama, rotation by the longest sequence": "rotary scaling 'dynamic' turns all tokens of a row by",
    "opt, a decoder within its decoder": "the forward of OPTForCausalLM ",
}


@pytest.mark.parametrize("what", sorted(UNUSUAL.keys() - UNUSUAL_BUT_REFUSED.keys()))
def test_an_unusual_model_is_exact(what):
    model, ordinary = built(UNUSUAL[what]), built(UNUSUAL[what], "sdpa")
    assert_equal_to_unshared(model, ordinary, CASES["groups"], logprob_error=5e-6, gradient_error=2e-5)


@pytest.mark.parametrize("what", UNUSUAL_BUT_REFUSED)
def test_what_would_be_inexact_in_an_unusual_model_is_refused(what):
    with pytest.raises((TypeError, ValueError), match=re.escape(UNUSUAL_BUT_REFUSED[what])):
        shared_logprobs(built(UNUSUAL[what]), CASES["groups"])


def test_layers_with_the_keys_of_others_are_exact_or_refused():
    """transformers 5.17 runs them whole; 5.23 cuts the mask for them."""
    config = transformers.Gemma4TextConfig(**FOUR_LAYERS, **GEMMA4, num_kv_shared_layers=2)
    try:
        logprobs = shared_logprobs(built(config), CASES["groups"])
    except TypeError as error:
        assert "got a BlockMask that is no TreeBlockMask" in str(error)
    else:
        assert (logprobs - baseline_logprobs(built(config, "sdpa"), CASES["groups"])).abs().max() < 5e-6


@pytest.mark.parametrize(
    "config",
    [
        transformers.Phi3Config(
            **SHAPE,
            rope_parameters=LONGROPE | {"original_max_position_embeddings": 64},
            original_max_position_embeddings=64,
        ),
        transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 64}, rope_parameters=DYNAMIC),
    ],
    ids=["longrope", "dynamic"],
)
def test_a_rotation_by_the_longest_sequence_is_exact_up_to_the_models_original_length(config):
    case = CASES["groups"]
    assert case.tree.num_tokens > 64 > case.tree.max_length  # the packed row may be longer
    assert_equal_to_unshared(built(config), built(config, "sdpa"), case, logprob_error=5e-6, gradient_error=3e-6)
