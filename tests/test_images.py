"""Prompts with images and videos: shared once, and equal to every sequence with its images on its own."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import hf_models as hf
import numpy as np
import pytest
import torch
import torch.distributed as dist
from baseline import tiny_model as torchtune_model
from cases import tokens
from hf_models import IMAGE, in_float64, with_lora
from pictures import Picture, with_images
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import flexpg
from flexpg import Rollouts, pack, packed_logprobs, self_check
from flexpg.integrations.transformers import image_checks
from flexpg.integrations.transformers.composite import tower_modules
from flexpg.verify import baseline_logprobs

ONE_IMAGE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5_vl", "gemma3_vl", "gemma4_vl", "mistral3", "internvl"]
MODELS = [*ONE_IMAGE, "smolvlm", "idefics3", "llava_next", "llava_onevision"]
SYSTEM = tokens(5, 1)
SQUARE, OTHER, WIDE, FILM = Picture(1), Picture(2), Picture(3, (1, 2)), Picture(7, frames=2)


def rollouts_of(*prompts: tuple[list[int], dict | None], group_size: int = 3) -> Rollouts:
    """Build groups of random completions."""
    completions = [[tokens(4 + i, 10 * g + i) for i in range(group_size)] for g in range(len(prompts))]
    return Rollouts.from_groups(
        [ids for ids, _ in prompts],
        completions,
        [[float(i) for i in range(group_size)]] * len(prompts),
        prompt_inputs=[given for _, given in prompts],
    )


def mixed_rollouts(name: str) -> Rollouts:
    """Build groups with equal and different images, questions and system prompts, several images, a video, and text."""
    prompts = [
        with_images(name, SYSTEM, SQUARE, tokens(6, 2)),
        with_images(name, SYSTEM, OTHER, tokens(6, 2)),
        with_images(name, SYSTEM, SQUARE, tokens(7, 3)),
        with_images(name, tokens(9, 4)),
        with_images(name, SYSTEM, SQUARE, tokens(2, 5), WIDE, tokens(4, 6)),
        with_images(name, tokens(3, 7), SQUARE, tokens(2, 8)),
    ]
    if name.startswith("qwen"):
        prompts.append(with_images(name, SYSTEM, FILM, tokens(3, 9), SQUARE, tokens(3, 9)))
    return rollouts_of(*prompts)


def weights_of(rollouts: Rollouts) -> Tensor:
    return torch.randn(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def shared(model: nn.Module, rollouts: Rollouts, max_tokens: int, group=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probabilities and gradients of packed sequences."""
    model.zero_grad()
    weights = weights_of(rollouts)
    found = torch.zeros_like(weights)
    for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens, context_parallel=group):
        (weights[batch.indices, : logprobs.shape[1]] * logprobs).sum().backward()
        found[batch.indices, : logprobs.shape[1]] = logprobs.detach()
    return found, gradients_of(model)


