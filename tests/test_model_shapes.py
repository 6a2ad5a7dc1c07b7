"""Shapes read from models give the FLOPs that torch counts in real updates, exactly, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import baseline
import hf_models
import peft
import pytest
import torch
import transformers
from cases import VOCAB, tokens
from hf_models import CONFIGS, EXPERT_MODELS, FLOAT64_EXPERTS, model_from_config, with_lora
from torch import nn
from torch._C._profiler import _EventType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchtune import training
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params, set_trainable_params

import flexpg
from benchmarks.paper_figure import SHAPES, flops_of, updates
from flexpg.analysis.flops import ModelShape, activation_bytes, update_flops
from flexpg.analysis.torchtune_shape import recipe_shape
from flexpg.analysis.torchtune_shape import shape_of as torchtune_shape
from flexpg.analysis.transformers_files import local_model
from flexpg.analysis.transformers_shape import shape_of as transformers_shape
from flexpg.analysis.work import Work, baseline_work, packed_work
from flexpg.integrations import integration_for
from flexpg.integrations.transformers.recurrent import is_recurrent
from flexpg.logprobs import token_logprobs
from flexpg.tree import PrefixTree

ROOT = Path(__file__).parent.parent
PROMPT, COMPLETION, GROUP = 96, 40, 4  # 256 tokens shared, so that there is no padding
PHI = transformers.PhiConfig(**hf_models.SHAPE)
OPT = transformers.OPTConfig(
    **{**hf_models.SPECIAL, "vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48},
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    dropout=0.0,
)
NEMOTRON_H = hf_models.SHAPE | {"head_dim": 8, "num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 8}
NEMOTRON_H |= {"ssm_state_size": 8, "n_groups": 2, "chunk_size": 64}


def tiny_model(library: str, name: str) -> nn.Module:
    if library == "torchtune":
        return baseline.tiny_model(name)
    if name == "phi":
        return model_from_config(PHI)
    if name == "opt":
        return model_from_config(OPT)
    if name == "nemotron_h":  # four layers, so that means over layers are whole numbers
        kinds = ["mamba", "attention", "mlp", "mamba"]
        return model_from_config(transformers.NemotronHConfig(**NEMOTRON_H | {"layers_block_type": kinds}))
    # FlopCounterMode does not know the grouped matrix product of experts.
    return hf_models.tiny_model(name, **FLOAT64_EXPERTS)


def checkpointed(model: nn.Module) -> nn.Module:
    if isinstance(model, TransformerDecoder):
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def shape_of(model: nn.Module) -> ModelShape:
    return (torchtune_shape if isinstance(model, TransformerDecoder) else transformers_shape)(model)


def group_tree(prompt: int = PROMPT, completion: int = COMPLETION, group: int = GROUP) -> PrefixTree:
    tree = PrefixTree.from_groups([tokens(prompt, 0)], [[tokens(completion, 1 + n) for n in range(group)]])
    assert tree.padded_length == tree.num_tokens
    return tree


def shared_update(model: nn.Module, tree: PrefixTree, completion: int = COMPLETION) -> Callable[[], None]:
    integration = integration_for(flexpg.enable(model))

    def update() -> None:
        hidden = integration.forward(model, tree)
        prompt_lens = tree.lengths - completion
        token_logprobs(hidden, integration.output(model), tree, prompt_lens=prompt_lens).sum().backward()

    if any(map(is_recurrent, model.modules())):
        update()  # the first checks that layers continue from a state
    return update


def baseline_update(model: nn.Module, tree: PrefixTree, completion: int = COMPLETION) -> Callable[[], None]:
    """Return an update by the model's own forward of whole sequences, with logits of completion tokens."""
    integration, input_ids = integration_for(model), tree.tokens[tree.node]  # [N, T]

    def update() -> None:
        hidden = integration.baseline_forward(model, input_ids)
        integration.output(model)(hidden[:, -completion - 1 : -1].flatten(0, 1)).sum().backward()

    return update


