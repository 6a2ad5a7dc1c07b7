"""Exact shared-prefix training for GRPO: every prompt is encoded once, however many completions hang on it.

Axes, everywhere in this package:

    N  rollouts (sequences: prompt + completion)      S  packed tokens, a multiple of 128
    C  tokens of the longest completion               T  tokens of the longest sequence
    H  heads (Hq query, Hkv key/value)                D  head size
    E  width of the hidden states                     V  vocabulary

True means "counts" in every mask.
"""

from flexpg.attention import attention
from flexpg.cost import Cost, dense_cost, group_cost, shared_cost
from flexpg.logprobs import token_logprobs, token_logprobs_and_entropies
from flexpg.losses import grpo_loss, loss_normalizer
from flexpg.masks import TreeBlockMask, block_mask, dense_mask, group_block_mask, tree_mask_mod
from flexpg.packing import MicroBatch, pack
from flexpg.rollouts import Rollouts, group_advantages
from flexpg.sampling import Samples, SamplingParams, sample
from flexpg.tree import PrefixTree

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "MicroBatch",
    "PrefixTree",
    "Rollouts",
    "Samples",
    "SamplingParams",
    "TreeBlockMask",
    "attention",
    "block_mask",
    "dense_cost",
    "dense_mask",
    "group_advantages",
    "group_block_mask",
    "group_cost",
    "grpo_loss",
    "loss_normalizer",
    "pack",
    "sample",
    "shared_cost",
    "token_logprobs",
    "token_logprobs_and_entropies",
    "tree_mask_mod",
]
