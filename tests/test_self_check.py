"""Tests of the self-check before the first update, and of flexpg's own baseline."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import baseline
import hf_models as hf
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from baseline import in_float64, tiny_model
from cases import tokens
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

import flexpg
from flexpg import Rollouts, pack, self_check
from flexpg.integrations import integration_for
from flexpg.integrations import transformers as integration
from flexpg.masks import TreeBlockMask, dense_mask
from flexpg.verify import SelfCheckError, SelfCheckResult, baseline_logprobs, checked_model, gradient_norms
from flexpg.verify.isolation import _perturbed_trees

WINDOW = 30


def make_rollouts(groups: int = 3, size: int = 4) -> Rollouts:
    completions = [[tokens(3 + 5 * i % 17, 100 + i) for i in range(g * size, g * size + size)] for g in range(groups)]
    return Rollouts.from_groups([tokens(12 + 7 * g, g) for g in range(groups)], completions, [[0.0] * size] * groups)


def check(model: nn.Module, **options: Any) -> SelfCheckResult:
    return self_check(model.train(), make_rollouts(), **options)


def assert_passes_with_margin(found: SelfCheckResult) -> None:
    assert 0 < found.logprob_error < 0.6 * found.logprob_budget
    assert 0 < found.gradient_error < 0.6 * found.gradient_budget


def test_ordinary_call_computes_logits_of_the_first_tokens_only(monkeypatch):
    monkeypatch.setattr(checked_model, "ORDINARY_TOKENS", 50)
    model = flexpg.enable(in_float64(tiny_model("llama3")).train())
    rollouts = Rollouts.from_groups([tokens(40, 0)], [[tokens(20, 1), tokens(9, 2)]], [[0.0, 0.0]])
    (batch,) = pack(rollouts, max_tokens=1000)
    expected, from_hidden_states = checked_model.CheckedModel(model, integration_for(model), 1.0, None).own_logprobs(
        batch, 0
    )
    assert expected.shape == from_hidden_states.shape == (49,)
    torch.testing.assert_close(expected, from_hidden_states, check_dtype=False)  # torchtune's logits are float32


# Correct models.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3_2", "llama3_2_lora", "qwen2_tied", "phi3", "gemma2"])
def test_torchtune_model_passes_with_margin(name, dtype):
    model = tiny_model(name)
    found = check(in_float64(model) if dtype == torch.float64 else model.to(dtype))
    assert_passes_with_margin(found)
    assert found.rollouts == 3 and found.tokens == 185


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "mixtral", "gpt2", *hf.SINK_MODELS, "llama4"],
)
def test_transformers_model_passes_with_margin(name, dtype):
    assert_passes_with_margin(check(flexpg.enable(hf.tiny_model(name).to(dtype))))


def test_peft_model_passes_with_margin():
    assert_passes_with_margin(check(flexpg.enable(hf.with_lora(hf.tiny_model("llama")))))


@pytest.mark.parametrize("make", [partial(tiny_model, "qwen2"), partial(hf.tiny_model, "qwen2")])
def test_autocast_bfloat16_passes_with_the_budget_of_bfloat16(make):
    found = check(flexpg.enable(make()), autocast_dtype=torch.bfloat16)
    assert_passes_with_margin(found)
    assert found.logprob_budget > 1e-3


def test_budget_is_rounding_and_no_more():
    budgets = {dtype: check(tiny_model("llama3_2").to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert budgets[torch.float32].logprob_budget < 1e-4
    assert budgets[torch.float32].gradient_budget < 1e-3
    assert 1e-2 < budgets[torch.bfloat16].logprob_budget < 1


@pytest.mark.parametrize("packed", [False, True])
def test_oversized_group_is_checked_with_its_prefix_cache(packed):
    rollouts = make_rollouts(groups=1, size=12)
    batches = pack(rollouts, max_tokens=60)
    assert len(batches) > 2 and all(batch.cached_tokens for batch in batches)
    options = {} if packed else {"max_tokens": 60}
    found = self_check(tiny_model("qwen2").train(), batches if packed else rollouts, **options)
    assert found.rollouts == 6  # three of each of the first two micro-batches


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_and_checkpointed_layers_pass(compiled, checkpointing):
    model = tiny_model("llama3_2").train()
    if compiled:
        for layer in model.layers:
            layer.compile(backend="eager")
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    check(model)
    layers = [module for module in model.modules() if isinstance(module, TransformerSelfAttentionLayer)]
    assert all((layer._compiled_call_impl is not None) == compiled for layer in layers)


def test_rollouts_that_share_nothing_or_are_equal_pass():
    self_check(tiny_model("qwen2").train(), make_rollouts(groups=3, size=1))
    self_check(tiny_model("qwen2").train(), Rollouts.from_groups([[1, 2]], [[[3], [3]]], [[0.0, 0.0]]))


def test_replaced_tokens_are_those_of_completions():
    """Others, such as 0 and 1, may be placeholders of an image."""
    (batch,) = pack(make_rollouts(), max_tokens=1000)
    known = {token for completion in batch.rollouts.completions for token in completion.tolist()}
    for tree, indices, _ in _perturbed_trees(batch):
        before, after = batch.tree.input_ids[0, indices], tree.input_ids[0, indices]
        assert len(before) and (before != after).all() and set(after.tolist()) <= known


def test_self_check_changes_nothing():
    model = tiny_model("qwen2").train()
    kept = torch.randn_like(model.norm.scale)
    model.norm.scale.grad = kept
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    check(model)
    assert model.norm.scale.grad is kept
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not model.norm.scale)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(module._forward_hooks for module in model.modules())


def test_result_prints_one_line():
    assert re.fullmatch(
        r"self-check passed: no leakage between completions \(\d+ packed tokens\); 3 of the packed rollouts match the "
        r"baseline: "
        r"log-probabilities within \de-\d\d \(budget \de-\d\d\), gradients within \de-\d\d \(budget \de-\d\d\), "
        r"in \d+\.\d s",
        str(check(tiny_model("qwen2"))),
    )


@torch.no_grad()
def routes_of(model: nn.Module, call: Callable[[], Any]) -> list[Tensor]:
    """Call a Qwen3-MoE and return the [T, K] experts that each router chose, ascending."""
    routes: list[Tensor] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, args, out: routes.append(out[2].sort(-1).values))
        for layer in model.model.layers
    ]
    call()
    for handle in handles:
        handle.remove()
    return routes


def test_tokens_that_rounding_sends_to_other_experts_are_counted():
    torch.manual_seed(0)
    model = hf.tiny_model("qwen3_moe").to(torch.bfloat16)
    for layer in model.model.layers:  # of experts that differ little, so that choices are close
        weight = layer.mlp.gate.weight.data
        weight.copy_(weight[:1] * (1 + 0.02 * torch.randn(weight.shape)))
    alone = [routes_of(model, partial(model, sequence[None])) for sequence in make_rollouts().sequences]
    (batch,) = pack(make_rollouts(), 8192)
    tree = batch.tree
    shared = routes_of(model, partial(integration.forward, flexpg.enable(model), tree))
    order = tree.node.amax(1).argsort(stable=True).tolist()
    expected = 0
    for n in (order[0], order[(len(order) - 1) // 2], order[-1]):
        nodes = tree.node[n][tree.node[n] >= 0]
        changed = [(a[nodes] != b).any(-1) for a, b in zip(shared, alone[int(batch.indices[n])], strict=True)]
        expected += int(torch.stack(changed).any(0).sum())
    found = check(model)
    assert found.rerouted_tokens == expected > 0
    assert f", rounding sends {expected} tokens to other experts, in " in str(found)
    assert check(model.float()).rerouted_tokens == 0 and check(tiny_model("qwen2")).rerouted_tokens is None


# The baseline that it compares with.


@pytest.mark.parametrize("framework", ["torchtune", "transformers"])
def test_baseline_logprobs_equal_the_written_out_baseline(framework):
    rollouts = make_rollouts()
    loss_mask = rollouts.loss_mask & (torch.rand(rollouts.loss_mask.shape, generator=torch.Generator()) < 0.8)
    sequences, lens = [sequence.tolist() for sequence in rollouts.sequences], rollouts.prompt_lens.tolist()
    if framework == "torchtune":
        model = in_float64(tiny_model("qwen2"))
        expected = baseline.baseline_logprobs(model, sequences, lens)
    else:
        model = hf.in_float64(hf.tiny_model("qwen2"))
        expected = hf.baseline_logprobs(model, sequences, lens)
        flexpg.enable(model)
    (found,) = baseline_logprobs(model, replace(rollouts, loss_mask=loss_mask))
    assert (found - expected.where(loss_mask, 0)).abs().max() < 1e-12


def test_baseline_logprobs_at_temperature_with_entropy():
    rollouts, model = make_rollouts(groups=1), hf.in_float64(hf.tiny_model("llama"))
    logprobs, entropy = baseline_logprobs(model, rollouts, temperature=0.7, return_entropy=True)
    for n, sequence in enumerate(rollouts.sequences):
        scores = (model(input_ids=sequence[None]).logits[0, 11:-1] / 0.7).log_softmax(-1)  # the prompt has 12 tokens
        in_use = slice(len(scores))
        assert (logprobs[n, in_use] - scores.gather(-1, sequence[12:, None])[:, 0]).abs().max() < 1e-12
        assert (entropy[n, in_use] + (scores.exp() * scores).sum(-1)).abs().max() < 1e-12
    assert logprobs.requires_grad and not entropy.requires_grad


def test_gradient_norms_by_parameter_name():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert gradient_norms(model) == {"weight": 5.0}


# Wrong models.


class IgnoresMask(nn.Module):
    """Attention that does not use the mask."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, y: Tensor, *, mask: object = None, input_pos: Tensor | None = None) -> Tensor:
        return self.attn(x, x, input_pos=input_pos)


