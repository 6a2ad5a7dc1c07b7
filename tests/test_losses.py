"""grpo_loss against hand-computed values, a loop, TRL's own trainer and liger-kernel's fused loss."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from flexpg.losses import ImportanceSamplingLevel, LossType, grpo_loss, loss_normalizer

LOSS_TYPES = get_args(LossType)
LEVELS = get_args(ImportanceSamplingLevel)
MAX_COMPLETION_LENGTH = 9
# Wide enough apart that both clips are hit on both sides, and different, so that mixing them up shows.
OPTIONS = {"beta": 0.3, "epsilon": 0.1, "epsilon_high": 0.25, "max_completion_length": MAX_COMPLETION_LENGTH}


def random_batch(num_rollouts=6, longest=7, dtype=torch.float64, seed=0):
    """Off-policy inputs of grpo_loss: every rollout is trained somewhere, and tool tokens make holes in the mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    lengths = torch.randint(1, longest + 1, (num_rollouts, 1), generator=generator)
    mask = torch.arange(longest) < lengths
    mask &= torch.rand(mask.shape, generator=generator) < 0.8
    mask[:, 0] = True
    logprobs = -draw(num_rollouts, longest).abs()
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "ref_logprobs": logprobs.detach() + 0.3 * draw(num_rollouts, longest),
        "advantages": draw(num_rollouts),
        "mask": mask,
    }


def rows(batch, start, stop):
    """Rollouts `start` to `stop` of a batch, with a leaf of their own for the gradient."""
    part = {name: values if values is None else values[start:stop] for name, values in batch.items()}
    return part | {"logprobs": part["logprobs"].detach().requires_grad_()}


def loss_and_grad(batch, **options):
    batch = rows(batch, 0, len(batch["mask"]))
    loss, _ = grpo_loss(**batch, **options)
    loss.backward()
    return loss.detach(), batch["logprobs"].grad


# ---- by hand -------------------------------------------------------------------------------------------------------

# Rollout 0 has A = 2 and ratios 1.5 and 0.5; rollout 1 has A = -1 and one token of ratio 1.5. With epsilon 0.2:
#   min(1.5 * 2, 1.2 * 2) = 2.4      min(0.5 * 2, 0.8 * 2) = 1.0      min(1.5 * -1, 1.2 * -1) = -1.5
RATIOS = torch.tensor([[1.5, 0.5], [1.5, 99.0]], dtype=torch.float64)
BY_HAND = {
    "logprobs": RATIOS.log() - 3,
    "old_logprobs": torch.full((2, 2), -3.0, dtype=torch.float64),
    "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
    "mask": torch.tensor([[True, True], [True, False]]),
}


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", -((2.4 + 1.0) / 2 + -1.5 / 1) / 2),  # mean over tokens, then over rollouts: -0.1
        ("bnpo", -(2.4 + 1.0 - 1.5) / 3),  # over 3 tokens
        ("dapo", -(2.4 + 1.0 - 1.5) / 3),
        ("dr_grpo", -(2.4 + 1.0 - 1.5) / (2 * 4)),  # over 2 rollouts of at most 4 tokens
    ],
)
def test_every_loss_type_is_what_a_hand_gets(loss_type, expected):
    loss, metrics = grpo_loss(**BY_HAND, loss_type=loss_type, max_completion_length=4)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert metrics["ratio"].item() == pytest.approx(3.5 / 3)
    assert metrics["clip_high"].item() == pytest.approx(1 / 3)  # 1.5 with A = 2; not 1.5 with A = -1
    assert metrics["clip_low"].item() == 0  # 0.5 is low, but has A = 2
    assert metrics["tokens"].item() == 3


def test_clip_low_counts_low_ratios_of_bad_rollouts():
    flipped = BY_HAND | {"advantages": -BY_HAND["advantages"]}
    metrics = grpo_loss(**flipped)[1]
    assert metrics["clip_low"].item() == pytest.approx(1 / 3)
    assert metrics["clip_high"].item() == pytest.approx(1 / 3)  # now rollout 1's 1.5


def test_kl_is_schulmans_k3():
    # The reference gives the token twice the probability: 2 - log 2 - 1 = 0.30685, and beta 0.5 adds half of it.
    batch = BY_HAND | {"old_logprobs": None, "ref_logprobs": BY_HAND["logprobs"] + math.log(2)}
    without, watched = grpo_loss(**batch)
    with_kl, metrics = grpo_loss(**batch, beta=0.5)
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2))
    assert watched["kl"].item() == pytest.approx(1 - math.log(2))
    assert (with_kl - without).item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_sequence_level_takes_the_geometric_mean_of_the_ratios():
    # Rollout 0: sqrt(1.5 * 0.5) = 0.8660 for both of its tokens. Rollout 1: 1.5. With A = 2 and -1: 2 * 1.7320 - 1.5.
    loss, metrics = grpo_loss(**BY_HAND, importance_sampling_level="sequence")
    assert loss.item() == pytest.approx(-(2 * 2 * math.sqrt(0.75) - 1.5) / 3)
    assert metrics["ratio"].item() == pytest.approx((2 * math.sqrt(0.75) + 1.5) / 3)


