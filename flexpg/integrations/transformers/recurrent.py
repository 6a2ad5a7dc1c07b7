"""Recurrent layers of transformers (GatedDeltaNet, KDA, Mamba2, lightning attention, short convolutions) over a tree.

A mask cannot keep the state of a recurrent layer from passing between completions; where the state comes from can. The
layer's own forward is called per segment of the tree, with a cache that hands over its parent's final state and keeps
the segment's own, so that gradients flow from every segment into its parent's state.

A sampler's prompts are segments too; their states are copied for each sample, which continues from them token by token.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from flexpg.collectives import broadcast_states, receive_states, send_states
from flexpg.context_parallel import ShardBlockMask
from flexpg.integrations.transformers.segment_plan import Plan, RangePlan, plan_prompts, plan_range, plan_segments
from flexpg.integrations.transformers.segment_states import SegmentStates, States
from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask, PrefixShardMask
from flexpg.sample_cache import SampleBlockMask

CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # the first since transformers 5.24

# The recurrent modules that the current packed forward has called; None outside of one.
driven: ContextVar[set[nn.Module] | None] = ContextVar("driven", default=None)
# The sampler's mask of the current forward; models drop masks of single tokens.
sampled: ContextVar[SampleBlockMask | None] = ContextVar("sampled", default=None)
# Kinds of layers, and forwards that another library installed, that were seen to continue from a state.
_checked: WeakSet[type | SegmentedForward] = WeakSet()

_plans: WeakKeyDictionary[TreeBlockMask, Plan] = WeakKeyDictionary()
_range_plans: WeakKeyDictionary[TreeBlockMask, list[RangePlan | None]] = WeakKeyDictionary()


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module's forward keeps states in transformers' cache of recurrent layers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    return any(name in names for name in ("update_conv_state", "update_recurrent_state", "set_linear_cache"))


def unused_arguments(forward: Callable[..., Any]) -> dict[str, None]:
    """Return what a recurrent module's forward takes besides hidden states and a cache, but does not need.

    These are the position embeddings and the mask of MiniMax's lightning attention.
    """
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    return {p.name: None for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}


def recurrent_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the recurrent modules of a model."""
    return (module for module in model.modules() if is_recurrent(module))


def install(model: nn.Module) -> None:
    """Make the recurrent modules of a model follow a packed sequence's tree; other calls do not change."""
    for module in recurrent_modules(model):
        if not isinstance(module.forward, SegmentedForward):
            module.forward = SegmentedForward(module)


def mask_for(base_model: nn.Module, mask: TreeBlockMask) -> Any:
    """Return what a model takes as `attention_mask` so that all its layers get the mask, recurrent ones too."""
    if next(recurrent_modules(base_model), None) is None:
        return mask
    takes_kinds = "dict" in inspect.unwrap(type(base_model).forward).__code__.co_names
    return _EveryKind(mask) if takes_kinds else _Padding(mask)


class _EveryKind(dict):
    """The masks of a hybrid model by kind of layer: the same for all."""

    def __init__(self, mask: TreeBlockMask) -> None:
        super().__init__()
        self.mask = mask

    def __missing__(self, kind: str) -> TreeBlockMask:
        return self.mask

    def get(self, kind: str, default: Any = None) -> TreeBlockMask:
        return self.mask


class _Padding:
    """A packed sequence's mask in place of a padding mask, which a model of recurrent layers only hands to them."""

    ndim = 2

    def __init__(self, mask: TreeBlockMask) -> None:
        self.mask, self.shape = mask, (1, mask.shape[-2])

    def __eq__(self, other: object) -> Any:
        return torch.zeros(1, dtype=torch.bool)  # not all ones, or it would be dropped

    def __getitem__(self, index: Any) -> _Padding:
        return self

    def contiguous(self) -> TreeBlockMask:
        return self.mask


