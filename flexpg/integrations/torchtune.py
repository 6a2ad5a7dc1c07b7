"""Shared prefixes in torchtune decoders, sharded by FSDP2 or not.

The attention modules of an enabled model get a `forward` that looks at the mask: with a TreeBlockMask or a SampleCache
it uses flexpg's attention, with key/value heads not expanded; with any other mask it calls torchtune's own code. So
ordinary calls do not change, and because the choice travels with the mask, it also holds in the recomputation of
activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer

from flexpg.backends.dispatch import attention
from flexpg.context_parallel import ContextShard
from flexpg.integrations.fsdp import run_as_forward
from flexpg.logprobs import OutputLayer
from flexpg.masks import TreeBlockMask
from flexpg.packed_input import packed_input, whole_sequence
from flexpg.prefix_cache import PrefixCache
from flexpg.prompt_inputs import PromptInputs
from flexpg.sample_cache import SampleCache
from flexpg.sampling import Decoder
from flexpg.tree import PrefixTree

# With and without gradients, adapters and known lengths, a compiled layer has more graphs than torch's limit of 8.
RECOMPILE_LIMIT = 64


def enable(model: TransformerDecoder) -> None:
    """Prepare a decoder of causal self-attention layers; calling it again has no effect.

    Raises:
        ValueError: If the model has dropout and is in training mode.
        TypeError: If the model is not a TransformerDecoder of plain self-attention layers.
    """
    if not isinstance(model, TransformerDecoder):
        raise TypeError(f"model must be a torchtune TransformerDecoder, got {type(model).__name__}")
    layers_found = sum(isinstance(module, TransformerSelfAttentionLayer) for module in model.modules())
    if layers_found != len(model.layers):
        raise TypeError(f"all {len(model.layers)} layers must be TransformerSelfAttentionLayers, got {layers_found}")
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention | Gemma2Attention)]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            _check_dropout(module, module.p)
    for attn in attentions:
        _check_dropout(attn, attn.attn_dropout)
        if not attn.is_causal:
            raise TypeError("model must have causal attention only: a prefix must not depend on what follows it")
        installed = getattr(vars(attn).get("forward"), "__func__", None)
        if "forward" in vars(attn) and installed is not _attention_forward:
            raise TypeError(f"the forward of a {type(attn).__name__} has been replaced; undo that first")
    for attn in attentions:
        if "forward" not in vars(attn):  # every forward calls `enable`, and a new method would recompile
            attn.forward = MethodType(_attention_forward, attn)


def forward(
    model: TransformerDecoder,
    tree: PrefixTree,
    *,
    prefix: PrefixCache | None = None,
    shard: ContextShard | None = None,
    step_has_images: bool = False,
) -> Tensor:
    """Compute the hidden states of a packed sequence, equal to those of the baseline.

    Args:
        model: A torchtune decoder (llama, qwen2, mistral, phi3, gemma2 ...), with or without activation checkpointing.
        tree: The packed sequence, with tokens, on the model's device.
        prefix: A cached prompt with which all sequences begin, from `flexpg.integrations.encode_prefix`.
        shard: The part of the packed sequence that this rank computes; None for all of it.
        step_has_images: Must be False.

    Returns:
        [1, S, E] hidden states after the final norm, or those of the shard.

    Raises:
        ValueError: If a token or a sequence does not fit the model, or a sequence does not begin with the prefix.
        TypeError: If prefixes cannot be shared in the model.
    """
    enable(model)
    check_rollouts(model, tree, step_has_images=step_has_images)
    check_fits(model, tree.max_token, tree.max_length)
    packed = packed_input(model, tree, prefix, shard)

    def hidden_states() -> Tensor:
        hidden = _hidden_states(model, packed.input_ids, packed.position_ids, packed.mask)
        return whole_sequence(hidden, tree, prefix, shard)

    return run_as_forward(model, hidden_states)


def output(model: TransformerDecoder) -> OutputLayer:
    """Return the model's output layer: [M, E] -> logits [M, V], tied or not, in the model's dtype.

    If the model is sharded by FSDP2, it can be called inside `run_as_forward` or `unsharded` only.
    """
    return model.output


def check_rollouts(
    model: TransformerDecoder,
    tree: PrefixTree,
    *,
    rollout_ids: Sequence[int] | None = None,
    step_has_images: bool = False,
) -> None:
    """Refuse images.

    Raises:
        TypeError: If a prompt has images.
    """
    if tree.inputs is not None or step_has_images:
        raise TypeError("torchtune decoders take text only; use a transformers model for prompts with images")


def baseline_forward(
    model: TransformerDecoder, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None
) -> Tensor:
    """Compute the hidden states [n, T, E] of right-padded sequences [n, T], by torchtune's own attention."""
    return run_as_forward(model, lambda: _hidden_states(model, input_ids, None, None))


