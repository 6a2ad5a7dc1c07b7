"""Tests of whole transformers models: packed sequences equal the baseline, and ordinary calls do not change.

test_matrix.py compares every family with the baseline, over all kinds of trees.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import accelerate
import hf_models as hf
import peft
import pytest
import torch
import transformers
from baseline import relative_error
from cases import VOCAB, Case, float32_floor, gradients, largest_error, three_levels, tokens
from hf_models import FLOAT64_EXPERTS, ONE_OF_EACH, SHAPE, WINDOW, in_float64, model_from_config, model_pair, with_lora
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flexpg
from flexpg import Rollouts, packed_logprobs
from flexpg.integrations import integration_for
from flexpg.integrations.transformers import attention as flexpg_attention
from flexpg.integrations.transformers import forward, output, register
from flexpg.integrations.transformers.attention import NAME
from flexpg.integrations.transformers.composite import backbone
from flexpg.logprobs import token_logprobs

GROUPS = Case.from_groups(
    [tokens(20, 11), tokens(1, 12), tokens(31, 13)],
    [[tokens(5, 14), tokens(9, 15), tokens(1, 16)], [tokens(8, 17), tokens(4, 18)], [tokens(12, 19)]],
)


def shared_logprobs(model: nn.Module, case: Case) -> Tensor:
    hidden = forward(model, case.tree)
    return token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))


def baseline_logprobs(model: nn.Module, case: Case) -> Tensor:
    return hf.baseline_logprobs(model, case.sequences, case.prompt_lens)


def results(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    return {"logprobs": logprobs.detach()} | gradients(model, logprobs)


def assert_equals_baseline(model: nn.Module, baseline: nn.Module, case: Case, tolerance: float = 1e-12) -> None:
    """Compare log-probabilities and every gradient of float64 models."""
    expected = results(baseline, baseline_logprobs(baseline, case))
    assert largest_error(results(model, shared_logprobs(model, case)), expected) < tolerance


# Equality.


@pytest.mark.parametrize("name", hf.CONFIGS)
def test_float64_model_is_the_same_model(name):
    batch = torch.tensor([tokens(25, 1)])
    expected = hf.tiny_model(name)(input_ids=batch).logits
    logits = in_float64(hf.tiny_model(name, **FLOAT64_EXPERTS))(input_ids=batch).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt_oss", "llama4"])
def test_gradient_checkpointing_gradients_are_bitwise_identical(name, use_reentrant):
    model, case = flexpg.enable(hf.tiny_model(name)), three_levels()
    expected = results(model, shared_logprobs(model, case))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing needs an input that requires grad
    calls = []
    backbone(model).layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    values = results(model, shared_logprobs(model, case))
    assert len(calls) == 2  # once more in the backward
    assert all(map(torch.equal, values.values(), expected.values()))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "lora_sliding_window": ("gemma3", {}),
    "lora_frozen_sinks": ("gpt_oss", {}),
    "dora": ("llama", {"use_dora": True}),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": r".*\.(q|up|down)_proj",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.0.mlp.up_proj": 3},
            "use_rslora": True,
            "lora_bias": True,
        },
    ),
    "experts": (
        "gpt_oss",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "trainable_tokens": ("llama", {"trainable_token_indices": [3, 5, 8]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "layer_replication": ("llama", {"layer_replication": [[0, 2], [0, 2]]}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_adapter_equals_baseline(kind, checkpointing):
    name, options = ADAPTERS[kind]
    model, baseline = (in_float64(with_lora(hf.tiny_model(name, **FLOAT64_EXPERTS), **options)) for _ in range(2))
    flexpg.enable(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equals_baseline(model, baseline, GROUPS)


def test_accelerate_device_hooks_equal_baseline():
    """`device_map` puts such hooks on every layer of a model that it spreads over devices."""
    model, baseline = map(in_float64, model_pair("mistral"))
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert_equals_baseline(model, baseline, GROUPS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "granite_swa"])
def test_bfloat16_within_error_budget(name, device):
    case = three_levels()
    case = replace(case, tree=case.tree.to(device))
    changes = {"head_dim": 16}  # FlexAttention's kernels take no less
    model, baseline = (each.bfloat16().to(device) for each in model_pair(name, **changes))
    exact = in_float64(hf.tiny_model(name, **changes).bfloat16()).to(device)
    truth, expected = baseline_logprobs(exact, case), baseline_logprobs(baseline, case)
    shared = shared_logprobs(model, case)
    assert shared.dtype == torch.float32
    assert relative_error(shared, truth) < 1.5 * relative_error(expected, truth)
    # All parameters together: the error of one bias of 16 rounded numbers varies by a factor of 1.8 by chance.
    true_gradient, value, other = (
        torch.cat([gradient.double().flatten() for gradient in gradients(*each).values()])
        for each in ((exact, truth), (model, shared), (baseline, expected))
    )
    assert relative_error(value, true_gradient) < 1.5 * relative_error(other, true_gradient)


# An oversized group, whose prompt is encoded once for several micro-batches.

OVERSIZED = Rollouts.from_groups([tokens(30, 59)], [[tokens(4 + n, 60 + n) for n in range(8)]], [[0.0] * 8])


def oversized_results(model: nn.Module) -> dict[str, Tensor]:
    """Return log-probabilities and gradients of the loop over micro-batches, at a temperature."""
    weights = torch.randn(OVERSIZED.loss_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, seen = torch.zeros_like(weights), 0
    model.zero_grad()
    for batch, logprobs in packed_logprobs(model, OVERSIZED, max_tokens=70, temperature=0.7):
        (weights[batch.indices, : logprobs.shape[1]] * logprobs).sum().backward()
        found[batch.indices, : logprobs.shape[1]] = logprobs.detach().double()
        seen += 1
    assert seen > 1
    return {"logprobs": found} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt_oss", "llama4"])
def test_oversized_group_at_temperature_equals_baseline(name, checkpointing):
    model, baseline = map(in_float64, model_pair(name, **FLOAT64_EXPERTS))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = []
    for sequence in OVERSIZED.sequences:
        scores = (baseline(input_ids=sequence[None]).logits[0] / 0.7).log_softmax(-1)
        rows.append(scores[29:-1].gather(-1, sequence[30:, None])[:, 0])
    expected = results(baseline, nn.utils.rnn.pad_sequence(rows, batch_first=True))
    tolerance = float32_floor() if name == "llama4" else 1e-12  # llama4's RoPE and router compute in float32
    assert largest_error(oversized_results(model), expected) < tolerance


def test_oversized_group_with_reentrant_checkpointing_raises():
    model = flexpg.enable(hf.tiny_model("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="activation checkpointing with use_reentrant=False"):
        oversized_results(model)


# Ordinary calls.


def batch(padding: str) -> dict[str, Tensor]:
    """Four rows of unequal lengths, most longer than the window, padded on one side; two contain the padding id."""
    rows = [tokens(length, 30 + length) for length in (12, 5, 9, 1)]
    rows[0][3] = rows[2][5] = SHAPE["pad_token_id"]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 0, padding)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0, padding)
    return {"input_ids": ids, "attention_mask": mask}


def without_mask(model: nn.Module) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokens(15, 1), tokens(15, 2)])).logits]


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = batch("right")
    model.zero_grad()
    out = model(**ids, labels=ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100))
    out.loss.backward()
    return [out.loss, out.logits, *(parameter.grad for parameter in model.parameters())]


def continued(model: nn.Module) -> list[Tensor]:
    """Prefill ten tokens, then three at once and one more, with the KV cache."""
    ids = torch.tensor([tokens(14, 3), tokens(14, 4)])
    outs = [model(input_ids=ids[:, :10], use_cache=True)]
    for start, stop in ((10, 13), (13, 14)):
        outs.append(model(input_ids=ids[:, start:stop], past_key_values=outs[-1].past_key_values, use_cache=True))
    return [out.logits for out in outs]


def packed_documents(model: nn.Module) -> list[Tensor]:
    """Run transformers' own packed sequences: without a mask, positions that start again begin another document."""
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    return [model(input_ids=torch.tensor([tokens(20, 5)]), position_ids=positions, use_cache=False).logits]