def baseline(model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same of every sequence with its images on its own, by transformers' attention."""
    model.zero_grad()
    weights = weights_of(rollouts)
    found = torch.zeros_like(weights)
    for n in range(len(rollouts)):
        (logprobs,) = baseline_logprobs(model, rollouts.select([n]))
        (weights[n, : logprobs.shape[1]] * logprobs).sum().backward()
        found[n, : logprobs.shape[1]] = logprobs.detach()
    return found, gradients_of(model)


def assert_equal(
    name: str, values: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Compare log-probabilities and gradients.

    GatedDeltaNet computes in float32. The vision towers of Qwen and Gemma 4 rotate queries and keys in float32, so that
    gradients round to it; those of the copies of a prompt, which are added up in the baseline, round one by one.
    """
    rounds = name == "qwen3_5_vl"
    assert (values[0] - expected[0]).abs().max() < (1e-6 if rounds else 1e-12)
    assert list(values[1]) == list(expected[1])
    largest = max(gradient.norm() for gradient in expected[1].values())
    for path, truth in expected[1].items():
        bound = 2e-4 if rounds else 1e-6 if "visual" in path or name == "gemma4_vl" else 1e-11
        scale = truth.norm() if truth.norm() > 1e-8 * largest else largest  # a key's bias, which a softmax ignores
        assert (values[1][path] - truth).norm() <= bound * scale, path


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Build two equal models in float64, the first enabled."""
    return flexpg.enable(in_float64(hf.tiny_model(name))), in_float64(hf.tiny_model(name))


def tower_of(model: nn.Module) -> nn.Module:
    parts = ("visual", "vision_tower", "vision_model")
    return next(getattr(model.model, part) for part in parts if hasattr(model.model, part))


@contextmanager
def encoded_rows(model: nn.Module) -> Iterator[list[int]]:
    """Count the rows of pixels that the vision tower reads in each call."""
    rows: list[int] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(len((*args, *kwargs.values())[0]))

    handle = tower_of(model).register_forward_pre_hook(record, with_kwargs=True)
    yield rows
    handle.remove()


# Equality.


@pytest.mark.parametrize("name", MODELS)
def test_images_equal_the_baseline_and_are_encoded_once(name):
    model, alone = pair(name)
    rollouts = mixed_rollouts(name)
    expected = baseline(alone, rollouts)
    assert any(path.startswith("model.vi") for path in expected[1])
    assert_equal(name, shared(model, rollouts, max_tokens=500), expected)
    assert_equal(name, shared(model, rollouts, max_tokens=62), expected)  # several micro-batches


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_completion_after_a_long_video_continues_as_in_the_model(name):
    """In Qwen2-VL and Qwen2.5-VL not after the largest position, which is one in time."""
    model, alone = pair(name)
    prompts = [with_images(name, SYSTEM, Picture(7, frames=9), tokens(2, seed)) for seed in (3, 4)]
    if name == "qwen2_5_vl":
        for (_, given), seconds in zip(prompts, (1.0, 2.0), strict=True):
            given["second_per_grid_ts"] = torch.tensor([seconds])
    rollouts = rollouts_of(*prompts)
    assert_equal(name, shared(model, rollouts, max_tokens=500), baseline(alone, rollouts))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5_vl", "gemma3_vl", "smolvlm"])
def test_oversized_group_with_images_equals_baseline_and_encodes_them_once(name):
    model, alone = pair(name)
    rollouts = rollouts_of(with_images(name, SYSTEM, SQUARE, tokens(2, 5), WIDE, tokens(9, 6)), group_size=7)
    expected = baseline(alone, rollouts)
    with encoded_rows(model) as rows:
        found = shared(model, rollouts, max_tokens=50)
    assert_equal(name, found, expected)
    assert len(rows) == 1


def test_same_image_is_encoded_once_per_micro_batch():
    name = "gemma3_vl"
    model = flexpg.enable(hf.tiny_model(name).double())
    with encoded_rows(model) as rows:
        shared(model, mixed_rollouts(name), max_tokens=500)
    assert rows == [3]  # SQUARE at three places of the tree, OTHER and WIDE


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3_vl"])
def test_lora_with_frozen_tower_equals_baseline_and_trains_nothing_else(name):
    targets = r".*language_model.*\.(q_proj|v_proj|gate_proj)"
    model, alone = (with_lora(in_float64(hf.tiny_model(name)), target_modules=targets).double() for _ in range(2))
    flexpg.enable(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rollouts = mixed_rollouts(name)
    expected = baseline(alone, rollouts)
    assert expected[1] and all("lora" in path for path in expected[1])
    assert_equal(name, shared(model, rollouts, max_tokens=500), expected)


def test_frozen_tower_gets_no_gradient_and_the_rest_equals_baseline():
    name = "qwen2_5_vl"
    model, alone = pair(name)
    for each in (model, alone):
        tower_of(each).requires_grad_(False)
    expected = baseline(alone, mixed_rollouts(name))
    assert not any("visual" in path for path in expected[1])
    assert_equal(name, shared(model, mixed_rollouts(name), max_tokens=500), expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3_vl"])
def test_self_check_with_images_passes(name):
    model = flexpg.enable(hf.tiny_model(name))
    rollouts = rollouts_of(with_images(name, SYSTEM, Picture(1), tokens(6, 2)), with_images(name, tokens(8, 3)))
    inputs = [None if given is None else in_float32(given) for given in rollouts.prompt_inputs]
    assert self_check(model, replace(rollouts, prompt_inputs=inputs), max_tokens=400).rollouts == 3


def in_float32(inputs: flexpg.prompt_inputs.PromptInputs) -> flexpg.prompt_inputs.PromptInputs:
    items = [
        replace(item, tensors={key: x.float() if x.is_floating_point() else x for key, x in item.tensors.items()})
        for item in inputs.items
    ]
    return replace(inputs, items=tuple(items))


# Identity.


def test_prompts_with_equal_tokens_and_other_pixels_are_other_prompts():
    prompts = [with_images("gemma3_vl", SYSTEM, picture, tokens(6, 2)) for picture in (SQUARE, OTHER, SQUARE)]
    assert prompts[0][0] == prompts[1][0]
    tree = rollouts_of(*prompts).tree
    length = len(prompts[0][0])
    first, other, equal = (tree.node[n, :length] for n in (0, 3, 6))
    assert torch.equal(first, equal)
    assert torch.equal(first == other, torch.arange(length) < len(SYSTEM) + 1)  # up to the first token of the image


def test_image_that_two_questions_share_is_one_node():
    prompts = [with_images("qwen2_5_vl", SYSTEM, SQUARE, question) for question in (tokens(6, 2), tokens(7, 3))]
    tree = rollouts_of(*prompts).tree
    until = len(SYSTEM) + 6
    assert torch.equal(tree.node[0, :until], tree.node[3, :until])
    assert not torch.equal(tree.node[0, : until + 1], tree.node[3, : until + 1])


def test_second_of_two_images_is_compared_on_its_own():
    name = "qwen2_5_vl"
    prompts = [with_images(name, SYSTEM, SQUARE, tokens(2, 5), second, tokens(2, 6)) for second in (SQUARE, OTHER)]
    assert len(rollouts_of(*prompts).prompt_inputs[0].items) == 2
    tree = rollouts_of(*prompts).tree
    until = len(SYSTEM) + 6 + 2 + 1
    assert torch.equal(tree.node[0, :until], tree.node[3, :until])
    assert not (tree.node[0, until : until + 4] == tree.node[3, until : until + 4]).any()


def test_mirrored_image_is_another_image():
    ids, given = with_images("gemma3_vl", SYSTEM, SQUARE, tokens(6, 2))
    pixels = given["pixel_values"].round(decimals=3)  # so that both sums are the same
    mirrored = given | {"pixel_values": pixels.flip(-1)}
    first, second = rollouts_of((ids, given | {"pixel_values": pixels}), (ids, mirrored)).prompt_inputs
    assert pixels.sum() == mirrored["pixel_values"].sum()
    assert first.items[0].identity != second.items[0].identity


def test_adjacent_images_are_compared_as_one_block():
    """In Gemma they see each other; so a prompt whose second image differs shares neither."""
    pixels = torch.randn(3, 3, 2, 2)
    ids, types = [3, *[IMAGE] * 8, 4], [0, *[1] * 8, 0]
    prompts = [(ids, {"pixel_values": pixels[[0, second]], "mm_token_type_ids": types}) for second in (1, 2)]
    tree = rollouts_of(*prompts).tree
    assert (tree.node[0, :10] == tree.node[3, :10]).tolist() == [True, *[False] * 9]


def test_tiles_of_zeros_are_padding():
    ids, given = with_images("smolvlm", SYSTEM, SQUARE, tokens(6, 2))
    padded = {key: torch.cat([x, torch.zeros_like(x)], 1) for key, x in given.items() if key.startswith("pixel")}
    first, second = rollouts_of((ids, given), (ids, given | padded)).prompt_inputs
    assert [item.identity for item in first.items] == [item.identity for item in second.items]


def test_inputs_of_several_reads_are_compared_by_pixels():
    first, second, third = (
        rollouts_of(with_images("gemma3_vl", SYSTEM, picture, tokens(6, 2))) for picture in (SQUARE, OTHER, SQUARE)
    )
    together = Rollouts(
        prompts=[each.prompts[0] for each in (first, second, third)],
        completions=[*first.completions, *second.completions, *third.completions],
        group_ids=torch.arange(3).repeat_interleave(3),
        rewards=torch.zeros(9),
        prompt_inputs=tuple(pickle.loads(pickle.dumps(each.prompt_inputs[0])) for each in (first, second, third)),
    )
    node = together.tree.node
    length = len(first.prompts[0])
    assert torch.equal(node[0, :length], node[6, :length]) and not torch.equal(node[0, :length], node[3, :length])


def test_method_that_a_user_has_replaced_is_kept():
    model = flexpg.enable(hf.tiny_model("gemma3_vl").double())
    original, calls = model.model.get_image_features, []
    model.model.get_image_features = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    for _ in range(2):
        shared(model, mixed_rollouts("gemma3_vl"), max_tokens=500)
    assert len(calls) == 2


def test_changed_pixel_changes_its_own_prompt_only():
    name = "qwen3_vl"
    model = flexpg.enable(hf.tiny_model(name).double())
    prompts = [with_images(name, SYSTEM, picture, tokens(6, 2)) for picture in (SQUARE, OTHER)]
    before, _ = shared(model, rollouts_of(*prompts), max_tokens=500)
    prompts[1][1]["pixel_values"][0, 0] += 1
    after, _ = shared(model, rollouts_of(*prompts), max_tokens=500)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all()


def test_from_generate_does_not_merge_prompts_with_other_images():
    name = "gemma3_vl"
    prompts = [with_images(name, SYSTEM, picture, tokens(2, 2)) for picture in (SQUARE, SQUARE, OTHER)]
    sequences = torch.tensor([ids + tokens(3, n) for n, (ids, _) in enumerate(prompts)])
    rollouts = Rollouts.from_generate(
        sequences,
        torch.ones(3, len(prompts[0][0]), dtype=torch.int64),
        [0.0, 1.0, 2.0],
        eos_token_id=None,
        prompt_inputs=[given for _, given in prompts],
    )
    assert rollouts.group_ids.tolist() == [0, 0, 1]
    assert len(rollouts.prompt_inputs) == 2


# Mistakes.


def refused(words: str, model_name: str, *prompts: tuple[list[int], dict | None], **changes: object) -> None:
    model = flexpg.enable(hf.tiny_model(model_name).double())
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *args: forwards.append(1))
    with pytest.raises(ValueError, match=words):
        shared(model, replace(rollouts_of(*prompts), **changes), max_tokens=60)
    assert not forwards


TEXT_ONLY = with_images("qwen2_5_vl", tokens(9, 4))


def test_pixels_that_are_missing_are_refused_with_the_prompt():
    ids, given = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    refused(
        r"rollout 3 has an image token \(50 of .*\) at position 6 without an image",
        "qwen2_5_vl",
        TEXT_ONLY,
        (ids, None),
    )
    given = {key: value for key, value in given.items() if key == "mm_token_type_ids"}
    refused(
        r"prompt_inputs\[1\] must have pixel_values if and only if .* 4 image tokens and no pixels",
        "qwen2_5_vl",
        TEXT_ONLY,
        (ids, given),
    )


def test_wrong_number_of_image_tokens_is_refused_with_the_prompt():
    for name in ("qwen2_5_vl", "gemma3_vl"):
        ids, given = with_images(name, SYSTEM, SQUARE, tokens(3, 2))
        shortened = ids[:7] + ids[8:], given | {"mm_token_type_ids": given["mm_token_type_ids"][:, 1:]}
        shortened[1]["mm_token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in shortened[0]]])
        refused(r"prompt_inputs\[1\] must have 4 tokens for image 0, .* got 3", name, TEXT_ONLY, shortened)


def test_number_that_only_the_vision_encoder_knows_is_refused_too():
    ids, given = with_images("llava_next", SYSTEM, SQUARE, tokens(3, 2))
    model = flexpg.enable(hf.tiny_model("llava_next").double())
    shortened = ids[:7] + ids[8:]
    given["mm_token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in shortened]])
    with pytest.raises(ValueError, match=r"prompt_inputs\[0\] has 13 image tokens for an image .* makes 14 feat"):
        shared(model, rollouts_of((shortened, given)), max_tokens=200)


def test_patches_without_a_grid_are_refused():
    ids, given = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    del given["image_grid_thw"]
    with pytest.raises(ValueError, match=r"must have image_grid_thw beside pixel_values of patches \[16, .*pass all"):
        rollouts_of((ids, given))


def test_grid_that_does_not_fit_the_pixels_is_refused_with_the_prompt():
    ids, given = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    given["image_grid_thw"] = torch.tensor([[1, 4, 6]])
    with pytest.raises(ValueError, match=r"prompt_inputs\[1\] must have one row of pixel_values .* 16 rows .* \[24\]"):
        rollouts_of(TEXT_ONLY, (ids, given))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_token_type_ids": None}, r"prompt_inputs\[0\] has pixel_values but neither mm_token_type_ids nor"),
        ({"mm_token_type_ids": torch.zeros(1, 3)}, r"must have token types for the 14 tokens .* got \[3\]"),
        ({"mm_token_type_ids": torch.full((1, 14), 3)}, r"must have token types 0 .* got \[3\]"),
        ({"input_features": torch.zeros(1, 3)}, r"prompt_inputs\[0\] has input_features; flexpg knows images"),
    ],
)
def test_mistake_in_prompt_inputs_is_refused(changes, words):
    ids, given = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    with pytest.raises(ValueError, match=words):
        rollouts_of((ids, given | changes))


@pytest.mark.parametrize("order", ["breaks after rows", "marks around the image"])
def test_token_types_of_breaks_and_marks_are_not_placeholders(order):
    """Pixtral's processor marks the break after each row too, InternVL's the tokens before and after an image."""
    ids, types = [3, IMAGE, IMAGE, 7, IMAGE, IMAGE, 8, 4], [0, 1, 1, 1, 1, 1, 1, 0]
    if order == "marks around the image":
        ids, types = [3, 7, IMAGE, IMAGE, IMAGE, IMAGE, 8, 4], [0, 1, 1, 1, 1, 1, 1, 0]
    given = {"pixel_values": torch.ones(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    (prompt_inputs,) = rollouts_of((ids, given | {"mm_token_type_ids": types})).prompt_inputs
    assert prompt_inputs.items[0].num_tokens == 4
    assert np.flatnonzero(prompt_inputs.item >= 0).tolist() == [n for n, token in enumerate(ids) if token == IMAGE]


def test_model_type_that_was_not_measured_with_images_warns(monkeypatch):
    monkeypatch.setattr(image_checks, "MEASURED", frozenset())
    rollouts = rollouts_of(with_images("qwen2_vl", SYSTEM, SQUARE, tokens(3, 2)))
    with pytest.warns(
        UserWarning, match="images in Qwen2VLForConditionalGeneration were not compared with the baseline"
    ):
        shared(flexpg.enable(hf.tiny_model("qwen2_vl").double()), rollouts, max_tokens=200)


def test_model_that_changes_its_mask_in_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setattr(image_checks, "BIDIRECTIONAL", {})
    for name in ("gemma3_vl", "gemma4_vl"):
        rollouts = rollouts_of(with_images(name, SYSTEM, SQUARE, tokens(3, 2)))
        with pytest.raises(TypeError, match=r"Gemma\w+ changes its mask where there are images, in a way that"):
            shared(flexpg.enable(hf.tiny_model(name).double()), rollouts, max_tokens=200)


def test_inputs_of_another_prompt_are_refused():
    rollouts = rollouts_of(with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2)))
    with pytest.raises(ValueError, match=r"prompt_inputs\[0\] was read with another prompt"):
        replace(rollouts, prompts=[rollouts.prompts[0].roll(1)])
    ids, given = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    with pytest.raises(ValueError, match=r"prompt_inputs\[0\] has input_ids that are not those of its prompt"):
        rollouts_of((ids, given | {"input_ids": torch.tensor([[*ids[:-1], 7]])}))


def test_images_with_other_tensors_are_refused():
    first, second = (with_images("smolvlm", SYSTEM, picture, tokens(3, 2)) for picture in (SQUARE, OTHER))
    del first[1]["pixel_attention_mask"]
    with pytest.raises(
        ValueError, match=r"the images of a micro-batch must have the same tensors, got .* options for all"
    ):
        shared(flexpg.enable(hf.tiny_model("smolvlm").double()), rollouts_of(first, second), max_tokens=500)


def test_list_of_tensors_is_stacked_or_refused():
    ids, given = with_images("gemma3_vl", SYSTEM, SQUARE, OTHER, tokens(3, 2))
    as_list = given | {"pixel_values": list(given["pixel_values"])}
    (first,), (second,) = (rollouts_of((ids, one)).prompt_inputs for one in (given, as_list))
    assert torch.equal(first.items[1].tensors["pixel_values"], second.items[1].tensors["pixel_values"])
    uneven = given | {"pixel_values": [torch.ones(3, 28, 28), torch.ones(3, 28, 56)]}
    with pytest.raises(ValueError, match='list of tensors; call the processor with return_tensors="pt"'):
        rollouts_of((ids, uneven))


def test_sampling_from_an_image_prompt_is_refused_with_the_way_out():
    ids, _ = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))
    with pytest.raises(ValueError, match=r"image token .* without an image; flexpg\.sample takes text only: use model"):
        flexpg.sample(hf.tiny_model("qwen2_5_vl").eval(), [torch.tensor(ids)], 2, flexpg.SamplingParams(3), seed=0)


def test_number_of_prompt_inputs_must_be_that_of_prompts():
    with pytest.raises(ValueError, match="prompt_inputs must have one entry per prompt, got 2 for 1 prompts"):
        Rollouts.from_groups([[1, 2]], [[[3]]], [[0.0]], prompt_inputs=[{"mm_token_type_ids": [0, 0]}, None])


def test_prompt_inputs_as_one_dict_raise():
    with pytest.raises(TypeError, match="prompt_inputs must have one entry per prompt, got a dict; call the processor"):
        Rollouts.from_groups([[1, 2]], [[[3]]], [[0.0]], prompt_inputs={"mm_token_type_ids": [[0, 0]]})


def test_image_token_in_a_completion_is_refused():
    rollouts = rollouts_of(with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2)))
    completions = [torch.tensor([4, IMAGE]), *rollouts.completions[1:]]
    model = flexpg.enable(hf.tiny_model("qwen2_5_vl").double())
    changed = replace(rollouts, completions=completions, loss_mask=None)
    with pytest.raises(ValueError, match=r"rollout 0 has an image token .* at position 15 without an image; .*none in"):
        shared(model, changed, max_tokens=200)