class SegmentedForward:
    """The forward of a recurrent module: its own, per segment if it gets the mask of a packed sequence.

    A forward that another library installed in the module, like accelerate's device hooks, is its own too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.installed = module, vars(module).get("forward")  # a copy of the model copies all three

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output; the arguments are those of its own forward."""
        module = self.module
        forward = self.installed or partial(type(module).forward, module)
        signature = inspect.signature(type(module).forward)
        given = signature.bind(module, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        mask = sampled.get() or (mask.mask if isinstance(mask, _Padding) else mask)
        if not isinstance(mask, TreeBlockMask):
            return forward(*args, **kwargs)
        cache_name = next(name for name in CACHE_NAMES if name in signature.parameters)
        unused, returns_tuple = unused_arguments(type(module).forward), False

        def call(hidden: Tensor, previous: States | None) -> tuple[Tensor, States]:
            nonlocal returns_tuple
            states = SegmentStates(previous)
            token = sampled.set(None)  # `own` may call a SegmentedForward, if it was installed after one
            try:
                out = forward(hidden, **unused, **{cache_name: states})
            finally:
                sampled.reset(token)
            if returns_tuple := isinstance(out, tuple):
                out = out[0]
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"{type(module).__name__} returns {type(out).__name__}, not a tensor; train this model without "
                    "flexpg"
                )
            return out, states.final

        hidden = given["hidden_states"]
        if (modules := driven.get()) is not None:  # None in the recomputation of activation checkpointing
            key = type(module) if self.installed is None else self
            if key not in _checked:
                _check_continues(type(module), call, hidden)
                _checked.add(key)
            modules.add(module)
        if isinstance(mask, SampleBlockMask):
            out = _sampled(module, call, hidden, mask)
        else:
            out = _segmented(module, call, hidden, mask)
        return (out, None) if returns_tuple else out


def _segmented(
    module: nn.Module,
    call: Callable[[Tensor, States | None], tuple[Tensor, States]],
    hidden: Tensor,
    mask: TreeBlockMask,
) -> Tensor:
    """Compute a recurrent layer over a prefix tree.

    Args:
        module: What tells the model's layers apart in a cached prompt.
        call: (hidden states [B, L, E], states) -> outputs [B, L, E] and the states after the last token.
        hidden: [1, S', E] from the mask's first query on.
        mask: The mask of the packed sequence.

    Returns:
        [1, S', E]; 0 at padding.
    """
    if isinstance(mask, ShardBlockMask):  # every rank needs the state before its range
        return _over_ranks(module, call, hidden, mask)
    plan = _plans.get(mask) or plan_segments(mask, hidden.shape[1])
    _plans[mask] = plan
    cache = mask.cache if isinstance(mask, PrefixBlockMask) else None
    kept: dict[int, tuple[States, int]] = {}  # segment -> states of a call, and its row
    if cache is not None and mask.first_query:
        kept[0] = cache.states_of(module), 0
    out = _run(plan, call, hidden, kept)
    if cache is not None and not mask.first_query:
        cache.keep_states(module, _gather([kept[0]]))
    return out


def _over_ranks(
    module: nn.Module,
    call: Callable[[Tensor, States | None], tuple[Tensor, States]],
    hidden: Tensor,
    mask: ShardBlockMask,
) -> Tensor:
    """Compute a recurrent layer over this rank's ranges of a packed sequence.

    States pass from each range to the next. Those after a cached prompt go to all ranks, whose completions continue
    them at the same time. Where a state after a single token would pass, the inputs of all ranks are gathered instead,
    and each rank computes the whole layer.
    """
    shard, cache = mask.shard, mask.cache if isinstance(mask, PrefixShardMask) else None
    is_prompt = cache is not None and shard.first == 0
    if mask not in _range_plans:
        _range_plans[mask] = [plan_range(shard.tree, shard.borders, number, is_prompt) for number in shard.numbers]
    outs = []
    kept: dict[int, tuple[States, int]] = {}
    final: States | None = None
    if cache is not None and not is_prompt:
        kept[0] = cache.states_of(module), 0
    lengths = [stop - start for start, stop in map(shard.range_of, shard.numbers)]
    for number, ranged, rows in zip(shard.numbers, _range_plans[mask], hidden.split(lengths, 1), strict=True):
        if ranged is None:
            whole = _segmented(module, call, shard.gather(hidden, 1), mask.whole)
            return whole[:, shard.index - shard.first]
        before, after = shard.owner_of(number - 1), shard.owner_of(number + 1)
        if ranged.received and before != shard.rank:
            states = receive_states(shard.group, before, hidden.device)
            kept |= {segment: (state, 0) for segment, state in zip(ranged.received, states, strict=True)}
        out = _run(ranged.plan, call, rows, kept)
        if ranged.sent and after != shard.rank:
            out = send_states([_gather([kept[segment]]) for segment in ranged.sent], out, shard.group, after)
        if ranged.final is not None:
            final = _gather([kept[ranged.final]])
        outs.append(out)
    if cache is not None and is_prompt:
        owner = shard.owner_of(bisect_right(shard.borders, shard.tree.num_tokens - 1) - 1)
        cache.keep_states(module, broadcast_states(final, shard.group, owner, hidden.device))
    return torch.cat(outs, 1)