def test_entropy_is_watched_and_not_trained():
    entropies = torch.tensor([[1.0, 2.0], [6.0, math.nan]], requires_grad=True)
    loss, metrics = grpo_loss(**BY_HAND, entropies=entropies)
    assert metrics["entropy"].item() == 3.0
    assert torch.equal(loss, grpo_loss(**BY_HAND)[0])
    assert not loss.requires_grad


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_downhill_raises_good_rollouts_and_lowers_bad_ones(level):
    batch = BY_HAND | {"old_logprobs": None}
    grad = loss_and_grad(batch, importance_sampling_level=level)[1]
    # On the policy the ratio is 1 and its gradient too: -A / 3 tokens, and nothing where nothing is trained.
    assert torch.allclose(grad, torch.tensor([[-2, -2], [1, 0]], dtype=torch.float64) / 3, rtol=1e-14, atol=0)
    flipped = loss_and_grad(batch | {"advantages": -batch["advantages"]}, importance_sampling_level=level)[1]
    assert torch.equal(flipped, -grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.3, 1.0, False), (0.7, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_clip_ends_the_gradient_on_the_side_that_went_too_far(ratio, advantage, flows):
    batch = {
        "logprobs": torch.tensor([[math.log(ratio)]]),
        "old_logprobs": torch.zeros(1, 1),
        "advantages": torch.tensor([advantage]),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }
    grad = loss_and_grad(batch)[1].item()
    assert grad == (pytest.approx(-advantage * ratio) if flows else 0)


def test_epsilon_high_moves_the_upper_clip_alone():
    grad = loss_and_grad(BY_HAND, epsilon_high=0.6)[1]
    assert grad[0, 0] != 0  # 1.5 is now within reach
    assert loss_and_grad(BY_HAND)[1][0, 0] == 0
    low = BY_HAND | {"advantages": -BY_HAND["advantages"]}
    assert loss_and_grad(low, epsilon_high=0.6)[1][0, 1] == 0  # 0.5 with A = -2 stays clipped


def test_old_logprobs_are_constants():
    policy = BY_HAND["logprobs"].clone().requires_grad_()
    grpo_loss(policy, policy, BY_HAND["advantages"], BY_HAND["mask"])[0].backward()
    assert torch.equal(policy.grad, loss_and_grad(BY_HAND | {"old_logprobs": None})[1])


def test_a_gradient_flows_to_the_policy_alone():
    batch = random_batch()
    leaves = {name: values.detach().requires_grad_() for name, values in batch.items() if name != "mask"}
    loss, _ = grpo_loss(**leaves, mask=batch["mask"], **OPTIONS)
    loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["logprobs"]


# ---- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_step(loss_type, level):
    batch = random_batch()
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level}
    loss, grad = loss_and_grad(batch, **options)
    cuts = [(0, 1), (1, 5), (5, 6)]
    normalizer = loss_normalizer(batch["mask"], loss_type, MAX_COMPLETION_LENGTH)
    parts = [loss_and_grad(rows(batch, *cut), **options, normalizer=normalizer) for cut in cuts]
    assert torch.allclose(sum(part for part, _ in parts), loss, rtol=1e-13, atol=0)
    assert torch.allclose(torch.cat([grad for _, grad in parts]), grad, rtol=1e-13, atol=0)
    # A plain mean over micro-batches, each with its own normalizer, is another loss.
    means = [loss_and_grad(rows(batch, *cut), **options)[0] for cut in cuts]
    assert not torch.allclose(sum(means) / len(cuts), loss, rtol=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_normalizers_of_micro_batches_sum_to_the_steps(loss_type):
    mask = random_batch()["mask"]
    mask[3] = False  # a rollout without a trained token counts as a rollout
    expected = {"grpo": 6, "bnpo": mask.sum(), "dapo": mask.sum(), "dr_grpo": 6 * MAX_COMPLETION_LENGTH}[loss_type]
    parts = [loss_normalizer(part, loss_type, MAX_COMPLETION_LENGTH) for part in mask.split(2)]
    assert sum(parts) == expected == loss_normalizer(mask, loss_type, MAX_COMPLETION_LENGTH)


def test_metrics_of_micro_batches_average_by_their_tokens():
    batch = random_batch() | {"entropies": torch.rand(6, 7)}
    whole = grpo_loss(**batch, **OPTIONS)[1]
    parts = [grpo_loss(**rows(batch, *cut), **OPTIONS)[1] for cut in [(0, 2), (2, 6)]]
    assert set(whole) == {"ratio", "clip_low", "clip_high", "kl", "entropy", "tokens"}
    tokens = sum(part["tokens"] for part in parts)
    for name, value in whole.items():
        assert value.dim() == 0 and not value.requires_grad and value.dtype == torch.float64
        average = sum(part[name] * part["tokens"] for part in parts) / tokens
        assert name == "tokens" or torch.allclose(average, value, rtol=1e-13)
    assert tokens == whole["tokens"]


def test_a_micro_batch_without_a_trained_token_adds_nothing():
    batch = rows(random_batch(), 0, 1)
    batch["mask"] = torch.zeros_like(batch["mask"])
    loss, metrics = grpo_loss(**batch, **OPTIONS, normalizer=10.0)
    loss.backward()
    assert loss == 0 and metrics["tokens"] == 0 and metrics["ratio"] == 0
    assert torch.equal(batch["logprobs"].grad, torch.zeros(1, 7, dtype=torch.float64))


# ---- padding and precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_stands_where_nothing_is_trained_is_never_read(loss_type, level, poison):
    batch = random_batch() | {"entropies": torch.rand(6, 7)}
    batch["mask"][2] = False
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level}
    clean = rows(batch, 0, 6)
    poisoned = rows(batch, 0, 6) | {"advantages": batch["advantages"].clone()}
    poisoned["advantages"][2] = poison
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropies"):
        poisoned[name] = poisoned[name].detach().masked_fill(~batch["mask"], poison)
    poisoned["logprobs"].requires_grad_()
    results = []
    for inputs in (clean, poisoned):
        loss, metrics = grpo_loss(**inputs, **options)
        loss.backward()
        results.append([loss, inputs["logprobs"].grad, *metrics.values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][0].isfinite() and results[0][1].isfinite().all()
    assert (results[0][1][batch["mask"]] != 0).any()
    assert (results[0][1][~batch["mask"]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in random_batch().items()}
    upcast = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    loss, grad = loss_and_grad(batch, **OPTIONS)
    exact_loss, exact_grad = loss_and_grad(upcast, **OPTIONS)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact_loss)
    assert grad.dtype == dtype and torch.equal(grad, exact_grad.to(dtype))


def test_float64_stays_float64():
    assert grpo_loss(**random_batch(), **OPTIONS)[0].dtype == torch.float64
    assert grpo_loss(**random_batch(dtype=torch.float32), **OPTIONS)[0].dtype == torch.float32


# ---- oracles -------------------------------------------------------------------------------------------------------


def loop_loss(batch, loss_type, level, normalizer):
    """The loss in Python floats, a token at a time."""
    low, high, beta = 1 - OPTIONS["epsilon"], 1 + OPTIONS["epsilon_high"], OPTIONS["beta"]
    policy, old, ref = (batch[name].tolist() for name in ("logprobs", "old_logprobs", "ref_logprobs"))
    total = 0.0
    for n, advantage in enumerate(batch["advantages"].tolist()):
        steps = [t for t, trained in enumerate(batch["mask"][n].tolist()) if trained]
        log_ratios = {t: policy[n][t] - old[n][t] for t in steps}
        if level == "sequence":
            log_ratios = dict.fromkeys(steps, sum(log_ratios.values()) / len(steps))
        for t in steps:
            ratio = math.exp(log_ratios[t])
            distance = ref[n][t] - policy[n][t]
            token = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
            token += beta * (math.exp(distance) - distance - 1)
            total += token / len(steps) if loss_type == "grpo" else token
    return total / normalizer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_agrees_with_a_loop_and_with_nothing_else(loss_type, level):
    batch = random_batch(num_rollouts=8, seed=1)
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level}
    expected = loop_loss(batch, loss_type, level, loss_normalizer(batch["mask"], loss_type, 9).item())
    assert grpo_loss(**batch, **options)[0].item() == pytest.approx(expected, rel=1e-13)
    mutations = [
        ({"advantages": -batch["advantages"]}, {}),
        ({"advantages": batch["advantages"].roll(1)}, {}),
        ({"old_logprobs": None}, {}),
        ({"old_logprobs": batch["logprobs"], "logprobs": batch["old_logprobs"]}, {}),
        ({"ref_logprobs": batch["old_logprobs"]}, {}),
        ({"mask": torch.ones_like(batch["mask"])}, {}),
        ({"mask": batch["mask"].roll(1, dims=1)}, {}),
        ({}, {"beta": 0.0}),
        ({}, {"epsilon": 0.05}),
        ({}, {"epsilon_high": None}),
        ({}, {"importance_sampling_level": "token" if level == "sequence" else "sequence"}),
        ({}, {"loss_type": "dr_grpo" if loss_type == "grpo" else "grpo"}),
    ]
    for inputs, changed in mutations:
        mutated = grpo_loss(**(batch | inputs), **(options | changed))[0].item()
        assert abs(mutated - expected) > 1e-4 * abs(expected), (list(inputs), changed)


