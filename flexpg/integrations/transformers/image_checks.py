"""Whether images and videos fit a packed sequence's tokens and a model: checked before anything is computed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from flexpg.integrations.fsdp import sharded_modules
from flexpg.integrations.transformers.composite import backbone, text_config, tower_modules
from flexpg.prompt_inputs import Item, PromptInputs
from flexpg.tree import PrefixTree

# Layers in which the tokens of an image see one another in both directions.
BIDIRECTIONAL = {"gemma3": ("full_attention", "sliding_attention"), "gemma4": ("sliding_attention",)}
# Names of the token ids of images, videos and audio in a config; their features replace embeddings.
PLACEHOLDERS = {kind: (f"{kind}_token_index", f"{kind}_token_id") for kind in ("image", "video", "audio")}
FEATURES = {"image": "get_image_features", "video": "get_video_features"}
# Model types with images that tests/support_matrix.py found exact; others warn.
MEASURED = frozenset(
    (
        "aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_vl gemma3 "
        "gemma4 glm46v glm4v glm4v_moe glm_ocr glmga got_ocr2 hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 "
        "internvl janus lfm3_vl lighton_ocr llava llava_next llava_onevision mistral3 ovis2 pp_chart2table "
        "qianfan_ocr qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm step3p7 video_llava"
    ).split()
)
PASS_IMAGES = (
    "pass images as Rollouts.from_groups(..., prompt_inputs=...), and none in completions (model.generate takes "
    "suppress_tokens)"
)
SAMPLE_TEXT = "flexpg.sample takes text only: use model.generate, and Rollouts.from_generate(..., prompt_inputs=...)"


def placeholder_ids(model: PreTrainedModel) -> dict[int, str]:
    """Return the token ids of images, videos and audio in a model's config, each with the kind that it represents."""
    if text_config(model) is model.config:
        return {}
    values = {kind: [getattr(model.config, name, None) for name in names] for kind, names in PLACEHOLDERS.items()}
    return {token: kind for kind, ids in values.items() for token in ids if isinstance(token, int)}


def check_inputs(
    model: PreTrainedModel,
    tree: PrefixTree,
    rollout_ids: Sequence[int] | None = None,
    advice: str = PASS_IMAGES,
    kinds: Collection[str] = PLACEHOLDERS.keys(),
) -> None:
    """Check that placeholder tokens and images belong together, before anything is computed.

    Args:
        model: The transformers model.
        tree: The packed sequence.
        rollout_ids: What errors call each of its sequences; None for their numbers.
        advice: What to do about a placeholder without an image.
        kinds: Kinds of placeholders that need an image; the others are tokens like any other.

    Raises:
        ValueError: If a placeholder has no image, or an image another number of placeholders than the model needs.
        TypeError: If flexpg does not support images in this model.
    """
    ids = {token: kind for token, kind in placeholder_ids(model).items() if kind in kinds}
    inputs = tree.inputs or (None,) * len(tree.lengths)
    if tree.inputs is None and (not ids or tree.max_token < min(ids)):
        return
    name = type(model).__name__
    if tree.inputs is not None:
        check_supports_images(model)
    packed = tree.input_ids[0].cpu().numpy()
    covered = np.zeros(len(packed), dtype=bool)
    node = tree.node.cpu().numpy()
    for n, given in first_of_each(inputs):
        for i, item in enumerate(given.items):
            if item.kind == "video" and not model.config.model_type.startswith("qwen"):
                raise TypeError(f"{given.name} has a video, which flexpg does not support in {name}; use images")
            places = node[n, np.flatnonzero(given.item == i)]
            found = {ids.get(token) for token in packed[places].tolist()}
            if found != {item.kind}:
                raise ValueError(
                    f"{given.name} must have {item.kind} tokens where its token types say so, got token "
                    f"ids {sorted(set(packed[places].tolist()))}; those of {name} are {_shown(ids)}"
                )
            expected = tokens_of(model, item)
            if expected is not None and expected != item.num_tokens:
                raise ValueError(
                    f"{given.name} must have {expected} tokens for {item.kind} {i}, of sizes "
                    f"{_sizes(item)}, got {item.num_tokens}; do not shorten prompts that have images"
                )
            covered[places] = True
    for token, kind in ids.items():
        alone = np.flatnonzero((packed[: tree.num_tokens] == token) & ~covered[: tree.num_tokens])
        if len(alone):
            n, t = (int(i) for i in np.argwhere(node == alone[0])[0])
            where = f"sequence {n}" if rollout_ids is None else f"rollout {rollout_ids[n]}"
            a = "a" if kind == "video" else "an"
            raise ValueError(
                f"{where} has {a} {kind} token ({token} of {name}) at position {t} without {a} {kind}; {advice}"
            )


