"""Keys and values while completions are sampled: a prompt's once, however many samples read them.

A decoding step attends in two parts under one softmax: to the prompt's keys, one copy for all G samples, and to the
sample's own. The samples' slots are allocated once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpg.backends.dispatch import attention
from flexpg.masks import block_mask
from flexpg.tree import BLOCK, PrefixTree


class SampleCache:
    """Keys and values of P prompts, once each, and of their P * G samples. A model's attention calls `attend`.

    Args:
        tree: the prompts as sequences of one packed row.
        group_size: G, samples per prompt.
        max_new_tokens: room for each sample.
        compiled: whether the steps are compiled: shapes stay the same from step to step then.

    Attributes:
        lengths: [P] int64, tokens of each prompt.
        step: [1] int64, tokens of each sample that are in the cache; a tensor, as an int would recompile.
        is_filled: whether the prompts are in, and the samples' tokens come next.
    """

    def __init__(self, tree: PrefixTree, group_size: int, max_new_tokens: int, compiled: bool = False) -> None:
        self.tree, self.group_size, self.max_new_tokens, self.compiled = tree, group_size, max_new_tokens, compiled
        self.lengths = tree.lengths
        self.step = torch.zeros(1, dtype=torch.int64, device=tree.lengths.device)
        self.is_filled = False
        self._mask = block_mask(tree)
        self._room = max_new_tokens if compiled else 1  # of each sample's slots, those that a step reads
        self._prompts: dict[Hashable, tuple[Tensor, ...]] = {}  # per layer k, v [P, Hkv, T, D]
        self._samples: dict[Hashable, tuple[Tensor, ...]] = {}  # per layer k, v [P, G, Hkv, max_new_tokens, D]

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
        """Attention of the packed prompts until the cache is filled, of each sample's newest token from then on.

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
        if self.is_filled:
            return self._attend_sample(layer, q, k, v, scale or q.shape[-1] ** -0.5, window, softcap)
        node = self.tree.node
        if self.compiled:
            node = F.pad(node, (0, -node.shape[1] % BLOCK))
        node = node.clamp(min=0)  # [P, T]
        room = (len(node), self.group_size, k.shape[1], self.max_new_tokens, k.shape[3])
        self._prompts[layer] = self._stable(x[0][:, node].transpose(0, 1) for x in (k, v))
        self._samples[layer] = self._stable(x.new_zeros(room) for x in (k, v))
        return attention(q, k, v, self._mask, scale=scale, window=window, softcap=softcap)

    def advance(self) -> None:
        """The next step: every layer has written its newest keys and values."""
        self.step += 1
        self._room = min(self._room + 1, self.max_new_tokens)

    def select(self, prompts: Tensor, samples: Tensor) -> None:
        """Keeps some samples of some prompts, and lets go of the memory of the others, layer by layer.

        Args:
            prompts: [P', 1] int64, prompts that stay.
            samples: [P', G'] int64, samples that stay of each of them.
        """
        kept = prompts[:, 0]
        self.lengths = self.lengths[kept]
        for layer in self._prompts:
            self._prompts[layer] = self._stable(x[kept] for x in self._prompts[layer])
            self._samples[layer] = self._stable(x[prompts, samples] for x in self._samples[layer])

    def _stable(self, made: Iterable[Tensor]) -> tuple[Tensor, ...]:
        tensors = tuple(made)
        if self.compiled:
            for x in tensors:  # or a CUDA graph would copy them at each replay, and refuse what is written in place
                torch._dynamo.mark_static_address(x)
        return tensors

    def _attend_sample(
        self, layer: Hashable, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        prompt_k, prompt_v = self._prompts[layer]
        sample_k, sample_v = self._samples[layer]
        groups, heads = sample_k.shape[:2], k.shape[1]
        sample_k.index_copy_(3, self.step, k.unflatten(0, groups))
        sample_v.index_copy_(3, self.step, v.unflatten(0, groups))
        sample_k, sample_v = sample_k[..., : self._room, :], sample_v[..., : self._room, :]
        queries = q[:, :, 0].unflatten(1, (heads, -1)).unflatten(0, groups) * scale  # [P, G, Hkv, Hq / Hkv, D]
        to_prompt = torch.einsum("pghrd,phtd->pghrt", queries, prompt_k)
        to_sample = torch.einsum("pghrd,pghtd->pghrt", queries, sample_k)
        scores = torch.cat([to_prompt, to_sample], -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = ~self._visible(prompt_k.shape[2], window)
        probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(v.dtype)
        on_prompt, on_sample = probabilities.split([to_prompt.shape[-1], to_sample.shape[-1]], -1)
        out = torch.einsum("pghrt,phtd->pghrd", on_prompt, prompt_v)
        out = out + torch.einsum("pghrt,pghtd->pghrd", on_sample, sample_v)
        return out.flatten(0, 1).flatten(1, 2)[:, :, None]  # [P * G, Hq, 1, D]

    def _visible(self, longest: int, window: int | None) -> Tensor:
        """[P, 1, 1, 1, T + room] bool, the keys that each prompt's newest tokens see."""
        lengths = self.lengths[:, None]  # [P, 1]
        prompt = torch.arange(longest, device=lengths.device)
        sample = torch.arange(self._room, device=lengths.device)
        visible = torch.cat([prompt < lengths, (sample <= self.step).expand(len(lengths), -1)], 1)
        if window is not None:
            ages = [lengths + self.step - prompt, (self.step - sample).expand(len(lengths), -1)]
            visible &= torch.cat(ages, 1) < window
        return visible[:, None, None, None]
