"""Completions of prompts: each prompt is encoded once, and its keys and values are read by its G samples, not copied.

The prompts are prefilled as one packed row, so what they have in common is encoded once as well.

A rollout's tokens depend on its prompt and its own random numbers alone. So it does not matter in which waves the
prompts are decoded (a budget for the cache cuts them), nor when the finished rows are dropped from a wave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache as cached

import torch
from torch import Tensor

from flexpg.sample_cache import SampleCache
from flexpg.scalars import is_number, is_whole
from flexpg.tree import BLOCK, PrefixTree, Tokens

CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between looks at what is finished: each look waits for the device
DRAW_ELEMENTS = 2**24  # logits of the rows that are drawn from at a time; bounds the float64 sums to 128 MiB
RECOMPILE_LIMIT = 256  # shapes of compiled steps; torch's limit of 8 is soon reached
NOT_DRAWN = -1


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token.

    Attributes:
        max_new_tokens: longest completion, its stop token included.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None for all (arXiv 1805.04833).
        top_p: draw among the fewest likeliest tokens that hold this probability together (arXiv 1904.09751).
        stop_tokens: ids that end a completion; the stop token is its last token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not is_whole(self.max_new_tokens):
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; give a whole number, 1 or more")
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}; give 0 for greedy or a positive number")
        if self.top_k is not None and not is_whole(self.top_k):
            raise ValueError(f"top_k is {self.top_k!r}; give a whole number, 1 or more, or None for all tokens")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; give a probability above 0, up to 1 for all tokens")
        stops = self.stop_tokens
        if not isinstance(stops, Collection) or not all(is_whole(token, least=0) for token in stops):
            raise ValueError(f"stop_tokens is {stops!r}; give a list of token ids, [] for none")
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))  # a Fraction divides no tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions as they were drawn; rollout n belongs to prompt n // group_size.

    Attributes:
        completions: N token rows, each 1-D int64, with the stop token where one was drawn.
        logprobs: [N, C] float32, each token's log-probability at the sampling temperature before top-k and top-p (at
            temperature 1 for greedy), which is what `token_logprobs` computes; 0 beyond a completion's length.
        is_finished: [N] bool, False where `max_new_tokens` cut the completion off.
    """

    completions: list[Tensor]
    logprobs: Tensor
    is_finished: Tensor


Decoder = Callable[[Tensor, Tensor, SampleCache], Tensor]
Output = Callable[[Tensor], Tensor]


@torch.no_grad()
def sample(
    decoder: Decoder,
    output: Output,
    prompts: Sequence[Tokens],
    group_size: int,
    params: SamplingParams,
    uniforms: Tensor | None,
    *,
    max_cache_tokens: int | None = None,
    compiled: bool = False,
) -> Samples:
    """G completions of every prompt, each from its own random numbers, whatever is decoded beside it.

    Args:
        decoder: (tokens [B, T], position ids [B, T], cache) -> hidden states [B, T, E], through a model whose attention
            is `cache.attend`; an integration makes it.
        output: rows [M, E] -> logits [M, V].
        prompts: P token sequences of any lengths, on the model's device.
        group_size: G, completions of each.
        params: how to draw.
        uniforms: [N, max_new_tokens] float64 in [0, 1), on any device: token t of rollout n is where the distribution
            function passes uniforms[n, t]. Not read at temperature 0, and may be None then.
        max_cache_tokens: tokens whose keys and values are held at a time, padding and unused room included. As many
            whole prompts as fit are decoded side by side, the longest first; of a prompt whose group does not fit,
            as many samples as do. None for all at once.
        compiled: compile the decoding step, once for every shape of the cache; on CUDA it becomes a CUDA graph.

    Raises:
        ValueError: a group size below 1, an empty prompt, uniforms that do not fit, a budget in which one sample does
            not fit.
        FloatingPointError: logits that are not finite.
    """
    if not is_whole(group_size):
        raise ValueError(f"group_size is {group_size!r}; give 1 completion per prompt or more")
    lengths = PrefixTree.from_sequences(prompts).lengths  # what is wrong with any prompt is refused before all waves
    shape = (len(prompts) * group_size, params.max_new_tokens)
    uniforms = _checked(uniforms, shape, params.temperature).to(lengths.device)
    tokens = torch.full(shape, NOT_DRAWN, device=lengths.device)
    logprobs = torch.zeros(shape, dtype=torch.float32, device=lengths.device)
    waves = _waves(lengths.tolist(), group_size, params.max_new_tokens, max_cache_tokens, BLOCK if compiled else 1)
    for chosen, group in waves:
        rows = torch.tensor([[p * group_size + g for g in group] for p in chosen], device=lengths.device)
        tree = PrefixTree.from_sequences([prompts[p] for p in chosen])
        cache = SampleCache(tree, len(group), params.max_new_tokens, compiled)
        _draw_wave(decoder, output, cache, params, uniforms, rows, tokens, logprobs)
    sizes = (tokens != NOT_DRAWN).sum(1)  # [N]
    longest = int(sizes.max())
    if not logprobs.isfinite().all():
        raise FloatingPointError(
            "some log-probabilities are not finite, so the model's logits are not; look at its weights"
        )
    last = tokens.gather(1, sizes[:, None] - 1)[:, 0]
    completions = [row[:size] for row, size in zip(tokens, sizes.tolist(), strict=True)]
    return Samples(completions, logprobs[:, :longest], torch.isin(last, _stops(params, last)))


