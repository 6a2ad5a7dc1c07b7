"""Recurrent layers follow the prefix tree: outputs and gradients equal those of each sequence on its own."""

from __future__ import annotations

import copy
import pickle
import types
from collections import Counter

import accelerate
import hf_models as hf
import pytest
import torch
import transformers
from baseline import relative_error
from cases import VOCAB, Case, three_levels, tokens
from float64 import float32_is_float64
from torch import nn

import flexpg
from flexpg import PrefixTree, Rollouts, packed_logprobs, self_check
from flexpg.integrations import transformers as integration
from flexpg.integrations.transformers import recurrent, register
from flexpg.integrations.transformers.attention import NAME
from flexpg.integrations.transformers.segment_plan import plan_segments
from flexpg.masks import TreeBlockMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FLOAT64 = {"_experts_implementation": "eager"}  # torch's grouped product has no float64


def branches() -> Case:
    """Build a tree with a branch in every place that matters for a state.

    Segments of one token with and without children, two of them in a row, a completion of one token, roots of one
    token, inner segments of equal and of different lengths, a completion that begins another, segments shorter than a
    convolution, and chunks (of 64 and 16 tokens) that start elsewhere than in each sequence on its own.
    """
    prompt, other = tokens(70, 1), tokens(20, 2)
    fork = prompt + tokens(3, 3)
    sequences = [
        prompt + tokens(9, 4),
        [*prompt, 7],
        fork + tokens(17, 5),
        [*fork, 9, *tokens(5, 6)],
        [*fork, 9, *tokens(2, 7)],
        [*fork, 11, 12, *tokens(4, 8)],
        [*fork, 11, 13],
        [*fork, 11, 13, 4, 5],
        prompt + tokens(2, 9),
        [*other, 1, *tokens(30, 10)],
        [*other, 2, *tokens(3, 11)],
        [5, *tokens(6, 12)],
        [5, 6, 7],
        [8, 9],
    ]
    return Case.from_sequences(sequences, [1] * len(sequences))


def weighted_loss(table: list[torch.Tensor]) -> torch.Tensor:
    """Weigh every token differently, so that swapped tokens show."""
    weights = torch.Generator().manual_seed(1)
    return sum((out * torch.randn(out.shape, generator=weights, dtype=torch.float64).to(out)).sum() for out in table)


def packed_table(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """Return the log-probabilities of each sequence's tokens but the first, from one packed forward."""
    hidden, output = integration.forward(model, case.tree), integration.output(model)
    table = []
    for n, sequence in enumerate(case.sequences):
        logits = output(hidden[0, case.tree.node[n, : len(sequence) - 1]])
        table.append(logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0])
    return table


def baseline_table(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """Return the same from one forward of each sequence."""
    table = []
    for sequence in case.sequences:
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, :-1]
        table.append(logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0])
    return table


def gradients(model: nn.Module, table: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weighted_loss(table).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module, baseline: nn.Module, case: Case, logprobs: float, grads: float) -> None:
    table, expected = packed_table(model, case), baseline_table(baseline, case)
    assert max((out - other).abs().max().item() for out, other in zip(table, expected, strict=True)) < logprobs
    found, wanted = gradients(model, table), gradients(baseline, expected)
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=errors.get)
    assert errors[worst] < grads, (worst, errors[worst])


# Every family.


@pytest.mark.parametrize("name", hf.HYBRIDS)
def test_packed_forward_and_gradients_equal_each_sequence_float64(name):
    with float32_is_float64():
        model, baseline = (hf.tiny_model(name, **FLOAT64).double() for _ in range(2))
        # MiniMax's tables of decays are float32 in every model: its blocks of tokens and its steps differ by that.
        tolerances = (1e-7, 1e-6) if name == "minimax" else (1e-10, 1e-9)
        assert_equal(flexpg.enable(model), baseline, branches(), *tolerances)


