"""Which model types of the installed transformers share prefixes exactly: measured, on a tiny random model of each.

    python -m tests.support_matrix                 check every type and write docs/models.md
    python -m tests.support_matrix gemma3 llama    check some types and print their rows

A type's config is made small without knowledge of the type: widths, heads, layers, vocabulary and experts get small
values, and of the layers one of each kind is kept. Log-probabilities and all gradients of a packed tree, and of its
groups with a cached prompt, are compared with each sequence alone. Types that take images are compared with random
images too, in the first layout of pixels that the model accepts. Each type has a process of its own and a time limit.
The command fails if a type is neither exact nor refused with a sentence of flexpg.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import multiprocessing
import os
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import flexpg
from flexpg import Rollouts, SamplingParams, packed_logprobs
from flexpg.integrations.transformers.composite import backbone
from flexpg.integrations.transformers.image_checks import placeholder_ids
from flexpg.verify import baseline_logprobs
from tests.float64 import float32_is_float64

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
TIMEOUT_S = 120
OUTCOMES = ("exact", "refused", "not built", "WRONG")
WINDOW, VOCAB = 7, 64
THROUGHOUT_TOLERANCE = 1e-9  # relative, if what a model rounds to float32 inside is computed in float64 too
FLOAT64_TOLERANCE = 1e-5  # norms, routers and RoPE round to float32 inside
SAMPLING_TOLERANCE = 1e-4  # absolute; sampled log-probabilities are float32
FLOAT32_TOLERANCE = 1e-3  # of models that cannot compute in float64; a token that sees too much changes 0.1 or more

# Values of config fields, by name.
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size")
HIDDEN += ("out_hidden_size", "projection_dim", "text_embed_dim", "output_hidden_size", "mm_hidden_size")
HIDDEN += ("text_hidden_size", "emb_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "decoder_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads")
SMALL: dict[str, Any] = {
    **dict.fromkeys(HIDDEN, 32),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "src_vocab_size"), VOCAB),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input"), 8
    ),
    **dict.fromkeys(
        ("qk_rope_head_dim", "rotary_dim", "index_topk", "mamba_d_state", "state_size", "ssm_state_size"), 4
    ),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("index_n_heads", "mamba_n_heads", "mamba_num_heads", "index_num_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("index_head_dim", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_value_head_dim", "lru_width_per_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "query_pre_attn_scalar": 6,
    "image_size": 28,
    "patch_size": 14,
    "mm_tokens_per_image": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DRAWN = 50  # token ids below are drawn; placeholders of images get ids above


@dataclass(frozen=True)
class Row:
    """What was found of one type.

    Attributes:
        name: The model type.
        architecture: The class that was built.
        outcome: "exact", "refused", "not built" or "WRONG".
        detail: The reason; of exact types a note, or "".
        errors: The largest errors of log-probabilities and gradients, relative.
        dtype: What they were computed in.
        sampled: The largest error of the log-probabilities of sampled tokens, or None if sampling was refused.
        images: The largest errors with images, relative; or why there are none.
    """

    name: str
    architecture: str
    outcome: str
    detail: str = ""
    errors: tuple[float, float] | None = None
    dtype: str = ""
    sampled: float | None = None
    images: tuple[float, float] | str = ""

    @property
    def error_texts(self) -> str:
        """The errors as three cells of a table."""
        if self.errors is None:
            return " |  | "
        return " | ".join("-" if error is None else f"{error:.0e}" if error else "0" for error in self._all_errors)

    @property
    def image_text(self) -> str:
        """What was found with images, as a cell of a table."""
        return self.images if isinstance(self.images, str) else " and ".join(f"{error:.0e}" for error in self.images)

    @property
    def _all_errors(self) -> tuple[float | None, ...]:
        return (*self.errors, self.sampled) if self.errors else ()


# Where a small value contradicts another one, the next of these is tried.
DEFAULT = object()
WIDER: dict[str, Any] = {**dict.fromkeys(HIDDEN, 64), "head_dim": 16}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": DEFAULT, "qk_head_dim": DEFAULT},
    {"mrope_section": [2, 1, 1], "head_dim": DEFAULT},
    {"mrope_section": [1, 1, 0], "head_dim": DEFAULT},
    WIDER,
    WIDER | {"num_key_value_heads": 4},
]

# What the generic rules do not find, by model type of the config. Layers that share keys and values come with others.
LAYER_TYPES = ["sliding_attention", "full_attention"]
SHARED_KV = {"num_hidden_layers": 4, "layer_types": LAYER_TYPES * 2, "num_kv_shared_layers": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}, "head_dim": 8}
SEVERAL_ROPES = {"rope_parameters": dict.fromkeys(LAYER_TYPES, ROPE), "layer_types": LAYER_TYPES}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": SEVERAL_ROPES,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16]},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_vision_layer": -1},
    "internvl": {"image_seq_length": 1},
    "llava_next": {"image_grid_pinpoints": [[28, 56]]},
    "llava_onevision": {"image_grid_pinpoints": [[28, 56]]},
    "qwen2_5_vl_vision": {"window_size": 56, "fullatt_block_indexes": [1]},
    "hunyuan_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}, "head_dim": 8},
    "molmo2_adapter": {"vision_feature_layer": [-1]},
    "nemotron_h": {"n_groups": 2},
    "step3p5": {"sliding_window": WINDOW, "layer_types": LAYER_TYPES, "num_hidden_layers": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": SHARED_KV | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": SHARED_KV | {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
}


# A small config


def small_config(cls: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    """Build a small config of a class, with one layer of each kind and two at least.

    Args:
        cls: The class.
        changes: Values that replace those of SMALL where the class has such a field; DEFAULT leaves the class's own.
    """
    defaults = _defaults(cls)
    values = {name: value for name, value in (SMALL | changes).items() if name in defaults}
    values |= {
        name: [values[name]] * len(defaults[name]) for name in values if isinstance(defaults[name], list | tuple)
    }
    values |= {name: 0.0 for name, value in defaults.items() if "drop" in name and isinstance(value, float)}
    values |= {name: 0.0 for name in defaults if name.endswith("jitter_noise")}
    values |= {name: True for name in defaults if name == "is_decoder"}
    placeholders = [name for name in sorted(defaults) if re.fullmatch(r".*_token_(id|index)", name)]
    values |= {name: VOCAB - 1 - n for n, name in enumerate(placeholders) if name not in SMALL}
    values |= _kept_layers(defaults)
    for name in ("sliding_window", "moe_intermediate_size", "num_experts"):  # None: there are none
        if defaults.get(name) is None:
            values.pop(name, None)
    for name, sub in cls.sub_configs.items():
        kind: Any = type(defaults[name]) if isinstance(defaults.get(name), PretrainedConfig) else sub
        if kind.__name__ != "AutoConfig":
            values[name] = small_config(kind, changes).to_dict()
    values |= CHANGES.get(cls.model_type, {})
    return cls(**{name: value for name, value in values.items() if value is not DEFAULT})


def _defaults(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the fields of a config class, and their values in its default config."""
    values = {name: value for name, value in vars(cls()).items() if not name.startswith("_")}
    return {field.name: values.get(field.name) for field in dataclasses.fields(cls)} | values


