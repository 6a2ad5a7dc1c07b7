"""What goes through a model for one packed sequence, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexpg.context_parallel import ContextShard, ShardBlockMask
from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixCache, PrefixShardMask
from flexpg.tree import PrefixTree


@dataclass(frozen=True)
class PackedInput:
    """What goes through a model for one packed sequence.

    Attributes:
        input_ids: [1, S'] int64.
        position_ids: [1, S'] int64.
        mask: The block mask; its queries are the S' tokens, and padding where the kernels need whole blocks.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: TreeBlockMask


def packed_input(
    model: nn.Module, tree: PrefixTree, prefix: PrefixCache | None = None, shard: ContextShard | None = None
) -> PackedInput:
    """Return the part of a packed sequence that goes through the model, and its mask.

    The tokens of a cached prompt are left out, and so is padding on a CPU: flex kernels need whole blocks, those of a
    CPU do not. A cached prompt itself keeps its padding, because what follows it begins a block, and so do compiled
    layers, because fewer lengths need fewer graphs.

    Args:
        model: The model, whose compiled layers are looked at.
        tree: The packed sequence, of S tokens.
        prefix: A cached prompt with which all sequences begin, or whose own forward this is.
        shard: The part of the packed sequence that this rank computes; None for all of it.
    """
    if shard is not None:
        sharded = ShardBlockMask(shard) if prefix is None else PrefixShardMask(prefix, shard)
        input_ids, position_ids = shard.tree.input_ids[:, shard.index], shard.tree.position_ids[shard.index]
        return PackedInput(input_ids, position_ids[None], sharded)
    mask = TreeBlockMask(tree) if prefix is None else prefix.mask_for(tree)
    keep_padding = (
        mask.tree.end.device.type != "cpu"
        or (prefix is not None and tree is prefix.tree)
        or torch.compiler.is_compiling()
        or any(module._compiled_call_impl is not None for module in model.modules())
    )
    queries = slice(mask.first_query, mask.tree.padded_length if keep_padding else mask.tree.num_tokens)
    return PackedInput(mask.tree.input_ids[:, queries], mask.tree.position_ids[None, queries], mask)


def whole_sequence(
    hidden: Tensor, tree: PrefixTree, prefix: PrefixCache | None = None, shard: ContextShard | None = None
) -> Tensor:
    """Return the hidden states of a whole packed sequence from those of `packed_input`.

    Args:
        hidden: [1, S', E].
        tree: The packed sequence, of S tokens.
        prefix: The cached prompt, if any.
        shard: The part of the packed sequence that this rank computes, if not all of it.

    Returns:
        [1, S, E], or those of the shard as they are; the values at padding have no meaning.
    """
    if prefix is not None and tree is not prefix.tree:
        hidden = prefix.prepend_hidden(hidden)
    if shard is not None:
        return hidden
    if hidden.shape[1] == tree.padded_length:
        return hidden
    return functional.pad(hidden[:, : tree.num_tokens], (0, 0, 0, tree.padded_length - tree.num_tokens))
