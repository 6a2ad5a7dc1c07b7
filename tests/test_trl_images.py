"""TRL's trainers on image prompts: with shared prefixes they train as TRL's own do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import hf_models as hf
import numpy as np
import pytest
import torch
import transformers
import trl.trainer.utils
from cases import tokens
from datasets import Dataset, Features, Image, List, Value
from hf_models import in_float64
from peft import LoraConfig
from pictures import Picture, with_images
from processors import picture, processor_of
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, unsplit_pixel_values_by_grid
from trl_runs import GROUP_OPTIONS, QUIET, Float64Head, Run, assert_trained_alike

from flexpg.integrations.trl import (
    SharedPrefixDPOTrainer,
    SharedPrefixGRPOTrainer,
    SharedPrefixRLOOTrainer,
    regroup,
    share_prefixes,
)
from flexpg.processor_layouts import TOKEN_TYPES, split_batch

pytestmark = [pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning"), pytest.mark.slow]

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
NO_IMAGES = {
    "suppress_tokens": list(range(hf.VOCAB, hf.VOCAB + 8))
}  # a sampled placeholder would be an image to TRL too
QUESTIONS = ["which colour", "how many", "what is it?"]


@pytest.fixture(autouse=True)
def float64_head(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], str]:
    """Return the folder of a tiny vision-language model by its name."""
    folders: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            hf.model_from_config(copy.deepcopy(hf.COMPOSITES[name])).save_pretrained(folders[name])
        return folders[name]

    return folder


def one_image() -> Dataset:
    """Return prompts with one image each; equal questions about other images, and other questions about equal ones."""
    rows = range(24)
    images = [picture(COLORS[n % 4], width=56 + 56 * (n % 8 == 5)) for n in rows]
    prompts = [[{"role": "user", "content": QUESTIONS[n // 2 % 3]}] for n in rows]
    return Dataset.from_dict({"prompt": prompts, "image": images}).cast_column("image", Image())


def several_or_none() -> Dataset:
    """Return prompts with two images, one or none, mixed in a batch."""
    rows = range(24)
    images = [[picture(COLORS[(n + i) % 4]) for i in range((2, 0, 1)[n % 3])] for n in rows]
    prompts = [[{"role": "user", "content": QUESTIONS[n // 2 % 3]}] for n in rows]
    features = Features(
        {"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    return Dataset.from_dict({"prompt": prompts, "images": images}, features=features)


def train(trainer_class: type, folder: str, name: str, dataset: Dataset, lora: bool = False, **settings: Any) -> Run:
    """Train a float64 model, always from the same seed."""
    torch.manual_seed(0)
    config = RLOOConfig if issubclass(trainer_class, RLOOTrainer) else GRPOConfig
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    batches = []

    def reward(completion_ids, **columns):
        batches.append([((), tuple(completion)) for completion in completion_ids])
        return [float(sum(token * 7 % 11 for token in completion) % 5) for completion in completion_ids]

    trainer = trainer_class(
        model=in_float64(model),
        reward_funcs=reward,
        args=config(
            **{"output_dir": folder + "/runs", "generation_kwargs": NO_IMAGES} | QUIET | GROUP_OPTIONS | settings
        ),
        processing_class=processor_of(name),
        peft_config=LoraConfig(r=4, lora_alpha=32, target_modules=r".*language_model.*_proj") if lora else None,
        train_dataset=dataset,
    )
    for each in (trainer.model, trainer.ref_model):
        if each is not None:
            in_float64(each)
    trainer.train()
    return Run(trainer, batches)


CASES = {
    "one image": ("qwen2_5_vl", one_image, {"num_iterations": 2, "beta": 0.1}),
    "several or none, lora": ("qwen3_vl", several_or_none, {"lora": True, "beta": 0.1}),
    "gemma, several or none": ("gemma3_vl", several_or_none, {"beta": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_grpo_with_images_trains_as_trl(case, saved):
    name, dataset, settings = CASES[case]
    ours, expected = (
        train(each, saved(name), name, dataset(), **settings) for each in (SharedPrefixGRPOTrainer, GRPOTrainer)
    )
    # Towers and RoPE compute in float32 in a float64 model.
    assert_trained_alike(ours, expected, tolerance=1e-6)
    assert min(ours.logged("flexpg/tokens_saved")) > 0


def test_rloo_with_images_trains_as_trl(saved):
    runs = [
        train(each, saved("qwen2_5_vl"), "qwen2_5_vl", one_image(), beta=0.1)
        for each in (SharedPrefixRLOOTrainer, RLOOTrainer)
    ]
    assert_trained_alike(*runs, tolerance=1e-6)


def preferences() -> Dataset:
    rows = one_image()
    answers = {"chosen": "red", "rejected": "blue as well"}
    return rows.map(lambda row: {name: [{"role": "assistant", "content": text}] for name, text in answers.items()})


def test_dpo_with_images_trains_as_trl(saved):
    runs = []
    for trainer_class in (SharedPrefixDPOTrainer, DPOTrainer):
        torch.manual_seed(0)
        options = QUIET | {"output_dir": saved("qwen2_5_vl") + "/runs", "per_device_train_batch_size": 4}
        trainer = trainer_class(
            model=in_float64(transformers.AutoModelForImageTextToText.from_pretrained(saved("qwen2_5_vl"))),
            args=DPOConfig(**options),
            processing_class=processor_of("qwen2_5_vl"),
            train_dataset=preferences(),
        )
        in_float64(trainer.ref_model)
        trainer.train()
        runs.append(Run(trainer, []))
    assert_trained_alike(*runs, tolerance=1e-6)


# One forward.


def batch_of(name: str) -> dict[str, Tensor]:
    """Return rows of prompts with two images, one or none and their completions."""
    prompts = [
        with_images(name, tokens(4, 1), Picture(1), tokens(3, 2), Picture(2), tokens(2, 3)),
        with_images(name, tokens(4, 1), Picture(1), tokens(5, 4)),
        with_images(name, tokens(9, 5)),
        with_images(name, tokens(4, 1), Picture(2), tokens(5, 4)),
    ]
    rows = [(ids + tokens(5, 10 * g + n), given) for g, (ids, given) in enumerate(prompts) for n in range(2)]
    return padded_batch(name, rows)


def batch_with_images_of_tools(name: str) -> dict[str, Tensor]:
    """Return completions of one prompt in which the answer of a tool, which is not in the loss, has an image."""
    parts = [(tokens(6, 1), tokens(3, 10 + n), Picture(1 + n % 2), tokens(5, 20 + n)) for n in range(4)]
    batch = padded_batch(name, [with_images(name, *row) for row in parts])
    calls = (batch["attention_mask"].cumsum(1) > 6) & (batch["attention_mask"].cumsum(1) <= 9)
    batch["labels"][calls] = batch["input_ids"][calls]
    return batch


def padded_batch(name: str, rows: list[tuple[list[int], Any]]) -> dict[str, Tensor]:
    """Return rows and their images as TRL passes them, padded on the left; the last 5 tokens are labels."""
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[int]) -> list[int]:
        return [0] * (width - len(values)) + values

    batch = {"input_ids": torch.tensor([padded(ids) for ids, _ in rows])}
    batch["attention_mask"] = torch.tensor([padded([1] * len(ids)) for ids, _ in rows])
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-5] = -100
    images = [{key: x for key, x in given.items() if key not in TOKEN_TYPES} for _, given in rows if given is not None]
    if name == "smolvlm":  # a row of tiles per prompt, filled up with zeros
        tiles = [image["pixel_values"] for image in images]
        full = torch.zeros(len(rows), 2, *tiles[0].shape[2:], dtype=torch.float64)
        for row, tile in zip([n for n, (_, given) in enumerate(rows) if given], tiles, strict=True):
            full[row, : tile.shape[1]] = tile[0]
        return batch | {"pixel_values": full}
    batch |= {key: torch.cat([image[key] for image in images]) for key in images[0]}
    types = [[int(token == hf.IMAGE) for token in row] for row in batch["input_ids"].tolist()]
    parameters = signature(type(hf.tiny_model(name).model).forward).parameters
    return batch | {key: torch.tensor(types) for key in TOKEN_TYPES if key in parameters}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma4_vl", "mistral3", "internvl", "smolvlm", "llava_next"])
def test_fused_forward_with_images_equals_trl(name):
    assert_equals_trl(name, batch_of(name))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "gemma3_vl", "internvl"])
def test_fused_forward_with_images_of_tools_equals_trl(name):
    assert_equals_trl(name, batch_with_images_of_tools(name))


def assert_equals_trl(name: str, batch: dict[str, Tensor]) -> None:
    found = []
    for shares in (True, False):
        model = in_float64(hf.tiny_model(name))
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if shares:
            share_prefixes(model)
        out = model(**batch, fused_lm_head=True)
        (out.log_probs * torch.arange(out.log_probs.numel()).view_as(out.log_probs)).sum().backward()
        gradients = {path: parameter.grad for path, parameter in model.named_parameters() if parameter.grad is not None}
        found.append(({"log_probs": out.log_probs.detach()}, gradients))
    (ours, our_gradients), (expected, gradients) = found
    assert (ours["log_probs"] - expected["log_probs"]).abs().max() < 1e-6  # of RoPE, which counts TRL's padding
    largest = max(gradient.norm() for gradient in gradients.values())
    assert our_gradients.keys() == gradients.keys()
    for path, truth in gradients.items():
        assert (our_gradients[path] - truth).norm() < 1e-5 * max(truth.norm(), 1e-4 * largest), path


def test_images_that_cannot_be_told_apart_are_refused():
    batch = batch_of("qwen2_5_vl")
    model = in_float64(hf.tiny_model("qwen2_5_vl"))
    add_fused_lm_head(model)
    share_prefixes(model)
    batch["image_grid_thw"][0] = torch.tensor([1, 2, 8])
    batch["image_grid_thw"][1] = torch.tensor([1, 4, 4])
    assert model(**batch, fused_lm_head=True).log_probs.isfinite().all()  # another shape with as many tokens
    batch["image_grid_thw"][0] = torch.tensor([1, 2, 4])
    with pytest.raises(ValueError, match=r"the batch must have one row of pixel_values per patch of its grids"):
        model(**batch, fused_lm_head=True)
    types = [np.array([0, 1, 1]), np.array([1, 1, 0])]
    with pytest.raises(ValueError, match=r"the rows must have image tokens for 3 images, got \[2, 2\], which does not"):
        split_batch(types, {"pixel_values": torch.ones(3, 3, 2, 2)})


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 2)], ids=["all", "two"])
def test_images_without_placeholders_are_refused(name, rows):
    """As by TRL, which says what to do if the text of this error is in it."""
    batch = batch_of(name)
    batch["input_ids"][rows].masked_fill_(batch["input_ids"][rows] == hf.IMAGE, 5)
    for shares in (True, False):
        model = in_float64(hf.tiny_model(name))
        add_fused_lm_head(model)
        if shares:
            share_prefixes(model)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**batch, fused_lm_head=True)


@pytest.mark.parametrize(("name", "has_images"), [("qwen2_5_vl", True), ("qwen2_5_vl", False), ("gemma3_vl", False)])
def test_sampled_placeholder_without_pixels_is_a_token_as_in_trl(name, has_images):
    batch = batch_of(name)
    if has_images:
        batch["input_ids"][1, -3] = hf.VIDEO
    else:
        batch = {key: batch[key][4:6] for key in ("input_ids", "attention_mask", "labels")}
        batch["input_ids"][1, -3] = hf.IMAGE
    if name == "gemma3_vl":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    found = []
    for shares in (True, False):
        model = in_float64(hf.tiny_model(name))
        add_fused_lm_head(model)
        if shares:
            share_prefixes(model)
        found.append(model(**batch, fused_lm_head=True).log_probs)
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_regroup_leaves_rows_of_tiles_with_their_prompts():
    """SmolVLM has a row of tiles per prompt; a micro-batch of as many images as rows must not be split by images."""
    batches = [
        {
            "prompt_ids": torch.tensor([[5], [first], [5], [first]]),
            "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
            "pixel_values": torch.arange(4.0).view(4, 1, 1, 1, 1) + 10 * number,
            "num_images": counts,
            "row": torch.arange(4) + 10 * number,
        }
        for number, (first, counts) in enumerate([(6, [2, 0, 2, 0]), (7, [2, 1, 2, 1])])
    ]
    for batch in map(unsplit_pixel_values_by_grid, regroup(batches)):
        assert batch["pixel_values"].flatten().tolist() == batch["row"].tolist()


def test_rows_of_equal_prompts_with_other_images_are_other_groups():
    pictures = [torch.full((4, 2), float(value)) for value in (1, 2, 1, 2)]
    rows = {
        "prompt_ids": torch.tensor([[5, 6]] * 4),
        "prompt_mask": torch.ones(4, 2, dtype=torch.int64),
        "pixel_values": pictures,
        "row": torch.arange(4),
    }
    assert [batch["row"].tolist() for batch in regroup([rows])] == [[0, 2, 1, 3]]
