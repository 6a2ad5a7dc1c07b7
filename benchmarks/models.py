"""The models of the benchmarks: torchtune's Qwen2 with random weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing, set_default_dtype

SHAPES = {
    # The proportions of Qwen2.5-0.5B: heads of 64, few key/value heads, a quarter of all weights in the output layer.
    "small": dict(vocab_size=4096, num_layers=2, num_heads=8, num_kv_heads=2, embed_dim=512, intermediate_dim=1536),
    "0.5B": dict(vocab_size=151_936, num_layers=24, num_heads=14, num_kv_heads=2, embed_dim=896, intermediate_dim=4864),
    "3B": dict(
        vocab_size=151_936, num_layers=36, num_heads=16, num_kv_heads=2, embed_dim=2048, intermediate_dim=11_008
    ),
    "tiny": dict(vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128),
}


def build_decoder(name: str, device: torch.device, checkpointing: bool = False) -> TransformerDecoder:
    """Build one of the shapes above with a tied output layer, in float32 on a CPU and bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device), set_default_dtype(dtype):  # as recipes do: rotary positions stay in float32
        model = qwen2(**SHAPES[name], max_seq_len=32_768, tie_word_embeddings=True)
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


def hidden_states(model: TransformerDecoder, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Compute the hidden states [B, T, E] of a batch [B, T] by torchtune's own layers, without the output layer."""
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, input_pos=position_ids)
    return model.norm(hidden)