def generated(model: nn.Module, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    length = {"min_new_tokens": 10, "max_new_tokens": 10, "pad_token_id": 0}
    return [model.eval().generate(**batch("left"), **options, **length)]


SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0}
CALLS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "right_padded": lambda model: [model(**batch("right")).logits],
    "left_padded": lambda model: [model(**batch("left")).logits],
    "without_mask": without_mask,
    "loss_and_gradients": loss_and_gradients,
    "kv_cache": continued,
    "packed_documents": packed_documents,
    "greedy": lambda model: generated(model, do_sample=False),
    "greedy_static_cache": lambda model: generated(model, do_sample=False, cache_implementation="static"),
    "sampled": lambda model: generated(model, **SAMPLING),
    "sampled_static_cache": lambda model: generated(model, **SAMPLING, cache_implementation="static"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_oss", "granite_swa", "mimo_v2_flash", "llama4"]
)
def test_enable_leaves_ordinary_calls_bitwise_identical(name, call):
    model, baseline = model_pair(name)
    shared_logprobs(model, GROUPS).sum().backward()
    assert all(map(torch.equal, CALLS[call](model), CALLS[call](baseline)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_enable_leaves_attention_dropout_of_ordinary_batches(name):
    logits = []
    for model in (flexpg.enable(hf.tiny_model(name).eval()), hf.tiny_model(name)):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        torch.manual_seed(7)
        logits.append(model.train()(**batch("right")).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], hf.tiny_model(name)(**batch("right")).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_enabled_model_compiles_ordinary_batches_into_one_graph(name):
    model = flexpg.enable(hf.tiny_model(name).eval())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    ids = {"input_ids": torch.tensor([tokens(15, 1)]), "use_cache": False}
    assert torch.equal(compiled(**ids).logits, model(**ids).logits)


# The output layer.


@pytest.mark.parametrize("name", hf.CONFIGS)
def test_output_gives_the_logits_of_the_model(name):
    model, ids = flexpg.enable(hf.tiny_model(name)), torch.tensor([tokens(15, 1)])
    expected = model(input_ids=ids).logits[0]
    hidden = backbone(model)(input_ids=ids).last_hidden_state[0]
    assert torch.equal(output(model)(hidden), expected)
    assert torch.equal(model(input_ids=ids).logits[0], expected)


def test_ordinary_call_in_a_thread_during_the_output_layer_is_unchanged():
    model, ids = flexpg.enable(hf.tiny_model("llama").eval()), torch.tensor([tokens(15, 1)])
    expected, found = model(input_ids=ids).logits, []

    def call_in_thread(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(model(input_ids=ids).logits))
        thread.start()
        thread.join()

    handle = model.lm_head.register_forward_pre_hook(call_in_thread)
    output(model)(torch.zeros(3, 32))
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_hooks_on_the_decoder_equal_baseline(name):
    """They run once, on the packed sequence, and not again on its rows in the output layer."""
    opt = transformers.OPTConfig(vocab_size=VOCAB, **OPT, dropout=0.0, enable_bias=False)
    config = opt if name == "opt" else hf.CONFIGS[name]
    model, baseline = float64_pair(copy.deepcopy(config))

    def scale(module: nn.Module, args: tuple, out: Any) -> Any:
        out.last_hidden_state = 1.5 * out.last_hidden_state
        return out

    for each in (model.eval(), baseline.eval()):
        each.get_decoder().register_forward_hook(scale)
    assert_equals_baseline(model, baseline, GROUPS, tolerance=float32_floor(2))


@pytest.mark.parametrize("register_hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_on_the_whole_model_is_refused(register_hook):
    model = flexpg.enable(hf.tiny_model("llama"))
    getattr(model, register_hook)(lambda module, *_: None)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM must have no forward hooks, .* or on the output layer"):
        output(model)


def with_doubled_logits(model: nn.Module) -> None:
    """Replace a model's forward by a method, as liger-kernel does."""

    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = type(self).forward(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = types.MethodType(doubled, model)


def with_device_hook(model: nn.Module) -> None:
    with_doubled_logits(model)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))


def with_compiled_forward(model: nn.Module) -> None:
    with_doubled_logits(model)
    model.forward = torch.compile(model.forward, backend="eager")


def with_closure(model: nn.Module) -> None:
    """Replace a model's forward by a function around a function that calls the original one."""
    with_doubled_logits(model)
    original = model.forward

    def inner(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if args or kwargs else inner(model)

    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


@pytest.mark.parametrize(
    "replace_forward", [with_doubled_logits, with_device_hook, with_compiled_forward, with_closure]
)
def test_output_calls_a_forward_that_another_library_installed(replace_forward):
    model, ids = flexpg.enable(hf.tiny_model("llama")), torch.tensor([tokens(15, 1)])
    hidden, plain = model.model(input_ids=ids).last_hidden_state[0], model(input_ids=ids).logits[0]
    replace_forward(model)
    replaced = vars(model)["forward"]
    assert torch.equal(output(model)(hidden), 2 * plain)
    assert torch.equal(model(input_ids=ids).logits[0], 2 * plain) and vars(model)["forward"] is replaced


def test_output_keeps_a_decoder_forward_that_another_library_installed():
    model, ids = flexpg.enable(hf.tiny_model("llama")), torch.tensor([tokens(15, 1)])
    decoder, calls = model.base_model, []
    original = decoder.forward

    def counted(*args, **kwargs):  # as accelerate's hooks do
        calls.append(1)
        return original(*args, **kwargs)

    decoder.forward = counted
    expected = model(input_ids=ids).logits[0]
    assert torch.equal(output(model)(decoder(input_ids=ids).last_hidden_state[0]), expected)
    assert decoder.forward is counted and len(calls) == 2


def test_model_without_output_layer_has_hidden_states_only():
    model = flexpg.enable(transformers.AutoModel.from_config(copy.deepcopy(hf.CONFIGS["llama"])))
    assert forward(model, GROUPS.tree).shape == (1, GROUPS.tree.padded_length, 32)
    with pytest.raises(TypeError, match="LlamaModel has no output layer; load it with AutoModelForCausalLM"):
        output(model)


# enable, loading and saving.


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_enable_twice_and_set_back_changes_nothing(name):
    model = hf.tiny_model(name)
    usual, before = model.config._attn_implementation, model(**batch("left")).logits
    assert flexpg.enable(model) is model
    expected = shared_logprobs(model, GROUPS)
    assert torch.equal(shared_logprobs(flexpg.enable(model), GROUPS), expected)
    model.set_attn_implementation(usual)
    assert torch.equal(model(**batch("left")).logits, before)
    with pytest.raises(ValueError, match=rf'attn_implementation="{usual}"; call flexpg.enable\(model\) first'):
        forward(model, GROUPS.tree)


def test_enable_peft_model_enables_its_base_model():
    model = with_lora(hf.tiny_model("llama"))
    assert flexpg.enable(flexpg.enable(model)) is model
    assert model.get_base_model().config._attn_implementation == NAME


def test_saved_checkpoint_does_not_name_flexpg(tmp_path):
    model = flexpg.enable(hf.tiny_model("qwen2"))
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(without_mask(loaded)[0], without_mask(model)[0])
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert torch.equal(shared_logprobs(again, GROUPS), shared_logprobs(model, GROUPS))


def test_import_registers_nothing(monkeypatch):
    interfaces = AttentionInterface, AttentionMaskInterface
    register()
    for interface in interfaces:
        monkeypatch.delitem(interface._global_mapping, NAME)
    spec = importlib.util.spec_from_file_location("imported_again", flexpg_attention.__file__)
    imported_again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, imported_again)
    spec.loader.exec_module(imported_again)
    assert not any(NAME in interface().valid_keys() for interface in interfaces)
    imported_again.register()
    assert all(NAME in interface().valid_keys() for interface in interfaces)


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {"ddp": DistributedDataParallel, "data_parallel": nn.DataParallel, "compiled": torch.compile}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_model_is_refused_with_advice(wrapper, process_group):
    model = WRAPPERS[wrapper](flexpg.enable(hf.tiny_model("llama")))
    for call in (integration_for, flexpg.enable):
        with pytest.raises(TypeError, match=r"without torch\.compile or DistributedDataParallel around it"):
            call(model)


# Refused models.


def share(model: nn.Module) -> Tensor:
    return forward(flexpg.enable(model), GROUPS.tree)


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HYBRID = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": VOCAB}
STATE = "layers, whose state passes from one completion to the next regardless of the mask; train it without flexpg"
NO_INTERFACE = "computes attention in its own way instead of by transformers' attention interface, so it would ignore"
GPT = {"vocab_size": VOCAB, "hidden_size": 32}
ARCHITECTURES = {
    "position_offset": (
        transformers.RobertaConfig(**(SHAPE | {"num_key_value_heads": None}), is_decoder=True, **NO_DROPOUT),
        "RobertaForCausalLM counts positions from its padding id on",
    ),
    "compressed_keys_next_to_sinks": (
        transformers.DeepseekV4Config(**SHAPE, layer_types=["heavily_compressed_attention", "sliding_attention"]),
        "has heavily_compressed_attention layers, which choose the keys that a token attends to by scores",
    ),
    "recurrent": (
        transformers.RecurrentGemmaConfig(**SHAPE),
        STATE,
    ),
    "rwkv": (transformers.RwkvConfig(**HYBRID), f"RwkvForCausalLM has recurrent {STATE}"),
    "alibi": (transformers.BloomConfig(**GPT, n_layer=2, n_head=4), NO_INTERFACE),
    "falcon": (transformers.FalconConfig(**GPT, num_hidden_layers=2, num_attention_heads=4), NO_INTERFACE),
    "gpt_neo": (
        transformers.GPTNeoConfig(**GPT, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        NO_INTERFACE,
    ),
    "without_position_ids": (
        transformers.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4),
        "BartForCausalLM takes no position_ids, so it would count packed tokens",
    ),
    "mask_arithmetic": (
        transformers.GitConfig(**{**SHAPE, **NO_DROPOUT}, vision_config={**TOWER, "projection_dim": 16}),
        "GitForCausalLM computes with the attention mask instead of handing it on",
    ),
    "bidirectional": (
        transformers.Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True),
        "Gemma3Attention is not causal; a prefix can be shared in causal models only",
    ),
}


@pytest.mark.parametrize("what", ARCHITECTURES)
def test_architecture_that_sees_past_the_mask_is_refused(what):
    config, message = ARCHITECTURES[what]
    with pytest.raises(TypeError, match=re.escape(message)):
        share(model_from_config(config))


INDEXED = transformers.DeepseekV32Config(
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


SPARSE = ["deepseek_v32", "deepseek_v4", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4"]  # by default


@pytest.mark.parametrize("name", [name for name in SPARSE if name in CONFIG_MAPPING])
def test_attention_to_chosen_keys_is_refused(name):
    config = CONFIG_MAPPING[name]()
    is_composite = config.get_text_config() is not config
    with torch.device("meta"):
        auto = transformers.AutoModelForImageTextToText if is_composite else AutoModelForCausalLM
        model = auto.from_config(config)
    with pytest.raises(TypeError, match="layers, which choose the keys that a token attends to by scores"):
        flexpg.enable(model)


def test_selected_keys_are_refused_in_ordinary_batches_too():
    register()
    message = 'selects keys by index, which "flexpg" does not support; use attn_implementation="sdpa"'
    with pytest.raises(TypeError, match=re.escape(message)):
        model_from_config(INDEXED, attn_implementation=NAME)(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]))


def test_sinks_in_ordinary_batch_of_class_with_sdpa_are_refused(monkeypatch):
    model = flexpg.enable(hf.tiny_model("gpt_oss"))
    assert shared_logprobs(model, GROUPS).isfinite().all()
    monkeypatch.setattr(transformers.GptOssModel, "_supports_sdpa", True)
    with pytest.raises(TypeError, match="GptOssAttention has attention sinks, which sdpa does not support; use attn_"):
        without_mask(model)


def encoder_decoder() -> nn.Module:
    text = {**SHAPE, "head_dim": 8, "sliding_window": WINDOW}
    return transformers.AutoModelForSeq2SeqLM.from_config(
        transformers.T5GemmaConfig(encoder=text, decoder=text, vocab_size=VOCAB)
    )


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def with_virtual_tokens() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(hf.tiny_model("llama"), config)


def changed(change: Callable[[nn.ModuleList], object], name: str = "llama", **options: Any) -> nn.Module:
    """Build a model and change its layers."""
    model = hf.tiny_model(name, **options)
    change(model.model.layers)
    return model


def with_own_attention() -> nn.Module:
    """A layer does not call the attention interface, like architectures that call torch's attention themselves."""
    model = hf.tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (attention.o_proj(attention.q_proj(hidden_states)), None)
    return model


def with_position_bias() -> nn.Module:
    """A layer passes a position bias to the attention interface, like the relatives of T5."""
    model = hf.tiny_model("llama")
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_bias": torch.zeros(1)}), with_kwargs=True
    )
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "encoder_decoder": (encoder_decoder, TypeError, "is an encoder-decoder; prefixes can be shared in decoders only"),
    "t5": (t5, TypeError, "is an encoder-decoder; prefixes can be shared in decoders only; train it without flexpg"),
    "prompt_tuning": (with_virtual_tokens, ValueError, "the adapter (PROMPT_TUNING) adds virtual tokens"),
    "lora_dropout": (lambda: with_lora(hf.tiny_model("llama"), lora_dropout=0.1), ValueError, "has dropout 0.1, which"),
    "alora": (
        lambda: with_lora(hf.tiny_model("llama"), alora_invocation_tokens=[3, 4]),
        ValueError,
        "the adapter (LORA) depends on the whole sequence; use one that does not, like LoRA",
    ),
    "loha": (
        lambda: peft.get_peft_model(hf.tiny_model("llama"), peft.LoHaConfig(target_modules=["q_proj"], r=2)),
        ValueError,
        "q_proj has an adapter (loha) that draws random numbers in training, even without dropout; use LoRA",
    ),
    "lokr": (
        lambda: peft.get_peft_model(hf.tiny_model("llama"), peft.LoKrConfig(target_modules=["q_proj"], r=2)),
        ValueError,
        "q_proj has an adapter (lokr) that draws random numbers in training",
    ),
    "dropout": (
        lambda: changed(lambda layers: setattr(layers[1], "mlp", nn.Sequential(layers[1].mlp, nn.Dropout(0.2)))),
        ValueError,
        "model.layers.1.mlp.1 has dropout 0.2, which would differ between",
    ),
    "attention_dropout": (
        lambda: hf.tiny_model("llama", attention_dropout=0.3),
        ValueError,
        "self_attn has attention_dropout=0.3, which would differ between the copies of a prefix; load the model with",
    ),
    "hidden_window": (
        lambda: changed(lambda layers: setattr(layers[0].self_attn, "sliding_window", None), "qwen2"),
        TypeError,
        "Qwen2ForCausalLM has sliding_window=7, but 0 of its layers pass it to attention where 1 should",
    ),
    "own_attention": (with_own_attention, TypeError, "1 of 2 layers of LlamaForCausalLM use transformers' attention"),
    "hidden_sinks": (
        lambda: changed(lambda layers: layers[1].self_attn.register_parameter("sinks", nn.Parameter(torch.ones(4)))),
        TypeError,
        "LlamaForCausalLM has attention sinks in 1 layers, but 0 of them pass theirs to attention",
    ),
    "chunk_without_size": (
        lambda: changed(lambda layers: None, "llama4", attention_chunk_size=None),
        TypeError,
        "Llama4ForCausalLM has chunked attention in 1 layers, but 0 of them know their chunk",
    ),
    "position_bias": (with_position_bias, TypeError, "LlamaAttention adds a position bias to its scores"),
    "convolution": (
        lambda: changed(lambda layers: setattr(layers[0], "mixer", nn.Conv1d(32, 32, 4))),
        TypeError,
        "has a convolution over the sequence, ",
    ),
    "bidirectional_layer": (
        lambda: changed(lambda layers: setattr(layers[1].self_attn, "is_causal", False)),
        TypeError,
        "LlamaAttention is not causal",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_inexact_model_is_refused(what):
    make, error, message = REFUSED[what]
    with pytest.raises(error, match=re.escape(message)):
        share(make())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_sequence_past_learned_positions_is_refused(name):
    changes = {"max_position_embeddings": 20, "enable_bias": False, "dropout": 0.0}
    opt = transformers.OPTConfig(vocab_size=VOCAB, **OPT, **changes)
    model = hf.tiny_model("gpt2", n_positions=20) if name == "gpt2" else model_from_config(opt)
    flexpg.enable(model.eval())
    fits = Case.from_groups([tokens(15, 1)], [[tokens(5, 2), tokens(3, 3)]])
    assert shared_logprobs(model, fits).isfinite().all()
    with pytest.raises(ValueError, match=r"sequences must have at most 20 tokens, the learned positions .* got 21"):
        shared_logprobs(model, Case.from_groups([tokens(15, 1)], [[tokens(6, 2), tokens(3, 3)]]))


@pytest.mark.parametrize("what", ["lora_dropout", "dropout", "attention_dropout"])
def test_dropout_is_allowed_in_eval(what):
    assert share(REFUSED[what][0]().eval()).isfinite().all()


# Unusual models: exact or refused, never silently wrong.

# The short factors rotate the first 24 positions, unless the sequence is longer: then the long factors rotate all.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 8.0]}
LONGROPE |= {"original_max_position_embeddings": 24, "rope_theta": 10000.0, "factor": 4.0}
NO_JITTER = {"input_jitter_noise": 0.0, "router_jitter_noise": 0.0}
GEMMA4 = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
FOUR_LAYERS = {**SHAPE, "num_hidden_layers": 4, "sliding_window": WINDOW}
FOUR_LAYERS |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED_KV = transformers.Gemma4TextConfig(**FOUR_LAYERS, **GEMMA4, num_kv_shared_layers=2)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
EXACT = {
    "llama_yarn": transformers.LlamaConfig(**SHAPE, rope_parameters=hf.YARN | {"original_max_position_embeddings": 24}),
    "granite_moe_swa_sinks": transformers.GraniteMoeSWAConfig(
        **SHAPE, **ONE_OF_EACH, attention_multiplier=0.3, num_local_experts=4, shared_intermediate_size=16
    ),
    "deepseek_v3_narrow_values": transformers.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
    ),
    "afmoe_views_of_attention_output": transformers.AfmoeConfig(
        **SHAPE, **ONE_OF_EACH, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "gemma4_per_layer_inputs": transformers.Gemma4TextConfig(**FOUR_LAYERS, **GEMMA4, num_kv_shared_layers=0),
    "gemma4_shared_keys_and_values": SHARED_KV,
    # The packed sequence may be longer than the original length, the sequences may not.
    "phi3_longrope_below_original_length": transformers.Phi3Config(
        **SHAPE,
        rope_parameters=LONGROPE | {"original_max_position_embeddings": 64},
        original_max_position_embeddings=64,
    ),
    "llama_dynamic_rope_below_original_length": transformers.LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 64}, rope_parameters=DYNAMIC
    ),
}
if "beam" in CONFIG_MAPPING:  # not in transformers 5.17, in which OPT draws a random number per layer in training
    EXACT["opt_nested_decoder"] = transformers.OPTConfig(vocab_size=VOCAB, **OPT, dropout=0.0, enable_bias=False)
    beam = CONFIG_MAPPING["beam"](**SHAPE, **ONE_OF_EACH, **hf.EXPERTS, head_dim=8, n_group=1, topk_group=1)
    EXACT["beam_layers_without_rope"] = beam
