"""Log-probabilities of completion tokens, from the hidden states of a packed row.

A token is predicted at its parent in the tree, which for the first token of every completion is the last token of the
prompt; the token before it in the packed row may belong to a sibling. The output layer is called on the trained
positions only, a chunk at a time, and again in the backward: neither [S, V] logits nor the prompt's logits ever exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flexpg.rollouts import Rollouts
from flexpg.scalars import is_number, is_whole
from flexpg.tree import PrefixTree, checked_tree

Output = Callable[[Tensor], Tensor]


def token_logprobs(
    hidden: Tensor,
    output: Output,
    tree: PrefixTree,
    *,
    prompt_lens: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Each trained completion token's log-probability, predicted at its parent.

    Args:
        hidden: [1, S, E], the hidden states of the packed row, after the final norm.
        output: rows [M, E] -> logits [M, V], the model's own output layer with its softcap or scale.
        tree: the packed row, with tokens.
        prompt_lens: [N] int, tokens of each sequence that are its prompt; what follows is its completion.
        mask: [N, C] bool, True where a completion token is trained; None for all of them.
        temperature: divides the logits.
        chunk_tokens: trained positions whose logits exist at a time.

    Returns:
        [N, C] float32 (float64 for float64 hidden), 0 where there is no trained token.

    Raises:
        ValueError: shapes, lengths, devices, temperature or chunk that do not fit, or logits without some token's.
        TypeError: an output layer that cannot be called, hidden states or a mask that are no tensor, lengths that are
            no tensor of integers, or a tree that is none.
    """
    logprobs, _ = _scored(hidden, output, tree, prompt_lens, mask, temperature, chunk_tokens, with_entropy=False)
    return logprobs


