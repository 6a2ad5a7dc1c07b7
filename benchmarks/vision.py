"""A GRPO update of one group whose prompt has an image, shaped like Qwen2.5-VL: TRL's trainer and flexpg's.

    python -m benchmarks.vision                    # CPU, float32
    python -m benchmarks.vision --device cuda      # bfloat16
    python -m benchmarks.vision --tiny             # seconds, as a test

Both trainers compute the loss and the backward of one micro-batch as TRL prepared it: every row with its own copy of
the image. TRL's encodes all copies. The bound is the cost model's: FLOPs of the baseline over those of flexpg, the
vision encoder's included. The vocabulary is small, as in trl_update.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl import GRPOTrainer

from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from benchmarks.trl_update import build_trainer, gradient, random_batch, update
from flexpg import Rollouts
from flexpg.analysis.report import report
from flexpg.analysis.transformers_images import image_flops
from flexpg.analysis.transformers_shape import shape_of
from flexpg.integrations.trl import SharedPrefixGRPOTrainer

START, END, IMAGE, VIDEO = 256, 257, 258, 259  # token ids; 256 is also the padding of completions


@dataclass(frozen=True)
class Case:
    """One update: tokens of image, question and completions, rollouts, and the widths of both models."""

    image: int
    question: int
    completion: int
    group: int
    width: int = 512
    layers: int = 6
    vision_width: int = 256
    vision_layers: int = 4


CASES = {
    "cpu": [Case(1024, 32, 128, 8)],
    "cuda": [Case(1024, 32, 512, 8, 2048, 24, 1280, 32), Case(4096, 32, 512, 8, 2048, 24, 1280, 32)],
    "tiny": [Case(16, 4, 8, 2, 64, 2, 64, 2)],
}


def config_of(case: Case) -> Qwen2_5_VLConfig:
    """Return the config of a model; every second layer of its vision encoder attends to the whole image."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 260,
            "hidden_size": case.width,
            "intermediate_size": 3 * case.width,
            "num_hidden_layers": case.layers,
            "num_attention_heads": case.width // 64,
            "num_key_value_heads": max(1, case.width // 256),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]},
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": case.vision_layers,
            "hidden_size": case.vision_width,
            "intermediate_size": 3 * case.vision_width,
            "num_heads": case.vision_width // 64,
            "out_hidden_size": case.width,
            "fullatt_block_indexes": list(range(1, case.vision_layers, 2)),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )


def image_batch(case: Case, device: torch.device) -> dict[str, Any]:
    """Return a micro-batch as TRL's loss takes it: a group whose prompt is an image and a question."""
    batch = random_batch(case.question + case.image + 2, [case.completion] * case.group, device)
    prompt = batch["prompt_ids"].clone()
    prompt[:, 0], prompt[:, 1 : case.image + 1], prompt[:, case.image + 1] = START, IMAGE, END
    side = 2 * int(case.image**0.5)  # patches; four are one token
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)).to(device)
    types = torch.cat([prompt == IMAGE, torch.zeros_like(batch["completion_ids"], dtype=torch.bool)], 1)
    return batch | {
        "prompt_ids": prompt,
        "pixel_values": pixels.repeat(case.group, 1),
        "image_grid_thw": torch.tensor([[1, side, side]] * case.group, device=device),
        "mm_token_type_ids": types.long(),
        "num_images": [1] * case.group,
    }


def rollouts_of(batch: dict[str, Any]) -> Rollouts:
    """Return the group of a micro-batch, for the cost model."""
    prompt, patches = batch["prompt_ids"][0], len(batch["pixel_values"]) // len(batch["prompt_ids"])
    inputs = {
        "pixel_values": batch["pixel_values"][:patches],
        "image_grid_thw": batch["image_grid_thw"][:1],
        "mm_token_type_ids": batch["mm_token_type_ids"][:1, : len(prompt)],
    }
    completions = list(batch["completion_ids"])
    return Rollouts.from_groups([prompt], [completions], [[0.0] * len(completions)], prompt_inputs=[inputs])


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of both trainers, the speed-up, its bound, and the difference of gradients."""
    options = argparse.Namespace(device=device.type, group=case.group)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config_of(case)).save_pretrained(folder)
        classes: dict[str, type[GRPOTrainer]] = {"trl": GRPOTrainer, "flexpg": SharedPrefixGRPOTrainer}
        trainers = {name: build_trainer(cls, folder, options) for name, cls in classes.items()}
    batch = image_batch(case, device)
    times = alternate({name: partial(update, trainer, batch) for name, trainer in trainers.items()}, repeats, device)
    expected, shared = gradient(trainers["trl"]), gradient(trainers["flexpg"])
    model, rollouts = trainers["trl"].model, rollouts_of(batch)
    flops = image_flops(model, rollouts)
    counted = report(rollouts, shape_of(model), image_flops=flops).total
    return {
        "times_ms": {name: quartiles(values) for name, values in times.items()},
        "speedup": paired_ratio(times["trl"], times["flexpg"]),
        "bound": counted["shared"]["flops_ratio"],
        "images": [counted[name]["images"] for name in ("baseline", "shared")],
        "vision_share": counted["baseline"]["images"] * sum(flops.values()) / counted["baseline"]["flops"],
        "gradient_difference": ((shared - expected).norm() / expected.norm()).item(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("vision", __doc__ or "", CASES, measure, argv)


if __name__ == "__main__":
    main()
