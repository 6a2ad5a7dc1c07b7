"""The check before the first update: right models pass in every precision, and known kinds of wrong ones are named."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import tokens
from test_transformers import loaded
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing
from baseline import in_float64, tiny_model

from flexpg.integrations.transformers import register
from flexpg.masks import TreeBlockMask, dense_mask
from flexpg.packing import pack, runs
from flexpg.rollouts import Rollouts
from flexpg.verify import SelfCheck, SelfCheckError, check_run, self_check

WINDOW = 30


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def rollouts(groups: int = 3, size: int = 4) -> Rollouts:
    completions = [tokens(3 + 5 * i % 17, 100 + i) for i in range(groups * size)]
    return Rollouts(
        [torch.tensor(tokens(12 + 7 * g, g)) for g in range(groups)],
        [torch.tensor(own) for own in completions],
        torch.arange(groups).repeat_interleave(size),
        torch.zeros(groups * size),
    )


def checked(model: nn.Module, **options) -> SelfCheck:
    return self_check(model.train(), rollouts(), **options)


# ---- right models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3_2", "llama3_2_lora", "qwen2_tied", "phi3", "gemma2"])
def test_torchtune_models_pass_with_room_to_spare(name, dtype):
    model = tiny_model(name)
    found = checked(in_float64(model) if dtype == torch.float64 else model.to(dtype))
    assert 0 < found.logprob_error < 0.6 * found.logprob_budget
    assert 0 < found.gradient_error < 0.6 * found.gradient_budget
    assert found.rollouts == 3 and found.tokens == 185


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "mixtral", "gpt2"])
def test_transformers_models_pass_with_room_to_spare(name, dtype):
    found = checked(loaded(name).to(dtype))
    assert 0 < found.logprob_error < 0.6 * found.logprob_budget
    assert 0 < found.gradient_error < 0.6 * found.gradient_budget


def test_the_budget_is_rounding_and_no_more():
    budgets = {dtype: checked(tiny_model("llama3_2").to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert budgets[torch.float32].logprob_budget < 1e-4
    assert budgets[torch.float32].gradient_budget < 1e-3
    assert 1e-2 < budgets[torch.bfloat16].logprob_budget < 1


def test_a_group_over_the_budget_is_checked_behind_its_encoded_prompt():
    model = tiny_model("qwen2").train()
    (run,) = runs(pack(rollouts(groups=1, size=12), max_tokens=60))
    assert len(run) > 2 and run[0].prefix_tokens
    assert check_run(model, run).rollouts == 6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_may_be_checkpointed_and_compiled(compiled, checkpointing):
    model = tiny_model("llama3_2").train()
    if compiled:
        for layer in model.layers:
            layer.compile(backend="eager")
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    checked(model)
    layers = [module for module in model.modules() if isinstance(module, TransformerSelfAttentionLayer)]
    assert all((layer._compiled_call_impl is not None) == compiled for layer in layers)


def test_rollouts_that_share_nothing_or_are_alone_pass():
    self_check(tiny_model("qwen2").train(), rollouts(groups=3, size=1))
    same = Rollouts([torch.tensor([1, 2])], [torch.tensor([3])] * 2, torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    self_check(tiny_model("qwen2").train(), same)


def test_nothing_is_changed():
    model = tiny_model("qwen2").train()
    kept = torch.randn_like(model.norm.scale)
    model.norm.scale.grad = kept
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    checked(model)
    assert model.norm.scale.grad is kept
    assert all(own.grad is None for own in model.parameters() if own is not model.norm.scale)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not any(module._forward_hooks for module in model.modules())


# ---- wrong models ----------------------------------------------------------------------------------------------------


class Blind(nn.Module):
    """Attention that takes no notice of the mask it is given."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, y: Tensor, *, mask: object = None, input_pos: Tensor | None = None) -> Tensor:
        return self.attn(x, x, input_pos=input_pos)


class CountsPacked(nn.Module):
    """Rotary positions that count the row's tokens."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        return self.rope(x)


class Drops(nn.Module):
    """Dropout that is no nn.Dropout, and so is not seen before the model runs."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.mlp(x), 0.1, self.training)


