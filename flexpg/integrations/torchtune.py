"""Shared-prefix forward, log-probabilities and sampling for any torchtune TransformerDecoder, sharded by FSDP2 or not.

A model's attention modules get a `forward` of ours that looks at the mask: a TreeBlockMask or a SampleCache goes to
this package's attention, with key/value heads unexpanded, and everything else goes to torchtune's own code. So ordinary
calls (generation, evaluation, training without sharing) are what they were; and as the choice travels with the mask, it
holds in the recomputation of activation checkpointing too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer

from flexpg.backends.dispatch import attention
from flexpg.logprobs import logprobs_alone as each_alone
from flexpg.logprobs import token_logprobs_and_entropies
from flexpg.masks import TreeBlockMask
from flexpg.packing import MicroBatch
from flexpg.prefix_cache import EncodedPrefix, encoded, encoded_row, encoded_run, row_mask, whole_row
from flexpg.rollouts import Rollouts
from flexpg.sample_cache import SampleCache
from flexpg.sampling import Decoder
from flexpg.tree import PrefixTree, Tokens

T = TypeVar("T")


def forward(
    model: TransformerDecoder,
    tree: PrefixTree,
    mask: TreeBlockMask | None = None,
    *,
    prefix: EncodedPrefix | None = None,
) -> Tensor:
    """Hidden states of the packed row, each token's equal to those of its own sequence run alone.

    Args:
        model: a torchtune decoder (llama, qwen2, mistral, phi3, gemma2 ...), with or without activation checkpointing.
        tree: the packed row, with tokens, on the model's device.
        mask: `block_mask(tree)`, where one is at hand; None makes it.
        prefix: what all sequences begin with, from `encode_prefix(model, ...)`: it is not encoded again.

    Returns:
        [1, S, E] hidden states after the final norm; `output(model)` makes logits of them.

    Raises:
        ValueError: tokens beyond the vocabulary, sequences beyond the model's context, dropout in training, a tree
            without tokens or on another device, another tree's mask or prefix.
        TypeError: a model that is no TransformerDecoder of self-attention layers.
    """
    row = _packed_row(model, tree, mask, prefix)
    return whole_row(_within(model, lambda model: _hidden(model, *row)), tree, prefix)


def encode_prefix(model: TransformerDecoder, tokens: Tokens) -> EncodedPrefix:
    """Encodes what a group has in common, once for all micro-batches of its completions: see `EncodedPrefix`.

    Args:
        model: as in `forward`.
        tokens: [P] int64, the prompt, on the model's device.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    return encoded(tokens, partial(forward, model))


def encode_run(model: TransformerDecoder, run: Sequence[MicroBatch]) -> AbstractContextManager[EncodedPrefix | None]:
    """The prompt that several micro-batches have in common, encoded: see `flexpg.prefix_cache.encoded_run`.

    Args:
        model: as in `forward`.
        run: micro-batches of one run, as `flexpg.packing.runs` gives them.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    return encoded_run(run, partial(encode_prefix, model))


def output(model: TransformerDecoder) -> Callable[[Tensor], Tensor]:
    """The model's output layer: rows [M, E] -> logits [M, V], tied or not, in the model's dtype.

    Of a model that FSDP2 has sharded, `logprobs` or `unsharded` must be around its use.
    """
    return model.output


def logprobs(
    model: TransformerDecoder, batch: MicroBatch, temperature: float = 1.0, prefix: EncodedPrefix | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a micro-batch's trained tokens, in one forward of the model.

    Under FSDP2 the output layer's weights are whole in the root's forward alone, so they are computed inside it.

    Args:
        model: as in `forward`.
        batch: rollouts and their packed row, on the model's device.
        temperature: divides the logits.
        prefix: of the micro-batch's run; not used where the micro-batch does not begin with it.

    Returns:
        [n, C] and [n, C], as `flexpg.token_logprobs_and_entropies`.

    Raises:
        ValueError: as `forward`.
        TypeError: as `forward`.
    """
    tree, rollouts = batch.tree, batch.rollouts
    prefix = prefix if batch.prefix_tokens else None
    row = _packed_row(model, tree, None, prefix)

    def scored(model: TransformerDecoder) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropies(
            whole_row(_hidden(model, *row), tree, prefix),
            output(model),
            tree,
            prompt_lens=rollouts.prompt_lens,
            mask=rollouts.trained,
            temperature=temperature,
        )

    return _within(model, scored)


