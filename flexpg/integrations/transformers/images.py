"""Images and videos in the prompts of a packed sequence, in unmodified vision-language models.

The model's own forward is called with the pixels of each different image once. The output of its vision encoder is put
into packed order on its way to the language model, and its rows are counted: as many as there are placeholder tokens
for each image. Positions (M-RoPE) are the model's own for each prompt, and completions continue from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from flexpg.context_parallel import ShardBlockMask
from flexpg.integrations.transformers.composite import backbone, language_model, text_config
from flexpg.integrations.transformers.image_checks import (
    BIDIRECTIONAL,
    FEATURES,
    check_supports_images,
    first_of_each,
)
from flexpg.integrations.transformers.recurrent import mask_for
from flexpg.masks import TreeBlockMask
from flexpg.packed_input import PackedInput
from flexpg.processor_layouts import KINDS, TOKEN_TYPES
from flexpg.prompt_inputs import Item, PromptInputs, concatenated
from flexpg.tree import PrefixTree


@dataclass(frozen=True)
class EncodedItems:
    """The images, or the videos, that one forward encodes.

    Attributes:
        kind: "image" or "video".
        items: Each different one, once.
        index: [M] int64, the row among the features of all items for each placeholder, in packed order.
        owners: For each item the name of a prompt that has it.
    """

    kind: str
    items: tuple[Item, ...]
    index: np.ndarray
    owners: tuple[str, ...]


def encoded_items(tree: PrefixTree, encoded: np.ndarray) -> list[EncodedItems]:
    """Return what a forward of some packed tokens encodes, each different image once.

    Args:
        tree: The packed sequence.
        encoded: [n] int64, the packed indices of the tokens.
    """
    if tree.inputs is None:
        return []
    node = tree.node.cpu().numpy()
    is_here = np.isin(np.arange(tree.padded_length), encoded)
    found = []
    for kind in FEATURES:
        feature = np.full((tree.padded_length, 2), -1)  # of each packed token: identity of the item, and its row
        items: dict[int, tuple[Item, str]] = {}
        for n, prompt_inputs in first_of_each(tree.inputs):
            for i, item in enumerate(prompt_inputs.items):
                mine = np.flatnonzero(prompt_inputs.item == i)
                packed = node[n, mine]
                if item.kind == kind and is_here[packed].any():
                    items.setdefault(item.identity, (item, prompt_inputs.name))
                    feature[packed] = np.stack([np.full(len(mine), item.identity), prompt_inputs.row[mine]], 1)
        if items:
            starts = accumulate((item.num_tokens for item, _ in items.values()), initial=0)
            offset = dict(zip(items, starts, strict=False))
            here = feature[encoded]
            identities, rows = here[here[:, 0] >= 0].T
            index = np.array([offset[identity] for identity in identities.tolist()]) + rows
            unique, owners = zip(*items.values(), strict=True)
            found.append(EncodedItems(kind, unique, index, owners))
    return found


def zero_of_towers(model: PreTrainedModel) -> Tensor:
    """Return 0 with a gradient of 0 for every trained parameter outside of the language model and the output layer."""
    of_text = [*language_model(model).parameters(), *model.get_output_embeddings().parameters()]
    known = set(of_text)
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in known]
    zeros = [parameter.sum() * 0 for parameter in others]
    return torch.stack(zeros).sum() if zeros else of_text[0].new_zeros(())


def image_features(model: PreTrainedModel, item: Item) -> list[Tensor]:
    """Return what the vision encoder makes of an image or video: [M, E] for the embeddings, and for layers (deepstack).

    Raises:
        TypeError: If the model takes no images.
    """
    check_supports_images(model)
    out = getattr(backbone(model), FEATURES[item.kind])(**_on_device(model, item.tensors), return_dict=True)
    return [_rows(features) for features in (out.pooler_output, *(getattr(out, "deepstack_features", None) or []))]


@contextmanager
def with_images(model: PreTrainedModel, packed: PackedInput) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the model below the output layer for a packed sequence, and put features into its order.

    Args:
        model: The transformers model.
        packed: What goes through it.
    """
    mask = packed.mask
    if isinstance(mask, ShardBlockMask):
        tree, encoded_now = mask.shard.tree, mask.shard.index
    else:
        tree, last = mask.tree, mask.first_query + packed.input_ids.shape[1]
        encoded_now = torch.arange(mask.first_query, last, device=tree.end.device)
    arguments: dict[str, Any] = {
        "input_ids": packed.input_ids,
        "position_ids": position_ids(model, tree)[..., encoded_now],
        "attention_mask": mask_by_kind(model, mask),
    }
    encoded = encoded_items(tree, encoded_now.cpu().numpy())
    for group in encoded:
        given = _on_device(model, concatenated(group.items))
        _check_taken(model, given)
        arguments |= given
    with _in_packed_order(backbone(model), encoded):
        yield arguments


