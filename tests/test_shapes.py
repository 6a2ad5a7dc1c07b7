"""Shapes read off real models give the FLOPs that torch counts in real updates, exactly, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from cases import tokens
from test_transformers import CONFIGS, EXPERT_MODELS, SHAPE, SLOW_EXPERTS, built, loaded
from torch import nn
from torch._C._profiler import _EventType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchtune import training
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from baseline import tiny_model

from benchmarks.paper_figure import SHAPES, flops_of, updates
from flexpg.analysis.flops import Cost, ModelShape, activation_bytes, dense_cost, shared_cost, update_flops
from flexpg.analysis.torchtune_shape import shape_of as torchtune_shape
from flexpg.analysis.transformers_shape import shape_of as transformers_shape
from flexpg.integrations import torchtune as shared_torchtune
from flexpg.integrations import transformers as shared_transformers
from flexpg.logprobs import token_logprobs
from flexpg.tree import PrefixTree

TORCHTUNE = ["llama3", "qwen2_tied", "phi3", "gemma2"]
TRANSFORMERS = ["llama", "qwen3", "gemma3", "phi3", "olmo2", "cohere", "gpt2", "phi", *EXPERT_MODELS]
PHI = transformers.PhiConfig(**SHAPE)
PROMPT, COMPLETION, GROUP = 96, 40, 4  # 256 tokens shared, so that there is no padding


@pytest.fixture(autouse=True, scope="module")
def registered():
    shared_transformers.register()


def a_group(prompt: int = PROMPT, completion: int = COMPLETION, group: int = GROUP) -> PrefixTree:
    tree = PrefixTree.from_groups([tokens(prompt, 0)], [[tokens(completion, 1 + n) for n in range(group)]])
    assert len(tree) == tree.num_tokens
    return tree


def model_of(library: str, name: str, checkpointing: bool = False) -> nn.Module:
    if library == "torchtune":
        return checkpointed(tiny_model(name)) if checkpointing else tiny_model(name)
    # FlopCounterMode knows no grouped product of experts
    model = built(PHI) if name == "phi" else loaded(name, **(SLOW_EXPERTS if name in EXPERT_MODELS else {}))
    return checkpointed(model) if checkpointing else model


def checkpointed(model: nn.Module) -> nn.Module:
    if isinstance(model, TransformerDecoder):
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def shape_of(model: nn.Module) -> ModelShape:
    return (torchtune_shape if isinstance(model, TransformerDecoder) else transformers_shape)(model)


def shared_update(model: nn.Module, tree: PrefixTree, completion: int = COMPLETION) -> Callable[[], None]:
    integration = shared_torchtune if isinstance(model, TransformerDecoder) else shared_transformers

    def update() -> None:
        hidden = integration.forward(model, tree)
        prompt_lens = tree.lengths - completion
        token_logprobs(hidden, integration.output(model), tree, prompt_lens=prompt_lens).sum().backward()

    return update


def unshared_update(model: nn.Module, tree: PrefixTree, completion: int = COMPLETION) -> Callable[[], None]:
    """The model's own forward on whole sequences, one batch, and the same log-probabilities of completions."""
    rows = tree.tokens[tree.node]  # [N, T]

    def update() -> None:
        if isinstance(model, TransformerDecoder):
            hidden = model.tok_embeddings(rows)
            for layer in model.layers:
                hidden = layer(hidden)
            hidden = model.norm(hidden)
        else:
            model.set_attn_implementation("sdpa")
            hidden = model.base_model(rows, use_cache=False).last_hidden_state
        integration = shared_torchtune if isinstance(model, TransformerDecoder) else shared_transformers
        integration.output(model)(hidden[:, -completion - 1 : -1].flatten(0, 1)).sum().backward()

    return update


def matrix_flops(update: Callable[[], None]) -> int:
    """What torch counts of products of two matrices: all but attention, which works on batches of them."""
    with FlopCounterMode(display=False) as counter:
        update()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)


# ---- FLOPs ---------------------------------------------------------------------------------------------------------