if hasattr(transformers, "FlintConfig"):  # since transformers 5.23
    EXACT["flint_sinks"] = transformers.FlintConfig(
        **SHAPE, **ONE_OF_EACH, **hf.EXPERTS, head_dim=8, shared_expert_intermediate_size=16, mlp_only_layers=[0]
    )
WINDOW_NOT_PASSED = "has sliding_window=7, but 0 of its layers pass it to attention"
INEXACT = {
    "qwen2_moe_window_in_mask_only": (
        transformers.Qwen2MoeConfig(
            **SHAPE, **ONE_OF_EACH, **hf.EXPERTS, shared_expert_intermediate_size=16, use_sliding_window=True
        ),
        WINDOW_NOT_PASSED,
    ),
    "phimoe_window_in_mask_only": (
        transformers.PhimoeConfig(**SHAPE, **NO_JITTER, num_local_experts=4, sliding_window=WINDOW),
        WINDOW_NOT_PASSED,
    ),
    "mixtral_router_noise": (
        transformers.MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5),
        "the forward of MixtralForCausalLM consumed random numbers",
    ),
    "starcoder2_functional_dropout": (
        transformers.Starcoder2Config(**SHAPE, residual_dropout=0.2),
        "the forward of Starcoder2ForCausalLM consumed random numbers",
    ),
    "phi3_longrope": (
        transformers.Phi3Config(**SHAPE, rope_parameters=LONGROPE, original_max_position_embeddings=24),
        "RoPE scaling 'longrope' depends on the longest sequence of a batch once it exceeds 24 tokens",
    ),
    "llama_dynamic_rope": (
        transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 24}, rope_parameters=DYNAMIC),
        "RoPE scaling 'dynamic' depends on the longest sequence of a batch once it exceeds 24 tokens",
    ),
}