def mask_by_kind(model: PreTrainedModel, mask: TreeBlockMask) -> Any:
    """Return what a model takes as `attention_mask`, with bidirectional image blocks in those layers that have them."""
    config = text_config(model)
    kinds = BIDIRECTIONAL.get(model.config.model_type, ())
    if model.config.model_type == "gemma4" and config.use_bidirectional_attention != "vision":
        kinds = ()
    if mask.tree.inputs is None or not kinds:
        return mask_for(backbone(language_model(model)), mask)
    return {kind: mask.for_images(kind in kinds) for kind in config.layer_types}


def position_ids(model: PreTrainedModel, tree: PrefixTree) -> Tensor:
    """Return positions [1, S], or those of M-RoPE [3, 1, S] in time, height and width, or [4, 1, S] after the tree's.

    Raises:
        TypeError: If the model computes positions of another form.
    """
    depth = tree.position_ids
    rope_index = getattr(backbone(model), "get_rope_index", None)
    if tree.inputs is None or rope_index is None:
        return depth[None]
    positions = depth.expand(3, -1).clone()
    taken = inspect.signature(rope_index).parameters
    node, lengths = tree.node, tree.lengths.tolist()
    starts: dict[int, Tensor] = {}  # of completions, by the prompt's inputs
    for n, inputs in first_of_each(tree.inputs):
        prompt = node[n, : len(inputs)]
        # With a token of text after the prompt, whose position is not always one more than the largest (Qwen's videos).
        types = nn.functional.pad(torch.from_numpy(inputs.token_types)[None], (0, 1))
        arguments = _all_inputs(inputs) | {"mm_token_type_ids": types}
        arguments = {key: x.to(depth.device) for key, x in arguments.items() if key in taken}
        try:
            index, _ = rope_index(input_ids=nn.functional.pad(tree.input_ids[:, prompt], (0, 1)), **arguments)
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"{type(model).__name__} needs more than flexpg passes to its get_rope_index ({error}); train it on "
                "text or without flexpg"
            ) from error
        if index.shape != (3, 1, len(inputs) + 1):
            raise TypeError(
                f"{type(model).__name__} computes positions of shape {list(index.shape)}, not "
                f"[3, 1, {len(inputs) + 1}]; train it on text or without flexpg"
            )
        positions[:, prompt] = index[:, 0, :-1]
        starts[id(inputs)] = index[0, 0, -1]
    for n, prompt_inputs in enumerate(tree.inputs):
        if prompt_inputs is not None:
            completion = node[n, len(prompt_inputs) : lengths[n]]
            positions[:, completion] = starts[id(prompt_inputs)] + torch.arange(len(completion), device=depth.device)
    takes_four = 4 in inspect.unwrap(type(language_model(model)).forward).__code__.co_consts
    return (torch.cat([depth[None], positions]) if takes_four else positions)[:, None]


def baseline_arguments(
    model: PreTrainedModel, input_ids: Tensor, inputs: Sequence[PromptInputs | None]
) -> dict[str, Any]:
    """Return the arguments for right-padded sequences [n, T] with the images of their prompts, each for its own row."""
    if all(prompt_inputs is None for prompt_inputs in inputs):
        return {}
    check_supports_images(model)
    items = [item for prompt_inputs in inputs if prompt_inputs is not None for item in prompt_inputs.items]
    by_kind = {kind: [item for item in items if item.kind == kind] for kind in FEATURES}
    arguments = {
        key: value for each in by_kind.values() if each for key, value in _on_device(model, concatenated(each)).items()
    }
    types = [torch.zeros(0, dtype=torch.int64) if x is None else torch.from_numpy(x.token_types) for x in inputs]
    padded = pad_sequence(types, batch_first=True)
    padded = nn.functional.pad(padded, (0, input_ids.shape[1] - padded.shape[1])).to(input_ids.device)
    taken = inspect.signature(type(backbone(model)).forward).parameters
    return arguments | {name: padded for name in TOKEN_TYPES if name in taken}


