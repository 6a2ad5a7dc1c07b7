"""Activations in main memory: the same gradients and updates, and what is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes
from recipe_runs import DIFFERENT, LORA, SHORT, SMALL, TINY, flat, make, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.checkpoint import checkpoint

from flexpg.training import offloading
from flexpg.training.models import GATHER
from flexpg.training.offloading import offload_activations

CPU = torch.device("cpu")


@pytest.fixture
def copies(monkeypatch) -> list[Tensor]:
    """Return the list to which every tensor is added that is copied to main memory or back."""
    return record_copies(monkeypatch)


def record_copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    copied, copy_to = [], offloading.copy_to

    def record(device: torch.device, tensor: Tensor, *args: bool) -> Tensor:
        copied.append(tensor)
        return copy_to(device, tensor, *args)

    monkeypatch.setattr(offloading, "copy_to", record)
    return copied


def gradients(model: nn.Module, x: Tensor, offload: bool, recompute: bool = False) -> list[Tensor]:
    model.zero_grad()
    if offload:
        with offload_activations(CPU):
            out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    else:
        out = model(x)
    out.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_offloaded_gradients_are_bitwise_identical_and_weights_stay(copies):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(2, 3, 8)
    expected = gradients(model, x, offload=False)
    assert not copies
    assert all(map(torch.equal, gradients(model, x, offload=True), expected))
    shapes = [tuple(tensor.shape) for tensor in copies]
    assert len(shapes) == 6 and shapes.count((6, 16)) + shapes.count((2, 3, 16)) == 4  # inputs of each layer, twice


def test_offloaded_layer_that_is_recomputed_copies_its_input_only(copies):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(3, 8, requires_grad=True)
    expected = gradients(model, x, offload=False)
    assert all(map(torch.equal, gradients(model, x, offload=True, recompute=True), expected))
    assert [tuple(tensor.shape) for tensor in copies] == [(3, 8)] * 2
    assert torch.equal(copies[0], x)


def test_offloaded_tensor_keeps_its_strides_and_broadcast_tensors_stay(copies):
    seen, base = [], torch.randn(4, 6, 2, requires_grad=True)

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tensors[0].sum()

        @staticmethod
        def backward(ctx, grad):
            seen.extend(ctx.saved_tensors)
            return grad.expand(2, 4, 3), None

    strided, broadcast = base.permute(2, 0, 1)[..., ::2], torch.randn(3, 1).expand(3, 5)
    with offload_activations(CPU):
        out = Save.apply(strided, broadcast)
    out.backward()
    assert seen[0].stride() == strided.stride() == (1, 12, 4) and torch.equal(seen[0], strided)
    assert seen[1].data_ptr() == broadcast.data_ptr()
    assert len(copies) == 2


OPTIONS = (*SMALL, *SHORT, DIFFERENT, "num_steps=2")
RUNS = {
    "all": [],
    "checkpointing": ["activation_checkpointing=true"],
    "oversized groups": ["max_tokens=328"],
    "lora": [*LORA, "loss.beta=0.1", "activation_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_run_with_activation_offloading_is_bitwise_identical(tmp_path, copies, run):
    expected = train(make(tmp_path / "without", *OPTIONS, *RUNS[run]))
    assert not copies
    offloaded = train(make(tmp_path / "with", *OPTIONS, *RUNS[run], "activation_offloading=true"))
    assert torch.equal(flat(offloaded.trained), flat(expected.trained))
    assert expected.history[1]["grad_norm"] == offloaded.history[1]["grad_norm"] > 1e-3
    assert len(copies) > 20


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_cpu", "tiny_transformers_cpu"])
def test_recipe_that_recomputes_layers_offloads_their_inputs_only(tmp_path, copies, config):
    mib = []
    for on in ("false", "true"):
        copies.clear()
        options = ["num_steps=1", f"activation_checkpointing={on}", "activation_offloading=true"]
        train(make(tmp_path / on, *OPTIONS, *options, config=f"recipes/configs/{config}.yaml"))
        mib.append(sum(tensor.nbytes for tensor in copies) / 2**20)
    assert 0 < mib[1] < mib[0] / 4


def train_on_rank(rank: int, output_dir: Path, option: str) -> tuple[dict[str, Tensor], int]:
    with pytest.MonkeyPatch.context() as patch:
        copied = record_copies(patch)
        run = make(output_dir, *OPTIONS, "activation_checkpointing=true", option, config=TINY)
        run.plot = lambda data: None
        run.train()
    weights = get_model_state_dict(run.model, options=GATHER)
    run.cleanup()
    return weights, len(copied)


@pytest.mark.distributed
def test_fsdp_run_with_activation_offloading_is_bitwise_identical(tmp_path):
    found = [
        run_processes(2, train_on_rank, tmp_path / on, f"activation_offloading={on}")[0] for on in ("true", "false")
    ]
    (ours, copied), (theirs, none) = found
    assert copied > 20 and none == 0
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