def float64_pair(config: transformers.PretrainedConfig) -> tuple[nn.Module, nn.Module]:
    """Build an enabled model and its baseline in float64; what rounds to float32 inside does so in both."""
    for key, value in FLOAT64_EXPERTS.items():
        setattr(config, key, value)
    return flexpg.enable(model_from_config(config).double()), model_from_config(config).double()


@pytest.mark.parametrize("what", EXACT)
def test_unusual_model_equals_baseline(what):
    """Norms and routers round to float32 inside, where inputs that differ in the last bit may round differently."""
    model, baseline = float64_pair(EXACT[what])
    assert_equals_baseline(model, baseline, GROUPS, tolerance=float32_floor(model.config.num_hidden_layers))


@pytest.mark.parametrize("what", INEXACT)
def test_unusual_model_that_would_be_inexact_is_refused(what):
    config, message = INEXACT[what]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        shared_logprobs(flexpg.enable(model_from_config(config)), GROUPS)


def test_layer_that_computes_attention_twice_cannot_cache_a_prompt():
    model, baseline = float64_pair(transformers.DiffLlamaConfig(**SHAPE, attention_dropout=0.0))
    assert_equals_baseline(model, baseline, GROUPS, tolerance=float32_floor(model.config.num_hidden_layers))
    rollouts = Rollouts.from_groups([tokens(12, 1)], [[tokens(4, 2), tokens(3, 3)]], [[1.0, 0.0]])
    with pytest.raises(TypeError, match=r"computes attention more than once per forward.*; raise max_tokens"):
        next(packed_logprobs(model, rollouts, max_tokens=16))