def test_model_without_images_refuses_them():
    rollouts = rollouts_of(with_images("gemma3_vl", SYSTEM, SQUARE, tokens(3, 2)))
    with pytest.raises(TypeError, match="Qwen2ForCausalLM takes no images"):
        shared(flexpg.enable(hf.tiny_model("qwen2")), rollouts, max_tokens=200)


def test_torchtune_model_refuses_images():
    rollouts = rollouts_of(with_images("gemma3_vl", SYSTEM, SQUARE, tokens(3, 2)))
    with pytest.raises(TypeError, match="torchtune decoders take text only"):
        next(packed_logprobs(torchtune_model("llama3_2"), rollouts, max_tokens=200))


def test_images_of_other_sizes_in_one_tensor_are_refused():
    small = {"pixel_values": torch.zeros(1, 3, 28, 28), "mm_token_type_ids": [0, 1, 1, 1, 1, 0]}
    large = small | {"pixel_values": torch.ones(1, 3, 56, 56)}
    ids = [3, *[IMAGE] * 4, 4]
    with pytest.raises(ValueError, match=re.escape("must have one size, got [3, 28, 28] and [3, 56, 56]")):
        shared(flexpg.enable(hf.tiny_model("gemma3_vl")), rollouts_of((ids, small), (ids, large)), max_tokens=200)