def token_logprobs_and_entropies(
    hidden: Tensor,
    output: Output,
    tree: PrefixTree,
    *,
    prompt_lens: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, with the entropy (nats, no gradient) of each token's distribution at `temperature`.

    Returns:
        Log-probabilities [N, C] and entropies [N, C], 0 where there is no trained token.
    """
    return _scored(hidden, output, tree, prompt_lens, mask, temperature, chunk_tokens, with_entropy=True)


def logprobs_alone(
    hidden: Callable[[Tensor], Tensor],
    output: Output,
    rollouts: Rollouts,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """What sharing is checked against: each rollout alone, forward by forward, each token predicted by the one before.

    Args:
        hidden: tokens [1, T] -> hidden states [1, T, E], the model's ordinary forward.
        output: as in `token_logprobs`.
        rollouts: on the model's device.
        temperature: divides the logits.
        chunk_tokens: positions whose logits exist at a time.

    Returns:
        [N, C] float32 (float64 for float64 logits), 0 where there is no trained token.
    """

    def scored(states: Tensor, targets: Tensor) -> Tensor:
        logits = output(states)  # [m, V]
        scores = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        return scores.gather(-1, targets[:, None])[:, 0]

    rows = []
    for tokens, prompt_len in zip(rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True):
        states = hidden(tokens[None])[0, prompt_len - 1 : -1]  # [T_n, E]
        chunks = zip(states.split(chunk_tokens), tokens[prompt_len:].split(chunk_tokens), strict=True)
        rows.append(torch.cat([checkpoint(scored, *chunk, use_reentrant=False) for chunk in chunks]))
    return pad_sequence(rows, batch_first=True).where(rollouts.trained, 0)


def _scored(
    hidden: Tensor,
    output: Output,
    tree: PrefixTree,
    prompt_lens: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    tokens = checked_tree(tree).token_row()[0]
    if not isinstance(hidden, Tensor) or not callable(output):
        raise TypeError(
            f"hidden is a {type(hidden).__name__} and output a {type(output).__name__}; give a tensor [1, S, E] and "
            "the output layer, which makes logits [M, V] of rows [M, E]"
        )
    if hidden.dim() != 3 or hidden.shape[:2] != (1, len(tree)):
        raise ValueError(f"hidden is {tuple(hidden.shape)}; the tree's packed row needs [1, {len(tree)}, E]")
    if hidden.device != tree.end.device:
        raise ValueError(
            f"hidden is on {hidden.device} and the tree on {tree.end.device}; move the tree with .to(device)"
        )
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; give a positive number (for greedy samples, 1)")
    if not is_whole(chunk_tokens):
        raise ValueError(f"chunk_tokens is {chunk_tokens!r}; give a whole number, 1 or more")
    prompt_lens = _checked_prompt_lens(tree, prompt_lens)
    trained = _trained(tree.lengths - prompt_lens, mask)  # [N, C]
    sequence, step = trained.nonzero(as_tuple=True)  # [M] each
    position = prompt_lens[sequence] + step
    target = tokens[tree.node[sequence, position]]  # [M]
    parent = tree.node[sequence, position - 1]  # [M], equal to tree.parent at the target

    entropies: list[Tensor] = []

    def chunk_logprobs(number: int, rows: Tensor, targets: Tensor) -> Tensor:
        logits = output(rows)  # [m, V]
        if logits.dim() != 2 or len(logits) != len(rows) or logits.shape[1] <= tree.max_token:
            raise ValueError(
                f"output made {tuple(logits.shape)} of rows {tuple(rows.shape)}; token ids up to {tree.max_token} need "
                f"logits [{len(rows)}, {tree.max_token + 1} or more]"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        if number == len(entropies):  # not in the backward, which computes the scores again
            entropies.append(_entropies(scores.detach()) if with_entropy else scores.new_zeros(len(scores)))
        return scores.gather(-1, targets[:, None])[:, 0]

    rows = hidden[0].index_select(0, parent)  # [M, E], once: its backward fills an [S, E] gradient
    chunks = [
        checkpoint(chunk_logprobs, number, row_chunk, target_chunk, use_reentrant=False)
        for number, (row_chunk, target_chunk) in enumerate(
            zip(rows.split(chunk_tokens), target.split(chunk_tokens), strict=True)
        )
    ]
    scattered = []
    for flat in (chunks, entropies):
        values = torch.cat(flat)
        scattered.append(values.new_zeros(trained.shape).index_put((sequence, step), values))  # [N, C]
    return scattered[0], scattered[1]


def _entropies(scores: Tensor) -> Tensor:
    """[m] nats of distributions that are given as log-probabilities [m, V]."""
    return torch.special.entr(scores.exp()).sum(-1)


def _checked_prompt_lens(tree: PrefixTree, prompt_lens: Tensor) -> Tensor:
    if not isinstance(prompt_lens, Tensor):
        raise TypeError(f"prompt_lens is of type {type(prompt_lens).__name__}; give an int64 tensor [N]")
    if prompt_lens.shape != tree.lengths.shape:
        raise ValueError(f"prompt_lens is {tuple(prompt_lens.shape)}; the tree has {len(tree.lengths)} sequences")
    if prompt_lens.is_floating_point() or prompt_lens.dtype == torch.bool:
        raise TypeError(f"prompt_lens is {prompt_lens.dtype}; lengths are integers")
    prompt_lens = prompt_lens.to(tree.lengths)
    wrong = ((prompt_lens < 1) | (prompt_lens >= tree.lengths)).nonzero().flatten()
    if len(wrong):
        n = int(wrong[0])
        raise ValueError(
            f"sequence {n} has {int(tree.lengths[n])} tokens and a prompt of {int(prompt_lens[n])}; "
            "prompt and completion need at least one token each"
        )
    return prompt_lens


def _trained(completion_lens: Tensor, mask: Tensor | None) -> Tensor:
    """[N, C] bool, True where a completion token is trained."""
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; give a bool tensor [N, C]")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != len(completion_lens)):
        wanted = f"bool [{len(completion_lens)}, longest completion]"
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; give {wanted}")
    width = int(completion_lens.max()) if mask is None else mask.shape[1]
    present = torch.arange(width, device=completion_lens.device) < completion_lens[:, None]
    if mask is None:
        return present
    mask = mask.to(present.device)
    if (mask & ~present).any():
        n = int((mask & ~present).any(1).nonzero()[0])
        raise ValueError(f"mask trains sequence {n} beyond its {int(completion_lens[n])} completion tokens")
    return mask
