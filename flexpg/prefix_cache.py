"""A prompt that is encoded once for several micro-batches, for groups that exceed the token budget.

The prompt goes through the model on its own and each layer's keys and values are kept. Every micro-batch of completions
attends to them and to itself, forward and backward. The gradients that arrive at the kept keys and values and at the
prompt's last hidden state are summed, and the prompt's single backward starts from these sums. By the chain rule the
gradients are those of one packed sequence, while memory holds the activations of the prompt and of one micro-batch.

The prompt is encoded once, not twice: its activations are kept until its backward (with activation checkpointing, the
inputs of its layers), because recomputing them would cost another forward of the longest part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flexpg.context_parallel import ContextShard, ShardBlockMask
from flexpg.masks import TreeBlockMask
from flexpg.prompt_inputs import PromptInputs
from flexpg.token_sequences import Tokens
from flexpg.tree import PrefixTree, padded_length


class PrefixCache:
    """Keys and values, or recurrent states, of a prompt per layer, for micro-batches that all begin with it.

    As a context manager it runs the prompt's backward on exit, so the backward of every micro-batch belongs inside.
    Created by `encode_prefix` of `flexpg.integrations`; `flexpg.packed_logprobs` uses it for oversized groups.

        with encode_prefix(model, prompt) as prefix:
            for tree in trees:
                hidden = forward(model, tree, prefix=prefix)
                ...
                loss.backward()

    Args:
        tokens: [P] int64, the prompt.
        forward: Computes the hidden states [1, S, E] of a packed sequence; called once with the prompt's tree and this
            cache, in which the layers store their keys and values.
        inputs: The prompt's images, or None.
        group: The ranks that share the prompt, each of which computes and stores a part of it; None for this one only.

    Attributes:
        tree: The prompt as a packed sequence.
        shard: This rank's part of it, or None.
    """

    def __init__(
        self,
        tokens: Tokens,
        forward: Callable[[PrefixTree, PrefixCache], Tensor],
        inputs: PromptInputs | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.tree = PrefixTree.from_sequences([tokens], [inputs])
        self.shard = None if group is None else ContextShard(self.tree, group)
        self.tree = self.tree if self.shard is None else self.shard.tree
        self._with_grad = torch.is_grad_enabled()
        self._is_closed = False
        self._layers: dict[Hashable, tuple[Tensor, ...]] = {}  # keys and values, or recurrent states
        self._state_names: dict[Hashable, tuple[Any, ...]] = {}
        self._outputs: list[Tensor] = []  # of the prompt's forward: those that need gradients
        self._grads: list[Tensor | None] = []  # the sum of the gradients of each
        self._hidden: Tensor | None = None
        self._hidden = self._detached(forward(self.tree, self))

    @property
    def requires_grad(self) -> bool:
        """Whether the prompt needs a backward."""
        return bool(self._outputs)

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient has arrived from a micro-batch."""
        return any(grad is not None for grad in self._grads)

    def extend(self, mask: TreeBlockMask, layer: Hashable, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Store the prompt's keys and values, or put them in front of those of a micro-batch.

        Args:
            mask: The mask of this forward.
            layer: What tells the model's layers apart.
            k: [1, Hkv, S', D] of the tokens that are encoded now.
            v: [1, Hkv, S', D], like `k`.

        Returns:
            A function that returns the layer's keys and values; ranks communicate until it is called.
        """
        self._check_grad_mode()
        is_prompt = mask.first_query < self.tree.padded_length
        if is_prompt and layer not in self._layers:  # activation checkpointing calls the layer a second time
            self._layers[layer] = self._detached(k), self._detached(v)
        current = mask.shard.start_to_gather_keys(k, v) if isinstance(mask, ShardBlockMask) else lambda: (k, v)
        if is_prompt:
            return current
        keys, values = self._layers[layer]

        def cached() -> tuple[Tensor, Tensor]:
            return keys, values

        if self.shard is not None:
            cached = self.shard.start_to_gather_keys(keys, values, self.tree.padded_length)

        def keys_and_values() -> tuple[Tensor, Tensor]:
            (first_k, first_v), (k, v) = cached(), current()
            return torch.cat([first_k, k], 2), torch.cat([first_v, v], 2)

        return keys_and_values

    def keep_states(self, layer: Hashable, states: Mapping[Any, Tensor]) -> None:
        """Store the states of a recurrent layer after the prompt's last token.

        Args:
            layer: What tells the model's layers apart.
            states: [1, ...] each.
        """
        self._check_grad_mode()
        if layer not in self._layers:  # activation checkpointing calls the layer a second time
            self._layers[layer] = tuple(map(self._detached, states.values()))
            self._state_names[layer] = tuple(states)

    def states_of(self, layer: Hashable) -> dict[Any, Tensor]:
        """Return a recurrent layer's states after the prompt's last token."""
        self._check_grad_mode()
        return dict(zip(self._state_names[layer], self._layers[layer], strict=True))

    def mask_for(self, tree: PrefixTree) -> PrefixBlockMask:
        """Return the mask of a micro-batch without its prompt, whose tokens are keys only; or that of the prompt.

        Args:
            tree: The micro-batch's tree, of whole sequences; or the prompt's.

        Raises:
            ValueError: If a sequence does not begin with the prompt, or the cache is closed.
        """
        if tree is self.tree:
            return PrefixBlockMask(self, tree)
        return PrefixBlockMask(self, self.with_padding(tree), first_query=self.tree.padded_length)

    def shard_of(self, tree: PrefixTree) -> ContextShard | None:
        """Return this rank's part of a micro-batch, or of the prompt; None for all of it.

        Args:
            tree: The micro-batch's tree, of whole sequences; or the prompt's.

        Raises:
            ValueError: If a sequence does not begin with the prompt, or the cache is closed.
        """
        if self.shard is None or tree is self.tree:
            return self.shard
        return ContextShard(self.with_padding(tree), self.shard.group, first=self.tree.padded_length)

    def row_of(self, tree: PrefixTree, shard: ContextShard) -> Tensor:
        """Return [S] int64, the row of this rank's hidden states for each token of a micro-batch, or -1.

        Args:
            tree: The micro-batch's tree.
            shard: This rank's part of it. Its hidden states come after those of this rank's part of the prompt.
        """
        assert self.shard is not None
        length, size = self.tree.num_tokens, self.tree.padded_length
        prompt, rest = self.shard.row_of[:length], shard.row_of[size:]
        rest = torch.where(rest < 0, rest, rest + len(self.shard.index))
        return torch.cat([prompt, rest[: tree.num_tokens - length]])

    def with_padding(self, tree: PrefixTree) -> PrefixTree:
        """Return a micro-batch's tree, in which the prompt has as much padding as in its own forward.

        Raises:
            ValueError: If a sequence does not begin with the prompt, or the cache is closed.
        """
        if self._is_closed:
            raise ValueError("the prefix cache is closed; encode the prompt again for these micro-batches")
        length = self.tree.num_tokens
        begins = torch.equal(tree.input_ids[0, :length], self.tree.input_ids[0, :length])
        inputs = [None] * len(tree.lengths) if tree.inputs is None else tree.inputs
        begins &= all(given is (None if self.tree.inputs is None else self.tree.inputs[0]) for given in inputs)
        if not begins or int(tree.lengths.min()) <= length or bool((tree.end[:length] != tree.num_tokens).any()):
            raise ValueError(f"every sequence must continue the prompt of {length} tokens, got {tree}")
        return _with_padded_prefix(tree, length, self.tree.padded_length)

    def prepend_hidden(self, hidden: Tensor) -> Tensor:
        """Return the prompt's hidden states followed by those of a micro-batch: [1, S', E] -> [1, P + S', E]."""
        assert self._hidden is not None
        prompt_hidden = self._hidden if self.shard is not None else self._hidden[:, : self.tree.num_tokens]
        return torch.cat([prompt_hidden, hidden], 1)

    def backward(self) -> None:
        """Run the prompt's backward from the summed gradients and close the cache.

        Without any gradient it runs from zeros, because the collectives of FSDP wait for every rank.
        """
        grads = [
            torch.zeros_like(output) if grad is None else grad.to(output.dtype)
            for output, grad in zip(self._outputs, self._grads, strict=True)
        ]
        try:
            if self._outputs:
                torch.autograd.backward(self._outputs, grads)
        finally:
            self.close()

    def close(self) -> None:
        """Free the cached tensors without a backward; a gradient that arrives later raises."""
        self._is_closed = True
        self._layers, self._hidden, self._outputs, self._grads = {}, None, [], []

    def __enter__(self) -> PrefixCache:
        """Return the cache itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Run the backward, unless the block failed."""
        if kind is None:
            self.backward()
        else:
            self.close()

    def _check_grad_mode(self) -> None:
        if torch.is_grad_enabled() != self._with_grad:
            raise ValueError(
                "a cached prompt and its micro-batches must all run with gradients or all without; use one "
                "torch.no_grad() around both, and activation checkpointing with use_reentrant=False"
            )

    def _detached(self, output: Tensor) -> Tensor:
        """Return a leaf with the values of `output`; its gradient is summed for the prompt's backward."""
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(partial(self._accumulate, len(self._outputs)))
        self._outputs.append(output)
        self._grads.append(None)
        return leaf

    def _accumulate(self, number: int, leaf: Tensor) -> None:
        """Sum a leaf's gradient in float32 or better: bfloat16 would lose many small ones."""
        grad, leaf.grad = leaf.grad, None
        if self._is_closed:
            raise ValueError("a gradient arrived after the prompt's backward; call loss.backward() before leaving it")
        assert grad is not None
        total = self._grads[number]
        if total is None:
            self._grads[number] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad


class PrefixBlockMask(TreeBlockMask):
    """A TreeBlockMask with the cache that holds the keys and values before its first query.

    The mask carries the cache because it is the one argument that frameworks hand to every attention layer, and that
    activation checkpointing hands to it again.

    Attributes:
        cache: The prefix cache.
    """

    def __init__(
        self,
        cache: PrefixCache,
        tree: PrefixTree,
        window: int | None = None,
        first_query: int = 0,
        chunk: int | None = None,
        bidirectional: bool = False,
    ) -> None:
        super().__init__(tree, window, first_query, chunk, bidirectional)
        self.cache = cache

    def start_keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return a function that returns a layer's keys and values with those of the prompt in front."""
        return self.cache.extend(self, layer, k, v)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "PrefixBlockMask cannot be pickled or copied: its cache collects gradients of the prompt; pickle mask.tree"
        )

    def _replace(self, tree: PrefixTree, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        return PrefixBlockMask(self.cache, tree, window, self.first_query, chunk, bidirectional)


class PrefixShardMask(ShardBlockMask):
    """A PrefixBlockMask of a rank's queries, whose keys and values are in parts on the ranks of a group.

    Attributes:
        cache: The prefix cache.
    """

    def __init__(self, cache: PrefixCache, shard: ContextShard, *limits: Any) -> None:
        super().__init__(shard, *limits)
        self.cache = cache

    @cached_property
    def whole(self) -> TreeBlockMask:
        """The mask of the whole packed sequence, for layers whose inputs are gathered."""
        return PrefixBlockMask(self.cache, self.shard.tree, first_query=self.shard.first)

    def start_keys_and_values(self, layer: Any, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return a function that returns a layer's keys and values with those of the prompt in front."""
        return self.cache.extend(self, layer, k, v)

    def _replace(self, tree: PrefixTree, window: int | None, chunk: int | None, bidirectional: bool) -> TreeBlockMask:
        return PrefixShardMask(self.cache, self.shard, window, chunk, bidirectional)


def _with_padded_prefix(tree: PrefixTree, length: int, size: int) -> PrefixTree:
    """Return the tree with padding between its first `length` tokens and the rest, which begins at index `size`.

    The padding tokens become children of the prefix, each a sequence that is one token longer; nothing sees them.
    """
    rest, shift = tree.num_tokens - length, size - length
    end = torch.arange(1, size + padded_length(rest) + 1, dtype=torch.int32, device=tree.end.device)
    end[:length] = size + rest
    end[size : size + rest] = tree.end[length : tree.num_tokens] + shift
    packed = tree.input_ids[0]
    tokens = torch.zeros(len(end), dtype=torch.int64, device=end.device)
    tokens[:length], tokens[size : size + rest] = packed[:length], packed[length : tree.num_tokens]
    node = torch.where(tree.node < length, tree.node, tree.node + shift)
    # Images are in the prompt, whose tokens are keys only.
    return replace(tree, tokens=tokens, end=end, node=node, num_tokens=size + rest, block_end=None)