class CountsPackedTokens(nn.Module):
    """RoPE with packed indices for positions."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        return self.rope(x)


class FunctionalDropout(nn.Module):
    """Dropout without an nn.Dropout, which only a forward can reveal."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.mlp(x), 0.1, self.training)


class WindowInPackedTokens(nn.Module):
    """A sliding window over the packed sequence instead of the token's own sequence."""

    cache_enabled = False  # read by torchtune's forward

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, y: Tensor, *, mask: object = None, input_pos: Tensor | None = None) -> Tensor:
        attn = self.attn
        q, k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = attn.pos_embeddings(q, input_pos=input_pos), attn.pos_embeddings(k, input_pos=input_pos)
        length = x.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if isinstance(mask, TreeBlockMask):
            visible = dense_mask(mask.tree.end[:length])
        visible = visible.triu(1 - WINDOW)
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), visible, enable_gqa=True)
        return attn.output_proj(out.transpose(1, 2).flatten(2))


def with_fault(name: str, *layers: int, **changes: int) -> nn.Module:
    model = tiny_model("llama3_2", **changes)
    for layer in (model.layers[n] for n in layers):
        if name == "packed_positions":
            layer.attn.pos_embeddings = CountsPackedTokens(layer.attn.pos_embeddings)
        elif name == "dropout":
            layer.mlp = FunctionalDropout(layer.mlp)
        else:
            layer.attn = {"ignored_mask": IgnoresMask, "packed_window": WindowInPackedTokens}[name](layer.attn)
    return model.train()