def trl_loss(batch, loss_type, level, *, tokens_in_step, accumulation_steps):
    """What TRL's own GRPOTrainer._compute_loss makes of one micro-batch; the trainer stands in for itself.

    Its attributes are set to what GRPOConfig would, and its forward returns the log-probabilities at hand.
    """
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], torch.zeros(batch["mask"].shape), None),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=OPTIONS["beta"],
        epsilon_low=OPTIONS["epsilon"],
        epsilon_high=OPTIONS["epsilon_high"],
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=accumulation_steps,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=accumulation_steps),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    prompts = torch.ones(len(batch["mask"]), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": torch.ones(batch["mask"].shape, dtype=torch.long),
        "completion_mask": torch.ones(batch["mask"].shape, dtype=torch.long),
        "tool_mask": batch["mask"].long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": torch.tensor(tokens_in_step),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_agrees_with_trls_trainer(loss_type, level):
    batch = random_batch(num_rollouts=8, seed=2)
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level}
    theirs, their_metrics = trl_loss(
        batch, loss_type, level, tokens_in_step=batch["mask"].sum().item(), accumulation_steps=1
    )
    theirs.backward()
    loss, grad = loss_and_grad(batch, **options)
    assert torch.allclose(loss, theirs, rtol=1e-12, atol=0)
    assert torch.allclose(grad, batch["logprobs"].grad, rtol=1e-12, atol=1e-15)
    metrics = grpo_loss(**batch, **options)[1]
    assert metrics["kl"].item() == pytest.approx(their_metrics["kl"][0], rel=1e-12)
    if level == "token":
        assert metrics["clip_low"].item() == pytest.approx(their_metrics["clip_ratio/low_mean"][0]) != 0
        assert metrics["clip_high"].item() == pytest.approx(their_metrics["clip_ratio/high_mean"][0]) != 0


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_accumulates_as_trls_trainer_does(loss_type):
    batch = random_batch(num_rollouts=8, seed=3)
    parts = [rows(batch, 0, 4), rows(batch, 4, 8)]
    tokens = batch["mask"].sum().item()
    theirs = [trl_loss(part, loss_type, "token", tokens_in_step=tokens, accumulation_steps=2)[0] for part in parts]
    normalizer = loss_normalizer(batch["mask"], loss_type, MAX_COMPLETION_LENGTH)
    ours = [grpo_loss(**part, **OPTIONS, loss_type=loss_type, normalizer=normalizer)[0] for part in parts]
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), rtol=1e-12, atol=0)