def matrix_flops(update: Callable[[], None]) -> int:
    """Return what torch counts for products of two matrices: all but attention, which multiplies batches of them."""
    with FlopCounterMode(display=False) as counter:
        update()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)


def counted_matrix_flops(tree: PrefixTree, shape: ModelShape, num_loss_tokens: int = GROUP * COMPLETION, **options):
    flops = update_flops(packed_work(tree), num_loss_tokens, shape, **options)
    return flops.linear + flops.output


# FLOPs

TORCHTUNE = ["llama3", "qwen2_tied", "phi3", "gemma2"]
TRANSFORMERS = ["llama", "qwen3", "gemma3", "phi3", "olmo2", "cohere", "gpt2", "phi", *EXPERT_MODELS]
TRANSFORMERS += ["gemma3_vl", "qwen2_5_vl"]  # the vision tower does not count
TRANSFORMERS += ["gpt_oss", "granite_swa", "mimo_v2_flash", "opt", "gemma4", *hf_models.HYBRIDS]
APPROXIMATE = ["kimi_linear", "granitemoehybrid", "zamba2", "opt", "gemma4"]  # with checkpointing
MODELS = [*(("torchtune", name) for name in TORCHTUNE), *(("transformers", name) for name in TRANSFORMERS)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("library", "name"), MODELS)
def test_linear_and_output_flops_equal_flop_counter(library, name, checkpointing):
    model, tree = tiny_model(library, name), group_tree()
    if checkpointing:
        checkpointed(model)
    shape, options = shape_of(model), {"activation_checkpointing": checkpointing}
    counted = matrix_flops(shared_update(model, tree))
    if checkpointing and name in APPROXIMATE:  # what is shared by layers, or outside of them, is taken to be recomputed
        assert counted_matrix_flops(tree, shape, **options) == pytest.approx(counted, rel=0.02)
        return
    assert counted_matrix_flops(tree, shape, **options) == counted
    if checkpointing and shape.last_weights:
        assert counted_matrix_flops(tree, replace(shape, last_weights=0), **options) != counted


def torchtune_lora(modules: list[str], build: Callable = lora_qwen2, **options) -> TransformerDecoder:
    sizes = {**baseline.SHAPE, "num_layers": 3, "max_seq_len": 1024, "lora_rank": 4, "lora_alpha": 8}
    torch.manual_seed(0)
    model = build(modules, **{**sizes, **options})
    set_trainable_params(model, get_adapter_params(model))
    return model


def hf_lora(name: str, **options) -> peft.PeftModel:
    return with_lora(tiny_model("transformers", name), **options)


