"""Shared-prefix training for GRPO: every prompt is encoded once, whatever the size of its group.

Axes, everywhere in this package:

    N  rollouts (sequences: prompt + completion)      S  packed tokens, a multiple of 128
    C  tokens of the longest completion               T  tokens of the longest sequence
    H  heads (Hq query, Hkv key/value)                D  head size
    E  width of the hidden states                     V  vocabulary

In a micro-batch of n rollouts, tensors are [n, C], and C is the longest completion of these.

True means "counts" in every mask.
"""

from flexpg.advantages import group_advantages
from flexpg.backends.dispatch import attention
from flexpg.integrations import enable, packed_logprobs, sample
from flexpg.logprobs import token_logprobs
from flexpg.losses import grpo_loss
from flexpg.masks import block_mask, dense_mask, group_block_mask, tree_mask_mod
from flexpg.micro_batches import MicroBatch
from flexpg.packing import pack
from flexpg.rollouts import Rollouts
from flexpg.sampling import SamplingParams
from flexpg.tree import PrefixTree
from flexpg.verify import self_check

__version__ = "0.2.0"

__all__ = [
    "MicroBatch",
    "PrefixTree",
    "Rollouts",
    "SamplingParams",
    "attention",
    "block_mask",
    "dense_mask",
    "enable",
    "group_advantages",
    "group_block_mask",
    "grpo_loss",
    "pack",
    "packed_logprobs",
    "sample",
    "self_check",
    "token_logprobs",
    "tree_mask_mod",
]
