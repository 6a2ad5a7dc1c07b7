"""How transformers' processors lay out images and videos: which rows of which tensors belong to which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # 0 for text, 1 and 2 as in KINDS
KINDS = {1: "image", 2: "video"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
INPUTS = {
    "image": {
        "pixel_values",
        "image_grid_thw",
        "image_sizes",
        "batch_num_images",
        "image_position_ids",
        "pixel_attention_mask",
        "spatial_shapes",
    },
    "video": {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_position_ids"},
}


def split_batch(types: Sequence[np.ndarray], given: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """Return for each row of a batch what a processor would have returned for it alone.

    Args:
        types: For each row its token types [T], without padding.
        given: What the processor returned for the batch: the images of all rows one after another, or a row each.

    Returns:
        One entry per row, None for rows of text.

    Raises:
        ValueError: If it cannot be told which images belong to which row.
    """
    rows: list[dict[str, Any]] = [{} for _ in types]
    for number, kind in KINDS.items():
        tensors = {key: given[key] for key in sorted(INPUTS[kind]) if given.get(key) is not None}
        if PIXELS[kind] not in tensors or not tensors[PIXELS[kind]].numel():
            continue
        places = [np.flatnonzero(row_types == number) for row_types in types]
        if not sum(map(len, places)):
            raise ValueError(f"the rows must have {kind} tokens for their {PIXELS[kind]}, got none")
        if _has_row_per_prompt(kind, tensors):
            for n, row in enumerate(rows):
                if not len(places[n]) and tensors[PIXELS[kind]][n].any():  # padding is zeros
                    raise ValueError(f"row {n} must have {kind} tokens for its {PIXELS[kind]}, got none")
                row.update({key: x[n : n + 1] for key, x in tensors.items()} if len(places[n]) else {})
            continue
        parts, sizes, _ = split_items("the batch", kind, tensors)
        runs = [stop - start for row_places in places for start, stop in runs_of(row_places)]
        total, found = sum(sizes), sum(map(len, places))
        if total and all(found * size % total == 0 for size in sizes):
            counts = [found * size // total for size in sizes]
        else:
            counts = runs if len(runs) == len(parts) else []
        bounds, ends = list(accumulate(counts)), list(accumulate(map(len, places)))
        if not set(ends) <= {0, *bounds} or not counts:
            raise ValueError(
                f"the rows must have {kind} tokens for {len(parts)} {kind}s, got {list(map(len, places))}, which does "
                "not tell which of them belong to which row"
            )
        first = 0
        for row, end in zip(rows, ends, strict=True):
            chosen = [part for part, bound in zip(parts, bounds, strict=True) if first < bound <= end]
            row.update({key: torch.cat([part[key] for part in chosen]) for key in tensors} if chosen else {})
            first = end
    return [row | {TOKEN_TYPES[0]: row_types} if row else None for row, row_types in zip(rows, types, strict=True)]


def split_items(name: str, kind: str, tensors: dict[str, Tensor]) -> tuple[list[dict[str, Tensor]], list[int], int]:
    """Return the tensors of each item, numbers to which their tokens are proportional (or zeros), and the dimension.

    The layouts are those of transformers' processors: patches of all images one after another, with their grids
    (Qwen); a row per image or tile (Gemma, LLaVA, InternVL, Mistral); or a row per prompt, of tiles (Idefics3).
    """
    pixels = tensors[PIXELS[kind]]
    grid = tensors.get("image_grid_thw" if kind == "image" else "video_grid_thw")
    if grid is not None:
        sizes = [int(size) for size in grid.prod(-1)]
        if sum(sizes) != len(pixels):
            raise ValueError(
                f"{name} must have one row of {PIXELS[kind]} per patch of its grids, got {len(pixels)} rows for grids "
                f"of {sizes} patches"
            )
        bounds = list(pairwise(accumulate(sizes, initial=0)))
        parts = [
            {key: x[start:stop] if key == PIXELS[kind] else x[i : i + 1] for key, x in tensors.items()}
            for i, (start, stop) in enumerate(bounds)
        ]
        return parts, sizes, 0
    if pixels.dim() == 2:  # patches of all images, whose numbers only a grid tells
        raise ValueError(
            f"{name} must have {kind}_grid_thw beside {PIXELS[kind]} of patches {list(pixels.shape)}, got "
            f"{', '.join(tensors)}; pass all that the processor returned"
        )
    if "batch_num_images" in tensors and len(pixels) > 1:  # LLaVA-OneVision divides images that are alone only
        return [tensors], [1], 0
    dim = 1 if _has_row_per_prompt(kind, tensors) and len(pixels) == 1 else 0
    lengths = {key: x.shape[dim] for key, x in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} must have tensors of the same number of {kind}s, got lengths {lengths}")
    parts = [{key: x.narrow(dim, i, 1) for key, x in tensors.items()} for i in range(pixels.shape[dim])]
    if dim == 1:  # tiles of zeros are padding, which the model drops
        parts = [part for part in parts if bool(part[PIXELS[kind]].any())]
    if "image_position_ids" in tensors:
        return parts, [int((part["image_position_ids"] != -1).all(-1).sum()) for part in parts], dim
    if "image_sizes" in tensors and kind == "image":
        by_area = [int(part["image_sizes"].prod()) for part in parts]
        return parts, by_area if pixels.dim() == 4 else [0] * len(parts), dim  # else with a separator in each row
    if "spatial_shapes" in tensors:
        return parts, [0] * len(parts), dim
    return parts, [1] * len(parts), dim


def runs_of(places: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of consecutive numbers."""
    runs = []
    for _, run in groupby(enumerate(places.tolist()), key=lambda pair: pair[1] - pair[0]):
        numbers = [place for _, place in run]
        runs.append((numbers[0], numbers[-1] + 1))
    return runs


def _has_row_per_prompt(kind: str, tensors: dict[str, Tensor]) -> bool:
    """Return whether the first dimension counts prompts, with tiles in the second (Idefics3, SmolVLM)."""
    return kind == "image" and tensors[PIXELS[kind]].dim() == 5 and "image_sizes" not in tensors