DIFFERENT = r"token \d+ of the completion of rollout \d+ has log-probability .* They differ from {layer} on, which"
LEAKED = (
    r"token \d+ of the completion of rollout \d+ changed in {layer} when the completion of rollout \d+ was replaced"
)
FAULTS = {
    "ignored_mask": LEAKED,
    "packed_positions": DIFFERENT,
    "dropout": r"two equal forwards differ from {layer} on, at token \d+ of the prompt of rollout \d+: .*dropout",
    "packed_window": DIFFERENT,
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_layer_is_named_with_token_and_rollout(fault, layer):
    with pytest.raises(SelfCheckError, match=FAULTS[fault].replace("{layer}", rf"layers\.{layer}")):
        check(with_fault(fault, layer))


@pytest.mark.parametrize(
    ("fault", "layers", "num_layers"),
    [
        ("ignored_mask", [0], 2),
        ("packed_positions", [0], 2),
        ("dropout", [0], 2),
        ("packed_window", [0, 1], 2),
        ("packed_positions", range(12), 12),
        ("packed_positions", [0], 12),
    ],
)
def test_wrong_model_fails_in_bfloat16(fault, layers, num_layers):
    with pytest.raises(SelfCheckError, match="self-check failed: "):
        check(with_fault(fault, *layers, num_layers=num_layers).to(torch.bfloat16))


def count_packed_tokens(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    positions = kwargs.get("position_ids", args[-1])
    return (args[0],), {"position_ids": torch.arange(positions.shape[1])[None]}


def test_transformers_model_that_counts_packed_tokens_is_named():
    model = flexpg.enable(hf.tiny_model("llama"))
    model.model.rotary_emb.register_forward_pre_hook(count_packed_tokens, with_kwargs=True)
    with pytest.raises(SelfCheckError, match=DIFFERENT.replace("{layer}", r"model\.layers\.0")):
        check(model)


class WithTermOfTokens(transformers.LlamaForCausalLM):
    """Logits get a term that depends on the tokens, which no hidden state shows."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + 0.1 * F.one_hot(input_ids, out.logits.shape[-1])
        return out


ORDINARY = r"token \d+ of the (prompt|completion) of rollout \d+ has log-probability .* in an ordinary call of the "


def test_logits_that_depend_on_tokens_fail():
    with pytest.raises(SelfCheckError, match=ORDINARY):
        check(flexpg.enable(WithTermOfTokens(copy.deepcopy(hf.CONFIGS["llama"]))))


def test_model_that_enters_autocast_needs_autocast_dtype():
    """As accelerate's `prepare` makes it with mixed precision."""
    model = flexpg.enable(hf.tiny_model("llama").float().train())
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(type(model).forward), model)
    rollouts = Rollouts.from_groups([[1, 2, 3, 4]], [[[5, 6, 7], [5, 8]]], [[1.0, 0.0]])
    with pytest.raises(SelfCheckError, match=r"as after accelerate's prepare, pass autocast_dtype"):
        self_check(model, rollouts)
    self_check(model, rollouts, autocast_dtype=torch.bfloat16)


def test_torchtune_forward_that_changes_logits_fails():
    model = tiny_model("llama3_2")
    model.register_forward_hook(lambda module, args, logits: 1.1 * logits)
    with pytest.raises(SelfCheckError, match=ORDINARY):
        check(model)


def test_torchtune_model_with_chunked_logits_passes():
    model = tiny_model("llama3_2")
    model.set_num_output_chunks(4)
    check(model)


def test_tokens_outside_the_loss_are_compared_too():
    rollouts = make_rollouts()
    mask = torch.zeros_like(rollouts.completion_mask)
    mask[3, 0] = True
    with pytest.raises(SelfCheckError, match="has log-probability"):
        self_check(with_fault("packed_positions", 0), replace(rollouts, loss_mask=mask))


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@pytest.mark.parametrize("factor", [2.0, torch.nan, None], ids=["doubled", "nan", "missing"])
def test_wrong_gradient_is_named_by_its_parameter(factor):
    def change(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        if out.shape[1] < 150:  # a baseline forward, of one sequence
            return out
        return out.detach() if factor is None else ScaledGradient.apply(out, factor)

    model = tiny_model("llama3_2").train()
    model.layers[1].attn.v_proj.register_forward_hook(change)
    expected = "is NaN or Inf" if factor != factor else "differs from the baseline by"
    with pytest.raises(SelfCheckError, match=rf"the gradient of layers\.\d\.[\w.]+ for rollouts [\d, ]+ {expected}"):
        check(model)


def test_nan_weights_are_named():
    model = tiny_model("llama3_2").train()
    with torch.no_grad():
        model.layers[1].mlp.w1.weight[0] = torch.nan
    with pytest.raises(SelfCheckError, match=r"hidden state of token 0 of the prompt of rollout \d+ is NaN or Inf"):
        check(model)


def check_on_rank(rank: int) -> str:
    """Check a model that FSDP2 has sharded and that is wrong on rank 1; return the error."""
    dist.init_process_group("gloo")
    model = with_fault("packed_positions", 0) if rank == 1 else tiny_model("llama3_2").train()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(SelfCheckError) as error:
        check(model)
    return str(error.value)


@pytest.mark.slow
def test_fsdp_failure_on_one_rank_raises_on_all():
    healthy, wrong = run_processes(2, check_on_rank)
    assert healthy == "self-check failed on another rank"
    assert "has log-probability" in wrong


def with_functional_dropout() -> nn.Module:
    model = flexpg.enable(hf.tiny_model("llama"))
    model.model.layers[1].mlp = FunctionalDropout(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tiny_model("qwen2").eval(), ValueError, r"model must be in training mode, .* call model\.train\(\)"),
        (lambda: nn.Linear(1, 1).train(), TypeError, "got Linear; pass the model without torch.compile"),
        (lambda: tiny_model("qwen2").train().requires_grad_(False), ValueError, "a parameter that requires grad"),
        (lambda: hf.tiny_model("llama"), ValueError, r"call flexpg\.enable\(model\) first"),
        (with_functional_dropout, ValueError, "consumed random numbers"),
    ],
    ids=["eval", "unknown", "frozen", "not_enabled", "dropout"],
)
def test_model_that_cannot_be_checked_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        self_check(make(), make_rollouts())
