"""Models that take images too: their text shares prefixes exactly, and image batches and generation do not change."""

from __future__ import annotations

import json
from dataclasses import replace

import hf_models as hf
import pytest
import torch
import transformers
from cases import VOCAB, Case, gradients, three_levels, tokens
from hf_models import IMAGE, IMAGE_END, IMAGE_START, in_float64, with_lora
from torch import Tensor, nn

import flexpg
from flexpg import Rollouts, packed_logprobs, self_check
from flexpg.integrations.transformers import forward, layers, output
from flexpg.integrations.transformers.attention import NAME
from flexpg.logprobs import token_logprobs

GROUPS = Case.from_groups(
    [tokens(20, 11), tokens(1, 12), tokens(31, 13)],
    [[tokens(5, 14), tokens(9, 15), tokens(1, 16)], [tokens(8, 17), tokens(4, 18)], [tokens(12, 19)]],
)


def composite(name: str) -> transformers.PreTrainedModel:
    """Build a composite model in float64."""
    return in_float64(hf.tiny_model(name))


def results(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Return log-probabilities and gradients; the vision tower has none, as in the baseline."""
    for path, parameter in model.named_parameters():
        if "language_model" not in path and "lm_head" not in path:
            parameter.requires_grad_(False)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {"logprobs": logprobs.detach()} | gradients(model, logprobs)


def shared_logprobs(model: nn.Module, case: Case) -> Tensor:
    hidden = forward(model, case.tree)
    return token_logprobs(hidden, output(model), case.tree, prompt_lens=torch.tensor(case.prompt_lens))


def baseline_logprobs(model: nn.Module, case: Case) -> Tensor:
    return hf.baseline_logprobs(model, case.sequences, case.prompt_lens)


def assert_equal(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients with their own norm; of a key's bias, which a softmax ignores, with that of the largest."""
    assert list(values) == list(expected)
    largest = max(value.norm() for value in expected.values())
    for name, truth in expected.items():
        scale = truth.norm() if truth.norm() > 1e-9 * largest else largest
        assert (values[name] - truth).norm() < 1e-12 * scale, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", hf.COMPOSITES)
def test_text_of_composite_model_equals_baseline(name, checkpointing):
    model, baseline = flexpg.enable(composite(name)), composite(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for case in (GROUPS, three_levels()):
        expected = results(baseline, baseline_logprobs(baseline, case))
        assert_equal(results(model, shared_logprobs(model, case)), expected)


def test_frozen_and_unused_vision_parameters_get_no_gradient():
    model = flexpg.enable(composite("gemma3_vl"))
    model.model.vision_tower.requires_grad_(False)
    shared_logprobs(model, GROUPS).sum().backward()
    with_gradient = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {path for path, _ in model.named_parameters() if "language_model" in path}


OVERSIZED = Rollouts.from_groups([tokens(30, 59)], [[tokens(4 + n, 60 + n) for n in range(8)]], [[0.0] * 8])


@pytest.mark.parametrize("name", hf.COMPOSITES)
def test_oversized_group_of_composite_model_equals_baseline(name):
    case = Case.from_groups([tokens(30, 59)], [[tokens(4 + n, 60 + n) for n in range(8)]])
    model, baseline = flexpg.enable(composite(name)), composite(name)
    expected = results(baseline, baseline_logprobs(baseline, case))
    weights = torch.randn(OVERSIZED.loss_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.zeros_like(weights)
    for batch, logprobs in packed_logprobs(model, OVERSIZED, max_tokens=70):
        (weights[batch.indices, : logprobs.shape[1]] * logprobs).sum().backward()
        found[batch.indices, : logprobs.shape[1]] = logprobs.detach().double()
    values = {path: parameter.grad for path, parameter in model.named_parameters() if path in expected}
    assert_equal({"logprobs": found} | values, expected)


@pytest.mark.parametrize("name", hf.COMPOSITES)
def test_composite_output_and_layers_are_those_of_the_language_model(name):
    model, ids = flexpg.enable(hf.tiny_model(name)), torch.tensor([tokens(15, 1)])
    expected = model(input_ids=ids).logits[0]
    assert torch.equal(output(model)(model.base_model(input_ids=ids).last_hidden_state[0]), expected)
    paths = [f"model.language_model.layers.{n}" for n in range(model.config.get_text_config().num_hidden_layers)]
    assert list(layers(model)) == paths
    assert list(layers(model).values()) == [model.get_submodule(path) for path in paths]


@pytest.mark.parametrize("name", ["gemma3_vl", "gemma4", "qwen2_5_vl"])
def test_self_check_of_composite_model_passes(name):
    assert self_check(flexpg.enable(hf.tiny_model(name)), OVERSIZED, max_tokens=70).rollouts == 6


@pytest.mark.parametrize("name", ["gemma3_vl", "qwen2_5_vl"])
def test_lora_of_composite_model_equals_baseline(name):
    model, baseline = (with_lora(composite(name), target_modules="all-linear").double() for _ in range(2))
    flexpg.enable(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = results(baseline, baseline_logprobs(baseline, GROUPS))
    assert sum("lora" in path for path in expected) > 20
    assert_equal(results(model, shared_logprobs(model, GROUPS)), expected)


def test_changed_completion_leaves_others_of_composite_bitwise_identical():
    model = flexpg.enable(hf.tiny_model("qwen3_vl"))
    changed = [(completion + 1) % VOCAB if n == 2 else completion for n, completion in enumerate(OVERSIZED.completions)]
    before, after = (
        next(packed_logprobs(model, each, max_tokens=400))[1]
        for each in (OVERSIZED, replace(OVERSIZED, completions=changed))
    )
    others = torch.arange(8) != 2
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[2], before[2])


# Images.


def image_batch(name: str) -> dict[str, Tensor]:
    """Return two rows with an image of four tokens in each."""
    row = [3, 4, IMAGE_START, *[IMAGE] * 4, IMAGE_END, 5, 6, 7, 8, 9]
    ids = torch.tensor([row, [*row[:-3], 10, 11, 12]])
    draw = torch.Generator().manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen"):
        pixels = torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=draw)  # 4 x 4 patches, merged by 2 x 2
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == IMAGE).long()}
        return inputs | {"pixel_values": pixels}
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[56, 56]] * 2)
        return inputs | {"pixel_values": torch.randn(2, 3, 56, 56, generator=draw)}
    inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs | {"pixel_values": torch.randn(2, 3, 28, 28, generator=draw)}


