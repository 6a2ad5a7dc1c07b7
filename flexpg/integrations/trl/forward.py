"""TRL's forward with shared prefixes: a padded batch goes in and comes out as TRL has it, and runs as one prefix tree.

TRL scores every policy, old, reference and preference batch through one call of a model with a fused output layer,
`model(input_ids, attention_mask, labels, fused_lm_head=True)`, which gives the labels' log-probabilities and entropies.
Here that call packs the rows, runs TRL's own fused layer on the hidden states at the labels' parents, and puts the
results back where TRL expects them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flexpg.integrations.transformers import register, softcap_of
from flexpg.integrations.transformers.checks import NAME, causal_lm, check_architecture, packed_forward
from flexpg.prefix_cache import encoded_row
from flexpg.tree import PrefixTree

SUPPORTED = "1.16"  # the version of TRL whose fused head this file was written and tested against

try:
    installed = version("trl")
except PackageNotFoundError:
    installed = "none"
if not installed.startswith(f"{SUPPORTED}."):
    raise ImportError(
        f"flexpg shares prefixes in trl {SUPPORTED} and {installed} is installed: pip install 'trl=={SUPPORTED}.*'"
    )

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
PASSED_ON = {"use_cache", "output_router_logits", "num_items_in_batch", "return_dict"}


@dataclass(frozen=True)
class Rows:
    """A padded batch as a prefix tree.

    Attributes:
        tree: the rows, packed.
        copies: [S] int64, the rows that hold each packed token; 0 for pads.
        row: [M] int64, the row of each label.
        column: [M] int64, where it stands in `labels[:, 1:]`.
        predicted_at: [M] int64, the packed token that predicts it.
        labels: [M] int64.
    """

    tree: PrefixTree
    copies: Tensor
    row: Tensor
    column: Tensor
    predicted_at: Tensor
    labels: Tensor


def packed_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Rows:
    """The prefix tree of a padded batch, and where each of its labels is predicted.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens; each row one run of them, padded on the left, the right, or both.
        labels: [B, T] int64, -100 where nothing is scored.

    Raises:
        ValueError: a row with a hole or without tokens, or a label that no token of its row precedes.
    """
    present = attention_mask.bool()
    ones, count = present.int(), len(present)
    start, stop = ones.argmax(1), ones.shape[1] - ones.flip(1).argmax(1)  # [B] each, of the run of tokens
    broken = (ones.sum(1) != stop - start).nonzero()
    if len(broken):
        n = int(broken[0])
        raise ValueError(
            f"row {n} of {count} has no token, or padding between its tokens; pad on the left or the right"
        )
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # [M] each
    unpredicted = ((column < start[row]) | (column + 1 >= stop[row])).nonzero()
    if len(unpredicted):
        n = int(row[unpredicted[0]])
        raise ValueError(f"row {n} of {count} has a label at padding or at its first token, which nothing predicts")
    sequences = [ids[here] for ids, here in zip(input_ids.cpu(), present.cpu(), strict=True)]
    tree = PrefixTree.from_sequences(sequences).to(input_ids.device)
    copies = torch.bincount(tree.node[tree.node >= 0], minlength=len(tree))
    return Rows(tree, copies, row, column, tree.node[row, column - start[row]], labels[:, 1:][row, column])


def share_prefixes(model: nn.Module, count: Callable[[PrefixTree], None] = lambda tree: None) -> None:
    """Makes a model with TRL's fused head encode rows that start alike as one prefix tree; exact, forward and backward.

    Calls without the fused head (generation, evaluation of logits) stay what they are.

    Args:
        model: a transformers model on which TRL called `add_fused_lm_head`, bare or in PEFT's wrapper.
        count: called with each tree before it is run.

    Raises:
        ValueError: a model that shares already; when called, as `flexpg.integrations.transformers.forward`, and for
            images and other inputs.
        TypeError: as `flexpg.integrations.transformers.forward`.
    """
    whole = causal_lm(model)
    check_architecture(whole)
    unshared: Any = whole.forward
    if getattr(unshared, "shares_prefixes", False):
        raise ValueError(f"this {type(whole).__name__} shares prefixes already; call share_prefixes once")
    register()
    before, usual = whole.config._attn_implementation, "sdpa" if softcap_of(whole.config) is None else "eager"
    whole.set_attn_implementation(NAME)
    if before not in (usual, NAME):
        warnings.warn(f"attn_implementation={before!r} gives way to flexpg, and to {usual} for all else", stacklevel=2)

    @functools.wraps(type(whole).forward)  # `generate` reads the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        own = MethodType(unshared.__func__, self)  # of this model, which may be a copy of the first
        if not fused_lm_head:
            return own(*args, **kwargs)
        return _shared_forward(self, own, count, *args, **kwargs)

    forward.shares_prefixes = True  # type: ignore[attr-defined]
    whole.forward = MethodType(forward, whole)


def _shared_forward(
    model: PreTrainedModel,
    unshared: Callable[..., Any],
    count: Callable[[PrefixTree], None],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> ModelOutput:
    other = sorted(name for name, value in kwargs.items() if value is not None and name not in PASSED_ON)
    if other or input_ids is None or attention_mask is None or labels is None:
        got = ", ".join(other) or "no input_ids, attention_mask or labels"
        raise ValueError(f"prefixes are shared in padded rows of text, and {got} came; use TRL's own trainer for that")
    rows = packed_rows(input_ids, attention_mask, labels)
    count(rows.tree)

    def give_mask(module: nn.Module, args: Any, kwargs: dict) -> tuple[Any, dict]:
        return args, kwargs | {"attention_mask": mask}

    def keep_predicting(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden.index_select(1, rows.predicted_at.to(hidden.device))  # [1, M, E]
        return out

    decoder = model.base_model
    with (
        packed_forward(model, rows.tree) as mask,
        decoder.register_forward_pre_hook(give_mask, with_kwargs=True),
        decoder.register_forward_hook(keep_predicting),
    ):
        own = encoded_row(mask, model)
        out = unshared(
            input_ids=rows.tree.token_row()[:, own],
            attention_mask=rows.copies[None, own],  # for the experts' auxiliary loss: a token counts once per row
            position_ids=rows.tree.position_ids[None, own],
            shift_labels=rows.labels[None],
            fused_lm_head=True,
            **kwargs,
        )
    shape, device = labels[:, 1:].shape, out.log_probs.device
    at = (rows.row.to(device), rows.column.to(device))
    per_token = {name: x for name in PER_TOKEN if (x := getattr(out, name)) is not None}
    return replace(out, **{name: x.new_zeros(shape).index_put(at, x[0]) for name, x in per_token.items()})