LORA = {
    "torchtune q v": partial(torchtune_lora, ["q_proj", "v_proj"]),
    "torchtune output_proj": partial(torchtune_lora, ["output_proj"], tie_word_embeddings=True),
    "torchtune all": partial(torchtune_lora, ["q_proj", "k_proj"], apply_lora_to_mlp=True, apply_lora_to_output=True),
    "llama q v": partial(hf_lora, "llama"),
    "llama down": partial(hf_lora, "llama", target_modules=["down_proj"]),
    "llama lm_head": partial(hf_lora, "llama", target_modules=["q_proj", "lm_head"]),
    "llama saved": partial(hf_lora, "llama", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "qwen3 all-linear": partial(hf_lora, "qwen3", target_modules="all-linear"),
    "gemma3 q down": partial(hf_lora, "gemma3", target_modules=["q_proj", "down_proj"]),
    "phi3 qkv": partial(hf_lora, "phi3", target_modules=["qkv_proj"]),
    "cohere q, parallel mlp": partial(hf_lora, "cohere", target_modules=["q_proj"]),
    "mixtral q v": partial(hf_lora, "mixtral"),
    "qwen3_5 q v": partial(hf_lora, "qwen3_5"),
    "qwen3_5 recurrence": partial(hf_lora, "qwen3_5", target_modules=["in_proj_qkv", "out_proj"]),
    "lfm2 all-linear": partial(hf_lora, "lfm2", target_modules="all-linear"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of PEFT, when lm_head has an adapter
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LORA)
def test_lora_flops_equal_flop_counter(name, checkpointing):
    model, tree = LORA[name](), group_tree()
    if checkpointing:
        checkpointed(model)
    shape, options = shape_of(model), {"activation_checkpointing": checkpointing}
    assert shape.frozen_weights > shape.layer_weights / 2
    counted = matrix_flops(shared_update(model, tree))
    assert counted_matrix_flops(tree, shape, **options) == counted
    assert counted_matrix_flops(tree, replace(shape, frozen_weights=0), **options) != counted


@pytest.mark.parametrize(
    ("library", "name"), [("torchtune", "qwen2"), ("transformers", "llama"), ("transformers", "phi")]
)
def test_baseline_flops_equal_flop_counter(library, name):
    model, tree = tiny_model(library, name), group_tree()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        baseline_update(model, tree)()
    counts, shape = counter.get_flop_counts()["Global"], shape_of(model)
    # Without a fused kernel, attention also computes the pairs that the causal mask hides: every token sees as many.
    length = PROMPT + COMPLETION
    all_pairs = Work(torch.tensor([0] * (length - 1) + [GROUP * length]))
    flops = update_flops(all_pairs, GROUP * COMPLETION, shape, recompute_output=False)
    assert flops.linear + flops.output == counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    assert flops.attention == counts[torch.ops.aten.bmm]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_total_flops_with_attention_kernels_equal_flop_counter(checkpointing):
    model, tree = tiny_model("torchtune", "qwen2"), group_tree()
    if checkpointing:
        checkpointed(model)
    work = baseline_work(tree), packed_work(tree)
    for update, done in zip(updates(model, PROMPT, COMPLETION, GROUP), work, strict=True):
        flops = update_flops(done, GROUP * COMPLETION, shape_of(model), activation_checkpointing=checkpointing)
        assert flops.total == flops_of(update)


RECURRENT = {  # with chunks of 64 tokens, the recurrence and its convolution
    "qwen3_5": lambda: hf_models.tiny_model("qwen3_5"),
    "kimi_linear": lambda: hf_models.tiny_model("kimi_linear", **FLOAT64_EXPERTS),
    "mamba2": lambda: hf_models.tiny_model("mamba2", chunk_size=64),
    "lfm2": lambda: hf_models.tiny_model("lfm2"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_flops_of_recurrence_are_within_5_percent_of_flop_counter(name, checkpointing):
    tree = group_tree(192, 64, 5)  # whole chunks, so that no padding is computed
    model = checkpointed(RECURRENT[name]()) if checkpointing else RECURRENT[name]()
    update = shared_update(model, tree, 64)
    with FlopCounterMode(display=False) as counter:
        update()
    counts, operators = counter.get_flop_counts()["Global"], torch.ops.aten
    forward = counts[operators.convolution] / (2 if checkpointing else 1)  # its backward is counted wrongly
    counted = counts.get(operators.bmm, 0) + forward * (4 if checkpointing else 3)
    flops = update_flops(packed_work(tree), 320, shape_of(model), activation_checkpointing=checkpointing)
    assert flops.recurrent == pytest.approx(counted, rel=0.05)


def test_attention_flops_of_windows_and_chunks_count_visible_pairs():
    tree = group_tree()
    work = packed_work(tree)
    for name, pairs in {
        "qwen2": work.num_pairs + work.pairs(7),
        "mistral": 2 * work.pairs(7),
        "llama4": work.num_pairs + work.pairs(10, is_chunked=True),
        "qwen3_5": work.num_pairs,
        "mamba2": 0,
    }.items():
        flops = update_flops(work, 0, shape_of(hf_models.tiny_model(name)))
        assert flops.attention == 3 * 4 * 8 * 4 * pairs, name
    latent, gemma2 = shape_of(hf_models.tiny_model("kimi_linear")), shape_of(baseline.tiny_model("gemma2"))
    assert update_flops(work, 0, latent).attention == 3 * 2 * (16 + 8) * 4 * work.num_pairs
    assert (gemma2.windowed_layers, gemma2.window) == (1, 7)


def test_flops_of_reentrant_checkpointing_equal_flop_counter():
    model, tree = tiny_model("transformers", "llama"), group_tree()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    shape = replace(shape_of(model), last_weights=0)
    counted = matrix_flops(shared_update(model, tree))
    assert counted_matrix_flops(tree, shape, activation_checkpointing=True) == counted


# Activation memory


def measured_peak_bytes(model: nn.Module, update: Callable[[], None]) -> int:
    """Return the peak of what torch's allocator provided, buffers of kernels included, gradients excluded."""
    update()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    gradients = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    events, waiting = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort(key=lambda event: event[0])
    last = {pointer: n for n, (_, pointer, size) in enumerate(events) if size > 0}
    live: dict[int, int] = {}
    total = peak = 0
    for n, (_, pointer, size) in enumerate(events):
        if size < 0:
            total -= live.pop(pointer, 0)  # the garbage collector may free what existed before
        elif pointer not in gradients or n != last[pointer]:
            live[pointer] = size
            total += size
            peak = max(peak, total)
    return peak


SIZES = {"num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "max_seq_len": 1024}


def sized_torchtune(build: Callable, embed_dim: int, intermediate_dim: int, vocab_size: int) -> TransformerDecoder:
    torch.manual_seed(0)
    return build(vocab_size=vocab_size, embed_dim=embed_dim, intermediate_dim=intermediate_dim, **SIZES)


def sized_hf(kind: type, embed_dim: int, intermediate_dim: int, vocab_size: int, **options) -> nn.Module:
    sizes = {"vocab_size": vocab_size, "hidden_size": embed_dim, "intermediate_size": intermediate_dim}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": None}
    return model_from_config(kind(**sizes, **heads, **options))


HYBRID = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 16}
HYBRID |= {"linear_value_head_dim": 16, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
LFM2 = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}
LORA_SIZES = SIZES | {"embed_dim": 128, "intermediate_dim": 512, "vocab_size": 300}
SIZED = {
    "llama3": partial(sized_torchtune, llama3, 128, 512, 300),
    "qwen2": partial(sized_torchtune, qwen2, 192, 384, 2000),
    "llama": partial(sized_hf, transformers.LlamaConfig, 128, 512, 300),
    "qwen3": partial(sized_hf, transformers.Qwen3Config, 192, 384, 2000, head_dim=24),
    "gemma3": partial(sized_hf, transformers.Gemma3TextConfig, 128, 512, 300, head_dim=16),
    "mixtral": partial(sized_hf, transformers.MixtralConfig, 128, 256, 300, num_local_experts=4),
    "phi": partial(sized_hf, transformers.PhiConfig, 128, 512, 300),
    "qwen3_5": partial(sized_hf, transformers.Qwen3_5TextConfig, 128, 512, 300, **HYBRID),
    "lfm2": partial(sized_hf, transformers.Lfm2Config, 128, 512, 300, **LFM2),
    "lora q v": lambda: torchtune_lora(["q_proj", "v_proj"], lora_llama3, **LORA_SIZES),
    "lora all-linear": lambda: with_lora(SIZED["llama"](), target_modules="all-linear"),
}
TREES = {"long prompt": (448, 16, 4), "long completions": (128, 160, 4), "many": (256, 16, 24)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("llama3", "long completions"),
        ("qwen2", "long prompt"),
        ("llama", "many"),
        ("qwen3", "long completions"),
        ("gemma3", "long prompt"),
        ("mixtral", "long prompt"),
        ("phi", "long prompt"),
        ("qwen3_5", "long completions"),
        ("lfm2", "long prompt"),
        ("lora q v", "long completions"),
        ("lora all-linear", "long prompt"),
    ],
)
def test_activation_bytes_are_within_15_percent_of_measured_peak(name, tree, checkpointing):
    model = checkpointed(SIZED[name]()) if checkpointing else SIZED[name]()
    prompt, completion, group = TREES[tree]
    tree, shape = group_tree(prompt, completion, group), shape_of(model)
    options = {"itemsize": 4, "activation_checkpointing": checkpointing}
    peak = measured_peak_bytes(model, shared_update(model, tree, completion))
    assert activation_bytes(tree.num_tokens, group * completion, shape, **options) == pytest.approx(peak, rel=0.15)
    assert activation_bytes(tree.baseline_tokens, group * completion, shape, **options) > 1.15 * peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama3", "llama"])
def test_baseline_activation_bytes_are_within_15_percent_of_measured_peak(name, checkpointing):
    model = checkpointed(SIZED[name]()) if checkpointing else SIZED[name]()
    prompt, completion, group = TREES["long prompt"]
    tree, shape = group_tree(prompt, completion, group), shape_of(model)
    options = {"itemsize": 4, "activation_checkpointing": checkpointing, "expanded_kv": name == "llama3"}
    peak = measured_peak_bytes(model, baseline_update(model, tree, completion))
    assert activation_bytes(tree.baseline_tokens, group * completion, shape, **options) == pytest.approx(peak, rel=0.15)


def test_activation_bytes_of_logit_chunks_are_within_15_percent_of_peak():
    model, tree = SIZED["qwen2"](), group_tree(128, 320, 4)
    estimate = activation_bytes(tree.num_tokens, 4 * 320, shape_of(model), itemsize=4)
    assert estimate == pytest.approx(measured_peak_bytes(model, shared_update(model, tree, 320)), rel=0.15)


# Shapes


def test_shape_of_qwen2_5_7b_matches_its_paper_in_both_libraries():
    sizes = {"vocab_size": 152_064, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "embed_dim": 3584}
    with torch.device("meta"):
        model = qwen2(**sizes, intermediate_dim=18_944, max_seq_len=64)
    config = transformers.Qwen2Config(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    )
    expected = replace(SHAPES["Qwen2.5-7B"], last_weights=3584 * 18_944)
    assert transformers_shape(config) == torchtune_shape(model) == expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2", "qwen2_5_vl", "mistral3"])
def test_shape_of_config_equals_shape_of_model(name):
    config = (CONFIGS | hf_models.COMPOSITES)[name]
    assert transformers_shape(config) == transformers_shape(hf_models.tiny_model(name))


def test_shape_counts_only_experts_that_a_token_is_routed_to():
    two, four = (transformers_shape(hf_models.tiny_model("mixtral", num_experts_per_tok=n)) for n in (2, 4))
    attention_and_router = 2 * 32 * (32 + 16) + 4 * 32
    assert two.layer_weights == attention_and_router + 2 * 3 * 32 * 48
    assert four.layer_weights == attention_and_router + 4 * 3 * 32 * 48


def test_shape_of_saved_peft_adapter_equals_shape_of_its_model(tmp_path):
    hf_models.tiny_model("llama").save_pretrained(tmp_path / "base")
    model = with_lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert transformers_shape(local_model(tmp_path / "adapter")) == transformers_shape(model)


def test_recipe_shape_of_lora_config_trains_adapters_only():
    full, lora = (recipe_shape(ROOT / f"recipes/configs/{name}.yaml") for name in ("tiny_cpu", "tiny_lora_cpu"))
    assert (full.frozen_weights, lora.frozen_weights) == (0, full.layer_weights)
    assert lora.layer_weights > full.layer_weights and lora.is_output_frozen


@pytest.mark.parametrize(
    ("read", "make", "message"),
    [
        (transformers_shape, lambda: hf_models.tiny_model("llama").model, "has no output layer"),
        (transformers_shape, lambda: hf_lora("llama", use_dora=True), "must have one LORA adapter, got DoRA"),
        (torchtune_shape, lambda: torchtune_lora(["q_proj"], use_dora=True), "must be plain LoRA, got DoRA"),
        (torchtune_shape, lambda: nn.Linear(2, 2), "must be a torchtune TransformerDecoder, got Linear"),
        (torchtune_shape, lambda: tiny_model("torchtune", "llama3").requires_grad_(False), "parameters that require"),
    ],
)
def test_shape_of_unsupported_model_raises(read, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read(make())