@pytest.mark.parametrize("logits_to_keep", [1, 5])
def test_shared_keys_and_fewer_queries_of_ordinary_calls_equal_sdpa(logits_to_keep):
    """Gemma 4 drops the queries that no logits are asked of, in the layers that share keys and values."""
    model, baseline = float64_pair(SHARED_KV)
    for length in (5, 20):  # below and above the window
        ids = torch.tensor([tokens(length, 1)])
        each = (twin.eval()(input_ids=ids, logits_to_keep=logits_to_keep).logits for twin in (model, baseline))
        assert torch.allclose(*each, rtol=0, atol=1e-6)


def test_forward_that_does_not_call_its_decoder_is_refused():
    model = flexpg.enable(hf.tiny_model("llama"))
    model.forward = types.MethodType(lambda self, **inputs: None, model)
    with pytest.raises(TypeError, match="the forward of LlamaForCausalLM does not call its LlamaModel"):
        output(model)(torch.zeros(3, 32))


class CallsModel:
    """Holds a model's forward where its output layer cannot replace it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)


def test_forward_that_is_replaced_by_an_object_is_refused():
    model = flexpg.enable(hf.tiny_model("llama"))
    model.forward = CallsModel(model.forward)
    with pytest.raises(TypeError, match=r"was replaced by .*; replace it by a method: model\.forward = types"):
        output(model)(torch.zeros(3, 32))


def test_loss_of_logits_equals_baseline_float64():
    """Distillation as in docs/own_loop.md: logits of the tokens before those in the loss."""
    model, baseline = map(hf.in_float64, hf.model_pair("llama"))
    mask = [[[1, 0, 1], [0, 1]], [[1, 1], [1, 0, 1, 1]]]
    completions = [[tokens(len(row), 10 * g + i) for i, row in enumerate(group)] for g, group in enumerate(mask)]
    rollouts = flexpg.Rollouts.from_groups([tokens(9, 1), tokens(6, 2)], completions, [[0, 1]] * 2, loss_mask=mask)
    targets = torch.randn(len(rollouts), 4, VOCAB, dtype=torch.float64).log_softmax(-1)
    losses = []
    for batch in flexpg.pack(rollouts, max_tokens=14):
        tree = batch.tree
        n, c = batch.loss_mask.nonzero(as_tuple=True)
        before = tree.parent[tree.node[n, batch.rollouts.prompt_lens[n] + c]]
        scores = output(model)(forward(model, tree)[0, before]).log_softmax(-1)
        losses.append(-(scores * targets[batch.indices[n], c].exp()).sum())
        losses[-1].backward()
    expected = []
    for n, sequence in enumerate(rollouts.sequences):
        scores = baseline(sequence[None]).logits[0, rollouts.prompt_lens[n] - 1 : -1].log_softmax(-1)
        kept = rollouts.loss_mask[n, : len(scores)]
        expected.append(-(scores * targets[n, : len(scores)].exp())[kept].sum())
        expected[-1].backward()
    assert len(losses) > 1 and float(abs(sum(losses) - sum(expected)) / sum(expected)) < 1e-12
    for ours, other in zip(model.parameters(), baseline.parameters(), strict=True):
        assert (ours.grad - other.grad).norm() <= 1e-12 * other.grad.norm()