def _sampled(
    module: nn.Module,
    call: Callable[[Tensor, States | None], tuple[Tensor, States]],
    hidden: Tensor,
    mask: SampleBlockMask,
) -> Tensor:
    """Compute a recurrent layer over the prompts of a sampler, then over one more token of each sample.

    Args:
        module: What tells the model's layers apart in the cache.
        call: (hidden states [B, L, E], states) -> outputs [B, L, E] and the states after the last token.
        hidden: [1, S, E] of the prompts, then [P * G, 1, E] of the samples.
        mask: The mask with the sampler's cache.

    Returns:
        A tensor of the shape of `hidden`; 0 at padding.
    """
    cache = mask.cache
    if cache.is_filled:
        previous = cache.states_of(module)
        out, states = call(hidden, previous)
        cache.keep_states(module, previous | states)  # a kernel for one token may have written into the previous ones
        return out
    kept: dict[int, tuple[States, int]] = {}
    out = _run(plan_prompts(mask.tree), call, hidden, kept)
    prompts = _gather([kept[n] for n in range(len(mask.tree.lengths))])
    cache.keep_states(module, {key: x.repeat_interleave(cache.group_size, 0) for key, x in prompts.items()})
    return out


def _run(
    plan: Plan,
    call: Callable[[Tensor, States | None], tuple[Tensor, States]],
    hidden: Tensor,
    kept: dict[int, tuple[States, int]],
) -> Tensor:
    """Run the calls of a plan, and add the final states of its segments to `kept`: those of a call, and the row."""
    outputs = []
    for step in plan.steps:
        previous = None if step.parents is None else _gather([kept[segment] for segment in step.parents])
        rows, length = step.index.shape
        out, states = call(hidden[0].index_select(0, step.index.flatten()).unflatten(0, (rows, length)), previous)
        outputs.append(out.flatten(0, 1))
        kept |= {segment: (states, row) for row, segment in enumerate(step.segments) if segment is not None}
    padding = outputs[0].new_zeros(1, outputs[0].shape[-1])
    return torch.cat([*outputs, padding]).index_select(0, plan.gather)[None]


def _gather(sources: Sequence[tuple[States, int]]) -> States:
    """Return the states of several segments as a batch; a layer may write into it."""
    first = sources[0][0]
    if all(states is first for states, _ in sources):
        rows = [row for _, row in sources]
        return {key: state.index_select(0, torch.tensor(rows, device=state.device)) for key, state in first.items()}
    return {key: torch.cat([states[key][row : row + 1] for states, row in sources]) for key in first}


@torch.no_grad()
def _check_continues(
    kind: type, call: Callable[[Tensor, States | None], tuple[Tensor, States]], hidden: Tensor
) -> None:
    """Refuse a kind of layer that does not continue from a state as if it had seen the tokens before it.

    In bfloat16, rounding may be as large as the effect of a state, so it is also checked that each state has an effect.

    Raises:
        TypeError: If the outputs of two halves differ from those of the whole, or do not depend on a state.
    """
    tokens = hidden[:, :8] if hidden.shape[1] >= 8 else hidden[:, :1].expand(-1, 8, -1)
    whole, _ = call(tokens, None)
    first, states = call(tokens[:, :5], None)

    def continued(shifted: tuple[str, int] | None = None) -> Tensor:
        copies = {key: state + int(key == shifted) for key, state in states.items()}  # a layer may write into them
        return call(tokens[:, 5:], copies)[0]

    second = continued()
    for key in states:
        if torch.equal(second, continued(shifted=key)):
            raise TypeError(
                f"{kind.__name__} ignores its {key[0]} state if it is called with several tokens, so a prefix cannot "
                "be shared; train this model without flexpg"
            )
    error = (torch.cat([first, second], 1) - whole).float().norm() / whole.float().norm().clamp(min=1e-30)
    if not error < max(1e-3, torch.finfo(whole.dtype).eps ** 0.5):  # float32 inside of float64 models
        raise TypeError(
            f"{kind.__name__} does not continue from its state over several tokens (relative error {error:.1g}), so a "
            "prefix cannot be shared; train this model without flexpg"
        )
