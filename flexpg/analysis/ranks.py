"""Activation memory of a packed sequence over several ranks, and the largest prompt that fits."""

from __future__ import annotations

from collections.abc import Sequence

from flexpg.analysis.flops import ModelShape, activation_bytes
from flexpg.logprobs import chunk_tokens_of_rank


def context_parallel_bytes(
    num_tokens: int,
    num_loss_tokens: int,
    shape: ModelShape,
    ranks: int,
    *,
    itemsize: int = 2,
    activation_checkpointing: bool = True,
) -> int:
    """Return the peak bytes of an update's activations on one of several ranks that share a packed sequence.

    It is the estimate of `activation_bytes` for a share of the tokens, plus what a rank gathers. Of one attention layer
    these are the keys and values of all tokens and, in the backward, their gradients and a copy in float32 or better,
    in which they are summed; without checkpointing, the keys and values of every layer. Recurrent layers hand on their
    states, which are small.

    Args:
        num_tokens: Tokens of the packed sequence.
        num_loss_tokens: Completion tokens whose logits are computed, all on one rank: after a long prompt, completions
            are at the end.
        shape: The model.
        ranks: Ranks of the context-parallel group.
        itemsize: Bytes per entry: 2 for bfloat16, 4 for float32.
        activation_checkpointing: A layer keeps only its input.

    >>> shape = ModelShape(1, 8, 1, 1, 8, 16, vocab_size=10, layer_weights=4 * 8 * 8 + 3 * 8 * 16)
    >>> context_parallel_bytes(5, 2, shape, 1) == activation_bytes(5, 2, shape, activation_checkpointing=True)
    True
    """
    kept = activation_bytes(
        -(-num_tokens // ranks),
        num_loss_tokens,  # which may all be on the last rank
        shape,
        itemsize=itemsize,
        activation_checkpointing=activation_checkpointing,
        chunk_tokens=chunk_tokens_of_rank(ranks),
    )
    if ranks == 1:
        return kept
    keys = num_tokens * shape.num_kv_heads * (shape.head_dim + (shape.value_dim or shape.head_dim))
    layers = 1 if activation_checkpointing else shape.num_attention_layers
    gathered = keys * (layers * itemsize + itemsize + max(itemsize, 4)) * bool(shape.num_attention_layers)
    return kept + gathered


def largest_prompt(
    completions: Sequence[int],
    shape: ModelShape,
    ranks: int,
    budget: int,
    *,
    itemsize: int = 2,
    activation_checkpointing: bool = True,
) -> int:
    """Return the most tokens of a prompt with which a group's activations stay within a budget on each rank.

    Args:
        completions: Tokens of each completion.
        shape: The model.
        ranks: Ranks of the context-parallel group.
        budget: Bytes for activations.
        itemsize: Bytes per entry.
        activation_checkpointing: A layer keeps only its input.

    Returns:
        Tokens; 0 if not even a prompt of one fits.
    """
    total = sum(completions)

    def fits(prompt: int) -> bool:
        return budget >= context_parallel_bytes(
            prompt + total,
            total,
            shape,
            ranks,
            itemsize=itemsize,
            activation_checkpointing=activation_checkpointing,
        )

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