def test_text_of_a_composite_model_with_recurrent_layers_equals_each_sequence():
    config = transformers.Qwen3_5Config(
        text_config=hf.TEXT | hf.DELTA | hf.HALF,
        vision_config={**hf.QWEN_TOWER, "hidden_size": 16, "out_hidden_size": 32},
        **hf.QWEN_IDS,
    )
    with float32_is_float64():
        model, baseline = (hf.model_from_config(config).double() for _ in range(2))
        assert_equal(flexpg.enable(model), baseline, branches(), 1e-10, 1e-9)
        rollouts = group_rollouts()
        (table, found), (expected_table, expected) = (update(model, rollouts, size) for size in (56, 1000))
    assert (table - expected_table).abs().max() < 1e-10
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-9


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2"])
def test_float32_is_as_exact_as_other_chunks_of_the_same_sequence(name):
    """A state restarts its chunks at segments, which rounds as differently as left padding by a token does."""
    case = branches()
    model, baseline = flexpg.enable(hf.tiny_model(name)), hf.tiny_model(name)
    with float32_is_float64():
        truth = baseline_table(hf.tiny_model(name, **FLOAT64).double(), case)
    table, expected = packed_table(model, case), baseline_table(baseline, case)
    error, budget = (
        max((some - exact).abs().max().item() for some, exact in zip(found, truth, strict=True))
        for found in (table, expected)
    )
    assert error < 3 * budget + 1e-5


def test_three_levels_and_padding_equal_each_sequence():
    with float32_is_float64():
        model, baseline = (hf.tiny_model("qwen3_5", **FLOAT64).double() for _ in range(2))
        assert_equal(flexpg.enable(model), baseline, three_levels(), 1e-10, 1e-9)


def test_isolation_changing_a_completion_leaves_others_bitwise_equal():
    """Rows of a batch do not mix, so bitwise equality holds as long as shapes do."""
    prompt = tokens(30, 1)
    for name in ("qwen3_5", "bamba", "lfm2"):
        model = flexpg.enable(hf.tiny_model(name))
        first, second = (
            integration.forward(model, PrefixTree.from_groups([prompt], [[tokens(9, 2), tokens(9, seed)]]))
            for seed in (3, 4)
        )
        assert torch.equal(first[0, :39], second[0, :39]) and not torch.equal(first[0, 39:48], second[0, 39:48])


# How often a layer is called.


def calls_of(model: nn.Module, tree: PrefixTree) -> list[tuple[int, int]]:
    """Return the shapes [B, L] with which the first recurrent layer calls its own forward."""
    shapes = []
    module = next(recurrent.recurrent_modules(model))
    linear = next(part for part in module.modules() if isinstance(part, nn.Linear))
    handle = linear.register_forward_hook(lambda layer, args, out: shapes.append(tuple(args[0].shape[:2])))
    integration.forward(model, tree)
    handle.remove()
    return shapes


def test_group_is_one_call_for_the_prompt_and_one_for_completions():
    model = flexpg.enable(hf.tiny_model("qwen3_5"))
    tree = PrefixTree.from_groups([tokens(30, 1)], [[tokens(n, n) for n in (9, 4, 1, 12)]])
    calls_of(model, tree)  # the first forward of a kind of layer checks that it continues from its state
    assert calls_of(model, tree) == [(1, 30), (4, 12)]
    two = PrefixTree.from_groups([tokens(30, 1), tokens(30, 2)], [[tokens(9, 3), tokens(2, 4)], [tokens(5, 5)]])
    assert calls_of(model, two)[-1][0] in (2, 3)


def test_plan_covers_every_token_once():
    case = branches()
    mask = TreeBlockMask(case.tree)
    plan = plan_segments(mask, case.tree.num_tokens)
    seen = Counter(torch.cat([step.index.flatten() for step in plan.steps]).tolist())
    assert set(seen) == set(range(case.tree.num_tokens))
    flat = torch.cat([step.index.flatten() for step in plan.steps])
    assert torch.equal(flat[plan.gather], torch.arange(case.tree.num_tokens))
    for step in plan.steps:
        assert step.parents is None or step.index.shape[1] >= 2  # no kernel for one token


# Oversized groups, checkpointing, adapters, precision.


def group_rollouts() -> Rollouts:
    completions = [[tokens(n, n) for n in (9, 1, 14, 6, 2)], [tokens(3, 30), tokens(7, 31)]]
    return Rollouts.from_groups([tokens(40, 1), tokens(25, 2)], completions, [[1.0, 0, 0, 1, 0], [0, 1.0]])


def update(model: nn.Module, rollouts: Rollouts, max_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    advantages = flexpg.group_advantages(rollouts)
    table = torch.zeros(rollouts.loss_mask.shape, dtype=torch.float64)
    model.zero_grad()
    for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens):
        flexpg.grpo_loss(
            logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens
        ).backward()
        table[batch.indices, : logprobs.shape[1]] = logprobs.detach().double()
    return table, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "lfm2", "mamba2"])
