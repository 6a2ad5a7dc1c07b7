"""grpo_loss compared with values by hand; in test_losses_trl.py with other implementations."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import (
    OPTIONS,
    each_level,
    each_loss_type,
    each_loss_type_and_level,
    loss_and_grad,
    loss_and_metrics,
    options_of,
    random_batch,
    rows,
    totals,
    with_entropies,
)

from flexpg.losses import BY_TOKENS, grpo_loss

# By hand. Rollout 0 has A = 2 and ratios 1.5 and 0.5; rollout 1 has A = -1 and one token of ratio 1.5. Epsilon is 0.2:
#   min(1.5 * 2, 1.2 * 2) = 2.4      min(0.5 * 2, 0.8 * 2) = 1.0      min(1.5 * -1, 1.2 * -1) = -1.5
RATIOS = torch.tensor([[1.5, 0.5], [1.5, 99.0]], dtype=torch.float64)
BY_HAND = {
    "logprobs": RATIOS.log() - 3,
    "old_logprobs": torch.full((2, 2), -3.0, dtype=torch.float64),
    "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
    "loss_mask": torch.tensor([[True, True], [True, False]]),
}
FLIPPED = BY_HAND | {"advantages": -BY_HAND["advantages"]}


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", -((2.4 + 1.0) / 2 + -1.5 / 1) / 2),  # mean over tokens, then over rollouts: -0.1
        ("bnpo", -(2.4 + 1.0 - 1.5) / 3),  # over 3 tokens
        ("dapo", -(2.4 + 1.0 - 1.5) / 3),
        ("dr_grpo", -(2.4 + 1.0 - 1.5) / (2 * 4)),  # over 2 rollouts of at most 4 tokens
    ],
    ids=["grpo", "bnpo", "dapo", "dr_grpo"],
)
def test_grpo_loss_by_hand(loss_type, expected):
    loss, metrics = loss_and_metrics(BY_HAND, loss_type=loss_type, max_completion_length=4)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert metrics["ratio"].item() == pytest.approx(3.5 / 3)
    assert metrics["clip_high"].item() == pytest.approx(1 / 3)  # 1.5 with A = 2; not 1.5 with A = -1
    assert metrics["clip_low"].item() == 0  # 0.5 is low, but has A = 2


def test_grpo_loss_clip_low_counts_low_ratios_of_bad_rollouts():
    metrics = loss_and_metrics(FLIPPED)[1]
    assert metrics["clip_low"].item() == pytest.approx(1 / 3)
    assert metrics["clip_high"].item() == pytest.approx(1 / 3)  # now rollout 1's 1.5


def test_grpo_loss_kl_is_k3():
    # The reference gives the token twice the probability: 2 - log 2 - 1 = 0.30685, and beta 0.5 adds half of it.
    batch = BY_HAND | {"old_logprobs": None, "ref_logprobs": BY_HAND["logprobs"] + math.log(2)}
    without, monitored = loss_and_metrics(batch)
    with_kl, metrics = loss_and_metrics(batch, beta=0.5)
    assert metrics["kl"].item() == monitored["kl"].item() == pytest.approx(1 - math.log(2))
    assert (with_kl - without).item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_grpo_loss_sequence_level_takes_the_geometric_mean():
    # Rollout 0: sqrt(1.5 * 0.5) = 0.8660 for both of its tokens. Rollout 1: 1.5. With A = 2 and -1: 2 * 1.7320 - 1.5.
    loss, metrics = loss_and_metrics(BY_HAND, importance_sampling_level="sequence")
    assert loss.item() == pytest.approx(-(2 * 2 * math.sqrt(0.75) - 1.5) / 3)
    assert metrics["ratio"].item() == pytest.approx((2 * math.sqrt(0.75) + 1.5) / 3)


def test_grpo_loss_vespo_weight_is_the_product_of_a_rollouts_ratios():
    # Rollout 0: w = 1.5 * 0.5 and A = 2. Rollout 1: w = 1.5 and A = -1. phi(w) = e^lambda w^k e^(-lambda w).
    good, bad = math.exp(3 - 3 * 0.75) * 0.75**2, math.exp(2 - 2 * 1.5) * 1.5**3
    loss, metrics = loss_and_metrics(BY_HAND, loss_type="vespo")
    first, second = (RATIOS[0].log() - 3).sum().item(), math.log(1.5) - 3
    assert loss.item() == pytest.approx(-(good * 2 * first - bad * second) / 3)
    assert metrics["vespo_weight"].item() == pytest.approx((2 * good + bad) / 3)
    assert loss_and_grad(BY_HAND | {"old_logprobs": None}, loss_type="vespo")[1][0].tolist() == [-2 / 3, -2 / 3]


@each_loss_type
def test_grpo_loss_entropy_bonus_is_a_mean_over_loss_tokens(loss_type):
    entropies = torch.tensor([[0.5, 1.0], [1.5, math.nan]], dtype=torch.float64, requires_grad=True)
    batch, options = BY_HAND | {"entropies": entropies}, options_of(loss_type) | {"beta": 0.0}
    loss, metrics = loss_and_metrics(batch, **options, entropy_coef=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(grpo_loss(**BY_HAND, **options).item() - 0.5 * 3.0 / 3)
    assert metrics["entropy"].item() == 1.0
    assert torch.allclose(entropies.grad, torch.tensor([[-1, -1], [-1, 0]]).double() / 6)
    assert grpo_loss(**batch, **options) == grpo_loss(**BY_HAND, **options)


# Gradients


@each_level
def test_gradient_on_policy_raises_good_rollouts_and_lowers_bad_ones(level):
    on_policy, flipped = BY_HAND | {"old_logprobs": None}, FLIPPED | {"old_logprobs": None}
    grad = loss_and_grad(on_policy, importance_sampling_level=level)[1]
    # The ratio is 1, and so is its derivative: -A / 3 tokens, and 0 where the mask is False.
    assert torch.allclose(grad, torch.tensor([[-2, -2], [1, 0]], dtype=torch.float64) / 3, rtol=1e-14, atol=0)
    assert torch.equal(loss_and_grad(flipped, importance_sampling_level=level)[1], -grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.3, 1.0, False), (0.7, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_gradient_is_clipped_on_the_side_that_went_too_far(ratio, advantage, flows):
    batch = {
        "logprobs": torch.tensor([[math.log(ratio)]]),
        "old_logprobs": torch.zeros(1, 1),
        "advantages": torch.tensor([advantage]),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    assert loss_and_grad(batch)[1].item() == (pytest.approx(-advantage * ratio) if flows else 0)


@each_level
def test_clipped_ratio_that_overflows_has_gradient_0_and_not_nan(level):
    batch = {
        "logprobs": torch.zeros(1, 1),
        "old_logprobs": torch.full((1, 1), -100.0),  # exp(100) is inf in float32
        "advantages": torch.ones(1),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    loss, grad = loss_and_grad(batch, importance_sampling_level=level)
    assert loss.item() == pytest.approx(-1.2) and grad.item() == 0


@pytest.mark.parametrize(("loss_type", "expected"), [("sapo", -4.0), ("vespo", 0.0)])
def test_unclipped_ratio_that_overflows_has_gradient_0_and_not_nan(loss_type, expected):
    batch = {
        "logprobs": torch.zeros(1, 1),
        "old_logprobs": torch.full((1, 1), -100.0),
        "advantages": torch.ones(1),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    loss, grad = loss_and_grad(batch, loss_type=loss_type)
    assert loss.item() == expected and grad.item() == 0


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "vespo"])
def test_overflowing_ratio_without_an_advantage_has_gradient_0_not_nan(loss_type):
    batch = {
        "logprobs": torch.full((1, 1), -1.0),
        "old_logprobs": torch.full((1, 1), -120.0),
        "advantages": torch.zeros(1),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    loss, grad = loss_and_grad(batch, loss_type=loss_type)
    assert loss.item() == grad.item() == 0


@each_level
@pytest.mark.parametrize(("ratio", "epsilon"), [(1.0, 0.0), (1.5, 0.5), (0.5, 0.5), (2.0, 1.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gradient_where_the_ratio_equals_the_clip_bound_is_full(ratio, epsilon, advantage, level):
    # torch's minimum and clamp halve the gradient at a tie, or drop it, depending on the version.
    old = -torch.tensor([[ratio]], dtype=torch.float64).log()
    assert (-old).exp().item() == ratio  # without rounding
    batch = {"logprobs": torch.zeros_like(old), "old_logprobs": old, "advantages": torch.tensor([advantage])}
    batch["loss_mask"] = torch.ones(1, 1, dtype=torch.bool)
    loss, grad = loss_and_grad(batch, epsilon=epsilon, importance_sampling_level=level)
    assert (loss.item(), grad.item()) == (-advantage * ratio, -advantage * ratio)


def test_epsilon_high_moves_only_the_upper_bound():
    assert loss_and_grad(BY_HAND, epsilon_high=0.6)[1][0, 0] != 0  # 1.5 is inside now
    assert loss_and_grad(BY_HAND)[1][0, 0] == 0
    assert loss_and_grad(FLIPPED, epsilon_high=0.6)[1][0, 1] == 0  # 0.5 with A = -2 stays clipped


def test_gradient_flows_only_to_logprobs():
    batch = random_batch()
    leaves = {name: values.detach().requires_grad_() for name, values in batch.items() if name != "loss_mask"}
    grpo_loss(**leaves, loss_mask=batch["loss_mask"], **OPTIONS).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["logprobs"]
    policy = BY_HAND["logprobs"].clone().requires_grad_()  # the same tensor as policy and old policy
    grpo_loss(policy, BY_HAND["advantages"], BY_HAND["loss_mask"], old_logprobs=policy).backward()
    assert torch.equal(policy.grad, loss_and_grad(BY_HAND | {"old_logprobs": None})[1])


# Micro-batches


@each_loss_type_and_level
def test_micro_batches_with_totals_sum_to_the_steps_loss(loss_type, level):
    batch = random_batch()
    batch["loss_mask"][3] = False  # a rollout without loss tokens counts as a rollout
    options = options_of(loss_type, level)
    loss, grad = loss_and_grad(batch, **options)
    parts = [
        loss_and_grad(rows(batch, *cut), **options, **totals(batch, loss_type)) for cut in [(0, 1), (1, 5), (5, 6)]
    ]
    assert torch.allclose(sum(part for part, _ in parts), loss, rtol=1e-13, atol=0)
    assert torch.allclose(torch.cat([grad for _, grad in parts]), grad, rtol=1e-13, atol=0)


@each_loss_type
def test_entropy_bonus_of_micro_batches_sums_to_the_steps(loss_type):
    batch = with_entropies(random_batch())
    batch["loss_mask"][3] = False
    options = options_of(loss_type) | {"entropy_coef": 0.3}
    loss = loss_and_grad(batch, **options)[0]
    grad, batch["entropies"].grad = batch["entropies"].grad, None
    both = {"total_tokens": batch["loss_mask"].sum(), "total_rollouts": 6}
    parts = [loss_and_grad(rows(batch, *cut), **options, **both)[0] for cut in [(0, 1), (1, 5), (5, 6)]]
    assert torch.allclose(sum(parts), loss, rtol=1e-13, atol=0)
    assert torch.allclose(batch["entropies"].grad, grad, rtol=1e-13, atol=0)


@each_loss_type
def test_the_total_of_another_loss_type_raises(loss_type):
    wrong = {"total_rollouts": 9} if loss_type in BY_TOKENS else {"total_tokens": 9}
    with pytest.raises(ValueError, match=f"'{loss_type}' is normalized by .*: pass total_"):
        grpo_loss(**random_batch(), **options_of(loss_type), **wrong)


def test_metrics_are_detached_means_over_loss_tokens():
    batch = with_entropies(random_batch())
    whole = loss_and_metrics(batch, **OPTIONS)[1]
    assert set(whole) == {"ratio", "clip_low", "clip_high", "kl", "entropy"}
    cuts = [(0, 2), (2, 6)]
    parts = [loss_and_metrics(rows(batch, *cut), **OPTIONS)[1] for cut in cuts]
    counts = [batch["loss_mask"][slice(*cut)].sum() for cut in cuts]
    for name, value in whole.items():
        assert value.dim() == 0 and not value.requires_grad and value.dtype == torch.float64
        average = sum(part[name] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert torch.allclose(average, value, rtol=1e-13)


def test_a_micro_batch_without_loss_tokens_adds_zero():
    batch = rows(random_batch(), 0, 1)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    loss, metrics = loss_and_metrics(batch, **OPTIONS, total_tokens=10)
    loss.backward()
    assert loss == 0 and metrics["ratio"] == 0 and not batch["logprobs"].grad.any()
    with pytest.raises(ValueError, match="there must be a loss token in the step"):
        grpo_loss(**batch, **OPTIONS)


# Masked values, precision, options


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@each_loss_type_and_level
def test_nan_and_inf_outside_the_loss_mask_are_not_read(loss_type, level, poison):
    batch = random_batch()
    batch["loss_mask"][2] = False
    poisoned = batch | {"advantages": batch["advantages"].index_fill(0, torch.tensor(2), poison)}
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        poisoned[name] = batch[name].detach().masked_fill(~batch["loss_mask"], poison)
    results = []
    for inputs in (rows(batch, 0, 6), rows(poisoned, 0, 6)):
        loss, metrics = loss_and_metrics(inputs, **options_of(loss_type, level))
        loss.backward()
        results.append([loss, inputs["logprobs"].grad, *metrics.values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][0].isfinite() and results[0][1].isfinite().all()
    assert torch.equal(results[0][1] != 0, batch["loss_mask"])  # the KL term reaches every loss token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in random_batch().items()}
    upcast = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    loss, grad = loss_and_grad(batch, **OPTIONS)
    exact_loss, exact_grad = loss_and_grad(upcast, **OPTIONS)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact_loss)
    assert grad.dtype == dtype and torch.equal(grad, exact_grad.to(dtype))
    assert grpo_loss(**random_batch(), **OPTIONS).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 2.0}, "epsilon must be between 0 and 1"),
        ({"epsilon": 0.1, "epsilon_high": -0.1}, "epsilon_high at least 0"),
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"beta": math.nan}, "beta must be at least 0, got nan"),
        ({"beta": 0.1, "ref_logprobs": None}, "beta=0.1 needs ref_logprobs, got None"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"loss_type": "cispo"}, "'cispo' needs epsilon_high of at least 1, the largest ratio, got None"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "at least 1, the largest ratio, got 0.28"),
        ({"delta": 1.2}, r"delta must be above 1 \+ epsilon_high = 1.2, got 1.2"),
        ({"loss_type": "sapo", "delta": 4.0}, "delta must be None for loss_type 'sapo'"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "temperatures must be positive, got 1.0 and 0.0"),
        (
            {"importance_sampling_clip_min": 3.0},
            "clip_max must be above importance_sampling_clip_min, .* got 3.0 and 3.0",
        ),
        ({"importance_sampling_clip_max": 0.0}, "clip_max must be above"),
        ({"importance_sampling_mode": "turn_mask"}, "importance_sampling_mode must be one of token_truncate"),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            "level must be 'token' for",
        ),
        (
            {"loss_type": "vespo", "sampler_logprobs": torch.zeros(6, 7)},
            "mode must be 'token_truncate' or 'token_mask' for loss_type 'vespo', got 'sequence_mask'",
        ),
        (
            {"loss_type": "vespo", "vespo_k_neg": -1.0},
            "vespo_k_.* at least 0 .* got k 2.0 and -1.0, lambda 3.0",
        ),
        ({"loss_type": "vespo", "vespo_lambda_pos": 0.0}, "at least 1e-4, got .* lambda 0.0 and 2.0"),
        ({"entropy_coef": 0.1}, r"entropy_coef needs entropies with a gradient, .* got None"),
        ({"entropy_coef": 0.1, "entropies": torch.zeros(6, 7)}, "with a gradient, .* got a tensor without"),
        (
            {
                "loss_type": "grpo",
                "entropy_coef": 0.1,
                "entropies": torch.zeros(6, 7, requires_grad=True),
                "total_rollouts": 9,
            },
            "mean over loss tokens: pass total_tokens besides total_rollouts",
        ),
        ({"entropies": torch.zeros(6, 1)}, r"must all be \[N, C\]"),
        ({"sampler_logprobs": torch.zeros(6, 1)}, r"must all be \[N, C\]"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level must be one of token"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"loss_mask": torch.ones(6, 7)}, "loss_mask must be bool"),
        ({"advantages": torch.ones(6, 1)}, r"advantages must be \[6\]"),
        ({"old_logprobs": torch.zeros(6, 1)}, r"must all be \[N, C\]"),
    ],
    ids=str,
)
def test_grpo_loss_options_that_would_be_wrong_silently_raise(options, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**random_batch() | options)


# The sampler is not the trainer. Ratios of the old policy to the sampler: rollout 0 has 4 and 0.5, rollout 1 has 1.25.
SAMPLER = {"sampler_logprobs": BY_HAND["old_logprobs"] - torch.tensor([[4.0, 0.5], [1.25, 77.0]]).double().log()}


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token_truncate", [[3.0, 0.5], [1.25, 1.0]]),
        ("token_mask", [[0.0, 0.5], [1.25, 1.0]]),
        ("sequence_truncate", [[2.0, 2.0], [1.25, 1.25]]),
        ("sequence_mask", [[2.0, 2.0], [1.25, 1.25]]),
    ],
)
def test_sampler_correction_by_hand(mode, weights):
    loss, metrics = loss_and_metrics(BY_HAND | SAMPLER, importance_sampling_mode=mode)
    (a, b), (c, _) = weights
    assert loss.item() == pytest.approx(-(a * 2.4 + b * 1.0 - c * 1.5) / 3)
    assert metrics["sampler_ratio"].item() == pytest.approx((a + b + c) / 3)
    assert metrics["sampler_ratio_max"].item() == pytest.approx(4.0 if mode.startswith("token") else 2.0)
    expected = sum(w - 1 - math.log(w) for w in (4.0, 0.5, 1.25)) / 3
    assert metrics["sampler_kl"].item() == pytest.approx(expected)


def test_sampler_correction_has_limits_of_its_own():
    def ratio(**limits):
        options = {f"importance_sampling_clip_{name}": value for name, value in limits.items()}
        return loss_and_metrics(BY_HAND | SAMPLER, importance_sampling_mode="token_truncate", **options)[1][
            "sampler_ratio"
        ].item()

    assert ratio(max=None) == pytest.approx((4 + 0.5 + 1.25) / 3)
    assert ratio(max=1.2, min=0.8) == pytest.approx((1.2 + 0.8 + 1.2) / 3)
