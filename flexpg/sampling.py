"""Sampling of G completions per prompt: each prompt is encoded once, and its samples read its keys and values.

The prompts are prefilled as one packed sequence, so what they have in common is encoded once as well.

The tokens of a rollout depend only on its prompt and its own random numbers. They do not depend on which prompts are
decoded together (a budget for the cache decides that) or on when finished rollouts leave the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cached
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexpg.logprobs import OutputLayer
from flexpg.sample_cache import SampleCache
from flexpg.token_sequences import Tokens
from flexpg.tree import BLOCK, PrefixTree

CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between checks for finished rollouts, each of which waits for the device
DRAW_ELEMENTS = 2**24  # logits that are drawn from at a time; bounds the float64 sums to 128 MiB
RECOMPILE_LIMIT = 256  # shapes of compiled steps; torch's limit is 8
NOT_DRAWN = -1

Decoder = Callable[[Tensor, Tensor, SampleCache], Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: Tokens of the longest completion, its stop token included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens only; None for all (arXiv 1805.04833).
        top_p: Sample from the fewest most likely tokens that have this probability together (arXiv 1904.09751).
        stop_tokens: Ids that end a completion; the stop token is its last token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop_tokens, Iterator):  # it is read more than once
            object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        for name, valid, condition in (
            ("max_new_tokens", _is_count(self.max_new_tokens), "an integer of at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k is None or _is_count(self.top_k), "an integer of at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop_tokens", _are_ids(self.stop_tokens), "a list of token ids"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {condition}, got {getattr(self, name)!r}")


def _is_count(value: Any) -> bool:
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


def _are_ids(tokens: Any) -> bool:
    try:
        return all(operator.index(token) >= 0 for token in tokens)
    except TypeError:  # an int, a string, None, or a list of these
        return False


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Sampled completions; rollout n belongs to prompt n // group_size.

    Attributes:
        completions: N tensors of token ids, 1-D int64, with the stop token if one was sampled.
        logprobs: [N, C] float32, each token's log-probability at the sampling temperature before top-k and top-p (at
            temperature 1 for greedy), which is what `token_logprobs` computes; 0 past the end of a completion.
        is_finished: [N] bool, False where `max_new_tokens` truncated the completion.
    """

    completions: list[Tensor]
    logprobs: Tensor
    is_finished: Tensor

    def __repr__(self) -> str:
        tokens, truncated = sum(map(len, self.completions)), int((~self.is_finished).sum())
        return f"Samples({len(self.completions)} completions, {tokens:,} tokens, {truncated} truncated)"


@torch.no_grad()
def sample_completions(
    decoder: Decoder,
    output: OutputLayer,
    prompts: Sequence[Tokens],
    group_size: int,
    params: SamplingParams,
    *,
    seed: int | Sequence[int] | None = None,
    max_cache_tokens: int | None = None,
    compiled: bool = False,
) -> Samples:
    """Sample G completions of every prompt; `flexpg.sample` calls this with a model's decoder and output layer.

    Args:
        decoder: (tokens [B, T], position ids [B, T], cache) -> hidden states [B, T, E], through a model whose attention
            is `cache.attend`.
        output: [M, E] -> logits [M, V].
        prompts: As in `flexpg.sample`, like all that follow.
        group_size: G.
        params: How tokens are sampled.
        seed: The seed of the random numbers.
        max_cache_tokens: The limit of the cache.
        compiled: Compile the decoding step.
    """
    if not _is_count(group_size):
        raise ValueError(f"group_size must be an integer of at least 1, got {group_size!r}")
    lengths = PrefixTree.from_sequences(prompts).lengths  # validates all prompts before the first is decoded
    shape = (len(prompts) * group_size, params.max_new_tokens)
    uniforms = _uniforms(seed, len(prompts), group_size, params).to(lengths.device)
    tokens = torch.full(shape, NOT_DRAWN, device=lengths.device)
    logprobs = torch.zeros(shape, dtype=torch.float32, device=lengths.device)
    waves = _waves(lengths.tolist(), group_size, params.max_new_tokens, max_cache_tokens, BLOCK if compiled else 1)
    for chosen, group in waves:
        rows = torch.tensor([[p * group_size + g for g in group] for p in chosen], device=lengths.device)
        tree = PrefixTree.from_sequences([prompts[p] for p in chosen])
        cache = SampleCache(tree, len(group), params.max_new_tokens, compiled)
        _decode_wave(decoder, output, cache, params, uniforms, rows, tokens, logprobs)
    sizes = (tokens != NOT_DRAWN).sum(1)  # [N]
    if not logprobs.isfinite().all():
        raise FloatingPointError("logits are NaN or Inf while sampling; the model's weights probably are too")
    last = tokens.gather(1, sizes[:, None] - 1)[:, 0]
    completions = [row[:size] for row, size in zip(tokens, sizes.tolist(), strict=True)]
    return Samples(completions, logprobs[:, : int(sizes.max())], torch.isin(last, _stops(params, last)))


