"""A prefix that is encoded once, however many micro-batches hang on it: for a group that is larger than the budget.

The prefix goes through the model alone. Each layer's keys and values are kept, and every micro-batch of completions
attends to them and to itself, forward and backward, on its own. The gradients that arrive at the kept keys and values,
and at the prefix's last hidden state, add up; the prefix's one backward starts from their sums. So the gradients are
those of one packed row, and at its peak the memory holds the activations of the prefix and of one micro-batch.

The prefix is encoded once, not twice: its activations wait for its backward (with activation checkpointing, its layers'
inputs), as recomputing them would cost another forward of what is longest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexpg.masks import TreeBlockMask, block_mask, mask_of
from flexpg.packing import MicroBatch
from flexpg.tree import PrefixTree, Tokens, checked_tree, padded_size


class EncodedPrefix:
    """Keys and values of a prefix, for the micro-batches that hang on it; made by an integration's `encode_prefix`.

    As a context manager it runs the prefix's backward when its block ends: the backward of every micro-batch belongs
    inside. Without gradients it just lets go of the memory.

        with encode_prefix(model, prompt) as prefix:  # leaving the block runs the prompt's backward
            for tree in trees:
                hidden = forward(model, tree, prefix=prefix)
                ...
                loss.backward()

    Args:
        tokens: [P] int64, what all sequences of all micro-batches begin with.

    Attributes:
        tree: the prefix as a packed row.
        mask: of that row; a forward with it keeps each layer's keys and values.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tree = PrefixTree.from_sequences([tokens])
        self.mask = block_mask(self.tree)
        self.mask.prefix = self
        self._with_grad = torch.is_grad_enabled()
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._hidden: Tensor | None = None
        self._made: list[Tensor] = []  # by the prefix's forward; gradients are wanted
        self._sums: list[Tensor | None] = []  # of the gradients of each
        self._is_used = self._is_done = False

    def keep_hidden(self, hidden: Tensor) -> None:
        """Ends the prefix's forward.

        Args:
            hidden: [1, S, E], its hidden states.
        """
        self._hidden = self._leaf(hidden)

    def joined(self, mask: TreeBlockMask, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values: the prefix's own, which are kept, or a micro-batch's behind the prefix's."""
        if torch.is_grad_enabled() != self._with_grad:
            raise ValueError(
                "the layers of a prefix run with gradients where its forward had none, or the other way round; use one "
                "torch.no_grad() around both, and activation checkpointing with use_reentrant=False"
            )
        if mask.first_query:
            kept_k, kept_v = self._layers[layer]
            return torch.cat([kept_k, k], 2), torch.cat([kept_v, v], 2)
        if layer not in self._layers:  # else checkpointing calls the layer again
            self._layers[layer] = self._leaf(k), self._leaf(v)
        return k, v

    def mask_of(self, tree: PrefixTree) -> TreeBlockMask:
        """The mask of a micro-batch's row without the prefix, whose tokens are keys alone.

        Args:
            tree: the micro-batch's, of whole sequences.

        Raises:
            ValueError: a tree of which a sequence does not begin with the prefix or ends with it, on another device, or
                a prefix that was left already, or made with gradients where there are none now.
        """
        if self._hidden is None or self._is_done:
            raise ValueError("the prefix is not encoded, or its block was left; encode it anew for these micro-batches")
        if torch.is_grad_enabled() != self._with_grad:
            raise ValueError(
                "prefix and micro-batches need gradients both, or neither; use one torch.no_grad() for all"
            )
        length, own = self.tree.num_tokens, self.tree.token_row()[0]
        row = tree.token_row()[0]
        if row.device != own.device:
            raise ValueError(f"the tree is on {row.device} and the prefix on {own.device}; move them to one device")
        begins = tree.num_tokens > length and torch.equal(row[:length], own[:length])
        if not begins or int(tree.lengths.min()) <= length or bool((tree.end[:length] != tree.num_tokens).any()):
            raise ValueError(f"not all sequences of {tree} go on after the {length} tokens of the prefix")
        self._is_used = True
        mask = block_mask(_apart(tree, length, len(self.tree)), first_query=len(self.tree))
        mask.prefix = self
        return mask

    def before(self, hidden: Tensor) -> Tensor:
        """The prefix's hidden states in front of those of a row without it: [1, S', E] -> [1, P + S', E]."""
        assert self._hidden is not None
        return torch.cat([self._hidden[:, : self.tree.num_tokens], hidden], 1)

    def backward(self) -> None:
        """The prefix's backward, from the summed gradients; zeros where none arrived, as FSDP waits for every process.

        Raises:
            ValueError: micro-batches were run with gradients, and none arrived.
        """
        try:
            if not self._made:
                return
            if self._is_used and not any(total is not None for total in self._sums):
                raise ValueError("no gradient arrived at the prefix; call loss.backward() inside its block")
            totals = zip(self._made, self._sums, strict=True)
            grads = [torch.zeros_like(x) if total is None else total.to(x.dtype) for x, total in totals]
            torch.autograd.backward(self._made, grads)
        finally:
            self._close()

    def __enter__(self) -> EncodedPrefix:
        """The prefix itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Runs the backward, unless the block failed."""
        if kind is None:
            self.backward()
        else:
            self._close()

    def _leaf(self, made: Tensor) -> Tensor:
        if not made.requires_grad:
            return made
        leaf = made.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(partial(self._add, len(self._made)))
        self._made.append(made)
        self._sums.append(None)
        return leaf

    def _add(self, number: int, leaf: Tensor) -> None:
        """Sums a leaf's gradient in float32 or better: in bfloat16 many small ones would be lost."""
        grad, leaf.grad = leaf.grad, None
        if self._is_done:
            raise ValueError("a gradient arrived after the prefix's backward; call loss.backward() inside its block")
        assert grad is not None
        total = self._sums[number]
        if total is None:
            self._sums[number] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad

    def _close(self) -> None:
        self._is_done = True
        self._layers, self._hidden, self._made, self._sums = {}, None, [], []


def encoded(tokens: Tokens, forward: Callable[[PrefixTree, TreeBlockMask], Tensor]) -> EncodedPrefix:
    """A prefix that has gone through `forward`, which gives the hidden states [1, S, E] of a packed row."""
    prefix = EncodedPrefix(tokens)
    prefix.keep_hidden(forward(prefix.tree, prefix.mask))
    return prefix


def encoded_run(
    run: Sequence[MicroBatch], encode: Callable[[Tokens], EncodedPrefix]
) -> AbstractContextManager[EncodedPrefix | None]:
    """The prompt that several micro-batches have in common, encoded; None for a micro-batch on its own.

    Where other processes encode a prompt and this one has none, one token goes through the model, as FSDP needs.

    Args:
        run: micro-batches of one run, as `flexpg.packing.runs` gives them.
        encode: an integration's `encode_prefix` of a model.
    """
    if len(run) == 1:
        return nullcontext()
    batch = max(run, key=lambda batch: batch.prefix_tokens)
    return encode(batch.rollouts.prompts[0][: max(batch.prefix_tokens, 1)])


def row_mask(tree: PrefixTree, mask: TreeBlockMask | None, prefix: EncodedPrefix | None) -> TreeBlockMask:
    """The mask of what goes through the model: the tree's whole row, or what stands behind the prefix.

    Raises:
        ValueError: a mask beside a prefix, another tree's mask, or another tree's prefix.
        TypeError: a tree that is none.
    """
    if prefix is None:
        return mask_of(tree, mask)
    if mask is not None:
        raise ValueError("mask and prefix came together; with a prefix leave the mask out, as it is another row's")
    return prefix.mask_of(checked_tree(tree))


def encoded_row(mask: TreeBlockMask, model: nn.Module) -> slice:
    """The packed tokens that go through a model: from the first query on, on a CPU without the pads at the end.

    Flex kernels want whole blocks, those of a CPU do not. A prefix keeps its pads, as what hangs on it begins a block,
    and so do compiled layers: fewer lengths make fewer graphs.
    """
    is_prefix = mask.prefix is not None and not mask.first_query
    is_padded = (
        mask.tree.end.device.type != "cpu"
        or is_prefix
        or torch.compiler.is_compiling()
        or any(module._compiled_call_impl is not None for module in model.modules())
    )
    return slice(mask.first_query, len(mask.tree) if is_padded else mask.tree.num_tokens)


def whole_row(hidden: Tensor, tree: PrefixTree, prefix: EncodedPrefix | None) -> Tensor:
    """The hidden states of a tree's packed row, whatever of it went through the model.

    Args:
        hidden: [1, S', E], of `encoded_row`.
        tree: the packed row, of S tokens.
        prefix: that the row stands behind, or None.

    Returns:
        [1, S, E]; what stands at pads has no meaning.
    """
    if prefix is not None:
        hidden = prefix.before(hidden)
    if hidden.shape[1] == len(tree):
        return hidden
    return functional.pad(hidden[:, : tree.num_tokens], (0, 0, 0, len(tree) - tree.num_tokens))


def _apart(tree: PrefixTree, length: int, size: int) -> PrefixTree:
    """The same tree with pads between the first `length` tokens and the rest, which begins at token `size`.

    The pads hang under the prefix as a sequence of one more token each would, and nobody sees them.
    """
    rest, shift = tree.num_tokens - length, size - length
    end = torch.arange(1, size + padded_size(rest) + 1, dtype=torch.int32, device=tree.end.device)
    end[:length] = size + rest
    end[size : size + rest] = tree.end[length : tree.num_tokens] + shift
    tokens = torch.zeros(len(end), dtype=torch.int64, device=end.device)
    row = tree.token_row()[0]
    tokens[:length], tokens[size : size + rest] = row[:length], row[length : tree.num_tokens]
    node = torch.where(tree.node < length, tree.node, tree.node + shift)
    return replace(tree, tokens=tokens, end=end, node=node, num_tokens=size + rest)
