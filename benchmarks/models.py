"""The models of the benchmarks: torchtune's Qwen2, with random weights."""

from __future__ import annotations

import torch
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.training import set_default_dtype

SHAPES = {
    # Of Qwen2.5-0.5B's proportions: heads of 64, few of them for keys and values, a quarter of all weights for logits.
    "small": dict(vocab_size=4096, num_layers=2, num_heads=8, num_kv_heads=2, embed_dim=512, intermediate_dim=1536),
    "0.5B": dict(vocab_size=151_936, num_layers=24, num_heads=14, num_kv_heads=2, embed_dim=896, intermediate_dim=4864),
    "3B": dict(
        vocab_size=151_936, num_layers=36, num_heads=16, num_kv_heads=2, embed_dim=2048, intermediate_dim=11_008
    ),
    "tiny": dict(vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128),
}


def decoder(name: str, device: torch.device, dtype: torch.dtype) -> TransformerDecoder:
    """One of the shapes above, with its output layer tied."""
    torch.manual_seed(0)
    with torch.device(device), set_default_dtype(dtype):  # as recipes do: rotary positions stay in float32
        return qwen2(**SHAPES[name], max_seq_len=32_768, tie_word_embeddings=True)