class WindowByIndex(nn.Module):
    """Attention over the last tokens of the row, where the sequence's are meant."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, y: Tensor, *, mask: object = None, input_pos: Tensor | None = None) -> Tensor:
        own = self.attn
        q, k, v = (proj(x).unflatten(-1, (-1, own.head_dim)) for proj in (own.q_proj, own.k_proj, own.v_proj))
        q, k = own.pos_embeddings(q, input_pos=input_pos), own.pos_embeddings(k, input_pos=input_pos)
        length = x.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if isinstance(mask, TreeBlockMask):
            visible = dense_mask(mask.tree.end[:length])
        visible = visible.triu(1 - WINDOW)
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), visible, enable_gqa=True)
        return own.output_proj(out.transpose(1, 2).flatten(2))


def with_faults(name: str, layer: int) -> nn.Module:
    """A model of three layers, one of which is wrong."""
    model = tiny_model("llama3_2")
    own = model.layers[layer]
    if name == "packed positions":
        own.attn.pos_embeddings = CountsPacked(own.attn.pos_embeddings)
    elif name == "dropout":
        own.mlp = Drops(own.mlp)
    else:
        own.attn = {"ignores the mask": Blind, "window by index": WindowByIndex}[name](own.attn)
    return model.train()


APART = r"token \d+ of the completion of rollout \d+ has the log-probability .* they part in {layer}, which"
MOVED = r"token \d+ of the completion of rollout \d+ moved in {layer} when the completion of rollout \d+"
FAULTS = {
    "ignores the mask": MOVED,
    "packed positions": APART,
    "dropout": r"two forwards of one row differ from {layer} on, at token \d+ of the prompt of rollout \d+: .*dropout",
    "window by index": APART,
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_named_with_token_and_rollout(fault, layer):
    with pytest.raises(SelfCheckError, match=FAULTS[fault].replace("{layer}", rf"layers\.{layer}")):
        checked(with_faults(fault, layer))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_model_shows_in_bfloat16_too(fault):
    model = with_faults(fault, 0)
    if fault == "window by index":
        model.layers[1] = with_faults(fault, 1).layers[1]
    with pytest.raises(SelfCheckError, match="self-check: "):
        checked(model.to(torch.bfloat16))


def counted_from_the_rows_start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    positions = kwargs.get("position_ids", args[-1])
    return (args[0],), {"position_ids": torch.arange(positions.shape[1])[None]}


def test_a_transformers_model_that_counts_packed_tokens_is_named():
    model = loaded("llama")
    model.model.rotary_emb.register_forward_pre_hook(counted_from_the_rows_start, with_kwargs=True)
    with pytest.raises(SelfCheckError, match=r"of the completion of rollout \d+ .* they part in model\.layers\.0"):
        checked(model)


def test_what_the_integration_refuses_is_refused_here_too():
    dropping = loaded("llama")
    dropping.model.layers[1].mlp = Drops(dropping.model.layers[1].mlp)
    with pytest.raises(ValueError, match="drew random numbers"):
        checked(dropping)
    blind = loaded("llama")
    own = blind.model.layers[1].self_attn
    forward = own.forward
    own.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": None})
    with pytest.raises(TypeError, match="1 of the 2 layers"):
        checked(blind)


@pytest.mark.parametrize("wrong", [slice(0, 12), slice(0, 1)], ids=["in all layers", "in the first"])
def test_packed_positions_show_in_bfloat16_in_a_deep_model(wrong):
    model = tiny_model("llama3_2", num_layers=12)
    for layer in list(model.layers)[wrong]:
        layer.attn.pos_embeddings = CountsPacked(layer.attn.pos_embeddings)
    with pytest.raises(SelfCheckError, match="self-check: "):
        checked(model.to(torch.bfloat16))


def test_tokens_that_are_not_trained_are_compared_too():
    given = rollouts()
    mask = torch.zeros_like(given.completion_mask)
    mask[3, 0] = True
    with pytest.raises(SelfCheckError, match="has the log-probability"):
        self_check(with_faults("packed positions", 0), replace(given, loss_mask=mask))


class PrefixTwice(torch.autograd.Function):
    """Hands on what it gets, and doubles the gradient: the prefix weighted once per sibling."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_gradient_that_is_off_is_named_by_its_parameter():
    model = tiny_model("llama3_2").train()
    v_proj = model.layers[1].attn.v_proj
    v_proj.register_forward_hook(lambda module, args, out: PrefixTwice.apply(out) if out.shape[1] > 150 else out)
    with pytest.raises(SelfCheckError, match=r"the gradient of layers\.\d\.attn\.\w+\.weight, over rollouts"):
        checked(model)


class NoGradient(torch.autograd.Function):
    """Hands on what it gets, and gives a gradient that is no number."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * torch.nan


@pytest.mark.parametrize("change", [Tensor.detach, NoGradient.apply], ids=["missing", "no number"])
def test_a_gradient_that_the_packed_row_lacks_is_named(change):
    model = tiny_model("llama3_2").train()
    w2 = model.layers[1].mlp.w2
    w2.register_forward_hook(lambda module, args, out: change(out) if out.shape[1] > 150 else out)
    with pytest.raises(SelfCheckError, match=r"the gradient of [\w.]+, over rollouts"):
        checked(model)


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("llama3_2").train()
    with torch.no_grad():
        model.layers[1].mlp.w1.weight[0] = torch.nan
    with pytest.raises(SelfCheckError, match=r"the hidden state of token 0 of the prompt of rollout \d+ is not finite"):
        checked(model)


def test_another_processs_failure_ends_this_one():
    (run,) = runs(pack(rollouts(), max_tokens=8192))
    with pytest.raises(SelfCheckError, match="it failed on another process"):
        check_run(tiny_model("qwen2").train(), run, any_failed=lambda failed: True)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: tiny_model("qwen2").eval(), ValueError, r"evaluation mode, .* call model\.train\(\) first"),
        (lambda: nn.Linear(1, 1).train(), TypeError, "model is of type Linear; .* out of a wrapper that compiles them"),
        (lambda: tiny_model("qwen2").train().requires_grad_(False), ValueError, "no parameter of the model is trained"),
    ],
)
def test_what_cannot_be_checked_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        self_check(model(), rollouts())


def test_the_result_reads_as_a_sentence():
    assert re.fullmatch(
        r"self-check: completions do not see each other; 3 rollouts in \d+ packed tokens are as alone: "
        r"log-probabilities within \de-\d\d \(rounding explains \de-\d\d\), "
        r"gradients within \de-\d\d \(\de-\d\d\); \d+\.\d s",
        str(checked(tiny_model("qwen2"))),
    )
