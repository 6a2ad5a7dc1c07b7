"""Prompts with random images, as the processors of tiny vision-language models return them.

pixels(name, seed, ...)                  what the processor of a model returns for one image, and its number of tokens
with_images(name, *parts)                token ids and prompt_inputs of a prompt: lists of tokens, and images
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hf_models import IMAGE, IMAGE_END, IMAGE_START, VIDEO, VIDEO_START
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """A random image, or a video of two frames.

    Attributes:
        seed: Of its pixels.
        size: Patches (Qwen), tiles (InternVL, SmolVLM) or pixels in units of 28, as height and width.
        frames: Frames of a video; 0 for an image.
    """

    seed: int
    size: tuple[int, int] = (1, 1)
    frames: int = 0


def pixels(name: str, picture: Picture, is_alone: bool = True) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of one image or video in the layout of a model's processor, and how many tokens it has.

    Args:
        name: The model.
        picture: The image or video.
        is_alone: Whether it is the only one of its prompt; LLaVA-OneVision divides only those into tiles.
    """
    draw = torch.Generator().manual_seed(picture.seed)
    height, width = picture.size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    if name.startswith("qwen"):
        grid = [max(1, picture.frames), 4 * height, 4 * width]
        patches = grid[0] * grid[1] * grid[2]
        kind, pixel_name = ("video", "pixel_values_videos") if picture.frames else ("image", "pixel_values")
        found = {pixel_name: random(patches, 3 * 2 * 14 * 14), f"{kind}_grid_thw": torch.tensor([grid])}
        return found, patches // 4
    if name == "mistral3":
        found = {"pixel_values": random(1, 3, 56 * height, 56 * width)}
        return found | {"image_sizes": torch.tensor([[56 * height, 56 * width]])}, 4 * height * width
    if name == "gemma4_vl":
        places = torch.cartesian_prod(torch.arange(4 * width), torch.arange(4 * height))[None]
        return {"pixel_values": random(1, len(places[0]), 147), "image_position_ids": places}, 4 * height * width
    if name == "llava_onevision" and not is_alone:
        sizes = torch.tensor([[28 * height, 28 * width]])
        return {"pixel_values": random(1, 1, 3, 28, 28), "image_sizes": sizes}, 4 + 1
    if name in ("llava_next", "llava_onevision"):
        # Tiles of 2 x 2 patches: the whole image, then a grid of them with a separator after each row.
        tiles = 1 + max(2, height * width)
        sizes = (28, 56) if height * width == 1 else (28 * height, 28 * width)
        rows, columns = 2 * sizes[0] // 28, 2 * sizes[1] // 28
        found = {"pixel_values": random(1, tiles, 3, 28, 28), "image_sizes": torch.tensor([sizes])}
        return found, 4 + rows * (columns + 1)
    if name == "internvl":
        return {"pixel_values": random(height * width, 3, 28, 28)}, 4 * height * width
    if name in ("smolvlm", "idefics3"):
        found = {"pixel_values": random(1, height * width, 3, 28, 28)}
        return found | {"pixel_attention_mask": torch.ones(1, height * width, 28, 28).long()}, 4 * height * width
    return {"pixel_values": random(1, 3, 28, 28)}, 4


def with_images(name: str, *parts: list[int] | Picture) -> tuple[list[int], dict[str, Any] | None]:
    """Return the token ids of a prompt of tokens and images, and what the processor returns beside them."""
    ids: list[int] = []
    types: list[int] = []
    given: dict[str, list[Tensor]] = {}
    count_images = sum(isinstance(part, Picture) for part in parts)
    for part in parts:
        if not isinstance(part, Picture):
            ids, types = ids + part, types + [0] * len(part)
            continue
        tensors, count = pixels(name, part, count_images == 1)
        for key, value in tensors.items():
            given.setdefault(key, []).append(value)
        start, token, kind = (VIDEO_START, VIDEO, 2) if part.frames else (IMAGE_START, IMAGE, 1)
        runs = [count]
        if part.frames and name.startswith("qwen3"):  # with a time before each frame
            runs = [count // part.frames] * part.frames
        for n, run in enumerate(runs):
            before = [start] if len(runs) == 1 else [5 + n, start]
            ids = [*ids, *before, *[token] * run, IMAGE_END]
            types = [*types, *[0] * len(before), *[kind] * run, 0]
    if not given:
        return ids, None
    dim = 1 if name in ("smolvlm", "idefics3") else 0
    joined = {key: _joined(values, dim, -1 if key.endswith("position_ids") else 0) for key, values in given.items()}
    if name == "llava_onevision":
        joined["batch_num_images"] = torch.tensor([count_images])
    return ids, joined | {"mm_token_type_ids": torch.tensor([types])}


def _joined(values: list[Tensor], dim: int, filler: int) -> Tensor:
    """Concatenate the tensors of several images, padded to the largest as processors do."""
    largest = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    padded = []
    for value in values:
        new = value.new_full([*largest[:dim], value.shape[dim], *largest[dim + 1 :]], filler)
        new[tuple(slice(0, size) for size in value.shape)] = value
        padded.append(new)
    return torch.cat(padded, dim)