def _kept_layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers, and every list of one value per layer, for one layer of each kind."""
    total = next((defaults[name] for name in LAYERS if isinstance(defaults.get(name), int)), 0)
    lists = {name: list(v) for name, v in defaults.items() if isinstance(v, list | tuple) and len(v) == total > 0}
    first: dict[str, int] = {}
    for layer in range(total):
        first.setdefault(str([values[layer] for values in lists.values()]), layer)
    kept = [*first.values()] * (1 if len(first) > 1 else 2)
    sizes = {name: len(kept) for name in LAYERS if name in defaults}
    return sizes | {name: [values[layer] for layer in kept] for name, values in lists.items()}


def small_model(name: str, variant: dict[str, Any], dtype: torch.dtype, takes_images: bool = False) -> PreTrainedModel:
    """Build a tiny model of a type in which every parameter matters: no norm weight is 1 and no bias is 0.

    Args:
        name: The model type.
        variant: Values of the config, one of VARIANTS.
        dtype: Of the parameters.
        takes_images: Build the class that takes images, of a type that has one for text too.
    """
    config = small_config(CONFIG_MAPPING[name], variant)
    text = config.get_text_config(decoder=True)
    if "mrope_section" in variant:
        text.rope_parameters = text.rope_parameters | {"mrope_section": variant["mrope_section"]}
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # torch's grouped product has no float64
    eager = getattr(text, "attn_logit_softcapping", None) is not None  # which sdpa would ignore
    is_text = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not takes_images
    auto: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > 130e6:
        raise ValueError(f"its small config still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, **({"attn_implementation": "eager"} if eager else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).train()


# The comparison


def draw(length: int, rng: random.Random) -> list[int]:
    return [rng.randrange(3, DRAWN) for _ in range(length)]


def tree_rollouts() -> Rollouts:
    """Return two groups, one of one completion, longer than the window; the first is oversized for 70 tokens."""
    rng = random.Random(0)
    prompts = [draw(30, rng), draw(9, rng)]
    groups = [[draw(n, rng) for n in (12, 5, 1, 17)], [draw(8, rng)]]
    return Rollouts.from_groups(prompts, groups, [[0.0] * len(group) for group in groups])


def weighted_gradients(model: nn.Module, pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the backward of every (rows, log-probabilities) pair; return all log-probabilities, and the gradients."""
    rollouts = tree_rollouts()
    weights = torch.randn(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.zeros_like(weights)
    model.zero_grad()
    for rows, logprobs in pairs:
        in_loss = rollouts.loss_mask[rows, : logprobs.shape[1]]
        (weights[rows, : logprobs.shape[1]] * logprobs.double())[in_loss].sum().backward()
        found[rows, : logprobs.shape[1]] = logprobs.detach().double().where(in_loss, 0)
    return found, {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the log-probabilities of each sequence, one forward each, through the model's own attention."""
    rollouts = tree_rollouts()
    for n, ids in enumerate(rollouts.sequences):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        first = int(rollouts.prompt_lens[n])
        yield torch.tensor([n]), scores[first - 1 : -1].gather(-1, ids[first:, None]).T


def packed(model: nn.Module, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch, logprobs in packed_logprobs(model, tree_rollouts(), max_tokens=max_tokens):
        yield batch.indices, logprobs


@torch.no_grad()
def sampling_error(model: nn.Module) -> float:
    """Return the largest error of a sample's log-probabilities, compared with each sequence alone."""
    rng, worst = random.Random(1), 0.0
    prompts = [torch.tensor(draw(length, rng)) for length in (27, 4, 1)]
    params = SamplingParams(14, stop_tokens=range(0, VOCAB, 9))
    samples = flexpg.sample(model, prompts, 3, params, seed=0)
    for n, (completion, logprobs) in enumerate(zip(samples.completions, samples.logprobs, strict=True)):
        drawn = (completion < DRAWN).long().cumprod(0).sum()  # up to a placeholder of images, if one was drawn
        prompt, tail = prompts[n // 3], completion[:drawn]
        logits = model(input_ids=torch.cat([prompt, tail])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores = logits.double().log_softmax(-1).gather(-1, tail[:, None])[:, 0]
        worst = max([worst, *(scores - logprobs[:drawn]).abs().tolist()])
    return worst


# Images


def image_layouts(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield what processors return for one small image, in the layouts that models have."""
    config = model.config
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", 28), getattr(vision, "patch_size", 14)
    size, patch = (value if isinstance(value, int) else value[0] for value in (size, patch))
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", getattr(vision, "num_channels", 3)))
    frames = getattr(vision, "temporal_patch_size", 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    yield {
        "pixel_values": random(16, channels * frames * patch**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    yield {"pixel_values": random(1, channels, size, size)}
    yield {"pixel_values": random(1, channels, 4 * patch, 4 * patch), "image_sizes": torch.tensor([[4 * patch] * 2])}
    yield {"pixel_values": random(1, 1, channels, size, size)}
    yield {"pixel_values": random(1, 3, channels, size, size), "image_sizes": torch.tensor([[size, 2 * size]])}
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
    yield {"pixel_values": random(1, 36, channels * patch**2), "image_position_ids": places}


def image_rollouts(model: PreTrainedModel, image: dict[str, Tensor]) -> Rollouts:
    """Return groups whose prompts have an image, another one at equal tokens, the first and a longer text, or none."""
    token = {kind: token for token, kind in placeholder_ids(model).items()}["image"]
    with torch.no_grad():
        features = backbone(model).get_image_features(**image, return_dict=True).pooler_output
    count = sum(feature.shape[:-1].numel() for feature in ([features] if isinstance(features, Tensor) else features))
    rng = random.Random(0)
    start, question, longer = draw(5, rng), draw(4, rng), draw(7, rng)
    other = image | {"pixel_values": image["pixel_values"].flip(-1)}
    prompts, inputs = [draw(9, rng)], [None]
    for given, text in ((image, question), (other, question), (image, longer)):
        prompts.append([*start, *[token] * count, *text])
        inputs.append(given | {"mm_token_type_ids": [0] * len(start) + [1] * count + [0] * len(text)})
    groups = [[draw(n, rng) for n in (6, 3)] for _ in prompts]
    return Rollouts.from_groups(prompts, groups, [[0.0, 1.0]] * len(prompts), prompt_inputs=inputs)


def image_errors(name: str, model: PreTrainedModel, dtype: torch.dtype) -> tuple[float, float] | str:
    """Return the relative errors of log-probabilities and gradients with images, or the reason why there are none.

    Args:
        name: The model type.
        model: A model that is enabled, and computes ordinary batches as before.
        dtype: Of its parameters.
    """
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ""
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # which text was compared with
        models = (small_model(name, variant, dtype, takes_images=True) for variant in VARIANTS)
        try:
            model = flexpg.enable(next(models))
        except Exception as error:
            return one_line(error) if is_own(error) else f"not run: {one_line(error)}"
    reason: BaseException | None = None
    for layout in image_layouts(model):
        torch.manual_seed(1)
        image = {name: x.to(dtype) if x.is_floating_point() else x for name, x in layout.items()}
        try:
            rollouts = image_rollouts(model, image)
            expected = image_results(model, rollouts, packs=False)
        except Exception as error:
            reason = error if reason is None or is_own(error) else reason
            continue
        try:
            return errors(image_results(model, rollouts, packs=True), expected)
        except Exception as error:
            return one_line(error) if is_own(error) else f"WRONG: {one_line(error)}"
    return one_line(reason) if reason is not None and is_own(reason) else f"not run: {one_line(reason or KeyError())}"


def image_results(model: PreTrainedModel, rollouts: Rollouts, packs: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probabilities and gradients, packed or of each sequence alone."""
    weights = torch.randn(rollouts.loss_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.zeros_like(weights)
    model.zero_grad()
    if packs:
        scored = ((batch.indices, logprobs) for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=10_000))
    else:
        scored = ((torch.tensor([n]), baseline_logprobs(model, rollouts.select([n]))[0]) for n in range(len(rollouts)))
    for rows, logprobs in scored:
        (weights[rows, : logprobs.shape[1]] * logprobs.double()).sum().backward()
        found[rows, : logprobs.shape[1]] = logprobs.detach().double()
    return found, {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(value: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    norm = max(float(expected.norm()), scale, 1e-30)
    error = float((value - expected).norm()) / norm
    return error if error == error else float("inf")


def errors(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
    """Return the relative errors of the log-probabilities and of the worst gradient.

    A gradient that is nearly 0 (of a key's bias, which a softmax ignores) counts against the largest one.
    """
    names = found[1].keys() | expected[1].keys()
    floor = 1e-4 * max(float(gradient.norm()) for gradient in expected[1].values())
    zero = torch.zeros(())
    return relative_error(found[0], expected[0]), max(
        relative_error(found[1].get(name, zero), expected[1].get(name, zero), floor) for name in names
    )


def is_own(error: BaseException) -> bool:
    """Return whether flexpg raised an error on purpose, rather than the model or Python."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, TypeError | ValueError) and f"flexpg{os.sep}" in last.filename and last.line[:5] == "raise"


def model_that_runs(name: str) -> tuple[PreTrainedModel, torch.dtype, Any]:
    """Return a type's model, its dtype, and its results of each sequence alone; float32 where float64 fails."""
    first: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for variant in VARIANTS:
            try:
                model = small_model(name, variant, dtype)
                return model, dtype, weighted_gradients(model, alone(model))
            except Exception as error:
                first = first or error
    assert first is not None
    raise first


def check(name: str) -> Row:
    """Build a type's model, and compare it with each sequence alone: in float64 throughout, if that works."""
    with float32_is_float64():
        row = _check(name, throughout=True)
    return row if row.outcome in ("exact", "refused") else _check(name)


def _check(name: str, throughout: bool = False) -> Row:
    try:
        model, dtype, expected = model_that_runs(name)
    except Exception as error:
        return _refused_or_not_built(name, one_line(error))
    architecture = type(model).__name__
    try:
        flexpg.enable(model)
        found = weighted_gradients(model, packed(model, 1000))
    except Exception as error:
        return Row(name, architecture, "refused" if is_own(error) else "WRONG", one_line(error))
    worst, tolerance = errors(found, expected), FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    tolerance = THROUGHOUT_TOLERANCE if throughout else tolerance
    outcome, detail = "exact" if max(worst) < tolerance else "WRONG", ""
    try:
        cached = errors(weighted_gradients(model, packed(model, 56)), expected)
        worst = max(worst[0], cached[0]), max(worst[1], cached[1])
        if not max(cached) < tolerance:
            outcome, detail = "WRONG", f"with a cached prompt: {cached[0]:.0e} {cached[1]:.0e}"
    except Exception as error:
        outcome = outcome if is_own(error) else "WRONG"
        detail = f"without a cached prompt: {one_line(error)}"
    sampled = None
    try:
        sampled = sampling_error(model)
        if not sampled < SAMPLING_TOLERANCE:
            outcome, detail = "WRONG", f"sampling: {sampled:.0e}"
    except Exception as error:
        outcome = outcome if is_own(error) else "WRONG"
        detail = detail or f"without sampling: {one_line(error)}"
    precision = "float64 throughout" if throughout else str(dtype).removeprefix("torch.")
    images = image_errors(name, model, dtype)
    if isinstance(images, tuple) and not max(images) < tolerance:
        outcome, detail = "WRONG", f"with images: {images[0]:.0e} {images[1]:.0e}"
    elif isinstance(images, str) and images.startswith("WRONG"):
        outcome, detail = "WRONG", f"with images: {images}"
    return Row(name, architecture, outcome, detail, worst, precision, sampled, images)


def _refused_or_not_built(name: str, reason: str) -> Row:
    """Return the row of a model that does not run without flexpg; it is refused if `enable` does so."""
    for variant in VARIANTS:
        try:
            model = small_model(name, variant, torch.float32)
        except Exception:
            continue
        try:
            flexpg.enable(model)
        except Exception as error:
            if is_own(error):
                return Row(name, type(model).__name__, "refused", one_line(error))
        return Row(name, type(model).__name__, "not built", f"without flexpg: {reason}")
    return Row(name, "", "not built", reason)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if is_own(error) else f"{type(error).__name__}: {text}"
    return text[:157] + "..." if len(text) > 160 and not is_own(error) else text


# Processes


def _check_in_child(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "wb") as nothing:
        for descriptor in (1, 2):
            os.dup2(nothing.fileno(), descriptor)
    pipe.send(check(name))


def rows(names: Sequence[str], num_processes: int = 2, timeout_s: float = TIMEOUT_S) -> Iterator[Row]:
    """Check types, each in a process of its own, and yield their rows as they finish."""
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: dict[Any, tuple[str, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                name = waiting.pop(0)
                pipe, child_pipe = context.Pipe(duplex=False)
                child = context.Process(target=_check_in_child, args=(name, child_pipe))
                child.start()
                child_pipe.close()
                running[pipe] = name, child, monotonic() + timeout_s
            for pipe in wait(list(running), timeout=1):
                name, child, _ = running.pop(pipe)
                try:
                    yield pipe.recv()
                except EOFError:
                    child.join()
                    yield Row(name, "", "not built", f"the process crashed with exit code {child.exitcode}")
                child.join()
            for pipe, (name, child, deadline) in list(running.items()):
                if monotonic() > deadline:
                    child.kill()
                    child.join()
                    del running[pipe]
                    yield Row(name, "", "not built", f"not finished after {timeout_s:.0f} seconds")
    finally:
        for _, child, _ in running.values():
            child.kill()
            child.join()


def all_types() -> list[str]:
    """Return every model type that generates text, alone or from images too."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(name for name in names if name in CONFIG_MAPPING)


def table(found: Sequence[Row]) -> str:
    """Return docs/models.md."""
    by_outcome = {outcome: sorted((row for row in found if row.outcome == outcome), key=_name) for outcome in OUTCOMES}
    counts = ", ".join(f"{len(names)} {outcome}" for outcome, names in by_outcome.items() if names)
    by_reason: dict[str, list[Row]] = {}
    for row in by_outcome["refused"]:
        by_reason.setdefault(row.detail.replace(row.architecture, "it"), []).append(row)
    return "\n".join(
        [
            INTRODUCTION.format(version=importlib.metadata.version("transformers"), counts=counts),
            "## Exact",
            "",
            "| type | class | computed in | log-probabilities | gradients | sampling | note |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(
                f"| {row.name} | {row.architecture} | {row.dtype} | {row.error_texts} | {row.detail} |"
                for row in by_outcome["exact"]
            ),
            "",
            "## Images",
            "",
            IMAGES.format(count=sum(isinstance(row.images, tuple) for row in by_outcome["exact"])),
            "| type | log-probabilities | gradients |",
            "| --- | --- | --- |",
            *(
                f"| {row.name} | {row.images[0]:.0e} | {row.images[1]:.0e} |"
                for row in by_outcome["exact"]
                if isinstance(row.images, tuple)
            ),
            "",
            "| types with text only | the reason |",
            "| --- | --- |",
            *(f"| {', '.join(names)} | {_cell(reason)} |" for reason, names in _without_images(by_outcome["exact"])),
            "",
            "## Refused",
            "",
            "| types | the error |",
            "| --- | --- |",
            *(f"| {', '.join(map(_name, names))} | {_cell(reason)} |" for reason, names in sorted(by_reason.items())),
            "",
            "## Not built",
            "",
            "| type | the error of transformers |",
            "| --- | --- |",
            *(f"| {row.name} | {_cell(row.detail)} |" for row in by_outcome["not built"]),
            "",
        ]
    )


INTRODUCTION = """# Models

Every model type of transformers {version} that generates text, from text (`AutoModelForCausalLM`) or from images too
(`AutoModelForImageTextToText`, here with text-only batches): **{counts}**.
`python -m tests.support_matrix`, a part of `make proof`, measures them and writes this page. It fails if a type is
silently wrong, or raises an error that is not flexpg's.

A tiny random model of each type is compared with each of five sequences on its own: two prompts, one of them with four
completions, in one packed sequence and again with the prompt cached. The table has the largest relative errors of
log-probabilities and of any parameter's gradient, and the largest error (not relative) of a log-probability that
`flexpg.sample` returned, in float32. What models round to float32 inside (norms, RoPE, routers, recurrent
states) is computed in float64 too where that works ("float64 throughout"); elsewhere errors of gradients up to 1e-6 are
rounding. Each type is represented by a small config, with one layer of each kind that its default config has: a
checkpoint with other options (a window, sinks) may be refused where the type is exact, and is checked in every forward.
"""


IMAGES = """With images in prompts (`Rollouts.from_groups(..., prompt_inputs=...)`), **{count}** types are exact:
prompts with the same tokens and other images, one image under two questions, and text, in one packed sequence; every
image goes through the vision encoder once. Qwen's videos, several images per prompt and cached prompts are tested for
some types in tests/test_images.py. "not run": the model accepted random images in none of the layouts that the test
knows.
"""


def _without_images(found: Sequence[Row]) -> list[tuple[str, list[str]]]:
    by_reason: dict[str, list[str]] = {}
    for row in found:
        if isinstance(row.images, str) and row.images:
            by_reason.setdefault(row.images.replace(row.architecture, "it"), []).append(row.name)
    return sorted(by_reason.items())


def _name(row: Row) -> str:
    return row.name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support_matrix", description="Compare a tiny model of every type with the baseline."
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all; writes docs/models.md)")
    parser.add_argument("-j", dest="num_processes", type=int, default=2, help="processes at a time (default: 2)")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    found = []
    for row in rows(options.types or all_types(), options.num_processes):
        found.append(row)
        cells = row.outcome, row.name, row.architecture, row.error_texts, row.image_text, row.detail
        print(" | ".join(cells), flush=True)
    print(dict(Counter(row.outcome for row in found)))
    if not options.types:
        TABLE.write_text(table(found))
    sys.exit(any(row.outcome == "WRONG" for row in found))


if __name__ == "__main__":
    main()