def _uniforms(seed: int | Sequence[int] | None, num_prompts: int, group_size: int, params: SamplingParams) -> Tensor:
    """Return [N, max_new_tokens] float64 random numbers in [0, 1), on the CPU; greedy sampling does not read them."""
    shape = (group_size, params.max_new_tokens)
    if params.temperature == 0:
        return torch.zeros(num_prompts * group_size, params.max_new_tokens, dtype=torch.float64)
    if seed is None or isinstance(seed, int | np.integer):
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        return torch.rand((num_prompts * group_size, shape[1]), dtype=torch.float64, generator=generator)
    if len(seed) != num_prompts:
        raise ValueError(f"seed must be an int or one int per prompt, got {len(seed)} for {num_prompts} prompts")
    generators = [torch.Generator().manual_seed(int(value)) for value in seed]
    return torch.cat([torch.rand(shape, dtype=torch.float64, generator=generator) for generator in generators])


def _waves(
    lengths: list[int], group_size: int, max_new_tokens: int, max_cache_tokens: int | None, multiple: int
) -> list[tuple[list[int], range]]:
    """Return what is decoded together: (prompts, which samples of each), prompt lengths padded to `multiple`."""
    padded = [-(-length // multiple) * multiple for length in lengths]
    group = group_size * max_new_tokens
    budget = len(lengths) * (max(padded) + group) if max_cache_tokens is None else max_cache_tokens
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])  # neighbors of similar length need little padding
    waves = []
    while order:
        p = order[0]
        whole = budget // (padded[p] + group)  # prompts, because p is the longest of those left
        samples = group_size if whole else (budget - padded[p]) // max_new_tokens
        if samples < 1:
            raise ValueError(
                f"max_cache_tokens must be at least {padded[p] + max_new_tokens} for prompt {p} ({padded[p]} tokens, "
                f"padding included, and {max_new_tokens} new ones), got {max_cache_tokens}"
            )
        chosen, order = order[: max(whole, 1)], order[max(whole, 1) :]
        waves += [(chosen, range(group_size)[g : g + samples]) for g in range(0, group_size, samples)]
    return waves