def logprobs_alone(model: TransformerDecoder, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of trained tokens, each rollout alone, through torchtune's own attention; for `self_check`.

    Args:
        model: as in `forward`.
        rollouts: on the model's device.
        temperature: divides the logits.

    Returns:
        [n, C], as `flexpg.logprobs.logprobs_alone`.
    """

    def scored(model: TransformerDecoder) -> Tensor:
        return each_alone(lambda tokens: _hidden(model, tokens, None, None), output(model), rollouts, temperature)

    return _within(model, scored)


def layers(model: TransformerDecoder) -> dict[str, nn.Module]:
    """The decoder layers by name, the first first."""
    return {f"layers.{n}": layer for n, layer in enumerate(model.layers)}


def unshared_logprobs(model: nn.Module, rollouts: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What sharing is compared with: each prompt once per completion, in padded rows, and logits of every token.

    Args:
        model: any causal model, tokens [n, T] -> logits [n, T, V].
        rollouts: on the model's device.
        temperature: divides the logits.

    Returns:
        As `logprobs`.
    """
    rows = pad_sequence(rollouts.sequences, batch_first=True)  # [n, T], padded on the right: causal rows never see it
    scores = (model(rows) / temperature).log_softmax(-1)  # [n, T, V]
    at = rollouts.prompt_lens[:, None] + torch.arange(rollouts.trained.shape[1], device=rows.device)  # [n, C]
    at = at.clamp(max=rows.shape[1] - 1)
    scores = scores.gather(1, (at - 1)[..., None].expand(-1, -1, scores.shape[-1]))  # [n, C, V]
    picked = scores.gather(-1, rows.gather(1, at)[..., None])[..., 0]
    probabilities = scores.detach().exp()
    entropies = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    return picked.where(rollouts.trained, 0), entropies.where(rollouts.trained, 0)


def decoder(model: TransformerDecoder) -> Decoder:
    """What `flexpg.sampling.sample` needs of a model; caches that are set up in it are not touched.

    Args:
        model: a torchtune decoder. When called, prompts and completions that do not fit it are refused.

    Raises:
        ValueError: dropout in training.
        TypeError: a model that is no TransformerDecoder of self-attention layers.
    """
    _prepare(model)

    def decode(tokens: Tensor, position_ids: Tensor, cache: SampleCache) -> Tensor:
        if not cache.is_filled:
            check_fits(model, cache.tree.max_token, cache.tree.max_length + cache.max_new_tokens, tokens.device)
        return _within(model, lambda model: _hidden(model, tokens, position_ids, cache))

    return decode


@contextmanager
def unsharded(model: TransformerDecoder) -> Iterator[None]:
    """Inside, each process holds all of the model's weights, and calls the model as often as it likes, without others.

    For sampling, where processes take different numbers of steps. A model that is not sharded is left as it is.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)  # as FSDP2 does: the root stays whole
            shard.reshard()


def check_fits(model: TransformerDecoder, max_token: int, max_length: int, device: torch.device | None = None) -> None:
    """Refuses what the model has no embedding or no position for.

    Args:
        model: a torchtune decoder.
        max_token: the largest token id.
        max_length: tokens of the longest sequence, prompt and completion.
        device: where the tokens are; None does not compare it with the model's.

    Raises:
        ValueError: a token beyond the vocabulary, a sequence beyond the model's context, or another device.
    """
    vocab_size, weight = model.tok_embeddings.num_embeddings, model.tok_embeddings.weight
    if max_token >= vocab_size:
        raise ValueError(f"token id {max_token} is beyond the model's vocabulary of {vocab_size}; check the tokenizer")
    if max_length > model.max_seq_len:
        raise ValueError(
            f"a sequence of {max_length} tokens is longer than the model's max_seq_len={model.max_seq_len}"
        )
    if device not in (None, weight.device):
        raise ValueError(f"the tokens are on {device} and the model on {weight.device}; move them to one device")


def _packed_row(
    model: TransformerDecoder, tree: PrefixTree, mask: TreeBlockMask | None, prefix: EncodedPrefix | None
) -> tuple[Tensor, Tensor, TreeBlockMask]:
    """Tokens [1, S'] and position ids [1, S'] of what goes through the model, and its mask, when they fit the model."""
    mask = row_mask(tree, mask, prefix)
    tokens, position_ids = mask.tree.token_row(), mask.tree.position_ids[None]
    _prepare(model)
    check_fits(model, tree.max_token, tree.max_length, tokens.device)
    row = encoded_row(mask, model)
    return tokens[:, row], position_ids[:, row], mask


def _within(model: TransformerDecoder, function: Callable[[TransformerDecoder], T]) -> T:
    """`function(model)`, under FSDP2 as a forward of the model, which gathers the root's weights and frees them."""
    if not isinstance(model, FSDPModule):
        return function(model)
    return cast(T, vars(model)["_flexpg_call"](function))


def _call(model: TransformerDecoder, function: Callable[[TransformerDecoder], T]) -> T:
    return function(model)


def _hidden(
    model: TransformerDecoder, tokens: Tensor, position_ids: Tensor | None, mask: TreeBlockMask | SampleCache | None
) -> Tensor:
    # Not model(...): that would cut a row at max_seq_len packed tokens, apply the output layer, and round to float32.
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, mask=mask, input_pos=position_ids)
    return model.norm(hidden)


