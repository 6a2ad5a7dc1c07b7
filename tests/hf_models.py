"""Tiny transformers models, and the baseline of their log-probabilities.

tiny_model(name, **changes)    a model of the tables below in training mode, as transformers builds it
model_from_config(config)      the same for any config
model_pair(name, **changes)    (enabled for flexpg, as transformers builds it), with equal weights
in_float64(model)              the model in float64, norms included
with_lora(model, **options)    the model with PEFT adapters that matter
baseline_logprobs(model, sequences, prompt_lens)    [N, C], one sequence after the other
"""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import torch
import transformers
from cases import VOCAB
from torch import Tensor, nn

import flexpg

WINDOW = 7
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **SPECIAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# Windows are shorter than the sequences, softcaps bend and multipliers are not 1, or they would do nothing here.
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE, **ONE_OF_EACH, use_sliding_window=True, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8),
    "gemma2": transformers.Gemma2Config(
        **SHAPE,
        **ONE_OF_EACH,
        head_dim=8,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **ONE_OF_EACH, head_dim=8, query_pre_attn_scalar=6),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=WINDOW),
    "phi3": transformers.Phi3Config(**SHAPE),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "granite": transformers.GraniteConfig(
        **SHAPE, attention_multiplier=0.3, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0
    ),
    "smollm3": transformers.SmolLM3Config(**SHAPE),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.25, use_qk_norm=True),
    "gpt2": transformers.GPT2Config(**GPT2, attn_pdrop=0.0),
    # Attention sinks, of one layer or of each.
    "gpt_oss": transformers.GptOssConfig(
        **SHAPE, **ONE_OF_EACH, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN
    ),
    "granite_swa": transformers.GraniteSWAConfig(
        **SHAPE, **ONE_OF_EACH, attention_multiplier=0.3, layer_rope_theta=[10000.0, 0]
    ),
    "mimo_v2_flash": transformers.MiMoV2FlashConfig(
        **SHAPE,
        **ONE_OF_EACH,
        head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        rope_parameters={kind: PARTIAL_ROPE for kind in ("full_attention", "sliding_attention")},
    ),
    # Chunks, and without RoPE a temperature by position; both change within the sequences.
    "llama4": transformers.Llama4TextConfig(
        **SHAPE,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        attention_chunk_size=10,
        floor_scale=8,
        attn_scale=0.5,
    ),
}
# Recurrent layers, most with attention in every second layer.
HYBRID_SHAPE = SHAPE | {"head_dim": 8}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
HYBRIDS = {
    "qwen3_5": transformers.Qwen3_5TextConfig(**HYBRID_SHAPE, **DELTA, **HALF),
    "qwen3_5_moe": transformers.Qwen3_5MoeTextConfig(**HYBRID_SHAPE, **DELTA, **HALF, **EXPERTS, **SHARED_EXPERT),
    "qwen3_next": transformers.Qwen3NextConfig(**HYBRID_SHAPE, **DELTA, **HALF, **EXPERTS, **SHARED_EXPERT),
    "kimi_linear": transformers.KimiLinearConfig(
        **SHAPE | {"num_key_value_heads": 4},
        **HALF,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=4,
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "olmo_hybrid": transformers.OlmoHybridConfig(**HYBRID_SHAPE, **DELTA, **HALF),
    "bamba": transformers.BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": transformers.FalconH1Config(**HYBRID_SHAPE, **MAMBA | {"mamba_n_heads": 4}, mamba_d_ssm=32),
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(
        **SHAPE, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=4, shared_intermediate_size=16
    ),
    "nemotron_h": transformers.NemotronHConfig(
        **SHAPE | {"num_hidden_layers": 3, "head_dim": 8},
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    "zamba2": transformers.Zamba2Config(
        **SHAPE | {"num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_d_state=8,
        mamba_headdim=8,
        chunk_size=16,
        num_mem_blocks=1,
    ),
    "mamba2": transformers.Mamba2Config(**SHAPE, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16),
    "minimax": transformers.MiniMaxConfig(
        **HYBRID_SHAPE, layer_types=["linear_attention", "full_attention"], num_local_experts=4, block_size=16
    ),
    "lfm2": transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "lfm2_moe": transformers.Lfm2MoeConfig(
        **SHAPE, **EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "lfm3": transformers.Lfm3Config(**SHAPE, layer_types=["conv", "full_attention"]),
}
# Models that take images too, with a tiny vision tower; ids from VOCAB on are placeholders of images and the like.
TEXT = SHAPE | {"vocab_size": VOCAB + 8, "head_dim": 8}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START = range(VOCAB, VOCAB + 5)
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN_TOWER = {"depth": 2, "patch_size": 14, "spatial_merge_size": 2, "num_heads": 2, "intermediate_size": 16}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS |= {"vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END}
COMPOSITES: dict[str, transformers.PretrainedConfig] = {
    "gemma3_vl": transformers.Gemma3Config(
        text_config=TEXT | ONE_OF_EACH | {"query_pre_attn_scalar": 6},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
    ),
    "gemma4": transformers.Gemma4Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB + 8,
        },
        vision_config={**TOWER, "head_dim": 8, "num_key_value_heads": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB + 5,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
    ),
    "mistral3": transformers.Mistral3Config(
        text_config={"model_type": "ministral3", **TEXT},
        vision_config={"model_type": "pixtral", **TOWER, "head_dim": 8},
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
        text_config=TEXT | MROPE,
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        **QWEN_IDS,
    ),
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
        text_config=TEXT | MROPE,
        vision_config={**QWEN_TOWER, "hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    ),
    "qwen3_vl": transformers.Qwen3VLConfig(
        text_config=TEXT | MROPE,
        vision_config={**QWEN_TOWER, "hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        **QWEN_IDS,
    ),
    "llava_onevision": transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    ),
}
# More models with images, each with another layout of pixels, features or positions.
VISION = {
    "qwen3_5_vl": transformers.Qwen3_5Config(
        text_config=TEXT
        | DELTA
        | HALF
        | {"rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True, "partial_rotary_factor": 1.0}},
        vision_config={**QWEN_TOWER, "hidden_size": 16, "out_hidden_size": 32},
        **QWEN_IDS,
    ),
    "gemma4_vl": transformers.Gemma4Config(
        text_config=TEXT
        | ONE_OF_EACH
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB + 8,
            "use_bidirectional_attention": "vision",
        },
        vision_config={**TOWER, "patch_size": 7, "pooling_kernel_size": 2, "head_dim": 8, "num_key_value_heads": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=VOCAB + 5,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
    ),
    "internvl": transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "smolvlm": transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**TOWER, "patch_size": 7},
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    "idefics3": transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**TOWER, "patch_size": 7},
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    "llava_next": transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **TOWER, "num_hidden_layers": 2, "projection_dim": 16},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    ),
}
EXPERT_MODELS = ["mixtral", "qwen3_moe"]
SINK_MODELS = ["gpt_oss", "granite_swa", "mimo_v2_flash"]
FLOAT64_EXPERTS = {"_experts_implementation": "eager"}  # torch's grouped product has no float64


def tiny_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """Build a model of one of the tables above in training mode; `changes` replace values of its config."""
    config = copy.deepcopy((CONFIGS | COMPOSITES | HYBRIDS | VISION)[name])
    for key, value in changes.items():
        setattr(config, key, value)
    return model_from_config(config)


def model_from_config(config: transformers.PretrainedConfig, **options: Any) -> transformers.PreTrainedModel:
    """Build a model in training mode in which every parameter matters: no norm weight is 1 and no bias is 0."""
    if getattr(config, "attn_logit_softcapping", None) is not None:  # which sdpa would ignore
        options = {"attn_implementation": "eager"} | options
    is_composite = config.get_text_config() is not config
    auto = transformers.AutoModelForImageTextToText if is_composite else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(copy.deepcopy(config), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.train()


def model_pair(name: str, **changes: Any) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """Build two models with equal weights: one that is enabled, and the baseline with transformers' own attention."""
    return flexpg.enable(tiny_model(name, **changes)), tiny_model(name, **changes)


class Float64Norm(nn.Module):
    """A norm of transformers without its round to float32: RMSNorm, Gemma's (1 + weight) or Cohere's (with a mean)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = dict(norm.named_parameters()).get("weight", 1.0)  # Gemma 4's values have none
        self.eps = vars(norm)["eps"] if "eps" in vars(norm) else vars(norm)["variance_epsilon"]
        self.offset = 1.0 if re.match("Gemma[23]?[A-Z]", type(norm).__name__) else 0.0
        self.is_centred = type(norm).__name__ == "CohereLayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + self.weight)


class Float64RoPE(nn.Module):
    """RoPE of transformers without its round to float32, by which rotations would depend on a row's left padding."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rope.inv_freq.double(), persistent=False)
        self.scaling = rope.attention_scaling
        self.repeats = 1 if type(rope).__name__ == "GptOssRotaryEmbedding" else 2

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, self.repeats)  # [B, T, D] or [B, T, D / 2]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


FLOAT64_ROPE = [f"{family}RotaryEmbedding" for family in ("Llama", "Qwen2", "Qwen3Moe", "Granite", "GptOss")]


def in_float64(model: nn.Module) -> nn.Module:
    """Convert a model to float64, with norms and RoPE that do not round to float32 as transformers' do."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = type(child).__name__
            if kind.endswith("RMSNorm") or kind == "CohereLayerNorm":
                setattr(module, name, Float64Norm(child))
            elif kind in FLOAT64_ROPE:
                setattr(module, name, Float64RoPE(child))
    return model


def with_lora(model: nn.Module, **options: Any) -> peft.PeftModel:
    """Wrap a model in LoRA adapters that are not zero; zero ones would give lora_A no gradient."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def baseline_logprobs(model: nn.Module, sequences: list[list[int]], prompt_lens: list[int]) -> Tensor:
    """Compute [N, C] log-probabilities of the completions, 0 past their end: one sequence after the other."""
    rows = []
    for tokens, prompt_len in zip(sequences, prompt_lens, strict=True):
        ids = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=ids).logits[0]  # [T, V]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        rows.append(scores[prompt_len - 1 : -1].gather(-1, ids[0, prompt_len:, None])[:, 0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
