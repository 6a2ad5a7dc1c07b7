"""TRL's forward with shared prefixes: a padded batch is packed into a prefix tree and its outputs are unpacked.

TRL scores every policy, old, reference and preference batch through one call of a model with a fused output layer,
`model(input_ids, attention_mask, labels, fused_lm_head=True)`, which returns the labels' log-probabilities and
entropies. Here that call packs the sequences, runs TRL's own fused layer on the hidden states at the labels' parents,
and puts the results where TRL expects them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flexpg.integrations.transformers.attention import NAME, register, uses_eager
from flexpg.integrations.transformers.checks import check_architecture, exact_forward, rope_by_longest, unwrap
from flexpg.integrations.transformers.composite import backbone, language_model, set_attention, text_config
from flexpg.integrations.transformers.image_checks import check_inputs, placeholder_ids
from flexpg.integrations.transformers.images import with_images
from flexpg.integrations.transformers.recurrent import install
from flexpg.integrations.trl.versions import PER_TOKEN
from flexpg.packed_input import packed_input
from flexpg.processor_layouts import INPUTS, KINDS, PIXELS, TOKEN_TYPES, split_batch
from flexpg.prompt_inputs import PromptInputs, read_prompt_inputs
from flexpg.tree import PrefixTree

OF_IMAGES = {*INPUTS["image"], *INPUTS["video"], *TOKEN_TYPES}
SUPPRESS = "none may be in completions (in TRL's config generation_kwargs, suppress_tokens)"
MISMATCH = "Image features and image tokens do not match"  # as in transformers; TRL adds what to do about it
PASSED_ON = {"use_cache", "output_router_logits", "num_items_in_batch", "return_dict"}


@dataclass(frozen=True)
class PackedBatch:
    """A padded batch as a prefix tree.

    Attributes:
        tree: The packed sequences.
        copies: [S] int64, in how many sequences each packed token occurs; 0 for padding.
        row: [M] int64, the row of each label.
        column: [M] int64, its place in `labels[:, 1:]`.
        parents: [M] int64, the packed token that predicts it.
        labels: [M] int64.
    """

    tree: PrefixTree
    copies: Tensor
    row: Tensor
    column: Tensor
    parents: Tensor
    labels: Tensor


def pack_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    images: Mapping[str, Tensor] | None = None,
    placeholders: Mapping[int, str] | None = None,
) -> PackedBatch:
    """Pack a padded batch, and find where each of its labels is predicted.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens; contiguous in each row, padded on the left, the right, or both.
        labels: [B, T] int64, -100 where nothing is scored.
        images: What a processor returned for all rows beside the token ids.
        placeholders: Token ids of images and videos, each with the kind that it represents.

    Raises:
        ValueError: If a row has no token or padding between tokens, a label has no token before it, or images do not
            fit the rows.
    """
    present = attention_mask.bool()
    ones = present.int()
    start, stop = ones.argmax(1), ones.shape[1] - ones.flip(1).argmax(1)  # [B] each, of the run of tokens
    broken = (ones.sum(1) != stop - start).nonzero()
    if len(broken):
        raise ValueError(f"attention_mask must be one run of ones in each row, got a gap in row {int(broken[0])}")
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # [M] each
    unpredicted = ((column < start[row]) | (column + 1 >= stop[row])).nonzero()
    if len(unpredicted):
        n = int(row[unpredicted[0]])
        raise ValueError(f"labels must be -100 at padding and at the first token, got a label there in row {n}")
    sequences = [ids[here] for ids, here in zip(input_ids.cpu(), present.cpu(), strict=True)]
    tree = PrefixTree.from_sequences(sequences, _inputs(sequences, images or {}, placeholders or {}))
    tree = tree.to(input_ids.device)
    copies = torch.bincount(tree.node[tree.node >= 0], minlength=tree.padded_length)
    return PackedBatch(tree, copies, row, column, tree.node[row, column - start[row]], labels[:, 1:][row, column])


def _inputs(
    sequences: Sequence[Tensor], images: Mapping[str, Tensor], placeholders: Mapping[int, str]
) -> Sequence[PromptInputs | None] | None:
    """Return the images of each sequence; None if all are text."""
    if not _kinds(images):
        return None
    types = []
    for sequence in sequences:
        tokens = sequence.numpy()
        row = np.zeros(len(tokens), dtype=np.int64)
        for number, kind in KINDS.items():
            if kind in _kinds(images):  # without pixels, a sampled placeholder is a token like any other
                row[np.isin(tokens, [token for token, other in placeholders.items() if other == kind])] = number
        types.append(row)
    return read_prompt_inputs(sequences, split_batch(types, images), name="rows")


def _kinds(images: Mapping[str, Tensor]) -> list[str]:
    """Return what a batch has pixels of: "image", "video", both or none."""
    return [kind for kind, name in PIXELS.items() if name in images and images[name].numel()]


def share_prefixes(model: nn.Module, count: Callable[[PrefixTree], None] = lambda tree: None) -> None:
    """Make a model with TRL's fused output layer encode shared prefixes once; exact, forward and backward.

    Calls without the fused layer (generation, evaluation of logits) do not change.

    Args:
        model: A transformers model on which TRL called `add_fused_lm_head`, plain or with PEFT adapters.
        count: Called with each tree before its forward.

    Raises:
        ValueError: If the model shares already or has no fused output layer; in its forward, for inputs other than text
            and images.
        TypeError: If prefixes cannot be shared exactly in the model.
    """
    base = unwrap(model)
    check_architecture(base)
    baseline: Any = base.forward
    if getattr(baseline, "shares_prefixes", False):
        raise ValueError(f"this {type(base).__name__} shares prefixes already; call share_prefixes once")
    if not _has_fused_head(baseline):
        raise ValueError(
            f"this {type(base).__name__} must have TRL's fused output layer, which a trainer adds in its __init__; "
            "call share_prefixes after it"
        )
    register()
    config = text_config(base)
    before, usual = config._attn_implementation, "eager" if uses_eager(config) else "sdpa"
    set_attention(base)
    install(language_model(base))
    if before not in (usual, NAME):
        warnings.warn(
            f"replacing attn_implementation={before!r} by 'flexpg', which uses {usual} outside of packed forwards",
            stacklevel=2,
        )
    for kind, original in rope_by_longest(base):
        warnings.warn(
            f"RoPE scaling {kind!r} depends on the longest sequence of a batch once it exceeds {original} tokens, "
            f"which will be an error; keep prompts with their completions within {original} tokens",
            stacklevel=2,
        )

    @functools.wraps(type(base).forward)  # `generate` reads the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        original = MethodType(baseline.__func__, self)  # of this model, which may be a copy of the first
        if not fused_lm_head:
            return original(*args, **kwargs)
        return _shared_forward(self, original, count, *args, **kwargs)

    forward.shares_prefixes = True  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)


def _has_fused_head(forward: Any) -> bool:
    """Return whether a forward, or one that it wraps, as accelerate does for mixed precision, is that of TRL."""
    while forward is not None:
        if "fused_lm_head" in getattr(getattr(forward, "__code__", None), "co_varnames", ()):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _shared_forward(
    model: PreTrainedModel,
    baseline: Callable[..., Any],
    count: Callable[[PrefixTree], None],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> ModelOutput:
    placeholders = placeholder_ids(model)
    images = {}
    if placeholders:  # token types follow from the placeholders
        images = {name: kwargs.pop(name) for name in [*kwargs] if name in OF_IMAGES}
        images = {name: value for name, value in images.items() if value is not None and name not in TOKEN_TYPES}
    other = sorted(name for name, value in kwargs.items() if value is not None and name not in PASSED_ON)
    if other or input_ids is None or attention_mask is None or labels is None:
        got = ", ".join(other) or "input_ids, attention_mask or labels missing"
        raise ValueError(f"inputs must be padded text with or without images, got {got}; use TRL's own trainer")
    try:
        batch = pack_batch(input_ids, attention_mask, labels, images, placeholders)
        check_inputs(model, batch.tree, advice=SUPPRESS, kinds=_kinds(images))
    except ValueError as error:
        if not _kinds(images):
            raise
        raise ValueError(f"{MISMATCH}: {error}") from error
    count(batch.tree)
    packed = packed_input(model, batch.tree)
    num_encoded = packed.input_ids.shape[1]

    def keep_parents(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden.index_select(1, batch.parents.to(hidden.device))  # [1, M, E]
        return out

    decoder = backbone(model)
    with exact_forward(model, batch.tree), with_images(model, packed) as arguments:

        def give_mask(module: nn.Module, args: Any, kwargs: dict) -> tuple[Any, dict]:
            return args, kwargs | {"attention_mask": arguments["attention_mask"]}

        with (
            decoder.register_forward_pre_hook(give_mask, with_kwargs=True),
            decoder.register_forward_hook(keep_parents),
        ):
            # The mask here is the weights of the experts' auxiliary loss, per token.
            weights = {"attention_mask": batch.copies[None, :num_encoded]}
            out = baseline(**arguments | weights, shift_labels=batch.labels[None], fused_lm_head=True, **kwargs)
    shape, device = labels[:, 1:].shape, out.log_probs.device
    at = (batch.row.to(device), batch.column.to(device))
    per_token = {name: x for name in PER_TOKEN if (x := getattr(out, name)) is not None}
    return replace(out, **{name: x.new_zeros(shape).index_put(at, x[0]) for name, x in per_token.items()})