def test_oversized_group_equals_one_packed_sequence(name, checkpointing):
    rollouts = group_rollouts()
    with float32_is_float64():
        model = flexpg.enable(hf.tiny_model(name, **FLOAT64).double())
        expected_table, expected = update(model, rollouts, 1000)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert any(batch.cached_tokens for batch in flexpg.pack(rollouts, 56))
        table, found = update(model, rollouts, 56)
    assert (table - expected_table).abs().max() < 1e-10
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-9


def test_prompt_of_one_token_can_be_cached():
    rollouts = Rollouts.from_groups([[3]], [[tokens(9, 1), tokens(8, 2), tokens(9, 3)]], [[0.0, 1.0, 0.0]])
    with float32_is_float64():
        model = flexpg.enable(hf.tiny_model("qwen3_5", **FLOAT64).double())
        (table, found), (expected_table, expected) = (update(model, rollouts, size) for size in (10, 1000))
    assert (table - expected_table).abs().max() < 1e-10
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-9


def test_cached_prompt_of_whole_blocks_equals_one_packed_sequence():
    """Without padding after the prompt, what all completions begin with continues its segment."""
    start = tokens(5, 1)
    completions = [[*start, *tokens(n, n)] for n in (40, 30, 20)]
    rollouts = Rollouts.from_groups([tokens(256, 2)], [completions], [[0.0, 1.0, 0.0]])
    assert [len(batch.indices) for batch in flexpg.pack(rollouts, 321)] == [1, 2]
    with float32_is_float64():
        model = flexpg.enable(hf.tiny_model("mamba2", **FLOAT64).double())
        (table, found), (expected_table, expected) = (update(model, rollouts, size) for size in (321, 1000))
    assert (table - expected_table).abs().max() < 1e-10
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-9


def test_gradient_checkpointing_equals_stored_activations():
    with float32_is_float64():
        for name in ("qwen3_5", "mamba2"):
            model, baseline = (hf.tiny_model(name, **FLOAT64).double() for _ in range(2))
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert_equal(flexpg.enable(model), baseline, three_levels(), 1e-10, 1e-9)


def test_lora_on_recurrent_layers_equals_baseline():
    targets = {"target_modules": ["in_proj_qkv", "out_proj", "q_proj"]}
    with float32_is_float64():
        model, baseline = (hf.with_lora(hf.tiny_model("qwen3_5", **FLOAT64).double(), **targets) for _ in range(2))
        assert_equal(flexpg.enable(model), baseline, three_levels(), 1e-10, 1e-9)


def test_autocast_of_a_recurrent_model_within_error_budget():
    rollouts = group_rollouts()
    model, baseline = hf.model_pair("qwen3_5")
    exact, _ = update(model, rollouts, 1000)
    table = torch.zeros_like(exact)
    for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=56, autocast_dtype=torch.bfloat16):
        table[batch.indices, : logprobs.shape[1]] = logprobs.detach().double()
        logprobs.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        lens = rollouts.prompt_lens.tolist()
        rounded = hf.baseline_logprobs(baseline, [row.tolist() for row in rollouts.sequences], lens).detach().double()
    assert (table - exact).norm() <= 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2"])
def test_self_check_passes_a_recurrent_model(name):
    result = self_check(flexpg.enable(hf.tiny_model(name)), group_rollouts())
    assert 0 < result.logprob_error < result.logprob_budget


# What does not change, and what is refused.


