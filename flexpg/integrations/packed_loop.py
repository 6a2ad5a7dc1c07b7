"""The loop over the micro-batches of a step: `packed_logprobs`."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexpg.collectives import check_same_on_all_ranks, sum_over_ranks, summed_gradients
from flexpg.context_parallel import ContextShard
from flexpg.integrations.framework import autocast, check_device, integration_for
from flexpg.integrations.fsdp import first_weights, run_as_forward, sharded_modules, sums_over
from flexpg.logprobs import chunk_tokens_of_rank, token_logprobs
from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.packing import pack
from flexpg.prefix_cache import PrefixCache
from flexpg.prompt_inputs import PromptInputs
from flexpg.rollouts import Rollouts
from flexpg.token_sequences import Tokens


def encode_prefix(
    model: nn.Module,
    tokens: Tokens,
    inputs: PromptInputs | None = None,
    *,
    step_has_images: bool = False,
    context_parallel: ProcessGroup | None = None,
) -> PrefixCache:
    """Encode a prompt once for several micro-batches; see `PrefixCache`.

    Args:
        model: An enabled model; activation checkpointing must not be reentrant.
        tokens: [P] int64, the prompt, on the model's device.
        inputs: The prompt's images, an entry of `Rollouts.prompt_inputs`; None for text.
        step_has_images: Whether this or another prompt of the step has images, on any rank.
        context_parallel: The ranks that share the prompt; None for this one only.
    """
    forward = partial(integration_for(model).forward, model, step_has_images=step_has_images)
    return PrefixCache(
        tokens, lambda tree, prefix: forward(tree, prefix=prefix, shard=prefix.shard), inputs, context_parallel
    )


@overload
def packed_logprobs(
    model: nn.Module,
    rollouts: Rollouts | Sequence[MicroBatch],
    *,
    max_tokens: int | None = ...,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
    autocast_dtype: torch.dtype | None = ...,
    context_parallel: ProcessGroup | DeviceMesh | None = ...,
) -> Iterator[tuple[MicroBatch, Tensor]]: ...


@overload
def packed_logprobs(
    model: nn.Module,
    rollouts: Rollouts | Sequence[MicroBatch],
    *,
    max_tokens: int | None = ...,
    temperature: float = ...,
    return_entropy: Literal[True],
    entropy_grad: bool = ...,
    autocast_dtype: torch.dtype | None = ...,
    context_parallel: ProcessGroup | DeviceMesh | None = ...,
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]: ...


def packed_logprobs(
    model: nn.Module,
    rollouts: Rollouts | Sequence[MicroBatch],
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    autocast_dtype: torch.dtype | None = None,
    context_parallel: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Iterate over micro-batches and the log-probabilities of their completion tokens, each prefix encoded once.

    Call `backward()` inside the loop body:

        for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=16_384):
            loss = grpo_loss(
                logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens
            )
            loss.backward()
        optimizer.step()

    A group that exceeds the budget becomes several micro-batches whose prompt is encoded once; its backward runs after
    theirs, when the loop continues. So run the loop to its end before `optimizer.step()`, and use `backward()` rather
    than `torch.autograd.grad`. Forwards run as the loop advances, with the adapters that are active then.
    Under `torch.no_grad()` the loop only scores.

    Args:
        model: An enabled torchtune or transformers model, plain, with PEFT adapters, or sharded by FSDP2.
        rollouts: The step's rollouts, on the model's device; or micro-batches of this rank, as `pack` returned them.
        max_tokens: Tokens of a packed sequence; None if `rollouts` are micro-batches.
        temperature: Divides the logits.
        return_entropy: Also yield entropies [n, C], in nats.
        entropy_grad: Whether entropies have a gradient, for an entropy bonus; the backward then needs more memory for
            each chunk of logits.
        autocast_dtype: Run the forwards under torch.autocast with this dtype; None to leave autocast unchanged.
        context_parallel: Ranks with the same rollouts and model that share the work on every packed sequence, for
            prompts that are too long for one: a process group, or a one-dimensional DeviceMesh. Each computes a part
            of the tokens. All get the same log-probabilities and, when the loop ends, the gradients of one rank alone;
            FSDP2 averages them as usual, over a mesh that contains these ranks. A loss must not have terms that depend
            on neither log-probabilities nor entropies: they would count once per rank. None for this rank only.

    Yields:
        (batch, logprobs): a `MicroBatch` of n rollouts and [n, C] float32, 0 where its loss mask is False.

    Raises:
        ValueError: If a rollout exceeds `max_tokens`, or does not fit the model, micro-batches are of several ranks, or
            rollouts are on the CPU and the model is on a GPU.
        TypeError: If the model is not supported.
        RuntimeError: In `backward()`, if it is called after the loop has moved on; in the loop, if the prompt of an
            oversized group would have no gradient or another one.
    """
    if isinstance(rollouts, Rollouts) != (max_tokens is not None):
        raise ValueError(
            "max_tokens must be given with Rollouts, and left out with micro-batches, which are packed already, got "
            f"{type(rollouts).__name__} and max_tokens={max_tokens}"
        )
    if entropy_grad and not return_entropy:
        raise ValueError("return_entropy must be True with entropy_grad=True, or there is no entropy with a gradient")
    if isinstance(rollouts, Rollouts):
        assert max_tokens is not None
        rollouts = pack(rollouts, max_tokens)
    rollouts = list(rollouts)  # it is read several times, and a generator would be empty after the first
    check_device(model, rollouts)
    if len(ranks := {batch.rank for batch in rollouts}) > 1:
        raise ValueError(
            f"micro-batches must be those of one rank, got ranks {sorted(ranks)}, whose gradients would be counted on "
            "every rank; pass [batch for batch in pack(...) if batch.rank == rank]"
        )
    context = partial(autocast, model, autocast_dtype)
    options = temperature, return_entropy, entropy_grad
    if context_parallel is None:
        return _packed_logprobs(model, rollouts, *options, context)
    group = context_parallel.get_group() if isinstance(context_parallel, DeviceMesh) else context_parallel
    tensors = (
        x
        for batch in rollouts
        for x in (batch.tree.input_ids, batch.tree.end, batch.tree.node, batch.rollouts.prompt_lens, batch.loss_mask)
    )
    check_same_on_all_ranks(group, [*options, autocast_dtype, len(rollouts)], tensors, [first_weights(model)])
    return _over_ranks(model, _packed_logprobs(model, rollouts, *options, context, group), group)