MODELS = [*(("torchtune", name) for name in TORCHTUNE), *(("transformers", name) for name in TRANSFORMERS)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("library", "name"), MODELS)
def test_linear_and_output_flops_are_those_that_torch_counts(library, name, checkpointing):
    model, tree = model_of(library, name, checkpointing), a_group()
    shape, predicted = shape_of(model), GROUP * COMPLETION

    def matrices(cost: Cost, predicted: int, shape: ModelShape) -> int:
        flops = update_flops(cost, predicted, shape, activation_checkpointing=checkpointing)
        return flops.linear + flops.output

    counted = matrix_flops(shared_update(model, tree))
    assert matrices(shared_cost(tree), predicted, shape) == counted
    assert matrices(dense_cost(tree), predicted, shape) != counted  # the prompt once per completion
    assert matrices(shared_cost(tree), predicted + 1, shape) != counted
    if checkpointing and shape.last_weights:
        assert matrices(shared_cost(tree), predicted, replace(shape, last_weights=0)) != counted


@pytest.mark.parametrize(
    ("library", "name"), [("torchtune", "qwen2"), ("transformers", "llama"), ("transformers", "phi")]
)
def test_flops_of_unshared_rows_are_those_that_torch_counts(library, name):
    model, tree = model_of(library, name), a_group()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unshared_update(model, tree)()
    counts, shape = counter.get_flop_counts()["Global"], shape_of(model)
    flops = update_flops(dense_cost(tree), GROUP * COMPLETION, shape, recomputed_output=False)
    assert flops.linear + flops.output == counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    # Written out, attention computes what the causal mask hides as well: every pair of a sequence's tokens.
    every_pair = Cost(0, GROUP * (PROMPT + COMPLETION) ** 2)
    assert update_flops(every_pair, 0, shape).attention == counts[torch.ops.aten.bmm]
    assert update_flops(shared_cost(tree), 0, shape).linear != flops.linear


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_flops_with_attention_are_those_that_run(checkpointing):
    model = model_of("torchtune", "qwen2", checkpointing)
    tree = a_group()
    shape, predicted = shape_of(model), GROUP * COMPLETION
    for update, cost in zip(updates(model, PROMPT, COMPLETION, GROUP), (dense_cost, shared_cost), strict=True):
        counted = flops_of(update)
        flops = update_flops(cost(tree), predicted, shape, activation_checkpointing=checkpointing)
        assert flops.total == counted
        assert flops.total - flops.attention != counted


def test_reentrant_checkpoints_compute_a_layers_last_matrix_again():
    model, tree = model_of("transformers", "llama"), a_group()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    shape = replace(shape_of(model), last_weights=0)
    flops = update_flops(shared_cost(tree), GROUP * COMPLETION, shape, activation_checkpointing=True)
    assert flops.linear + flops.output == matrix_flops(shared_update(model, tree))


# ---- bytes ---------------------------------------------------------------------------------------------------------


def measured_peak_bytes(model: nn.Module, update: Callable[[], None]) -> int:
    """The most that torch's allocator gave out at a time, kernels' own buffers too, without the gradients."""
    update()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    gradients = {parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}
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
            total -= live.pop(pointer, 0)  # what was there before, and the garbage collector found now, is not ours
        elif pointer not in gradients or n != last[pointer]:
            live[pointer] = size
            total += size
            peak = max(peak, total)
    return peak


def a_torchtune_model(embed_dim: int, intermediate_dim: int, vocab_size: int, build=llama3) -> TransformerDecoder:
    torch.manual_seed(0)
    return build(
        vocab_size=vocab_size,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=1024,
    )


def a_transformers_model(kind: type, embed_dim: int, intermediate_dim: int, vocab_size: int, **options) -> nn.Module:
    sizes = {"vocab_size": vocab_size, "hidden_size": embed_dim, "intermediate_size": intermediate_dim}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": None}
    return built(kind(**sizes, **heads, **options))


SIZED = {
    "llama3": lambda: a_torchtune_model(128, 512, 300),
    "qwen2": lambda: a_torchtune_model(192, 384, 2000, qwen2),
    "llama": lambda: a_transformers_model(transformers.LlamaConfig, 128, 512, 300),
    "qwen3": lambda: a_transformers_model(transformers.Qwen3Config, 192, 384, 2000, head_dim=24),
    "gemma3": lambda: a_transformers_model(transformers.Gemma3TextConfig, 128, 512, 300, head_dim=16),
    "mixtral": lambda: a_transformers_model(transformers.MixtralConfig, 128, 256, 300, num_local_experts=4),
    "phi": lambda: a_transformers_model(transformers.PhiConfig, 128, 512, 300),
}
TREES = {"long prompt": (448, 16, 4), "long completions": (128, 160, 4), "many": (256, 16, 24)}
SHARED = [
    ("llama3", "long completions"),
    ("qwen2", "long prompt"),
    ("llama", "many"),
    ("qwen3", "long completions"),
    ("gemma3", "long prompt"),
    ("mixtral", "long prompt"),
    ("phi", "long prompt"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "kind"), SHARED)
