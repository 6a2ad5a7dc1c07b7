"""grpo_loss compared with values by hand, TRL's own trainer and liger-kernel's fused loss."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from flexpg.losses import BY_TOKENS, ImportanceSamplingLevel, ImportanceSamplingMode, LossType, grpo_loss

LOSS_TYPES = get_args(LossType)
LEVELS = get_args(ImportanceSamplingLevel)
MAX_COMPLETION_LENGTH = 9
# Both clips are hit on both sides, and differ, so that mixing them up shows.
OPTIONS = {"beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.25, "max_completion_length": MAX_COMPLETION_LENGTH}
SAMPLER_MODES = get_args(ImportanceSamplingMode)
each_level = pytest.mark.parametrize("level", LEVELS)
each_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def random_batch(num_rollouts=6, longest=7, dtype=torch.float64, seed=0):
    """Return off-policy inputs; every rollout has a loss token, and tool tokens make holes in the mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    lengths = torch.randint(1, longest + 1, (num_rollouts, 1), generator=generator)
    loss_mask = torch.arange(longest) < lengths
    loss_mask &= torch.rand(loss_mask.shape, generator=generator) < 0.8
    loss_mask[:, 0] = True
    logprobs = -draw(num_rollouts, longest).abs()
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "ref_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "advantages": draw(num_rollouts),
        "loss_mask": loss_mask,
    }


def rows(batch, start, stop):
    """Return rollouts `start` to `stop`, with a leaf of their own for the gradient."""
    part = {name: values if values is None else values[start:stop] for name, values in batch.items()}
    return part | {"logprobs": part["logprobs"].detach().requires_grad_()}


def loss_and_grad(batch, **options):
    batch = rows(batch, 0, len(batch["loss_mask"]))
    loss = grpo_loss(**batch, **options)
    loss.backward()
    return loss.detach(), batch["logprobs"].grad


def loss_and_metrics(batch, **options):
    metrics = {}
    return grpo_loss(**batch, **options, metrics=metrics), metrics


def totals(batch, loss_type):
    """Return the total of a whole step that a loss type needs."""
    if loss_type in BY_TOKENS:
        return {"total_tokens": batch["loss_mask"].sum()}
    return {"total_rollouts": len(batch["loss_mask"])}


def options_of(loss_type, level="token"):
    """Return options with which the limits of a loss are hit on both sides."""
    own = {"epsilon_high": 1.25} if loss_type == "cispo" else {}
    return OPTIONS | own | {"loss_type": loss_type, "importance_sampling_level": level}


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


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
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


@each_level
@each_loss_type
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
def test_the_total_of_another_loss_type_raises(loss_type):
    wrong = {"total_rollouts": 9} if loss_type in BY_TOKENS else {"total_tokens": 9}
    with pytest.raises(ValueError, match=f"'{loss_type}' is normalized by .*: pass total_"):
        grpo_loss(**random_batch(), **options_of(loss_type), **wrong)


def test_metrics_are_detached_means_over_loss_tokens():
    batch = random_batch()
    whole = loss_and_metrics(batch, **OPTIONS)[1]
    assert set(whole) == {"ratio", "clip_low", "clip_high", "kl"}
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
@each_level
@each_loss_type
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
        ({"beta": -0.1}, "beta must be 0 or, with ref_logprobs, positive"),
        ({"beta": 0.1, "ref_logprobs": None}, "beta must be 0 or, with ref_logprobs, positive"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"loss_type": "cispo"}, "'cispo' needs epsilon_high of at least 1, the largest ratio, got None"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "at least 1, the largest ratio, got 0.28"),
        ({"delta": 1.2}, r"delta must be above 1 \+ epsilon_high = 1.2, for a clipped loss, got 1.2"),
        ({"loss_type": "sapo", "delta": 4.0}, "delta must be above"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "temperatures must be positive, got 1.0 and 0.0"),
        (
            {"importance_sampling_clip_min": 3.0},
            "clip_max must be above importance_sampling_clip_min, .* got 3.0 and 3.0",
        ),
        ({"importance_sampling_clip_max": 0.0}, "clip_max must be above"),
        ({"importance_sampling_mode": "turn_mask"}, "importance_sampling_mode must be one of token_truncate"),
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


# Other implementations


def trl_loss(
    batch, loss_type, level="token", *, tokens_in_step=None, accumulation_steps=1, delta=None, sampler_ratio=None
):
    """Return the loss and metrics of TRL's own GRPOTrainer._compute_loss for one micro-batch.

    It is called on an object that has the attributes GRPOConfig would set, and returns these log-probabilities.
    """
    from trl import GRPOTrainer

    mask = batch["loss_mask"]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], torch.zeros(mask.shape), None),
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
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=sampler_ratio is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
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


@each_level
@each_loss_type
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
    elif level == "token" and loss_type != "sapo":
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


@each_loss_type
@pytest.mark.parametrize("mode", SAMPLER_MODES)
def test_sampler_correction_matches_trl(mode, loss_type):
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


def test_sapo_ratio_that_overflows_has_gradient_0_and_not_nan():
    batch = {
        "logprobs": torch.zeros(1, 1),
        "old_logprobs": torch.full((1, 1), -100.0),
        "advantages": torch.ones(1),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    loss, grad = loss_and_grad(batch, loss_type="sapo")
    assert loss.item() == -4.0 and grad.item() == 0


@each_loss_type
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


@each_level
@each_loss_type
def test_grpo_loss_matches_liger(loss_type, level):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if level == "sequence" and loss_type in ("cispo", "sapo"):
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
    assert torch.allclose(metrics["clip_low"] + metrics["clip_high"], their_clip, rtol=1e-6)
    for grad, theirs in zip(grads, their_grads, strict=True):
        assert torch.allclose(grad, theirs, rtol=1e-5, atol=1e-7)