def _all_inputs(inputs: PromptInputs) -> dict[str, Tensor]:
    """Return the tensors of all items of a prompt, as its processor returned them."""
    by_kind = [[item for item in inputs.items if item.kind == kind] for kind in KINDS.values()]
    return {key: value for items in by_kind if items for key, value in concatenated(items).items()}


def _on_device(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(model.device) for name, x in tensors.items()}


def _check_taken(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Raise if the model does not take one of the inputs."""
    taken = inspect.signature(type(backbone(model)).forward).parameters
    if unknown := sorted(set(inputs) - set(taken)):
        raise ValueError(f"{type(model).__name__} takes no {', '.join(unknown)}; leave them out of prompt_inputs")


@contextmanager
def _in_packed_order(base_model: nn.Module, encoded: Sequence[EncodedItems]) -> Iterator[None]:
    """Make `get_image_features` and `get_video_features` return features in the order of the packed placeholders."""
    running, called = False, set()

    def call(function: Callable[..., Any], items: EncodedItems, *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        if running:  # some models' get_video_features calls get_image_features
            return function(*args, **kwargs)
        running = True
        called.add(items.kind)
        try:
            out = function(*args, **kwargs)
        finally:
            running = False
        return _reordered_output(out, items)

    before = {}  # what a user has set
    for items in encoded:
        name = FEATURES[items.kind]
        before[name] = vars(base_model).get(name)
        setattr(base_model, name, partial(call, getattr(base_model, name), items))
    try:
        yield
    finally:
        for name, original in before.items():
            delattr(base_model, name)
            if original is not None:
                setattr(base_model, name, original)
    if missing := [FEATURES[items.kind] for items in encoded if items.kind not in called]:
        raise TypeError(
            f"the forward of {type(base_model).__name__} does not call {missing[0]}; train it on text or without flexpg"
        )


def _reordered_output(out: Any, encoded: EncodedItems) -> Any:
    """Return a vision encoder's output with features in packed order, if each item has as many as placeholders."""
    lengths = _lengths(out.pooler_output)
    wanted = [item.num_tokens for item in encoded.items]
    bounds, ends = set(accumulate(lengths)), list(accumulate(wanted))
    for owner, (since, until) in zip(encoded.owners, pairwise([0, *ends]), strict=True):
        if until not in bounds and len(lengths) >= len(wanted):  # Idefics3 returns the features of all tiles as one
            n = sum(end <= since for end in accumulate(lengths))
            got = lengths[n] if n < len(lengths) else 0
            raise ValueError(
                f"{owner} has {until - since} {encoded.kind} tokens for an {encoded.kind} that "
                f"the vision encoder makes {got} features of; do not shorten prompts that have images"
            )
    if sum(lengths) != sum(wanted):
        raise ValueError(f"the vision encoder makes {sum(lengths)} features of {sum(wanted)} {encoded.kind} tokens")
    index = torch.from_numpy(encoded.index)
    out.pooler_output = _reordered(out.pooler_output, index)
    if getattr(out, "deepstack_features", None) is not None:
        out.deepstack_features = [_reordered(layer, index) for layer in out.deepstack_features]
    return out


def _lengths(features: Any) -> list[int]:
    """Return the number of features of each image, which come as a list or as one tensor."""
    if isinstance(features, Tensor):
        return [features.shape[-2]] * (features.shape[:-2].numel()) if features.dim() > 2 else [1] * len(features)
    return [feature.shape[:-1].numel() for feature in features]


def _reordered(features: Any, index: Tensor) -> Any:
    """Return features in another order, in the form in which they came: one tensor, or a list of those per image."""
    rows = _rows(features)
    rows = rows.index_select(0, index.to(rows.device))
    return rows.view(-1, *features.shape[1:]) if isinstance(features, Tensor) else [rows]


def _rows(features: Any) -> Tensor:
    """Return the features of all images one after another, [M, E]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([feature.flatten(0, -2) for feature in features])