def test_bytes_of_a_shared_update_are_within_15_percent_of_the_measured_peak(name, kind, checkpointing):
    model = checkpointed(SIZED[name]()) if checkpointing else SIZED[name]()
    prompt, completion, group = TREES[kind]
    tree, shape = a_group(prompt, completion, group), shape_of(model)
    options = {"itemsize": 4, "activation_checkpointing": checkpointing}
    peak = measured_peak_bytes(model, shared_update(model, tree, completion))
    assert activation_bytes(shared_cost(tree), group * completion, shape, **options) == pytest.approx(peak, rel=0.15)
    without = activation_bytes(dense_cost(tree), group * completion, shape, **options)
    assert without != pytest.approx(peak, rel=0.15)  # the prompt once per completion


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama3", "llama"])
def test_bytes_of_an_unshared_update_are_within_15_percent_of_the_measured_peak(name, checkpointing):
    model = checkpointed(SIZED[name]()) if checkpointing else SIZED[name]()
    prompt, completion, group = TREES["long prompt"]
    tree, shape = a_group(prompt, completion, group), shape_of(model)
    options = {"itemsize": 4, "activation_checkpointing": checkpointing, "expanded_kv": name == "llama3"}
    peak = measured_peak_bytes(model, unshared_update(model, tree, completion))
    assert activation_bytes(dense_cost(tree), group * completion, shape, **options) == pytest.approx(peak, rel=0.15)


def test_bytes_of_several_chunks_of_logits_are_within_15_percent_of_the_measured_peak():
    model, tree = SIZED["qwen2"](), a_group(128, 320, 4)
    estimate = activation_bytes(shared_cost(tree), 4 * 320, shape_of(model), itemsize=4)
    assert estimate == pytest.approx(measured_peak_bytes(model, shared_update(model, tree, 320)), rel=0.15)


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_shapes_of_named_models_are_what_their_papers_say():
    expected = SHAPES["Qwen2.5-7B"]
    config = transformers.Qwen2Config(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    )
    with torch.device("meta"):
        model = qwen2(
            vocab_size=152_064,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            embed_dim=3584,
            intermediate_dim=18_944,
            max_seq_len=64,
        )
    last = replace(expected, last_weights=3584 * 18_944)
    assert transformers_shape(config) == torchtune_shape(model) == last


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2"])
def test_a_config_has_the_shape_of_its_model(name):
    assert transformers_shape(CONFIGS[name]) == transformers_shape(loaded(name))


def test_experts_count_as_many_as_a_token_goes_through():
    four, all_of_four = (transformers_shape(replaced(CONFIGS["mixtral"], num_experts_per_tok=n)) for n in (2, 4))
    attention_and_router = 2 * 32 * (32 + 16) + 4 * 32
    assert four.layer_weights == attention_and_router + 2 * 3 * 32 * 48
    assert all_of_four.layer_weights == attention_and_router + 4 * 3 * 32 * 48


def replaced(config: transformers.PretrainedConfig, **changes) -> transformers.PretrainedConfig:
    return type(config)(**{**config.to_dict(), **changes})


def adapted() -> nn.Module:
    return peft.get_peft_model(loaded("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("read", "make", "message"),
    [
        (transformers_shape, adapted, "type PeftModelForCausalLM; give a transformers model without adapters"),
        (transformers_shape, lambda: transformers.OPTConfig(num_hidden_layers=1), "OPTForCausalLM has 0 lists"),
        (transformers_shape, lambda: transformers.MambaConfig(num_hidden_layers=1), "MambaForCausalLM does not use"),
        (
            transformers_shape,
            lambda: transformers.DeepseekV3Config(num_hidden_layers=1),
            r"DeepseekV3ForCausalLM has keys and values of different sizes \(latent attention\)",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(read, make, message):
    with pytest.raises(TypeError, match=message):
        read(make())
