"""Exact shared-prefix training for GRPO: every prompt is encoded once, however many completions hang on it.

Axes, everywhere in this package:

    N  rollouts (sequences: prompt + completion)      S  packed tokens, a multiple of 128
    C  tokens of the longest completion               T  tokens of the longest sequence
    H  heads (Hq query, Hkv key/value)                D  head size
    E  width of the hidden states                     V  vocabulary

True means "counts" in every mask.
"""

from flexpg.analysis.flops import (
    Cost,
    Flops,
    ModelShape,
    activation_bytes,
    dense_cost,
    group_cost,
    shared_cost,
    update_flops,
)
from flexpg.analysis.report import Report, report
from flexpg.backends.dispatch import attention
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.logprobs import token_logprobs, token_logprobs_and_entropies
from flexpg.losses import grpo_loss, loss_normalizer
from flexpg.masks import TreeBlockMask, block_mask, dense_mask, group_block_mask, tree_mask_mod
from flexpg.packing import MicroBatch, pack, recomputed_tokens, runs
from flexpg.prefix_cache import EncodedPrefix
from flexpg.rollouts import Rollouts, group_advantages
from flexpg.sampling import Samples, SamplingParams, sample
from flexpg.tree import PrefixTree
from flexpg.verify import SelfCheck, SelfCheckError, self_check

__version__ = "0.1.0"

__all__ = [
    "Conversation",
    "Cost",
    "EncodedPrefix",
    "Flops",
    "MicroBatch",
    "ModelShape",
    "PrefixTree",
    "Report",
    "Rollouts",
    "Samples",
    "SamplingParams",
    "SelfCheck",
    "SelfCheckError",
    "TreeBlockMask",
    "activation_bytes",
    "attention",
    "block_mask",
    "conversation_rollouts",
    "dense_cost",
    "dense_mask",
    "group_advantages",
    "group_block_mask",
    "group_cost",
    "grpo_loss",
    "loss_normalizer",
    "pack",
    "recomputed_tokens",
    "report",
    "runs",
    "sample",
    "self_check",
    "shared_cost",
    "token_logprobs",
    "token_logprobs_and_entropies",
    "tree_mask_mod",
    "update_flops",
]