def test_random_numbers_of_the_vision_tower_are_refused():
    model = flexpg.enable(hf.tiny_model("qwen2_5_vl").double())
    tower_of(model).merger.add_module("noise", nn.Dropout(0.3))
    tower_of(model).merger.register_forward_hook(lambda module, args, out: module.noise(out))
    with pytest.raises(ValueError, match="consumed random numbers"):
        shared(model, rollouts_of(with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(3, 2))), max_tokens=200)
    assert tower_modules(model)


# Several ranks.


def context_parallel_update(rank: int, name: str) -> tuple[tuple[Tensor, dict[str, Tensor]], int]:
    """Return log-probabilities and gradients, and the rows of pixels that this rank encoded."""
    dist.init_process_group("gloo")
    model = pair(name)[0]
    with encoded_rows(model) as encoded:
        found = shared(model, long_rollouts(name), 10_000, dist.group.WORLD)
    dist.destroy_process_group()
    return found, sum(encoded)


def long_rollouts(name: str) -> Rollouts:
    first = with_images(name, tokens(200, 1), SQUARE, tokens(6, 2))
    return rollouts_of(first, with_images(name, tokens(150, 3), OTHER, tokens(90, 4), WIDE, tokens(3, 5)))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3_vl", "smolvlm", "qwen3_5_vl"])