WITH_IMAGES = ["gemma3_vl", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def ordinary_results(model: nn.Module, name: str) -> list[Tensor]:
    """Return logits, loss and gradients of an image batch, and what the model generates from images and from text."""
    inputs = image_batch(name)
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    found = [out.logits, out.loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert any(p.grad is not None for path, p in model.named_parameters() if "vi" in path and "language" not in path)
    length = {"min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    text = {"input_ids": torch.tensor([[0, 3, 4], [5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    return [*found, *(model.eval().generate(**batch, **length) for batch in (inputs, text))]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_enable_leaves_images_and_generation_bitwise_identical(name):
    model, baseline = flexpg.enable(hf.tiny_model(name)), hf.tiny_model(name)
    shared_logprobs(model, GROUPS)
    assert all(map(torch.equal, ordinary_results(model, name), ordinary_results(baseline, name)))


def test_vision_tower_keeps_its_attention_implementation():
    attention = {"vision_config": "eager", "text_config": "sdpa"}
    model = hf.model_from_config(hf.COMPOSITES["gemma3_vl"], attn_implementation=attention)
    flexpg.enable(model)
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "eager"
    towers = [module for path, module in model.named_modules() if "vision_tower" in path and hasattr(module, "config")]
    assert towers and {module.config._attn_implementation for module in towers} == {"eager"}


def test_saved_composite_checkpoint_does_not_name_flexpg(tmp_path):
    model = flexpg.enable(hf.tiny_model("gemma3_vl")).eval()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    ids = torch.tensor([tokens(15, 1)])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["gemma3_vl", "qwen2_5_vl", "llava_onevision"])
def test_placeholder_without_an_image_is_refused(name):
    rollouts = Rollouts.from_groups([[3, IMAGE, 4]], [[[5], [6, 7]]], [[0.0, 1.0]])
    words = rf"rollout 0 has an image token \({IMAGE} of \w+\) at position 1 without an image; pass images as"
    with pytest.raises(ValueError, match=words):
        next(packed_logprobs(flexpg.enable(hf.tiny_model(name)), rollouts, max_tokens=100))


def test_dropout_of_the_vision_tower_is_allowed():
    model = hf.tiny_model("gemma3_vl")
    model.model.vision_tower.add_module("dropout", nn.Dropout(0.3))
    assert shared_logprobs(flexpg.enable(model), GROUPS).isfinite().all()
    model.model.language_model.layers[0].add_module("dropout", nn.Dropout(0.3))
    with pytest.raises(ValueError, match=r"language_model\.layers\.0\.dropout has dropout 0\.3"):
        shared_logprobs(model, GROUPS)
