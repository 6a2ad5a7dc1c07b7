"""Isolation: when a completion is replaced, every hidden state outside of it stays bitwise identical."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexpg.micro_batches import MicroBatch
from flexpg.tree import PrefixTree
from flexpg.verify.checked_model import ADVICE, CheckedModel, packed_order, token_name


def check_isolation(checked: CheckedModel, batch: MicroBatch) -> None:
    """Check that two forwards are equal, and that a replaced completion changes nothing outside of itself."""
    tree, found = batch.tree, None
    base = checked.hidden(tree)
    bound = _isolation_bound(checked, tree, base)
    for other, changed, what in [(tree, slice(0, 0), ""), *_perturbed_trees(batch)]:
        moved = ~((checked.hidden(other) - base).abs() <= bound).all(1)  # [S'], True for NaN
        moved[changed] = False
        if found is None and moved.any():
            found = other, moved, what
    other, moved, what = found or (tree, torch.zeros(len(base), dtype=torch.bool, device=base.device), "")

    def explain() -> str:
        before, after = (checked.layer_outputs(partial(checked.hidden, each)) for each in (tree, other))
        hits = {
            name: (moved.cpu() & (out[: len(base)] != after[name][: len(base)]).any(1)).nonzero()
            for name, out in before.items()
        }
        layer = next((name for name, hit in hits.items() if len(hit)), "the final norm")
        packed = int(hits[layer][0] if layer in hits else moved.nonzero()[0]) if found else 0
        n, t = (int(i) for i in (tree.node == packed).nonzero()[0])
        token = token_name(batch, n, t)
        if not base[moved].isfinite().all():
            return f"the hidden state of {token} is NaN or Inf; check the weights"
        if not what:
            return (
                f"two equal forwards differ from {layer} on, at {token}: the model draws random numbers (dropout, "
                "noise), which would differ between the copies of a prefix; disable them"
            )
        return f"{token} changed in {layer} when {what} was replaced: the layer sees past its mask; {ADVICE}"

    checked.settle(found is not None, explain)


def _isolation_bound(checked: CheckedModel, tree: PrefixTree, hidden: Tensor) -> float:
    """Return how much may change: nothing, except for rounding where experts process all their tokens at once."""
    if not checked.has_experts:
        return 0.0
    with checked.perturbed():
        return checked.allowance * float((checked.hidden(tree) - hidden).abs().max())


def _perturbed_trees(batch: MicroBatch) -> Iterator[tuple[PrefixTree, slice, str]]:
    """Yield the tree with the first and the last completion replaced, as far as it is not shared, and where that is."""
    tree = batch.tree
    tokens, nodes = tree.input_ids[0], tree.node.clamp(min=0)
    counts = torch.bincount(tree.node[tree.node >= 0], minlength=tree.padded_length)
    steps = torch.arange(nodes.shape[1], device=tokens.device)
    is_completion = (tree.node >= 0) & (steps >= batch.rollouts.prompt_lens[:, None])  # [N, T]
    is_own = is_completion & (counts[nodes] == 1)
    known = tokens[tree.node[is_completion]].unique()  # of completions, so none is a placeholder of an image
    first, second = known[0], known[-1] if len(known) > 1 else (known[0] == 0).long()
    owners = [n for n in packed_order(batch) if is_own[n].any()]
    for n in (owners[0], owners[-1]) if owners else (0, 0):
        indices = tree.node[n][is_own[n]]
        start, stop = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        changed = tokens.clone()
        changed[start:stop] = torch.where(changed[start:stop] == first, second, first)
        yield replace(tree, tokens=changed), slice(start, stop), f"the completion of rollout {int(batch.indices[n])}"