def _decode_wave(
    decoder: Decoder,
    output: OutputLayer,
    cache: SampleCache,
    params: SamplingParams,
    uniforms: Tensor,
    rows: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    """Fill `tokens` and `logprobs` [N, max_new_tokens] at `rows` [P, G], the rollouts of the cache."""
    logits = _first_logits(decoder, output, cache)  # [P * G, V]
    stops, every = _stops(params, rows), CHECK_EVERY[rows.device.type]
    is_finished = torch.zeros_like(rows, dtype=torch.bool)  # [P, G]; what finished rollouts go on to sample is dropped
    for step in range(params.max_new_tokens):
        token, logprob = (x.view_as(rows) for x in _draw(logits, params, uniforms[rows, step].flatten()))
        tokens[rows, step] = token.masked_fill(is_finished, NOT_DRAWN)
        logprobs[rows, step] = logprob.masked_fill(is_finished, 0)
        is_finished = is_finished | torch.isin(token, stops)
        if step + 1 == params.max_new_tokens:
            return
        if (step + 1) % every == 0:
            prompts, samples = _count_live(is_finished)
            if prompts == 0:
                return
            if cache.compiled:
                prompts, samples = _halved(rows.shape[0], prompts), _halved(rows.shape[1], samples)
            if 2 * prompts * samples <= rows.numel():
                kept = _live_first(is_finished, prompts, samples)
                cache.select(*kept)
                rows, token, is_finished = rows[kept], token[kept], is_finished[kept]
        logits = _next_logits(decoder, output, token, cache)


def _count_live(is_finished: Tensor) -> tuple[int, int]:
    """Return how many of the P prompts have an unfinished sample, and the most of one prompt. Waits for the device."""
    live = (~is_finished).sum(1).tolist()
    return sum(n > 0 for n in live), max(live)


def _live_first(is_finished: Tensor, prompts: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return indices [prompts, 1] and [prompts, samples] of what continues; finished ones fill the rectangle up."""
    rows = is_finished.all(1).byte().argsort(stable=True)[:prompts]
    return rows[:, None], is_finished[rows].byte().argsort(dim=1, stable=True)[:, :samples]


def _halved(size: int, needed: int) -> int:
    """Return `size` halved as often as it stays at least `needed`: few sizes, so few compilations."""
    while size > 1 and (size + 1) // 2 >= needed:
        size = (size + 1) // 2
    return size


def _first_logits(decoder: Decoder, output: OutputLayer, cache: SampleCache) -> Tensor:
    """Return logits [P * G, V] after the prompts, which fill the cache."""
    tree = cache.tree
    hidden = decoder(tree.input_ids, tree.position_ids[None], cache)  # [1, S, E]
    cache.is_filled = True
    last = tree.node.gather(1, tree.lengths[:, None] - 1)[:, 0]  # [P]
    return output(hidden[0, last]).repeat_interleave(cache.group_size, 0)


def _next_logits(decoder: Decoder, output: OutputLayer, token: Tensor, cache: SampleCache) -> Tensor:
    """Return logits [P * G, V] after one more token [P, G] of each sample."""
    position_ids = (cache.lengths + cache.step)[:, None].expand_as(token)
    inputs = (decoder, output, token.reshape(-1, 1), position_ids.reshape(-1, 1), cache)
    if cache.compiled:
        torch.compiler.cudagraph_mark_step_begin()  # the last logits have been read and may be overwritten
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            logits = _compiled_step("reduce-overhead" if token.is_cuda else "default")(*inputs)
    else:
        logits = _step(*inputs)
    cache.advance()
    return logits


def _step(decoder: Decoder, output: OutputLayer, token: Tensor, position_ids: Tensor, cache: SampleCache) -> Tensor:
    return output(decoder(token, position_ids, cache)[:, 0])


@cached
def _compiled_step(mode: str) -> Callable[..., Tensor]:
    # fullgraph=True makes a shape past the limit an error instead of an eager step.
    return torch.compile(_step, fullgraph=True, dynamic=False, mode=mode)


def _stops(params: SamplingParams, like: Tensor) -> Tensor:
    return torch.tensor(list(params.stop_tokens), dtype=torch.int64, device=like.device)


def _draw(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return one token [M] per row of logits [M, V], and its log-probability [M] before top-k and top-p."""
    rows_at_a_time = max(1, DRAW_ELEMENTS // logits.shape[1])
    parts = zip(logits.split(rows_at_a_time), uniforms.split(rows_at_a_time), strict=True)
    tokens, logprobs = zip(*(_draw_rows(rows, params, u) for rows, u in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_rows(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    scores = (logits.float() / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        token = scores.argmax(-1)
    else:
        # The token is where the distribution function passes the random number. It is summed in float64: float32 has
        # steps of 6e-8 near 1, which is a percent of each of 150,000 equally likely tokens.
        passed = _truncated(scores, params).exp().cumsum(-1, dtype=torch.float64)
        # `right` skips tokens of probability 0, and u < 1 keeps u * total below total.
        token = torch.searchsorted(passed, uniforms[:, None] * passed[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)  # only NaN is past the end; the log-probability shows it
    return token, scores.gather(-1, token[:, None])[:, 0]


def _truncated(scores: Tensor, params: SamplingParams) -> Tensor:
    """Return log-probabilities [N, V] with -inf for the tokens that top-k and top-p leave out."""
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        least = scores.topk(params.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if params.top_p < 1:
        ranked, order = scores.softmax(-1).sort(-1, descending=True)
        is_dropped = ranked.cumsum(-1) - ranked >= params.top_p  # more likely tokens have top_p already
        scores = scores.masked_fill(is_dropped.gather(-1, order.argsort(-1)), float("-inf"))
    return scores
