"""The vision encoder's work, which is counted once per image instead of once per rollout."""

from __future__ import annotations

import re
from typing import Any

import hf_models as hf
import pytest
from cases import tokens
from pictures import Picture, with_images
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flexpg
from flexpg import Rollouts, packed_logprobs
from flexpg.analysis.report import report
from flexpg.analysis.transformers_images import image_flops
from flexpg.analysis.transformers_shape import shape_of

NAMES = ("baseline", "prompts_once", "shared")
PROMPTS = [(Picture(1), 2), (Picture(2, (1, 2)), 3), (Picture(1), 4)]  # images, and seeds of questions


def rollouts_of(name: str) -> Rollouts:
    prompts = [with_images(name, tokens(5, 1), picture, tokens(20, seed)) for picture, seed in PROMPTS]
    completions = [[tokens(7, 10 * g + n) for n in range(4)] for g in range(3)]
    rewards = [[0.0, 1.0, 2.0, 3.0]] * 3
    return Rollouts.from_groups(
        [ids for ids, _ in prompts], completions, rewards, prompt_inputs=[given for _, given in prompts]
    )


def measured(model: nn.Module, rollouts: Rollouts) -> int:
    """Return what torch counts in a shared forward and backward, attention as products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _, logprobs in packed_logprobs(model, rollouts, max_tokens=10_000):
            logprobs.sum().backward()
    return counter.get_total_flops()


def without_vision(model: nn.Module, rollouts: Rollouts, trained: bool) -> int:
    """Return the same with the vision encoder's output given."""
    kept = {}
    original = model.model.get_image_features

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept["out"] = original(*args, **kwargs)
        return kept["out"]

    def leaf(features: Any) -> Any:
        if isinstance(features, Tensor):
            return features.detach().requires_grad_(trained)
        return [leaf(feature) for feature in features]

    model.model.get_image_features = keep
    measured(model, rollouts)
    out = kept["out"]
    for name in ("pooler_output", "deepstack_features"):
        if getattr(out, name, None) is not None:
            setattr(out, name, leaf(getattr(out, name)))
    model.model.get_image_features = lambda *args, **kwargs: out
    return measured(model, rollouts)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3_vl", "internvl"])
def test_flops_of_images_are_those_of_torch(name, trained):
    model = flexpg.enable(hf.tiny_model(name).double())
    for path, parameter in model.named_parameters():
        if re.search("visual|vision_tower|projector", path):
            parameter.requires_grad_(trained)
    rollouts = rollouts_of(name)
    counted = image_flops(model, rollouts)
    assert len(counted) == (3 if name == "internvl" else 2)  # whose tiles are counted one by one
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(counted.values()) == measured(model, rollouts) - without_vision(model, rollouts, trained) > 0


def test_report_counts_an_image_once_instead_of_per_rollout():
    model = flexpg.enable(hf.tiny_model("qwen3_vl").double())
    rollouts, shape = rollouts_of("qwen3_vl"), shape_of(model)
    flops = image_flops(model, rollouts)
    found = report(rollouts, shape, max_tokens=[60, 4096], image_flops=flops)
    rows = [found.total[name] for name in NAMES]
    assert [row["images"] for row in rows] == [12, 3, 2]
    free = report(rollouts, shape, max_tokens=[60, 4096], image_flops=dict.fromkeys(flops, 0))
    of_images = [found.total[name]["flops"] - free.total[name]["flops"] for name in NAMES]
    assert of_images == [4 * (2 * flops[0] + flops[1]), 2 * flops[0] + flops[1], flops[0] + flops[1]]
    assert found.by_max_tokens[1]["flops"] == rows[2]["flops"]
    assert "images encoded" in str(found._tables()[0])


def test_report_of_images_needs_their_flops():
    shape = shape_of(hf.tiny_model("qwen3_vl"))
    with pytest.raises(ValueError, match="prompts have images, so pass image_flops"):
        report(rollouts_of("qwen3_vl"), shape)


def test_model_without_images_is_refused():
    with pytest.raises(TypeError, match="Qwen2ForCausalLM takes no images"):
        image_flops(hf.tiny_model("qwen2"), rollouts_of("gemma3_vl"))
