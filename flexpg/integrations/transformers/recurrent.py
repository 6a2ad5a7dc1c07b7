"""Recurrent layers of transformers (GatedDeltaNet, KDA, Mamba2, short convolutions) over a prefix tree.

A mask cannot keep the state of a recurrent layer from passing between completions; where the state comes from can. The
layer's own forward is called per segment of the tree, with a cache that hands over its parent's final state and keeps
the segment's own. transformers' cache writes states in place, which autograd does not allow; this one keeps the tensors
that it is given, so that gradients flow from every segment into its parent's state.

Segments are batched: leaves of one depth in one call, padded on the right, where a causal layer does not see it; inner
segments of one depth and length in one call, because their children need the state after their last token. A group is
one call for the prompt and one for all completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flexpg.masks import TreeBlockMask
from flexpg.prefix_cache import PrefixBlockMask

States = dict[tuple[str, int], Tensor]  # (kind, number of the state) -> [B, ...]
PROMPT = -1  # the segment number of a cached prompt

# The recurrent modules that the current packed forward has called; None outside of one.
driven: ContextVar[set[nn.Module] | None] = ContextVar("driven", default=None)
_checked: set[type] = set()  # kinds of layers that were seen to continue from a state


@dataclass(frozen=True)
class Step:
    """One call of a recurrent layer.

    Attributes:
        index: [B, L] int64, the hidden state that each token reads; padding reads any.
        parents: For each row the segment whose state it continues; None for rows that start from nothing.
        segments: For each row the segment whose final state it is, or None if nobody needs it.
    """

    index: Tensor
    parents: list[int] | None
    segments: list[int | None]


@dataclass(frozen=True)
class Plan:
    """All calls of a recurrent layer for one packed sequence.

    Attributes:
        steps: The calls, parents first.
        gather: [S'] int64, for each hidden state its place in the outputs of all calls, one after the other, or after
            them for padding.
    """

    steps: list[Step]
    gather: Tensor


_plans: WeakKeyDictionary[TreeBlockMask, Plan] = WeakKeyDictionary()


class SegmentStates:
    """A cache for one call of a recurrent layer: it holds the parents' states, and keeps the segments' own.

    It has the methods of transformers' Cache that recurrent layers call.
    """

    def __init__(self, previous: States | None) -> None:
        self.previous = previous or {}
        self.final: States = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution, [B, E, K]."""
        return self.previous.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a recurrence."""
        return self.previous.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the inputs of a convolution after those before the segment; keep the last ones."""
        before = self.get_conv_state(layer_idx, state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], -1)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        missing = max(0, size - inputs.shape[-1])
        self.final["conv", state_idx] = nn.functional.pad(inputs, (missing, 0))[..., -size:]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state of a recurrence."""
        self.final["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether the segment continues another."""
        return bool(self.previous)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return True, so that a layer does not take its in-place kernel for one token."""
        return True


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module's forward keeps states in transformers' cache of recurrent layers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    return "update_conv_state" in names or "update_recurrent_state" in names


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
    """The forward of a recurrent module: its own, per segment if it gets the mask of a packed sequence."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # a copy of the model copies both

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output; the arguments are those of its own forward."""
        module, own = self.module, type(self.module).forward
        signature = inspect.signature(own)
        given = signature.bind(module, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        mask = mask.mask if isinstance(mask, _Padding) else mask
        if not isinstance(mask, TreeBlockMask):
            return own(module, *args, **kwargs)
        cache_name = "cache_params" if "cache_params" in signature.parameters else "past_key_values"

        def call(hidden: Tensor, previous: States | None) -> tuple[Tensor, States]:
            states = SegmentStates(previous)
            out = own(module, hidden, **{cache_name: states})
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"{type(module).__name__} returns {type(out).__name__}, not a tensor; train this model without "
                    "flexpg"
                )
            return out, states.final

        hidden = given["hidden_states"]
        if (modules := driven.get()) is not None:  # None in the recomputation of activation checkpointing
            _check_continues(type(module), call, hidden)
            modules.add(module)
        return _segmented(module, call, hidden, mask)


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
    plan = _plans.get(mask) or _plan(mask, hidden.shape[1])
    _plans[mask] = plan
    cache = mask.cache if isinstance(mask, PrefixBlockMask) else None
    kept: dict[int, tuple[States, int]] = {}  # segment -> states of a call, and its row
    if cache is not None and mask.first_query:
        kept[PROMPT] = cache.states_of(module), 0
    outputs = []
    for step in plan.steps:
        previous = None if step.parents is None else _gather([kept[segment] for segment in step.parents])
        rows, length = step.index.shape
        out, states = call(hidden[0].index_select(0, step.index.flatten()).unflatten(0, (rows, length)), previous)
        outputs.append(out.flatten(0, 1))
        kept |= {segment: (states, row) for row, segment in enumerate(step.segments) if segment is not None}
    if cache is not None and not mask.first_query:
        (states, row) = kept[0]
        cache.keep_states(module, {key: state[row : row + 1] for key, state in states.items()})
    padding = outputs[0].new_zeros(1, outputs[0].shape[-1])
    return torch.cat([*outputs, padding]).index_select(0, plan.gather)[None]


def _gather(sources: Sequence[tuple[States, int]]) -> States:
    """Return the states of several segments as a batch; a layer may write into it."""
    first = sources[0][0]
    if all(states is first for states, _ in sources):
        rows = [row for _, row in sources]
        return {key: state.index_select(0, torch.tensor(rows, device=state.device)) for key, state in first.items()}
    return {key: torch.cat([states[key][row : row + 1] for states, row in sources]) for key in first}


def _plan(mask: TreeBlockMask, size: int) -> Plan:
    """Plan the calls for a packed sequence of which `size` hidden states are computed.

    A segment of one token that continues a state is not called on its own, because layers have another kernel for it
    that writes into the state: a leaf is padded by a second token, and an inner segment is put in front of each of its
    children instead.
    """
    tree, first = mask.tree, mask.first_query
    segments = tree.segments.tolist()
    parents = _parents(segments)
    has_children = {parent for (start, *_), parent in zip(segments, parents, strict=True) if start >= first}
    is_prompt = isinstance(mask, PrefixBlockMask) and not first
    tokens: dict[int, list[int]] = {}  # what each segment reads: its own tokens, after those of an absorbed parent
    state_of: dict[int, int | None] = {}  # the segment whose state it continues
    depth: dict[int, int] = {}
    absorbed: set[int] = set()
    for n, (start, stop, _) in enumerate(segments):
        if start < first:
            continue
        parent = parents[n]
        outside = parent is not None and segments[parent][0] < first
        before = tokens[parent] if parent in absorbed else []
        tokens[n] = [*before, *range(start - first, stop - first)]
        state_of[n] = PROMPT if outside else state_of[parent] if parent in absorbed else parent
        depth[n] = 0 if parent is None or outside else depth[parent] + (parent not in absorbed)
        if len(tokens[n]) == 1 and n in has_children and state_of[n] is not None:
            absorbed.add(n)
    by_call: dict[tuple[int, bool, int], list[int]] = {}
    for n in tokens:
        if n not in absorbed:
            needs_state = n in has_children or (is_prompt and n == 0)
            key = (depth[n], state_of[n] is None, len(tokens[n]) if needs_state else 0)
            by_call.setdefault(key, []).append(n)
    steps: list[Step] = []
    place: dict[int, int] = {}  # of a token's output among those of all calls
    offset = 0
    for (_, is_first, inner_length), members in sorted(by_call.items(), key=lambda item: item[0][0]):
        length = max(len(tokens[n]) for n in members)
        if not is_first:
            length = max(length, 2)
        rows = []
        for n in members:
            own = tokens[n]
            rows.append([*own, *[own[-1]] * (length - len(own))])
            for at, token in enumerate(own):
                place.setdefault(token, offset + at)  # an absorbed token is in several calls, with the same output
            offset += length
        states = [None if is_first else state_of[n] for n in members]
        steps.append(
            Step(
                torch.tensor(rows, device=tree.end.device),
                None if is_first else [own for own in states if own is not None],
                [n if inner_length else None for n in members],
            )
        )
    gather = torch.tensor([place.get(token, offset) for token in range(size)], device=tree.end.device)
    return Plan(steps, gather)


def _parents(segments: Sequence[Sequence[int]]) -> list[int | None]:
    """Return for each segment (start, stop, end of its subtree) the number of its parent."""
    parents: list[int | None] = []
    path: list[int] = []
    for n, (start, *_) in enumerate(segments):
        while path and segments[path[-1]][2] <= start:
            path.pop()
        parents.append(path[-1] if path else None)
        path.append(n)
    return parents


@torch.no_grad()
def _check_continues(
    kind: type, call: Callable[[Tensor, States | None], tuple[Tensor, States]], hidden: Tensor
) -> None:
    """Refuse a kind of layer that does not continue from a state as if it had seen the tokens before it.

    In bfloat16, rounding may be as large as the effect of a state, so it is also checked that each state has an effect.

    Raises:
        TypeError: If the outputs of two halves differ from those of the whole, or do not depend on a state.
    """
    if kind in _checked:
        return
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
    _checked.add(kind)
