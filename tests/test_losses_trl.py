"""grpo_loss compared with TRL's own trainer and liger-kernel's fused loss, values and gradients."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from loss_cases import (
    MAX_COMPLETION_LENGTH,
    OPTIONS,
    VESPO,
    each_level,
    each_trl_loss_type,
    each_trl_loss_type_and_level,
    loss_and_grad,
    loss_and_metrics,
    options_of,
    random_batch,
    rows,
    totals,
    with_entropies,
)

from flexpg.loss_terms import ImportanceSamplingMode
from flexpg.losses import grpo_loss


def trl_loss(
    batch,
    loss_type,
    level="token",
    *,
    tokens_in_step=None,
    accumulation_steps=1,
    delta=None,
    sampler_ratio=None,
    entropy_coef=0.0,
):
    """Return the loss and metrics of TRL's own GRPOTrainer._compute_loss for one micro-batch.

    It is called on an object that has the attributes GRPOConfig would set, and returns these log-probabilities.
    """
    from trl import GRPOTrainer

    mask = batch["loss_mask"]
    entropies = batch.get("entropies", torch.zeros(mask.shape))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], entropies, None),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=OPTIONS["beta"],
        epsilon_low=OPTIONS["epsilon"],
        epsilon_high=options_of(loss_type)["epsilon_high"],
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=accumulation_steps,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            steps_per_generation=accumulation_steps,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            **VESPO,
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=sampler_ratio is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=entropy_coef != 0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
    )
    ones = torch.ones(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ones,
        "completion_mask": ones,
        "tool_mask": mask.long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": mask.sum() if tokens_in_step is None else tokens_in_step,
        "importance_sampling_ratio": sampler_ratio,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@each_trl_loss_type_and_level
def test_grpo_loss_matches_trl(loss_type, level):
    batch = random_batch(num_rollouts=8, seed=2)
    theirs, their_metrics = trl_loss(batch, loss_type, level)
    theirs.backward()
    options = options_of(loss_type, level)
    loss, grad = loss_and_grad(batch, **options)
    rounding = 1e-7 if loss_type == "sapo" else 1e-12  # TRL's temperature is float32
    assert torch.allclose(loss, theirs, rtol=rounding, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=rounding, atol=1e-15)
    metrics = loss_and_metrics(batch, **options)[1]
    assert metrics["kl"].item() == pytest.approx(their_metrics["kl"][0], rel=1e-12)
    if level == "token" and loss_type == "cispo":
        assert metrics["clip_high"].item() == pytest.approx(their_metrics["cispo_clip_ratio"][0]) != 0
    elif level == "token" and loss_type not in ("sapo", "vespo"):
        assert metrics["clip_low"].item() == pytest.approx(their_metrics["clip_ratio/low_mean"][0]) != 0
        assert metrics["clip_high"].item() == pytest.approx(their_metrics["clip_ratio/high_mean"][0]) != 0


@each_level
def test_two_sided_clipping_matches_trl(level):
    batch = random_batch(num_rollouts=8, seed=2)
    batch["old_logprobs"] = batch["logprobs"].detach() + 2 * (batch["old_logprobs"] - batch["logprobs"].detach())
    theirs, _ = trl_loss(batch, "dapo", level, delta=1.5)
    theirs.backward()
    loss, grad = loss_and_grad(batch, **options_of("dapo", level), delta=1.5)
    assert torch.allclose(loss, theirs, rtol=1e-12, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=1e-12, atol=1e-15)
    assert loss != loss_and_grad(batch, **options_of("dapo", level))[0]


@each_trl_loss_type
@pytest.mark.parametrize("mode", get_args(ImportanceSamplingMode))
def test_sampler_correction_matches_trl(mode, loss_type):
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL and grpo_loss refuse it")
    batch = random_batch(num_rollouts=8, seed=5)
    gap = 0.8 * torch.randn(batch["loss_mask"].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    batch["old_logprobs"] = batch["old_logprobs"].detach()
    # As TRL's _generate_and_score_completions computes it.
    difference = gap * batch["loss_mask"]
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(0.4, 1.8)
    else:
        ratio = ratio.masked_fill((ratio < 0.4) | (ratio > 1.8), 0.0)
    theirs, _ = trl_loss(batch, loss_type, sampler_ratio=ratio)
    theirs.backward()
    options = options_of(loss_type) | {"importance_sampling_mode": mode}
    options |= {"importance_sampling_clip_min": 0.4, "importance_sampling_clip_max": 1.8}
    loss, grad = loss_and_grad(batch | {"sampler_logprobs": batch["old_logprobs"] - gap}, **options)
    rounding = 1e-7 if loss_type == "sapo" else 1e-12  # TRL's temperature is float32
    assert torch.allclose(loss, theirs, rtol=rounding, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=rounding, atol=1e-15)


def test_vespo_limits_of_the_weight_match_trl():
    # Tokens beyond 20 and rollouts beyond log(1e-8) and 20: without the limits the weights are e^5, e^-25 and e^30.
    log_ratios = torch.tensor([[30.0, -25.0], [-15.0, -10.0], [15.0, 15.0], [0.5, -0.25]], dtype=torch.float64)
    batch = random_batch(num_rollouts=4, longest=2) | {"loss_mask": torch.ones(4, 2, dtype=torch.bool)}
    for sign in (1, -1):
        batch |= {"old_logprobs": batch["logprobs"].detach() - log_ratios, "advantages": sign * torch.ones(4).double()}
        batch = rows(batch, 0, 4)
        theirs, _ = trl_loss(batch, "vespo")
        theirs.backward()
        loss, grad = loss_and_grad(batch, **options_of("vespo"))
        assert torch.allclose(loss, theirs, rtol=1e-12, atol=0)
        assert torch.allclose(grad, batch["logprobs"].grad, rtol=1e-12, atol=1e-15)


@each_trl_loss_type
def test_rollout_without_loss_tokens_matches_trls_truncated_completion(loss_type):
    batch = random_batch(num_rollouts=8, seed=2)
    batch["loss_mask"][3] = False  # as Rollouts.keep_in_loss and TRL's mask_truncated_completions have it
    theirs, _ = trl_loss(batch, loss_type)
    theirs.backward()
    loss, grad = loss_and_grad(batch, **options_of(loss_type))
    rounding = 1e-7 if loss_type == "sapo" else 1e-12  # TRL's temperature is float32
    assert torch.allclose(loss, theirs, rtol=rounding, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=rounding, atol=1e-15)


@each_trl_loss_type
def test_entropy_bonus_matches_trl(loss_type):
    batch = with_entropies(random_batch(num_rollouts=8, seed=2))
    theirs, their_metrics = trl_loss(batch, loss_type, entropy_coef=0.4)
    theirs.backward()
    their_grad, batch["entropies"].grad = batch["entropies"].grad, None
    options = options_of(loss_type) | {"entropy_coef": 0.4}
    loss, grad = loss_and_grad(batch, **options)
    rounding = 1e-7 if loss_type == "sapo" else 1e-12  # TRL's temperature is float32
    assert torch.allclose(loss, theirs, rtol=rounding, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=rounding, atol=1e-15)
    assert torch.allclose(batch["entropies"].grad, their_grad, rtol=1e-12, atol=0) and their_grad.any()
    metrics = loss_and_metrics(batch, **options)[1]
    assert metrics["entropy"].item() == pytest.approx(their_metrics["entropy"][0], rel=1e-12)


@each_trl_loss_type
def test_micro_batches_match_trl_gradient_accumulation(loss_type):
    batch = random_batch(num_rollouts=8, seed=3)
    for part in (rows(batch, 0, 4), rows(batch, 4, 8)):
        theirs, _ = trl_loss(part, loss_type, tokens_in_step=batch["loss_mask"].sum(), accumulation_steps=2)
        rounding = 1e-6 if loss_type == "sapo" else 1e-12  # TRL's temperature is float32
        if loss_type == "bnpo":  # TRL counts tokens per micro-batch and averages: the departure that losses.py names
            ours = grpo_loss(**part, **options_of(loss_type)) / 2
        else:
            ours = grpo_loss(**part, **options_of(loss_type), **totals(batch, loss_type))
        assert torch.allclose(ours, theirs, rtol=rounding, atol=0)


@each_trl_loss_type_and_level
def test_grpo_loss_matches_liger(loss_type, level):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if level == "sequence" and loss_type in ("cispo", "sapo"):  # and "vespo"
        pytest.skip("liger-kernel has no ratios of sequences for it")
    batch = random_batch(dtype=torch.float32, seed=4)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=True)
    tokens = torch.randint(11, (6, 7), generator=generator)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # [N, C]
    shift = logprobs.detach() - batch["logprobs"].detach()
    batch |= {"logprobs": logprobs, "old_logprobs": batch["old_logprobs"] + shift}
    batch |= {"ref_logprobs": batch["ref_logprobs"] + shift}

    loss, metrics = loss_and_metrics(batch, **options_of(loss_type, level))
    grads = torch.autograd.grad(loss, [hidden, weight])
    fused = LigerFusedLinearGRPOLoss(
        beta=OPTIONS["beta"],
        compiled=False,
        epsilon_low=OPTIONS["epsilon"],
        epsilon_high=options_of(loss_type)["epsilon_high"],
        loss_type=loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        importance_sampling_level=level,
        **VESPO,
    )
    theirs, (their_kl, their_clip) = fused(
        hidden,
        weight,
        tokens,
        batch["loss_mask"].float(),
        batch["advantages"],
        ref_per_token_logps=batch["ref_logprobs"],
        old_per_token_logps=batch["old_logprobs"],
    )
    their_grads = torch.autograd.grad(theirs, [hidden, weight])
    assert torch.allclose(loss, theirs, rtol=1e-6, atol=1e-7)
    assert torch.allclose(metrics["kl"], their_kl, rtol=1e-6, atol=1e-7)
    clipped = sum((metrics[name] for name in ("clip_low", "clip_high") if name in metrics), start=torch.tensor(0.0))
    assert torch.allclose(clipped, their_clip, rtol=1e-6)
    for grad, theirs in zip(grads, their_grads, strict=True):
        assert torch.allclose(grad, theirs, rtol=1e-5, atol=1e-7)