def test_context_parallel_with_images_equals_one_rank(name):
    model = pair(name)[0]
    with encoded_rows(model) as encoded:
        expected = shared(model, long_rollouts(name), 10_000)
    found = run_processes(2, context_parallel_update, name)
    for values, _ in found:
        assert_equal(name, values, expected)
    assert sum(rows for _, rows in found) == sum(encoded)  # each image on one rank
    assert all(rows > 0 for _, rows in found)


def sharded_update(rank: int, tower_too: bool) -> dict[str, Tensor] | str:
    """Return the gradients of rollouts over two ranks, of which the second has text only."""
    dist.init_process_group("gloo")
    model = flexpg.enable(in_float64(hf.tiny_model("qwen2_5_vl")))
    layers = [*model.model.language_model.layers, *(tower_of(model).blocks if tower_too else [])]
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    rollouts = two_ranks()
    batches = [batch for batch in pack(rollouts, 62, world_size=2) if batch.rank == rank]
    weights = weights_of(rollouts)
    try:
        for batch, logprobs in packed_logprobs(model, batches):
            (weights[batch.indices, : logprobs.shape[1]] * logprobs).sum().backward()
    except TypeError as error:
        return str(error)
    return {path: value.grad.full_tensor() * 2 for path, value in model.named_parameters() if value.grad is not None}


def two_ranks() -> Rollouts:
    """Return an oversized group with images, and groups of text."""
    pictures = with_images("qwen2_5_vl", SYSTEM, SQUARE, tokens(2, 5), WIDE, tokens(9, 6))
    texts = [with_images("qwen2_5_vl", tokens(30, 20 + n)) for n in range(4)]
    return rollouts_of(pictures, *texts, group_size=6)


@pytest.mark.distributed
def test_fsdp_with_images_on_one_rank_equals_single_process():
    expected = baseline(in_float64(hf.tiny_model("qwen2_5_vl")), two_ranks())[1]
    for gradients in run_processes(2, sharded_update, False):
        assert_equal("qwen2_5_vl", (torch.zeros(1), gradients), (torch.zeros(1), expected))


@pytest.mark.distributed
def test_fsdp_with_a_sharded_vision_encoder_is_refused():
    for error in run_processes(2, sharded_update, True):
        assert re.search("the vision encoder of .* is sharded on its own", str(error))