@pytest.mark.parametrize("is_enabled_before", [False, True])
def test_accelerate_device_hooks_on_recurrent_layers_equal_baseline(is_enabled_before):
    """`device_map` puts such hooks on the layers and on parts of them; here one counts its calls."""
    calls = []

    class CountingHook(accelerate.hooks.AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return super().pre_forward(module, *args, **kwargs)

    with float32_is_float64():
        model, baseline = (hf.tiny_model("qwen3_5", **FLOAT64).double().eval() for _ in range(2))
        if is_enabled_before:
            flexpg.enable(model)
        recurrent_layers = list(recurrent.recurrent_modules(model))
        for module in (*model.model.layers, *recurrent_layers):
            accelerate.hooks.add_hook_to_module(module, CountingHook("cpu", io_same_device=True))
        assert_equal(flexpg.enable(model), baseline, branches(), 1e-10, 1e-9)
        assert set(recurrent_layers) < set(calls)
        calls.clear()
        ids = torch.tensor([tokens(20, 1)])
        assert torch.equal(model(ids).logits, baseline(ids).logits)
        assert Counter(calls) == Counter([*model.model.layers, *recurrent_layers])
        params = flexpg.SamplingParams(max_new_tokens=4)
        samples, expected = (flexpg.sample(each, [tokens(9, 1)], 2, params, seed=1) for each in (model, baseline))
    assert torch.equal(samples.logprobs, expected.logprobs)


def test_forward_that_replaces_that_of_a_recurrent_layer_is_kept():
    model, ids = hf.tiny_model("qwen3_5").eval(), torch.tensor([tokens(20, 1)])
    module = next(recurrent.recurrent_modules(model))
    module.forward = types.MethodType(
        lambda self, *args, **kwargs: 2 * type(self).forward(self, *args, **kwargs), module
    )
    expected = model(ids).logits
    flexpg.enable(model)
    assert torch.equal(model(ids).logits, expected)
    hidden = integration.forward(model, PrefixTree.from_groups([ids[0].tolist()], [[[3], [4]]]))
    assert torch.allclose(integration.output(model)(hidden[0, :20]), expected[0], atol=1e-5)


def test_ordinary_calls_of_a_recurrent_model_are_bitwise_identical():
    ids = torch.tensor([tokens(20, 1), tokens(20, 2)])
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    for name in ("qwen3_5", "bamba", "lfm2"):
        model, baseline = (each.eval() for each in hf.model_pair(name))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, baseline(ids).logits)
            assert torch.equal(model(ids, attention_mask=padding).logits, baseline(ids, attention_mask=padding).logits)
            found, expected = (each.generate(ids[:1], max_new_tokens=5, do_sample=False) for each in (model, baseline))
        assert torch.equal(found, expected)


def test_compiled_recurrent_layer_raises_and_attention_compiles():
    model, tree = flexpg.enable(hf.tiny_model("qwen3_5")), three_levels().tree
    expected = integration.forward(model, tree)
    of_kind = dict(zip(model.config.layer_types, model.model.layers, strict=True))
    of_kind["full_attention"].compile(backend="eager")
    found = integration.forward(model, tree)[:, : tree.num_tokens]  # padding is left out without compiled layers
    assert torch.equal(found, expected[:, : tree.num_tokens])

    def compiler(*_):
        raise AssertionError("compiled")

    of_kind["linear_attention"].compile(backend=compiler)
    with pytest.raises(TypeError, match=r"layers\.\d+ of Qwen3_5ForCausalLM is compiled and has a recurrent layer"):
        integration.forward(model, tree)


def test_recurrent_model_that_is_not_enabled_raises():
    register()
    model = hf.model_from_config(hf.HYBRIDS["qwen3_5"], attn_implementation=NAME)
    with pytest.raises(ValueError, match=r"do not follow a packed sequence yet; call flexpg\.enable\(model\) first"):
        integration.forward(model, three_levels().tree)


def test_copied_recurrent_model_uses_its_own_weights():
    model = flexpg.enable(hf.tiny_model("qwen3_5"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    tree = three_levels().tree
    unchanged, changed = (integration.forward(each, tree) for each in (model, other))
    assert not torch.equal(unchanged, changed)
    assert torch.equal(integration.forward(pickle.loads(pickle.dumps(other)), tree), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.MambaConfig(**hf.SHAPE, state_size=8), "MambaMixer ignores its recurrent state"),
        (
            transformers.JambaConfig(
                **hf.SHAPE, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8
            ),
            "JambaMambaMixer ignores its recurrent state if it is called with several tokens",
        ),
        (transformers.RecurrentGemmaConfig(**hf.SHAPE), "has linear_attention layers"),
    ],
    ids=["mamba", "jamba", "recurrent_gemma"],
)
def test_recurrent_layer_that_cannot_continue_is_refused(config, words, dtype):
    model = hf.model_from_config(config).to(dtype)
    with pytest.raises(TypeError, match=words):
        integration.forward(flexpg.enable(model), three_levels().tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recurrent_layer_that_misreads_its_state_is_refused(dtype, monkeypatch):
    monkeypatch.setattr(recurrent, "_checked", set())
    read = recurrent.SegmentStates.get_recurrent_state

    def reversed_heads(states, layer_idx, state_idx=0):
        state = read(states, layer_idx, state_idx)
        return None if state is None else state.flip(1)

    monkeypatch.setattr(recurrent.SegmentStates, "get_recurrent_state", reversed_heads)
    model = flexpg.enable(hf.tiny_model("qwen3_5").to(dtype))
    with pytest.raises(TypeError, match="does not continue from its state over several tokens"):
        integration.forward(model, three_levels().tree)


def test_token_ids_of_the_cases_fit_the_models():
    assert max(max(sequence) for sequence in branches().sequences) < VOCAB