def _checked(uniforms: Tensor | None, shape: tuple[int, int], temperature: float) -> Tensor:
    if temperature == 0:
        return torch.zeros(shape, dtype=torch.float64)  # not read
    if uniforms is None:
        raise ValueError(f"uniforms is None, and temperature {temperature} draws; give a {list(shape)} float64 tensor")
    if uniforms.shape != shape or uniforms.dtype != torch.float64:
        raise ValueError(
            f"uniforms is {list(uniforms.shape)} {uniforms.dtype}; {shape[0]} rollouts of up to {shape[1]} tokens need "
            f"{list(shape)} torch.float64"
        )
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError("uniforms holds numbers outside [0, 1); make it with torch.rand")
    return uniforms


def _waves(
    lengths: list[int], group_size: int, max_new_tokens: int, max_cache_tokens: int | None, multiple: int
) -> list[tuple[list[int], range]]:
    """What is decoded side by side: (prompts, which samples of each), prompt lengths padded to `multiple`."""
    padded = [-(-length // multiple) * multiple for length in lengths]
    group = group_size * max_new_tokens
    budget = len(lengths) * (max(padded) + group) if max_cache_tokens is None else max_cache_tokens
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])  # neighbours of like length need little padding
    waves = []
    while order:
        p = order[0]
        whole = budget // (padded[p] + group)  # prompts, as p is the longest of those left
        samples = group_size if whole else (budget - padded[p]) // max_new_tokens
        if samples < 1:
            raise ValueError(
                f"prompt {p} of {len(lengths)} needs {padded[p] + max_new_tokens} tokens in the cache for one sample "
                f"({padded[p]} and {max_new_tokens} new ones); raise max_cache_tokens={max_cache_tokens}"
            )
        chosen, order = order[: max(whole, 1)], order[max(whole, 1) :]
        waves += [(chosen, range(group_size)[g : g + samples]) for g in range(0, group_size, samples)]
    return waves


