"""Keys and values while completions are sampled: those of a prompt are stored once for all its samples.

A decoding step attends in two parts under one softmax: to the prompt's keys, one copy for all G samples, and to the
sample's own. The slots of the samples are allocated once. Recurrent layers keep a state per sample.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpg.backends.dispatch import attention
from flexpg.masks import TreeBlockMask, block_mask
from flexpg.tree import BLOCK, PrefixTree


class SampleCache:
    """Keys and values of P prompts, once each, and of their P * G samples. A model's attention calls `attend`.

    Args:
        tree: The prompts as the sequences of one tree.
        group_size: G, samples per prompt.
        max_new_tokens: Slots of each sample.
        compiled: Whether decoding steps are compiled, for which shapes stay constant over the steps.

    Attributes:
        lengths: [P] int64, tokens of each prompt.
        step: [1] int64, tokens of each sample in the cache; a tensor, because an int would recompile.
        is_filled: Whether the prompts are stored and tokens of samples come next.
    """

    def __init__(self, tree: PrefixTree, group_size: int, max_new_tokens: int, compiled: bool = False) -> None:
        self.tree, self.group_size, self.max_new_tokens, self.compiled = tree, group_size, max_new_tokens, compiled
        self.lengths = tree.lengths
        self.step = torch.zeros(1, dtype=torch.int64, device=tree.lengths.device)
        self.is_filled = False
        self._mask = block_mask(tree)
        self._slots = max_new_tokens if compiled else 1  # of each sample, that a step reads
        self._num_samples = group_size  # of each prompt, those that are decoded
        self._prompts: dict[Hashable, tuple[Tensor, ...]] = {}  # per layer k, v [P, Hkv, T, D]
        self._samples: dict[Hashable, tuple[Tensor, ...]] = {}  # per layer k, v [P, G, Hkv, max_new_tokens, D]
        self._seen: set[Hashable] = set()  # layers that the current step has called
        self._states: dict[Hashable, dict[Any, Tensor]] = {}  # per recurrent layer [P, G, ...] each

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
        sinks: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Compute attention of the packed prompts until the cache is filled, then of each sample's newest token.

        Args:
            layer: What tells the model's layers apart.
            q: [1, Hq, S, D] of the prompts, then [P * G, Hq, 1, D] of the samples.
            k: [1, Hkv, S, D], then [P * G, Hkv, 1, D]; stored.
            v: Like k.
            scale: Factor of the scores; None for 1 / sqrt(D).
            window: Sliding window in positions, or None.
            softcap: Scores become `softcap * tanh(scores / softcap)`; None for no softcap.
            sinks: [Hq], one more logit per head in the softmax, whose value vector is 0, or None.
            chunk: Positions of a chunk, outside of which a query sees nothing, or None.

        Returns:
            A tensor of the shape of q.
        """
        if self.is_filled:
            if not self.compiled:
                self._seen.add(layer)
            visible = self._visible(self._prompts[layer][0].shape[2], window, chunk)
            return self._attend_sample(layer, q, k, v, scale or q.shape[-1] ** -0.5, visible, softcap, sinks)
        node = self.tree.node
        if self.compiled:
            node = F.pad(node, (0, -node.shape[1] % BLOCK))
        node = node.clamp(min=0)  # [P, T]
        slots = (len(node), self.group_size, k.shape[1], self.max_new_tokens, k.shape[3])
        self._prompts[layer] = self._stable(x[0][:, node].transpose(0, 1) for x in (k, v))
        self._samples[layer] = self._stable(x.new_zeros(slots) for x in (k, v))
        mask = self._mask if chunk is None else self._mask.for_chunk(chunk)
        return attention(q, k, v, mask, scale=scale, window=window, softcap=softcap, sinks=sinks)

    def keep_states(self, layer: Hashable, states: Mapping[Any, Tensor]) -> None:
        """Store the states [P * G, ...] of a recurrent layer after the newest token of each sample."""
        if self.is_filled:
            self._seen.add(layer)
        groups = len(self.lengths), -1
        self._states[layer] = {key: state.unflatten(0, groups) for key, state in states.items()}

    def states_of(self, layer: Hashable) -> dict[Any, Tensor]:
        """Return the states [P * G, ...] of a recurrent layer; the layer may write into them."""
        return {key: state.flatten(0, 1) for key, state in self._states[layer].items()}

    def positions(self) -> Tensor:
        """Return the positions of the newest tokens, [P * G] int64, or those of the packed prompts, [S]."""
        if not self.is_filled:
            return self.tree.position_ids
        return (self.lengths + self.step).repeat_interleave(self._num_samples)

    def num_bytes(self) -> int:
        """Return the bytes of all keys, values and states, unused slots included."""
        stored = [*self._prompts.values(), *self._samples.values(), *(kept.values() for kept in self._states.values())]
        return sum(tensor.nbytes for tensors in stored for tensor in tensors)

    def advance(self) -> None:
        """Advance to the next step, after every layer has stored its newest keys and values, or its state.

        Raises:
            TypeError: If a layer has not, because the model did not hand it the cache.
        """
        if not self.compiled and len(self._seen) < (needed := len(self._prompts) + len(self._states)):
            raise TypeError(
                f"{len(self._seen)} of {needed} layers used the sampler's cache for the newest token; sample with "
                "model.generate(...)"
            )
        self._seen.clear()
        self.step += 1
        self._slots = min(self._slots + 1, self.max_new_tokens)

    def select(self, prompts: Tensor, samples: Tensor) -> None:
        """Keep some samples of some prompts and free the memory of the others, layer by layer.

        Args:
            prompts: [P', 1] int64, the prompts to keep.
            samples: [P', G'] int64, the samples to keep of each.
        """
        kept = prompts[:, 0]
        self.lengths = self.lengths[kept]
        for layer in self._prompts:
            self._prompts[layer] = self._stable(x[kept] for x in self._prompts[layer])
            self._samples[layer] = self._stable(x[prompts, samples] for x in self._samples[layer])
        for layer, states in self._states.items():
            self._states[layer] = {key: state[prompts, samples] for key, state in states.items()}
        self._num_samples = samples.shape[1]

    def _stable(self, made: Iterable[Tensor]) -> tuple[Tensor, ...]:
        tensors = tuple(made)
        if self.compiled:
            for x in tensors:  # a CUDA graph would copy other tensors at each replay and refuse in-place writes
                torch._dynamo.mark_static_address(x)
        return tensors

    def _attend_sample(
        self,
        layer: Hashable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        visible: Tensor,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        prompt_k, prompt_v = self._prompts[layer]
        sample_k, sample_v = self._samples[layer]
        groups, heads = sample_k.shape[:2], k.shape[1]
        sample_k.index_copy_(3, self.step, k.unflatten(0, groups))
        sample_v.index_copy_(3, self.step, v.unflatten(0, groups))
        sample_k, sample_v = sample_k[..., : self._slots, :], sample_v[..., : self._slots, :]
        queries = q[:, :, 0].unflatten(1, (heads, -1)).unflatten(0, groups) * scale  # [P, G, Hkv, Hq / Hkv, D]
        to_prompt = torch.einsum("pghrd,phtd->pghrt", queries, prompt_k)
        to_sample = torch.einsum("pghrd,pghtd->pghrt", queries, sample_k)
        scores = torch.cat([to_prompt, to_sample], -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill_(~visible, float("-inf"))
        if sinks is not None:
            by_head = sinks.to(scores.dtype).view(heads, -1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, by_head], -1)
        probabilities = scores.softmax(-1)[..., : visible.shape[-1]].to(v.dtype)
        on_prompt, on_sample = probabilities.split([to_prompt.shape[-1], to_sample.shape[-1]], -1)
        out = torch.einsum("pghrt,phtd->pghrd", on_prompt, prompt_v)
        out = out + torch.einsum("pghrt,pghtd->pghrd", on_sample, sample_v)
        return out.flatten(0, 1).flatten(1, 2)[:, :, None]  # [P * G, Hq, 1, D]

    def _visible(self, longest: int, window: int | None, chunk: int | None) -> Tensor:
        """Return [P, 1, 1, 1, T + slots] bool, the keys that the newest tokens of each prompt's samples see."""
        lengths = self.lengths[:, None]  # [P, 1]
        prompt = torch.arange(longest, device=lengths.device)
        sample = torch.arange(self._slots, device=lengths.device)
        visible = torch.cat([prompt < lengths, (sample <= self.step).expand(len(lengths), -1)], 1)
        ages = [lengths + self.step - prompt, (self.step - sample).expand(len(lengths), -1)]
        if window is not None:
            visible &= torch.cat(ages, 1) < window
        if chunk is not None:
            visible &= torch.cat(ages, 1) <= (lengths + self.step) % chunk
        return visible[:, None, None, None]


class SampleBlockMask(TreeBlockMask):
    """The TreeBlockMask of a sampler's prompts with the cache, for models that hand their mask to every layer.

    Attributes:
        cache: The sampler's cache.
    """

    def __init__(self, cache: SampleCache) -> None:
        super().__init__(cache.tree)
        self.cache = cache
