"""Log-probabilities of completion tokens, from the hidden states of a packed sequence.

A token is predicted at its parent in the tree, which for the first token of every completion is the last token of the
prompt; the token before it in the packed sequence may belong to another completion. The output layer is applied only
where a token counts in the loss, in chunks that are recomputed in the backward, so neither [S, V] logits nor logits of
the prompt exist at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexpg.tree import PrefixTree

OutputLayer = Callable[[Tensor], Tensor]  # [M, E] -> [M, V]
CHUNK_TOKENS = 1024  # positions whose logits exist at a time


def chunk_tokens_of_rank(ranks: int) -> int:
    """Return the chunk for one of several ranks with context parallelism, so that logits take a part of the memory.

    >>> [chunk_tokens_of_rank(ranks) for ranks in (1, 4, 64)]
    [1024, 256, 128]
    """
    return max(CHUNK_TOKENS // ranks, 128)


@overload
def token_logprobs(
    hidden: Tensor,
    output: OutputLayer,
    tree: PrefixTree,
    *,
    prompt_lens: Tensor,
    loss_mask: Tensor | None = ...,
    temperature: float = ...,
    chunk_tokens: int = ...,
    return_entropy: Literal[False] = ...,
    row_of: Tensor | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    output: OutputLayer,
    tree: PrefixTree,
    *,
    prompt_lens: Tensor,
    loss_mask: Tensor | None = ...,
    temperature: float = ...,
    chunk_tokens: int = ...,
    return_entropy: Literal[True],
    entropy_grad: bool = ...,
    row_of: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    output: OutputLayer,
    tree: PrefixTree,
    *,
    prompt_lens: Tensor,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    row_of: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probability of each completion token, predicted at its parent.

    Args:
        hidden: [1, S, E], hidden states of the packed sequence after the final norm; with `row_of`, of some tokens.
        output: [M, E] -> logits [M, V], the model's output layer with its softcap or scale.
        tree: The packed sequence, with tokens.
        prompt_lens: [N] int64, the prompt's tokens of each sequence; the rest is its completion.
        loss_mask: [N, C] bool, True where a log-probability is wanted; None for every completion token.
        temperature: Divides the logits.
        chunk_tokens: Positions whose logits exist at a time.
        return_entropy: Also return the entropy of each predicted distribution, in nats.
        entropy_grad: Whether entropies have a gradient, for an entropy bonus; the backward then needs more memory for
            each chunk of logits.
        row_of: [S] int64, the row of `hidden` that belongs to each packed token, or -1: only what these rows predict is
            scored. None if `hidden` is complete.

    Returns:
        [N, C] float32 (float64 for float64 logits), 0 where `loss_mask` is False; with `return_entropy`, two of them.

    Raises:
        ValueError: If shapes or lengths do not belong to the tree, or `temperature` is not positive.
    """
    if row_of is None and list(hidden.shape[:2]) != [1, tree.padded_length]:
        raise ValueError(f"hidden must be [1, {tree.padded_length}, E] for this tree, got {list(hidden.shape)}")
    tokens = tree.input_ids[0]
    prompt_lens = prompt_lens.to(tree.lengths)
    if prompt_lens.shape != tree.lengths.shape or bool(((prompt_lens < 1) | (prompt_lens >= tree.lengths)).any()):
        raise ValueError(
            f"prompt_lens must leave at least one prompt and one completion token of sequences of "
            f"{tree.lengths.tolist()} tokens, got {prompt_lens.tolist()}"
        )
    loss_mask = _completion_loss_mask(tree.lengths - prompt_lens, loss_mask)  # [N, C]
    sequence, step = loss_mask.nonzero(as_tuple=True)  # [M] each
    position = prompt_lens[sequence] + step
    parents = tree.node[sequence, position - 1]  # [M], equal to tree.parent at the targets
    if row_of is not None:
        parents = row_of[parents]
        here = parents >= 0
        sequence, step, position, parents = sequence[here], step[here], position[here], parents[here]
    targets = tokens[tree.node[sequence, position]]  # [M]
    rows = hidden[0].index_select(0, parents)  # [M, E], once: its backward fills an [S, E] gradient
    flat = chunked_logprobs(
        rows,
        targets,
        output,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        return_entropy=return_entropy,
        entropy_grad=entropy_grad,
    )
    logprobs, *entropies = (
        values.new_zeros(loss_mask.shape).index_put((sequence, step), values) for values in flat
    )  # [N, C]
    return (logprobs, entropies[0]) if return_entropy else logprobs


def chunked_logprobs(
    rows: Tensor,
    targets: Tensor,
    output: OutputLayer,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    return_entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Compute log-probabilities of targets in chunks, whose logits are recomputed in the backward.

    Args:
        rows: [M, E] hidden states, each of which predicts one target.
        targets: [M] int64 token ids.
        output: [M, E] -> logits [M, V].
        temperature: Divides the logits.
        chunk_tokens: Rows whose logits exist at a time.
        return_entropy: Also return entropies, in nats.
        entropy_grad: Whether entropies have a gradient.

    Returns:
        [M] log-probabilities in float32 or better and, with `return_entropy`, [M] entropies.

    Raises:
        ValueError: If `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy samples are scored at 1")

    def score(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = output(rows)  # [m, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        if not return_entropy:
            return (chosen,)
        # Without a gradient, entropies come last: the backward stops recomputing before them.
        return chosen, _entropy(logprobs) if entropy_grad else torch.special.entr(logprobs.detach().exp()).sum(-1)

    chunks = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*scored, strict=True)))


def _entropy(logprobs: Tensor) -> Tensor:
    """Return entropies [m] of log-probabilities [m, V], with a gradient that is finite where a probability is 0."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def _completion_loss_mask(completion_lens: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Return [N, C] bool, True where a completion token counts."""
    width = int(completion_lens.max()) if loss_mask is None else loss_mask.shape[1]
    present = torch.arange(width, device=completion_lens.device) < completion_lens[:, None]
    if loss_mask is None:
        return present
    if loss_mask.dtype != torch.bool or len(loss_mask) != len(present):
        raise ValueError(f"loss_mask must be bool [{len(present)}, C], got {loss_mask.dtype} {list(loss_mask.shape)}")
    loss_mask = loss_mask.to(present.device)
    if bool((loss_mask & ~present).any()):
        raise ValueError("loss_mask must be False past the end of each completion")
    return loss_mask