def _draw_wave(
    decoder: Decoder,
    output: Output,
    cache: SampleCache,
    params: SamplingParams,
    uniforms: Tensor,
    rows: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    """Fills `tokens` and `logprobs` [N, max_new_tokens] at `rows` [P, G], the numbers of the cache's rollouts."""
    logits = _first_logits(decoder, output, cache)  # [P * G, V]
    stops, every = _stops(params, rows), CHECK_EVERY[rows.device.type]
    is_finished = torch.zeros_like(rows, dtype=torch.bool)  # [P, G]; what such rows go on to draw is not kept
    for step in range(params.max_new_tokens):
        token, logprob = (x.view_as(rows) for x in _draw(logits, params, uniforms[rows, step].flatten()))
        tokens[rows, step] = token.masked_fill(is_finished, NOT_DRAWN)
        logprobs[rows, step] = logprob.masked_fill(is_finished, 0)
        is_finished = is_finished | torch.isin(token, stops)
        if step + 1 == params.max_new_tokens:
            return
        if (step + 1) % every == 0:
            count, most = _live(is_finished)
            if count == 0:
                return
            if cache.compiled:
                count, most = _halved(rows.shape[0], count), _halved(rows.shape[1], most)
            if 2 * count * most <= rows.numel():
                kept = _live_first(is_finished, count, most)
                cache.select(*kept)
                rows, token, is_finished = rows[kept], token[kept], is_finished[kept]
        logits = _next_logits(decoder, output, token, cache)


def _live(is_finished: Tensor) -> tuple[int, int]:
    """How many of the P prompts have a live sample, and the most that one has. Waits for the device."""
    live = (~is_finished).sum(1).tolist()
    return sum(n > 0 for n in live), max(live)


def _live_first(is_finished: Tensor, count: int, most: int) -> tuple[Tensor, Tensor]:
    """Indices [count, 1] and [count, most] of the [P, G] samples that go on; finished ones fill the rectangle up."""
    prompts = is_finished.all(1).byte().argsort(stable=True)[:count]
    return prompts[:, None], is_finished[prompts].byte().argsort(dim=1, stable=True)[:, :most]


def _halved(size: int, needed: int) -> int:
    """`size` halved as often as it stays `needed` or more: few sizes, so few compiles."""
    while size > 1 and (size + 1) // 2 >= needed:
        size = (size + 1) // 2
    return size


def _first_logits(decoder: Decoder, output: Output, cache: SampleCache) -> Tensor:
    """[P * G, V] after the prompts, which go through the model once and into the cache."""
    tree = cache.tree
    assert tree.tokens is not None
    hidden = decoder(tree.tokens[None], tree.position_ids[None], cache)  # [1, S, E]
    cache.is_filled = True
    last = tree.node.gather(1, tree.lengths[:, None] - 1)[:, 0]  # [P]
    return output(hidden[0, last]).repeat_interleave(cache.group_size, 0)


def _next_logits(decoder: Decoder, output: Output, token: Tensor, cache: SampleCache) -> Tensor:
    """[P * G, V] after one more token [P, G] of each sample."""
    position_ids = (cache.lengths + cache.step)[:, None].expand_as(token)
    inputs = (decoder, output, token.reshape(-1, 1), position_ids.reshape(-1, 1), cache)
    if cache.compiled:
        torch.compiler.cudagraph_mark_step_begin()  # the last logits have been drawn from, and may be overwritten
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            logits = _compiled_step("reduce-overhead" if token.is_cuda else "default")(*inputs)
    else:
        logits = _step(*inputs)
    cache.advance()
    return logits


def _step(decoder: Decoder, output: Output, token: Tensor, position_ids: Tensor, cache: SampleCache) -> Tensor:
    return output(decoder(token, position_ids, cache)[:, 0])


@cached
def _compiled_step(mode: str) -> Callable[..., Tensor]:
    # fullgraph: a shape beyond the limit is an error then, and not an eager step in silence.
    return torch.compile(_step, fullgraph=True, dynamic=False, mode=mode)


def _stops(params: SamplingParams, like: Tensor) -> Tensor:
    return torch.tensor(list(params.stop_tokens), dtype=torch.int64, device=like.device)


def _draw(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token [M] for each row of logits [M, V], and its log-probability [M] before top-k and top-p."""
    at_a_time = max(1, DRAW_ELEMENTS // logits.shape[1])
    parts = zip(logits.split(at_a_time), uniforms.split(at_a_time), strict=True)
    tokens, logprobs = zip(*(_draw_rows(rows, params, u) for rows, u in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_rows(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    scores = (logits.float() / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        token = scores.argmax(-1)
    else:
        # Summed in float64: float32 has steps of 6e-8 near 1, a percent of each of 150,000 even tokens. The sum is
        # rounded by 150,000 * 2^-53 = 2e-11 at most; what the probabilities themselves are off by is 1e-7 of each.
        passed = _kept(scores, params).exp().cumsum(-1, dtype=torch.float64)
        # A token of probability 0 passes nothing, so that `right` skips it; and u < 1 keeps u * total below total.
        token = torch.searchsorted(passed, uniforms[:, None] * passed[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)  # only NaN is beyond; it shows in the log-probability
    return token, scores.gather(-1, token[:, None])[:, 0]


def _kept(scores: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [N, V] with -inf for the tokens that top-k and top-p leave out."""
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        least = scores.topk(params.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if params.top_p < 1:
        ranked, order = scores.softmax(-1).sort(-1, descending=True)
        is_dropped = ranked.cumsum(-1) - ranked >= params.top_p  # what stands before it holds top_p already
        scores = scores.masked_fill(is_dropped.gather(-1, order.argsort(-1)), float("-inf"))
    return scores