def _packed_logprobs(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    temperature: float,
    return_entropy: bool,
    entropy_grad: bool,
    context: Any,
    group: ProcessGroup | None = None,
) -> Generator[tuple[Any, ...]]:
    integration = integration_for(model)

    def score(batch: MicroBatch, prefix: PrefixCache | None) -> tuple[Tensor, ...]:
        cached, shard, row_of = prefix if batch.cached_tokens else None, None, None
        if group is not None:
            shard = ContextShard(batch.tree, group) if cached is None else cached.shard_of(batch.tree)
            assert shard is not None
            row_of = shard.row_of if cached is None else cached.row_of(batch.tree, shard)
        hidden = integration.forward(
            model, batch.tree, prefix=cached, shard=shard, step_has_images=batch.step_has_images
        )
        layer, lens, mask = integration.output(model), batch.rollouts.prompt_lens, batch.loss_mask
        options: Any = {"prompt_lens": lens, "loss_mask": mask, "temperature": temperature, "row_of": row_of}
        if group is not None:  # logits are not divided over ranks: completions are next to one another
            options["chunk_tokens"] = chunk_tokens_of_rank(group.size())
        if return_entropy:
            return token_logprobs(hidden, layer, batch.tree, **options, return_entropy=True, entropy_grad=entropy_grad)
        return (token_logprobs(hidden, layer, batch.tree, **options),)

    for batch in batches:
        ids, has_images = batch.indices.tolist(), batch.step_has_images
        integration.check_rollouts(model, batch.tree, rollout_ids=ids, step_has_images=has_images)
    for series in by_cache(batches):
        with context():
            cache = _cached_prompt(model, series, group)
        with cache as prefix:
            is_trained = prefix is not None and prefix.requires_grad
            turns, version = [], _version(model) if is_trained else 0
            for batch in series:
                turn = _Turn()
                turns += [turn] if batch.cached_tokens else []
                with context():
                    logprobs, *entropies = run_as_forward(model, partial(score, batch, prefix))
                for values in (logprobs, *entropies):
                    if values.requires_grad:
                        values.register_hook(turn.check)
                try:
                    yield batch, logprobs, *entropies
                except GeneratorExit:
                    if prefix is not None and prefix.has_gradient:
                        warnings.warn(
                            "the loop over packed_logprobs ended inside an oversized group: its prompt has no gradient",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                    raise
                turn.is_over = True
            if prefix is not None and is_trained:
                _check_prompt_gradient(prefix, turns, version, _version(model))


def _over_ranks(model: nn.Module, parts: Generator[tuple[Any, ...]], group: ProcessGroup) -> Iterator[tuple[Any, ...]]:
    """Iterate over micro-batches of which each rank of a group scores a part; tables and gradients are summed."""
    is_sharded = sums_over(model, group)
    # FSDP2 averages over all ranks of its mesh, of which only one of a group has a given part.
    scale = float(group.size()) if is_sharded else 1.0
    with nullcontext() if is_sharded else summed_gradients(model, group), closing(parts):
        for batch, *tables in parts:
            yield batch, *(sum_over_ranks(table, group, scale) for table in tables)


class _Turn:
    """The loop body of a micro-batch, in which its backward has to be called."""

    is_over = False
    has_gradient = False

    def check(self, grad: Tensor) -> None:
        """Raise if it is over; a hook on the log-probabilities and entropies."""
        self.has_gradient = True
        if self.is_over:
            raise RuntimeError(
                "backward() must be called inside the loop over packed_logprobs, before the next micro-batch: the "
                "prompt of an oversized group runs its backward when the loop continues"
            )


def _version(model: nn.Module) -> int:
    """Return a number that changes if a parameter is written to; 0 under FSDP2, which writes to them itself."""
    return 0 if sharded_modules(model) else sum(p._version for p in model.parameters() if p.requires_grad)


def _check_prompt_gradient(prefix: PrefixCache, turns: Sequence[_Turn], before: int, after: int) -> None:
    """Raise if the backward of an oversized group's prompt would be left out, or run with other parameters."""
    if any(turn.has_gradient for turn in turns) and not prefix.has_gradient:
        raise RuntimeError(
            "the prompt of an oversized group received no gradient; call loss.backward() without `inputs`, and not "
            "torch.autograd.grad, or raise max_tokens until every group fits"
        )
    if before != after:
        raise RuntimeError(
            "parameters changed between the micro-batches of an oversized group, before the backward of its prompt; "
            "call optimizer.step() after the loop"
        )


def _cached_prompt(
    model: nn.Module, series: Sequence[MicroBatch], group: ProcessGroup | None
) -> AbstractContextManager[PrefixCache | None]:
    """Return the cache of the prompt that several micro-batches share; None for a micro-batch on its own.

    Where other ranks encode a prompt and this one has none, one token goes through the model, as FSDP needs.
    """
    if len(series) == 1:
        return nullcontext()
    batch = max(series, key=lambda batch: batch.cached_tokens)
    tokens, inputs = batch.rollouts.completions[0][:1], None
    if batch.cached_tokens:
        tokens, inputs = batch.rollouts.prompts[0], batch.rollouts.sequence_inputs[0]
    return encode_prefix(model, tokens, inputs, step_has_images=batch.step_has_images, context_parallel=group)
