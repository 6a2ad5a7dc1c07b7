"""Completions of prompts: each prompt is encoded once, and its keys and values are read by its G samples, not copied.

The prompts are prefilled as one packed row, so what they have in common is encoded once as well. A decoding step
attends in two parts under one softmax: to the prompt's keys, one copy for all G samples, and to the sample's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpg.attention import attention
from flexpg.masks import block_mask
from flexpg.tree import PrefixTree, Tokens


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
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; give a whole number, 1 or more")
        if not isinstance(self.temperature, int | float) or not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature!r}; give 0 for greedy or a positive number")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; give a whole number, 1 or more, or None for all tokens")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; give a probability above 0, up to 1 for all tokens")


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


class SampleCache:
    """Keys and values of P prompts, once each, and of their P * G samples. A model's attention calls `attend`.

    Args:
        tree: the prompts as sequences of one packed row.
        group_size: G, samples per prompt.
        max_new_tokens: room for each sample.
    """

    def __init__(self, tree: PrefixTree, group_size: int, max_new_tokens: int) -> None:
        self.tree, self.group_size, self.max_new_tokens = tree, group_size, max_new_tokens
        self._mask = block_mask(tree)
        self._prompts: dict[Hashable, tuple[Tensor, Tensor]] = {}  # per layer [P, Hkv, T, D]
        self._samples: dict[Hashable, tuple[Tensor, Tensor]] = {}  # per layer [P, G, Hkv, max_new_tokens, D]
        self.step = 0  # tokens of each sample that are in the cache

    def attend(
        self,
        layer: Hashable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of the packed prompts at a layer's first call, of each sample's newest token from then on.

        Args:
            layer: what tells the model's layers apart.
            q: [1, Hq, S, D] the prompts' queries, then [P * G, Hq, 1, D] the samples'.
            k: [1, Hkv, S, D], then [P * G, Hkv, 1, D]; kept.
            v: as k.
            scale: factor of the scores; None for 1 / sqrt(D).
            window: sliding window in positions, or None.
            softcap: scores become `softcap * tanh(scores / softcap)`; None for none.

        Returns:
            As q.
        """
        if layer in self._prompts:
            return self._attend_sample(layer, q, k, v, scale or q.shape[-1] ** -0.5, window, softcap)
        node = self.tree.node.clamp(min=0)  # [P, T]
        self._prompts[layer] = (k[0][:, node].transpose(0, 1), v[0][:, node].transpose(0, 1))
        room = (len(node), self.group_size, k.shape[1], self.max_new_tokens, k.shape[3])
        self._samples[layer] = (k.new_zeros(room), v.new_zeros(room))
        return attention(q, k, v, self._mask, scale=scale, window=window, softcap=softcap)

    def _attend_sample(
        self, layer: Hashable, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        prompt_k, prompt_v = self._prompts[layer]
        sample_k, sample_v = self._samples[layer]
        groups, heads = sample_k.shape[:2], k.shape[1]
        sample_k[:, :, :, self.step] = k[:, :, 0].unflatten(0, groups)
        sample_v[:, :, :, self.step] = v[:, :, 0].unflatten(0, groups)
        sample_k, sample_v = sample_k[..., : self.step + 1, :], sample_v[..., : self.step + 1, :]
        queries = q[:, :, 0].unflatten(1, (heads, -1)).unflatten(0, groups) * scale  # [P, G, Hkv, Hq / Hkv, D]
        to_prompt = torch.einsum("pghrd,phtd->pghrt", queries, prompt_k)
        to_sample = torch.einsum("pghrd,pghtd->pghrt", queries, sample_k)
        scores = torch.cat([to_prompt, to_sample], -1).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        probabilities = scores.masked_fill(~self._visible(window), float("-inf")).softmax(-1).to(v.dtype)
        on_prompt, on_sample = probabilities.split([to_prompt.shape[-1], to_sample.shape[-1]], -1)
        out = torch.einsum("pghrt,phtd->pghrd", on_prompt, prompt_v)
        out = out + torch.einsum("pghrt,pghtd->pghrd", on_sample, sample_v)
        return out.flatten(0, 1).flatten(1, 2)[:, :, None]  # [P * G, Hq, 1, D]

    def _visible(self, window: int | None) -> Tensor:
        """[P, 1, 1, 1, T + step + 1] bool, the keys that each prompt's newest tokens see."""
        lengths = self.tree.lengths[:, None]  # [P, 1]
        prompt = torch.arange(self.tree.max_length, device=lengths.device).expand(len(lengths), -1)
        sample = lengths + torch.arange(self.step + 1, device=lengths.device)
        visible = torch.cat([prompt < lengths, torch.ones_like(sample, dtype=torch.bool)], 1)
        if window is not None:
            visible &= lengths + self.step - torch.cat([prompt, sample], 1) < window
        return visible[:, None, None, None]


Decoder = Callable[[Tensor, Tensor, SampleCache], Tensor]


@torch.no_grad()
def sample(
    decoder: Decoder,
    output: Callable[[Tensor], Tensor],
    prompts: Sequence[Tokens],
    group_size: int,
    params: SamplingParams,
    generator: torch.Generator,
) -> Samples:
    """G completions of every prompt, all drawn side by side.

    Args:
        decoder: (tokens [B, T], position ids [B, T], cache) -> hidden states [B, T, E], through a model whose attention
            is `cache.attend`; an integration makes it.
        output: rows [M, E] -> logits [M, V].
        prompts: P token sequences of any lengths, on the model's device.
        group_size: G, completions of each.
        params: how to draw.
        generator: the source of randomness, on the model's device; same seed, same samples.

    Raises:
        ValueError: a group size below 1, or an empty prompt.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; give 1 completion per prompt or more")
    tree = PrefixTree.from_sequences(prompts)
    assert tree.tokens is not None
    cache = SampleCache(tree, group_size, params.max_new_tokens)
    hidden = decoder(tree.tokens[None], tree.position_ids[None], cache)  # [1, S, E]
    last = tree.node.gather(1, tree.lengths[:, None] - 1)[:, 0]  # [P]
    logits = output(hidden[0, last]).repeat_interleave(group_size, 0)  # [N, V]
    position = tree.lengths.repeat_interleave(group_size)  # [N]
    stops = torch.tensor(list(params.stop_tokens), dtype=torch.int64, device=logits.device)
    is_finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    length = torch.zeros_like(position)
    tokens, logprobs = [], []
    for step in range(params.max_new_tokens):
        token, logprob = _draw(logits, params, generator)
        tokens.append(token)
        logprobs.append(torch.where(is_finished, 0, logprob))
        length += ~is_finished
        is_finished |= torch.isin(token, stops)
        if step + 1 == params.max_new_tokens or is_finished.all():
            break
        cache.step = step
        hidden = decoder(token[:, None], (position + step)[:, None], cache)  # [N, 1, E]
        logits = output(hidden[:, 0])
    drawn = torch.stack(tokens, 1)  # [N, C]
    completions = [row[:n] for row, n in zip(drawn, length.tolist(), strict=True)]
    return Samples(completions, torch.stack(logprobs, 1), is_finished)


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token [N] for each row of logits [N, V], and its log-probability [N] before top-k and top-p."""
    scores = (logits.float() / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        token = scores.argmax(-1)
    else:
        token = torch.multinomial(_kept(scores, params).exp(), 1, generator=generator)[:, 0]
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
