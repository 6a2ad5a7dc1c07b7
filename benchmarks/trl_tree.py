"""The prefix tree of TRL's experimental AsyncGRPOTrainer (TRL 1.16), for benchmarks.update.

The layout is that of TRL's own code: a trie of the sequences in depth-first order, cut into segments, and for every
segment the packed indices of its path from the root. Attention gathers the keys and values of each path, so those of a
prompt are copied once for every completion. TRL then calls FlashAttention 3 with variable lengths, which needs a GPU of
the Hopper generation. It is replaced here by torch's `varlen_attn` on CUDA, and on a CPU by one call of SDPA per
segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torchtune.modules import TransformerDecoder
from trl.experimental.async_grpo.packing import TreeRow

from benchmarks.models import hidden_states


class TrlTree:
    """One group, packed by TRL.

    Args:
        prompt: [P] int64.
        completions: Of the group.
    """

    def __init__(self, prompt: Tensor, completions: Sequence[Tensor]) -> None:
        row = TreeRow()
        for completion in completions:
            tokens = torch.cat([prompt, completion]).cpu()
            is_completion = torch.arange(len(tokens)) >= len(prompt)
            unused = {"old_log_probs": torch.zeros(len(tokens)), "advantage": 0.0, "group_id": 0}
            row.add({"input_ids": tokens, "completion_mask": is_completion, **unused})
        packed = {name: tensor.to(prompt.device) for name, tensor in row.pack().items()}
        self.tokens, self.position_ids = packed["input_ids"][None], packed["position_ids"][None]
        self.scored_at = packed["token_index"]  # [M], of completion tokens, sequence by sequence
        self.targets = torch.cat(list(completions))  # [M]
        self.kv_index = packed["tree_kv_index"]
        self.starts = packed["tree_cu_seqlens_q"], packed["tree_cu_seqlens_k"]
        self.longest = packed["tree_max_seqlens"].tolist()
        lengths = [[stop - start for start, stop in pairwise(starts.tolist())] for starts in self.starts]
        self.segments = list(zip(*lengths, strict=True))  # queries and keys of each
        self.masks = [
            None if queries == keys else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            for queries, keys in self.segments
        ]

    def logprobs(self, model: TransformerDecoder, completion_mask: Tensor) -> Tensor:
        """Return log-probabilities [G, C], with logits of completion tokens only."""
        hidden = hidden_states(model, self.tokens, self.position_ids)[0]
        logits = model.output(hidden[self.scored_at])  # [M, V]
        flat = logits.gather(-1, self.targets[:, None])[:, 0] - logits.logsumexp(-1)
        return flat.new_zeros(completion_mask.shape).masked_scatter(completion_mask, flat)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention [1, N, Hq, D] of q [1, Hq, N, D] to k and v [1, Hkv, N, D]."""
        if q.device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            q, k, v = (z[0].transpose(0, 1) for z in (q, k, v))  # [N, H, D] each
            paths = (z.repeat_interleave(q.shape[1] // z.shape[1], 1)[self.kv_index] for z in (k, v))
            return varlen_attn(q, *paths, *self.starts, *self.longest, window_size=(-1, 0))[None]
        queries, keys = (list(side) for side in zip(*self.segments, strict=True))
        parts = (
            q.split(queries, 2),
            k.index_select(2, self.kv_index).split(keys, 2),
            v.index_select(2, self.kv_index).split(keys, 2),
        )
        outs = [
            sdpa(*tensors, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            for *tensors, mask in zip(*parts, self.masks, strict=True)
        ]
        return torch.cat(outs, 2).transpose(1, 2)