def check_supports_images(model: PreTrainedModel) -> None:
    """Refuse models in which images of packed sequences would not be exact.

    Raises:
        TypeError: With the reason.
    """
    name, base_model = type(model).__name__, backbone(model)
    parameters = inspect.signature(type(base_model).forward).parameters
    if not hasattr(base_model, FEATURES["image"]) or "pixel_values" not in parameters:
        raise TypeError(f"{name} takes no images, or not by `get_image_features`; train it on text or without flexpg")
    if "moe_mm_token_type_ids" in parameters:
        raise TypeError(
            f"{name} routes images to experts of their own, which flexpg does not support; train it on text"
        )
    kind = model.config.model_type
    if kind not in BIDIRECTIONAL and ("token_type_ids" in parameters or _changes_masks(type(base_model))):  # type: ignore[arg-type]
        raise TypeError(
            f"{name} changes its mask where there are images, in a way that flexpg does not know; train it on text or "
            "without flexpg"
        )
    if tower_modules(model).intersection(sharded_modules(model)):
        raise TypeError(
            f"the vision encoder of {name} is sharded on its own, so that ranks with text only would not take part in "
            "its collectives; shard its layers with the whole model"
        )
    if kind not in MEASURED:
        warnings.warn(
            f"images in {name} were not compared with the baseline in flexpg's tests (docs/models.md); do so once by "
            "flexpg.self_check(model, rollouts)",
            stacklevel=2,
        )


@cache
def _changes_masks(model_class: type) -> bool:
    """Return whether the code of a model has masks that depend on images."""
    source = inspect.getsource(inspect.getmodule(model_class))  # type: ignore[arg-type]
    return any(name in source for name in ("block_sequence_ids", "or_mask_function"))


def tokens_of(model: PreTrainedModel, item: Item) -> int | None:
    """Return how many placeholders an item needs; None if that is known only after the vision encoder."""
    config: Any = model.config
    grid = item.tensors.get("image_grid_thw", item.tensors.get("video_grid_thw"))
    if grid is not None:
        if not config.model_type.startswith("qwen"):
            return None
        return int((grid.prod(-1) // config.vision_config.spatial_merge_size**2).sum())
    rows = item.tensors["pixel_values"].shape[item.dim] if item.kind == "image" else 0
    per_row = {"gemma3": "mm_tokens_per_image", "internvl": "image_seq_length"}.get(config.model_type)
    return None if per_row is None or not rows else rows * int(getattr(config, per_row))


def first_of_each(inputs: Sequence[PromptInputs | None]) -> Iterator[tuple[int, PromptInputs]]:
    """Yield each prompt's inputs once, with the first sequence that has them."""
    seen = set()
    for n, prompt_inputs in enumerate(inputs):
        if prompt_inputs is not None and id(prompt_inputs) not in seen:
            seen.add(id(prompt_inputs))
            yield n, prompt_inputs


def _sizes(item: Item) -> dict[str, Any]:
    return {
        name: x.tolist() if x.numel() < 10 else list(x.shape)
        for name, x in item.tensors.items()
        if not name.endswith("mask")
    }


def _shown(ids: dict[int, str]) -> str:
    return ", ".join(f"{token} ({kind})" for token, kind in ids.items()) or "unknown"