def _prepare(model: TransformerDecoder) -> None:
    """Lets the model's attention modules understand our masks; done once, and invisible to any other call."""
    if not isinstance(model, TransformerDecoder):
        raise TypeError(f"model is a {type(model).__name__}; shared prefixes work in a torchtune TransformerDecoder")
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise ValueError(f"the model has dropout {module.p}, which would differ per copy of a prefix; set it to 0")
        if not isinstance(module, MultiHeadAttention | Gemma2Attention):
            continue
        if module.attn_dropout > 0 and module.training:
            raise ValueError(f"the model has attn_dropout={module.attn_dropout}; sharing is exact without: set it to 0")
        if not module.is_causal:
            raise TypeError("the model has attention that is not causal; a prefix can be shared in causal models only")
        own = vars(module).get("forward")
        if own is None:
            module.forward = MethodType(_forward, module)
        elif getattr(own, "__func__", None) is not _forward:
            raise TypeError(f"something else has replaced the forward of a {type(module).__name__}; undo that first")
    layers = sum(isinstance(module, TransformerSelfAttentionLayer) for module in model.modules())
    if layers != len(model.layers):
        raise TypeError(f"{len(model.layers) - layers} of the model's layers are not plain self-attention layers")
    if isinstance(model, FSDPModule) and "_flexpg_call" not in vars(model):
        vars(model)["_flexpg_call"] = MethodType(_call, model)
        register_fsdp_forward_method(cast(nn.Module, model), "_flexpg_call")


_attend_cached = torch.compiler.disable(SampleCache.attend)  # compiled layers would recompile, each and every step
_joined = torch.compiler.disable(TreeBlockMask.joined)  # or for every layer and prefix


def _forward(
    attn: MultiHeadAttention | Gemma2Attention,
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Any = None,
    input_pos: Tensor | None = None,
) -> Tensor:
    """Torchtune's attention forward, for our masks too."""
    if not isinstance(mask, TreeBlockMask | SampleCache):
        return type(attn).forward(attn, x, y, mask=mask, input_pos=input_pos)
    q, k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    if attn.pos_embeddings is not None:
        q, k = attn.pos_embeddings(q, input_pos=input_pos), attn.pos_embeddings(k, input_pos=input_pos)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # [B, H, T, D]
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    scale, window, softcap = None, None, None
    if isinstance(attn, Gemma2Attention):
        scale, window, softcap = attn.scaling, attn.sliding_window_size, attn.softcapping
    if isinstance(mask, SampleCache):
        attend = SampleCache.attend if mask.is_filled and mask.compiled else _attend_cached  # a step is one graph
        out = attend(mask, attn, q, k, v, scale=scale, window=window, softcap=softcap)
    else:
        if mask.prefix is not None:
            k, v = _joined(mask, attn, k, v)
        out = attention(q, k, v, mask, scale=scale, window=window, softcap=softcap)
    return attn.output_proj(out.transpose(1, 2).flatten(2))