def logits(model: TransformerDecoder, input_ids: Tensor, inputs: Sequence[PromptInputs | None] | None = None) -> Tensor:
    """Compute the logits [n, T, V] of right-padded sequences [n, T] by an ordinary call of the model."""
    out: Tensor | list[Tensor] = model(input_ids)  # several chunks, if the loss asked for them
    return torch.cat(out, 1) if isinstance(out, list) else out


def layers(model: TransformerDecoder) -> dict[str, nn.Module]:
    """Return the decoder layers by name, in order."""
    return {f"layers.{n}": layer for n, layer in enumerate(model.layers)}


def decoder(model: TransformerDecoder) -> Decoder:
    """Return what `sample_completions` calls for hidden states; caches that torchtune set up are not used."""
    enable(model)

    def decode(tokens: Tensor, position_ids: Tensor, cache: SampleCache) -> Tensor:
        if not cache.is_filled:
            check_fits(model, cache.tree.max_token, cache.tree.max_length + cache.max_new_tokens)
        return run_as_forward(model, lambda: _hidden_states(model, tokens, position_ids, cache))

    return decode


def check_fits(model: TransformerDecoder, max_token: int, length: int) -> None:
    """Check that the model has an embedding for every token and a position for every length.

    Args:
        model: A torchtune decoder.
        max_token: The largest token id.
        length: Tokens of the longest sequence, prompt and completion.

    Raises:
        ValueError: If it has not.
    """
    if max_token >= (vocab_size := model.tok_embeddings.num_embeddings):
        raise ValueError(f"token ids must be below the model's vocabulary size of {vocab_size}, got {max_token}")
    if length > model.max_seq_len:
        raise ValueError(f"sequences must have at most max_seq_len={model.max_seq_len} tokens, got {length}")


def _check_dropout(module: nn.Module, rate: float) -> None:
    if rate > 0 and module.training:
        raise ValueError(f"dropout must be 0, got {rate}: it would differ between the copies of a prefix")


def _hidden_states(
    model: TransformerDecoder, tokens: Tensor, position_ids: Tensor | None, mask: TreeBlockMask | SampleCache | None
) -> Tensor:
    # Not model(...): it would refuse more than max_seq_len packed tokens, apply the output layer and round to float32.
    has_compiled_layers = any(module._compiled_call_impl is not None for module in model.modules())
    is_eager = not torch.compiler.is_compiling()  # as it is not in a compiled decoding step
    with _recompile_limit() if has_compiled_layers and is_eager else nullcontext():
        hidden = model.tok_embeddings(tokens)
        for layer in model.layers:
            hidden = layer(hidden, mask=mask, input_pos=position_ids)
        return model.norm(hidden)


def _recompile_limit() -> AbstractContextManager[None]:
    """Raise torch's limit for compiled layers; past it they would run uncompiled, which is made an error."""
    return torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True)


_attend_cached = torch.compiler.disable(SampleCache.attend)  # compiled layers would recompile at every step


@torch.compiler.disable  # compiled layers would recompile for every layer and prefix
def _start_keys_and_values(
    mask: TreeBlockMask, attn: nn.Module, k: Tensor, v: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    return mask.start_keys_and_values(attn, k, v)


@torch.compiler.disable
def _finished(keys_and_values: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return keys_and_values()


def _attention_forward(
    attn: MultiHeadAttention | Gemma2Attention,
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Any = None,
    input_pos: Tensor | None = None,
) -> Tensor:
    """Torchtune's attention forward, extended to flexpg's masks."""
    if not isinstance(mask, TreeBlockMask | SampleCache):
        return type(attn).forward(attn, x, y, mask=mask, input_pos=input_pos)

    def heads(proj: nn.Module, rotate: nn.Module | None = None, norm: nn.Module | None = None) -> Tensor:
        z = proj(x).unflatten(-1, (-1, attn.head_dim))
        z = (z if rotate is None else rotate(z, input_pos=input_pos)).transpose(1, 2)  # [B, H, T, D]
        return z if norm is None else norm(z)

    k, v = heads(attn.k_proj, attn.pos_embeddings, attn.k_norm), heads(attn.v_proj)
    shares_keys = isinstance(mask, TreeBlockMask) and type(mask) is not TreeBlockMask  # with a cache or other ranks
    pending = _start_keys_and_values(mask, attn, k, v) if shares_keys else None
    q = heads(attn.q_proj, attn.pos_embeddings, attn.q_norm)  # while ranks exchange keys
    scale, window, softcap = None, None, None
    if isinstance(attn, Gemma2Attention):
        scale, window, softcap = attn.scaling, attn.sliding_window_size, attn.softcapping
    if isinstance(mask, SampleCache):
        attend = SampleCache.attend if mask.is_filled and mask.compiled else _attend_cached  # a step is one graph
        out = attend(mask, attn, q, k, v, scale=scale, window=window, softcap=softcap)
    else:
        if pending is not None:
            k, v = _finished(pending)
        out = attention(q, k, v, mask, scale=scale, window=window, softcap=softcap)
    return attn.output_proj(out.transpose(1, 2).flatten(2))