def test_bnpo_is_trls_when_each_micro_batch_counts_its_own_tokens():
    batch = random_batch(num_rollouts=8, seed=3)
    for part in (rows(batch, 0, 2), rows(batch, 2, 8)):
        theirs = trl_loss(part, "bnpo", "token", tokens_in_step=0, accumulation_steps=2)[0]
        assert torch.allclose(grpo_loss(**part, **OPTIONS, loss_type="bnpo")[0] / 2, theirs, rtol=1e-12, atol=0)
        whole = grpo_loss(**part, **OPTIONS, loss_type="bnpo", normalizer=loss_normalizer(batch["mask"], "bnpo"))[0]
        assert not torch.allclose(whole, theirs, rtol=1e-3)  # the departure that the head of losses.py names


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_agrees_with_ligers_fused_loss(loss_type, level):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch = random_batch(dtype=torch.float32, seed=4)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=True)
    tokens = torch.randint(11, (6, 7), generator=generator)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # [N, C]
    shift = logprobs.detach() - batch["logprobs"].detach()
    batch |= {"logprobs": logprobs, "old_logprobs": batch["old_logprobs"] + shift}
    batch |= {"ref_logprobs": batch["ref_logprobs"] + shift}

    loss, metrics = grpo_loss(**batch, **OPTIONS, loss_type=loss_type, importance_sampling_level=level)
    grads = torch.autograd.grad(loss, [hidden, weight])
    fused = LigerFusedLinearGRPOLoss(
        beta=OPTIONS["beta"],
        compiled=False,
        epsilon_low=OPTIONS["epsilon"],
        epsilon_high=OPTIONS["epsilon_high"],
        loss_type=loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        importance_sampling_level=level,
    )
    theirs, (their_kl, their_clip) = fused(
        hidden,
        weight,
        tokens,
        batch["mask"].float(),
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


# ---- errors --------------------------------------------------------------------------------------------------------
