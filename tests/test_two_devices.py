"""Updates, samples, TRL's forward and the recipe on a GPU, if there is one, and on a simulated one (two_devices.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import hf_models as hf
import pytest
import torch
from baseline import in_float64 as torchtune_in_float64
from baseline import tiny_model as torchtune_model
from cases import largest_error, tokens
from conftest import needs_cuda
from hf_models import in_float64
from pictures import Picture, with_images
from torch import Tensor, nn
from two_devices import DeviceMismatchError, simulated_cuda

import flexpg
from flexpg import Rollouts, SamplingParams, group_advantages, grpo_loss, packed_logprobs, sample, self_check
from flexpg.rollout_checks import LOGPROBS

TEXT = ["llama", "gemma2", "llama4", "gpt_oss", "qwen3_moe", "qwen3_5", "bamba", "torchtune"]
IMAGES = ["qwen2_5_vl", "gemma3_vl", "smolvlm"]
PROMPTS = [tokens(40, 1), tokens(9, 2)]


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=needs_cuda)])
def on_device(request) -> Iterator[str]:
    with simulated_cuda() if request.param == "simulated" else nullcontext():
        yield request.param


def enabled(name: str) -> nn.Module:
    if name == "torchtune":
        return flexpg.enable(torchtune_in_float64(torchtune_model("llama3_2_lora"))).train()
    options = hf.FLOAT64_EXPERTS if name in ("gpt_oss", "qwen3_moe") else {}
    return flexpg.enable(in_float64(hf.tiny_model(name, **options))).train()


def text_rollouts() -> Rollouts:
    completions = [[tokens(n, 10 + n) for n in (3, 5, 1)], [tokens(n, 20 + n) for n in (4, 2)]]
    return Rollouts.from_groups(PROMPTS, completions, [[1.0, 0.0, 0.5], [1.0, 0.0]])


def image_rollouts(name: str) -> Rollouts:
    prompts = [with_images(name, tokens(5, 1), Picture(1), tokens(6, 2)), with_images(name, tokens(9, 3))]
    completions = [[tokens(3, 10 * g + i) for i in range(2)] for g in range(2)]
    return Rollouts.from_groups(
        [ids for ids, _ in prompts], completions, [[1.0, 0.0]] * 2, prompt_inputs=[given for _, given in prompts]
    )


def update(model: nn.Module, rollouts: Rollouts, max_tokens: int) -> dict[str, Tensor]:
    """Return log-probabilities, losses and the gradient of the loop in README, on the CPU."""
    results: dict[str, Tensor] = {}
    model.zero_grad()
    advantages = group_advantages(rollouts)
    for i, (batch, logprobs, entropies) in enumerate(
        packed_logprobs(model, rollouts, max_tokens=max_tokens, return_entropy=True, entropy_grad=True)
    ):
        loss = grpo_loss(
            logprobs,
            advantages[batch.indices],
            batch.loss_mask,
            total_tokens=rollouts.num_loss_tokens,
            old_logprobs=logprobs.detach() - 0.1,
            ref_logprobs=logprobs.detach() - 0.2,
            beta=0.1,
            entropies=entropies,
            entropy_coef=0.1,
            metrics={},
        )
        loss.backward()
        assert loss.device == logprobs.device == rollouts.rewards.device
        results |= {f"logprobs {i}": logprobs.detach().cpu(), f"loss {i}": loss.detach().cpu()}
    grads = [parameter.grad.cpu().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return results | {"gradient": torch.cat(grads)}


@pytest.mark.parametrize("max_tokens", [500, 45], ids=["whole", "split"])
@pytest.mark.parametrize("name", TEXT)
def test_update_on_cuda_equals_update_on_cpu(name, max_tokens, on_device):
    model = enabled(name)
    expected = update(model, text_rollouts(), max_tokens)
    ours = update(model.to("cuda"), text_rollouts().to("cuda"), max_tokens)
    assert largest_error(ours, expected) < 1e-9


@pytest.mark.parametrize("name", IMAGES)
def test_update_with_images_on_cuda_equals_update_on_cpu(name, on_device):
    model = enabled(name)
    expected = update(model, image_rollouts(name), 300)
    ours = update(model.to("cuda"), image_rollouts(name).to("cuda"), 300)
    assert largest_error(ours, expected) < 1e-6  # Qwen's vision encoder rotates in float32


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "torchtune"])
def test_samples_on_cuda_equal_samples_on_cpu(name, on_device):
    model, params = enabled(name), SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.95, stop_tokens=[1])
    expected = sample(model, PROMPTS, 3, params, seed=1)
    prompts = [PROMPTS[0], torch.tensor(PROMPTS[1], device="cuda")]  # a list goes to the model's device
    ours = sample(model.to("cuda"), prompts, 3, params, seed=1)
    assert ours.completions[0].is_cuda and ours.logprobs.is_cuda
    assert [completion.tolist() for completion in ours.completions] == [
        completion.tolist() for completion in expected.completions
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "torchtune"])
def test_self_check_on_cuda_passes(name, on_device):
    assert self_check(enabled(name).to("cuda"), text_rollouts().to("cuda"))


@pytest.mark.parametrize("given", ["prompts", "completions"])
def test_from_groups_puts_lists_on_cuda_where_a_tensor_is(given, on_device):
    prompts, completions = PROMPTS, [[[1, 2], [3]], [[4]]]
    if given == "prompts":
        prompts = [torch.tensor(prompt, device="cuda") for prompt in prompts]
    else:
        completions = [[torch.tensor(completion, device="cuda") for completion in group] for group in completions]
    rollouts = Rollouts.from_groups(prompts, completions, [[1, 0], [1]], loss_mask=[[[1, 0], [1]], [[1]]])
    assert all(x.is_cuda for x in (*rollouts.prompts, *rollouts.completions, rollouts.rewards, rollouts.loss_mask))
    assert rollouts.tree.end.is_cuda


@pytest.mark.parametrize("function", [self_check, lambda *given: next(packed_logprobs(*given, max_tokens=500))])
def test_rollouts_on_the_cpu_for_a_model_on_cuda_raise(function, on_device):
    with pytest.raises(ValueError, match=r'rollouts must be on the model\'s device, got cpu; .*\.to\("cuda:0"\)'):
        function(enabled("llama").to("cuda"), text_rollouts())


def test_rollouts_to_moves_every_tensor_and_keeps_values(on_device):
    rollouts = text_rollouts().keep_in_loss(torch.tensor([True, False, True, True, True]))
    logprobs = {name: torch.rand(rollouts.loss_mask.shape) for name in LOGPROBS}
    rollouts = replace(rollouts, **logprobs)
    moved = rollouts.to("cuda")
    assert moved.rewards.is_cuda and moved.loss_mask.is_cuda and moved.completions[0].is_cuda
    assert all(getattr(moved, name).is_cuda for name in LOGPROBS)
    back = moved.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(back.sequences, rollouts.sequences, strict=True))
    assert torch.equal(back.loss_mask, rollouts.loss_mask) and torch.equal(back.rewards, rollouts.rewards)
    assert all(torch.equal(getattr(back, name), value) for name, value in logprobs.items())


def test_from_generate_on_cuda_equals_rollouts_on_cpu(on_device):
    rows = torch.tensor([[0, 5, 6, 7, 2, 0], [0, 5, 6, 8, 9, 9]])
    mask = torch.tensor([[0, 1, 1]])
    expected = Rollouts.from_generate(rows, mask, [1.0, 0.0], eos_token_id=2)
    ours = Rollouts.from_generate(rows.to("cuda"), mask.to("cuda"), [1.0, 0.0], eos_token_id=2)
    assert ours.completions[0].is_cuda and ours.tree.end.is_cuda
    assert [sequence.tolist() for sequence in ours.sequences] == [sequence.tolist() for sequence in expected.sequences]


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_trl_forward_on_cuda_equals_its_forward_on_cpu(name, monkeypatch, on_device):
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from flexpg.integrations.trl import share_prefixes

    if on_device == "simulated":
        for module in (chunked_logprob, utils):  # TRL's kernels need a GPU
            monkeypatch.setattr(module, "_use_triton", lambda device: False)
    model = in_float64(hf.tiny_model(name))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    share_prefixes(model)
    ids = torch.tensor([[*PROMPTS[0], *tokens(6, n)] for n in range(3)])
    labels = ids.where(torch.arange(46) >= 40, -100)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    expected = model(**given, fused_lm_head=True)
    ours = model.to("cuda")(**{name: value.to("cuda") for name, value in given.items()}, fused_lm_head=True)
    assert ours.log_probs.is_cuda
    for name in ("log_probs", "entropy"):  # in float32, in which TRL's output layer accumulates
        torch.testing.assert_close(getattr(ours, name).cpu(), getattr(expected, name), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="Adam of torch's CUDA build needs a GPU driver")
@pytest.mark.parametrize("config", ["tiny_cpu", "tiny_lora_cpu", "tiny_transformers_cpu"])
def test_recipe_on_simulated_cuda_trains_evaluates_and_resumes(config, tmp_path, monkeypatch):
    from recipe_runs import SHORT, SMALL, make, train

    from flexpg.backends import dispatch

    choose = dispatch._choose
    monkeypatch.setattr(  # FlexAttention's kernels need a GPU
        dispatch, "_choose", lambda backend, q, is_plain: "dense" if q.is_cuda else choose(backend, q, is_plain)
    )
    options = [*SMALL, *SHORT, "device=cuda", "self_check=true", "loss.beta=0.1", "num_iterations=2"]
    options += ["checkpoint_every_n_steps=1", "eval_every_n_steps=1", "test_problems.size=2", "num_steps=1"]
    options += ["train_problems.shots=1", "test_problems.shots=1"]
    config = f"recipes/configs/{config}.yaml"
    with simulated_cuda():
        train(make(tmp_path, *options, config=config))
        resumed = train(make(tmp_path, *options, "resume=true", "num_steps=2", config=config))
        assert all(parameter.is_cuda for parameter in resumed.model.parameters())
    assert resumed.steps_done == 2 and resumed.history[1]["grad_norm"] > 0


# The simulated device raises where a GPU would.


def on_cuda(size: int = 3) -> Tensor:
    return torch.arange(size, device="cuda")


@pytest.mark.parametrize(
    "operation",
    [
        lambda: on_cuda() + torch.arange(3),
        lambda: torch.cat([on_cuda(), torch.zeros(1)]),
        lambda: nn.Linear(3, 2).to("cuda")(torch.ones(3)),
        lambda: nn.Embedding(3, 2)(on_cuda()),
        lambda: torch.arange(3)[on_cuda()],
        lambda: on_cuda().index_put_((on_cuda(),), torch.arange(3)),
        lambda: on_cuda().index_select(0, torch.arange(2)),
        lambda: on_cuda().numpy(),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    ],
    ids=["add", "cat", "linear", "embedding", "cpu_by_cuda", "index_put", "index_select", "numpy", "generator"],
)
def test_operation_on_two_devices_raises(operation: Callable[[], Any]):
    with simulated_cuda(), pytest.raises(DeviceMismatchError):
        operation()


@pytest.mark.parametrize(
    "operation",
    [
        lambda: on_cuda() + torch.tensor(1),
        lambda: on_cuda()[torch.tensor([0, 2])],
        lambda: on_cuda().copy_(torch.arange(3)),
        lambda: torch.arange(3).to("cuda"),
        lambda: on_cuda().new_zeros(2),
        lambda: torch.zeros(2, device=on_cuda().device),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator("cuda")),
        lambda: nn.Linear(3, 2).to("cuda")(torch.ones(3, device="cuda")),
        lambda: on_cuda().cpu().cuda(),
    ],
    ids=["scalar", "cpu_index", "copy", "to", "new", "device_of", "generator", "linear", "and_back"],
)
def test_operation_that_cuda_allows_returns_a_cuda_tensor(operation: Callable[[], Tensor]):
    with simulated_cuda():
        assert operation().device == torch.device("cuda", 0) and operation().is_cuda
