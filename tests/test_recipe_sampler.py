"""recipes/grpo.py with an inference engine, asynchronous sampling, resampled groups, and losses of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_runs import AGAIN, SMALL, flat, make, train
from torch import Tensor

from flexpg import grpo_loss

pytestmark = pytest.mark.slow

CONFIG = "recipes/configs/tiny_transformers_cpu.yaml"
OPTIONS = (*SMALL, "num_steps=3", "optimizer.lr=0.001", "test_problems.size=2", "group_size=3")
ENGINE = ("sampler._component_=engines.CheckpointEngine", "sampler.path=recipes/assets/tiny")
SEEN = ("reward", "loss", "grad_norm", "entropy", "completion_tokens", "tokens_encoded")


def run(output_dir: Path, *options: str):
    return train(make(output_dir, *OPTIONS, *options, config=CONFIG))


@pytest.mark.parametrize("lora", [(), ("model.lora.r=4", "model.lora.target_modules=all-linear")])
def test_run_with_engine_equals_the_run_that_samples_itself(tmp_path, lora):
    ours, theirs = run(tmp_path / "engine", *ENGINE, *lora), run(tmp_path / "own", *lora)
    for step, other in zip(ours.history, theirs.history, strict=True):
        for name in SEEN:
            assert step[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        assert step["sampler_ratio"] == pytest.approx(1.0, abs=1e-4) and step["sampler_kl"] < 1e-8
        assert step["sync_s"] > 0
    torch.testing.assert_close(flat(ours.trained), flat(theirs.trained), rtol=1e-4, atol=1e-5)
    # Each version: the check of its log-probabilities, held-out accuracy before and after, and the step's samples.
    assert ours.engine.log == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    ours.cleanup()
    assert ours.engine.is_closed


def test_async_run_trains_on_samples_of_the_weights_before(tmp_path):
    recipe = run(tmp_path, *ENGINE, "async_steps=1", "loss.importance_sampling_mode=token_truncate")
    assert recipe.engine.log == [0, 0, 0, 0, 1, 1, 2, 3, 3]  # step 2 from version 0, step 3 from version 1
    first, *later = (entry["sampler_kl"] for entry in recipe.history)
    assert first < 1e-8 and min(later) > 1e-6
    assert recipe.history[1]["sampler_ratio_max"] > 1.001


def test_engine_with_other_weights_raises_runtime_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"must sample from the weights that are trained.* with version 1"):
        run(tmp_path, "sampler._component_=engines.StaleEngine", ENGINE[1], "optimizer.lr=0.01")


def test_broken_engine_saves_progress_and_resumes_to_the_same_steps(tmp_path, capsys):
    whole = run(tmp_path / "whole", *ENGINE)
    broken = ("sampler._component_=engines.BrokenEngine", ENGINE[1], "sampler.broken_call=5")
    with pytest.raises(ConnectionError, match="does not answer"):
        run(tmp_path / "broken", *broken)
    assert "saved after step 2; resume=true continues" in capsys.readouterr().out
    resumed = run(tmp_path / "broken", *ENGINE, "resume=true")
    assert [entry["loss"] for entry in resumed.history] == pytest.approx([entry["loss"] for entry in whole.history])
    torch.testing.assert_close(flat(resumed.trained), flat(whole.trained), rtol=0, atol=1e-6)


def test_engine_with_a_shorter_limit_is_refused_at_setup(tmp_path):
    longest = run(tmp_path / "own", "num_steps=1").max_length
    options = [*OPTIONS, *ENGINE]
    assert make(tmp_path / "fits", *options, f"sampler.max_model_len={longest}", config=CONFIG).max_length == longest
    with pytest.raises(ValueError, match=rf"max_model_len must be at least {longest}, .*, got {longest - 1}"):
        make(tmp_path / "short", *options, f"sampler.max_model_len={longest - 1}", config=CONFIG)


def test_episodes_are_as_long_as_the_engine_allows(tmp_path):
    options = [*OPTIONS, *ENGINE, AGAIN[0], "sampler.max_model_len=400", "max_cache_tokens=2048"]
    assert make(tmp_path / "default", *options, config=CONFIG).max_length == 400
    with pytest.raises(ValueError, match=r"max_model_len must be at least 512, .*environment.max_length .*, got 400"):
        make(tmp_path / "set", *options, *AGAIN, config=CONFIG)


def test_resampled_groups_have_spread(tmp_path):
    before, after = (run(tmp_path / n, f"max_resamplings={n}", "prompts_per_step=4").history for n in ("0", "2"))
    assert "groups_resampled" not in before[0]
    assert sum(entry["groups_without_spread"] for entry in before) > sum(
        entry["groups_without_spread"] for entry in after
    )
    for entry, other in zip(before[:1], after[:1], strict=True):
        assert entry["groups_without_spread"] * 4 <= other["groups_resampled"] <= 2 * 4


def doubled(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, *, factor: float, **options: object) -> Tensor:
    return factor * grpo_loss(logprobs, advantages, loss_mask, **options)


def test_loss_component_replaces_grpo_loss(tmp_path):
    custom = ("loss._component_=test_recipe_sampler.doubled", "loss.factor=2.0")
    first, second = run(tmp_path / "own", *custom, "num_steps=1"), run(tmp_path / "other", "num_steps=1")
    assert first.history[0]["loss"] == pytest.approx(2 * second.history[0]["loss"])
    assert first.history[0]["grad_norm"] == pytest.approx(2 * second.history[0]["grad_norm"], rel=1e-5)
    with pytest.raises(ValueError, match=r"loss: .*factor"):
        make(tmp_path / "wrong", *OPTIONS, custom[0], config=CONFIG)


def test_run_with_environment_equals_the_baseline_run(tmp_path):
    shared, baseline = (run(tmp_path / on, *AGAIN, f"sharing={on}", "num_steps=2") for on in ("true", "false"))
    for step, other in zip(shared.history, baseline.history, strict=True):
        for name in ("reward", "reward/environment", "loss", "grad_norm", "entropy", "completion_tokens", "turns"):
            assert step[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert 1 < shared.history[0]["turns"] <= 2 and shared.history[0]["token_ratio"] > 4
    start = flat(make(tmp_path / "start", *OPTIONS, config=CONFIG).trained)
    ours, theirs = flat(shared.trained), flat(baseline.trained)
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_kl_in_reward_is_zero_until_the_policy_has_moved(tmp_path):
    first, second, _ = run(tmp_path / "kl", "kl_in_reward=10.0").history
    without = run(tmp_path / "none", "num_steps=2").history
    assert first["reward_kl"] == 0 and second["reward_kl"] != 0 and "reward_kl" not in without[0]
    assert first["loss"] == pytest.approx(without[0]["loss"], rel=1e-5)
    assert second["reward"] == without[1]["reward"] and second["grad_norm"] != pytest.approx(without[1]["grad_norm"])


def test_truncated_completions_are_not_trained_on_request(tmp_path):
    short = (
        "sampling.max_new_tokens=2",
        "sampling.temperature=3.0",
        "num_steps=1",
        "rewards.correct._component_=recipe_runs.spread_reward",
    )
    start = flat(make(tmp_path / "start", *OPTIONS, config=CONFIG).trained)
    masked, trained = (run(tmp_path / on, *short, f"mask_truncated_completions={on}") for on in ("true", "false"))
    assert masked.history[0]["truncated"] == 1 and masked.history[0]["grad_norm"] == 0
    assert torch.equal(flat(masked.trained), start) and not torch.equal(flat(trained.trained), start)
