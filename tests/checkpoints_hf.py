"""Small transformers checkpoints with the tokenizer of recipes/assets/tiny, and configs of published ones.

save_tiny(name, folder)    write a random model of hf_models' configs, of the tiny model's size, and its tokenizer
PUBLISHED                  by name of a recipe's configuration, the config that its checkpoint has
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import hf_models
import torch
import transformers

from flexpg.analysis.transformers_files import auto_class

TOKENIZER = Path(__file__).parent.parent / "recipes/assets/tiny"
VOCAB = 260

# Sizes from the published config.json files.
QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
QWEN3 |= {"max_position_embeddings": 40_960}
PUBLISHED: dict[str, Any] = {
    "qwen3_0_6B_full": transformers.Qwen3Config(
        **QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16
    ),
    "qwen3_4B_lora": transformers.Qwen3Config(
        **QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
    ),
    "qwen3_5_0_8B_full": transformers.Qwen3_5Config(
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "linear_num_value_heads": 16,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_heads": 12,
            "out_hidden_size": 1024,
        },
        tie_word_embeddings=True,
    ),
    "gemma3_1B_full": transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        sliding_window=512,
        max_position_embeddings=32_768,
    ),
    "gemma3_4B_lora": transformers.Gemma3Config(
        text_config={
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 896,
            "vision_use_head": False,
        },
    ),
    "llama3_2_1B_transformers_full": transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    ),
    "gpt_oss_20b_lora": transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
}


def save_tiny(name: str, folder: Path) -> Path:
    """Write a random checkpoint of a kind of model, with the tokenizer of bytes, and return its folder."""
    config = copy.deepcopy((hf_models.CONFIGS | hf_models.HYBRIDS | hf_models.COMPOSITES)[name])
    text_config = config.get_text_config(decoder=True)
    text_config.update({"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": 258, "pad_token_id": 256})
    text_config.update({"bos_token_id": 257})
    torch.manual_seed(0)
    auto_class(config).from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return folder
