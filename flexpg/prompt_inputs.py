"""Images and videos of prompts, as a transformers processor returned them beside the token ids.

A prompt has placeholder tokens where the language model reads what the vision encoder made of an image. Prompts with
the same token ids and other pixels are other prompts, so placeholders are compared by what they represent: which items
(images or videos, with equal pixels and equal sizes) and which of their rows.

How many placeholders belong to each item is a model's matter. It follows from the sizes that processors return, or
from the text between the images; where neither tells, the images of a prompt are one item, which is shared as a whole.
The integration compares the numbers with what the vision encoder returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from flexpg.processor_layouts import INPUTS, KINDS, PIXELS, TOKEN_TYPES, runs_of, split_items

OF_TEXT = {"input_ids", "attention_mask"}  # which a processor returns too
FIRST_IDENTITY = 2**32  # above all token ids


@dataclass(frozen=True, eq=False)
class Item:
    """One image or video, a tile of an image, or all images of a prompt.

    Attributes:
        kind: "image" or "video".
        identity: Equal for items of equal tensors.
        tensors: What the vision encoder reads, by the name of the model's argument.
        dim: The dimension in which the tensors of several items are concatenated.
        num_tokens: Placeholder tokens that represent it.
    """

    kind: str
    identity: int
    tensors: dict[str, Tensor]
    dim: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """The images and videos of one prompt.

    Attributes:
        name: What errors call it, such as "prompt_inputs[3]".
        read: Names the call of `read_prompt_inputs` that it is from, within which identities are comparable.
        items: In the order of their placeholders, images before videos.
        identities: [P] int64, what is compared in place of token ids: at placeholders a number for what they show.
        item: [P] int64, the index in `items` of what each placeholder represents; -1 at text.
        row: [P] int64, which of the item's features each placeholder represents; -1 at text.
        token_types: [P] int64, 0 at text, 1 at images, 2 at videos.
        blocks: (start, stop) of each run of placeholders.
    """

    name: str
    read: str
    items: tuple[Item, ...]
    identities: np.ndarray
    item: np.ndarray
    row: np.ndarray
    token_types: np.ndarray
    blocks: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """P, tokens of the prompt."""
        return len(self.identities)

    def fits(self, prompt: np.ndarray) -> bool:
        """Return whether a prompt [P] is the one that these are the inputs of."""
        is_text = self.item < 0
        return len(prompt) == len(self) and np.array_equal(self.identities[is_text], prompt[is_text])

    def compared(self, tokens: np.ndarray) -> np.ndarray:
        """Return what is compared of a sequence [T] that begins with the prompt."""
        return np.concatenate([self.identities, tokens[len(self) :]])


class Identities:
    """Numbers for what placeholders show, equal for equal items and rows."""

    def __init__(self) -> None:
        self.name = uuid4().hex
        self._known: dict[Any, list[tuple[dict[str, Tensor], int]]] = {}
        self._count = 0
        self._first: dict[Any, int] = {}
        self._next = FIRST_IDENTITY

    def of_item(self, tensors: dict[str, Tensor]) -> int:
        """Return the number of the first item with equal tensors."""
        shapes = tuple((name, x.dtype, tuple(x.shape)) for name, x in sorted(tensors.items()))
        sums = tuple(float(x.sum(dtype=torch.float64)) for x in tensors.values())  # of which few items have equal ones
        candidates = self._known.setdefault((shapes, sums), [])
        for known, number in candidates:
            if all(torch.equal(known[name], x) for name, x in tensors.items()):
                return number
        candidates.append((tensors, self._count))
        self._count += 1
        return self._count - 1

    def of_block(self, content: tuple[tuple[int, int], ...]) -> int:
        """Return the first of consecutive numbers for a block of placeholders, each (identity of the item, row)."""
        if content not in self._first:
            self._first[content] = self._next
            self._next += len(content)
        return self._first[content]


def read_prompt_inputs(
    prompts: Sequence[Tensor], given: Sequence[Mapping[str, Any] | None], name: str = "prompt_inputs"
) -> tuple[PromptInputs | None, ...]:
    """Read what a processor returned for each of several prompts, which are compared with one another.

    Args:
        prompts: [P] int64 each.
        given: For each prompt the processor's tensors for this prompt alone; None, or only token types, for text.
        name: What errors call `given`.

    Returns:
        One entry per prompt, None for text prompts.

    Raises:
        ValueError: If tensors are missing, unknown, or do not fit the prompt, which the error names.
    """
    if len(given) != len(prompts):
        raise ValueError(f"{name} must have one entry per prompt, got {len(given)} for {len(prompts)} prompts")
    identities = Identities()
    return tuple(
        None if inputs is None else _read(f"{name}[{g}]", prompt, dict(inputs), identities)
        for g, (prompt, inputs) in enumerate(zip(prompts, given, strict=True))
    )


def with_common_identities(
    prompts: Sequence[Tensor], inputs: Sequence[PromptInputs | None]
) -> tuple[PromptInputs | None, ...]:
    """Return inputs, maybe of several calls of `read_prompt_inputs`, with identities that can be compared.

    Args:
        prompts: [P] int64 each.
        inputs: For each prompt its inputs, or None.

    Raises:
        ValueError: If the inputs of a prompt are those of another one.
    """
    for g, (prompt, given) in enumerate(zip(prompts, inputs, strict=True)):
        if given is not None and not given.fits(prompt.cpu().numpy()):
            raise ValueError(
                f"prompt_inputs[{g}] was read with another prompt; pass what the processor returned for it"
            )
    if len({given.read for given in inputs if given is not None}) < 2:
        return tuple(inputs)
    identities = Identities()
    found: list[PromptInputs | None] = []
    for prompt, given in zip(prompts, inputs, strict=True):
        if given is None:
            found.append(None)
            continue
        items = tuple(replace(item, identity=identities.of_item(item.tensors)) for item in given.items)
        compared = _compared(prompt.cpu().numpy(), items, given.item, given.row, given.blocks, identities)
        found.append(replace(given, read=identities.name, items=items, identities=compared))
    return tuple(found)


def concatenated(items: Iterable[Item]) -> dict[str, Tensor]:
    """Concatenate the tensors of items of one kind, as the processor would have returned them for one prompt.

    Raises:
        ValueError: If their sizes differ and no tensor says how much of each is padding.
    """
    items = list(items)
    if other := next((item for item in items if item.tensors.keys() != items[0].tensors.keys()), None):
        raise ValueError(
            f"the {items[0].kind}s of a micro-batch must have the same tensors, got {sorted(items[0].tensors)} and "
            f"{sorted(other.tensors)}; call the processor with the same options for all prompts"
        )
    joined = {}
    for name in items[0].tensors:
        parts = [item.tensors[name] for item in items]
        dim = items[0].dim if parts[0].dim() > items[0].dim else 0
        shapes = [[size for d, size in enumerate(part.shape) if d != dim] for part in parts]
        if any(shape != shapes[0] for shape in shapes):
            has_sizes = {"image_sizes", "image_position_ids", "pixel_attention_mask"} & set(items[0].tensors)
            if not has_sizes or len({len(shape) for shape in shapes}) > 1:
                raise ValueError(
                    f"{name} of the images in a micro-batch must have one size, got {shapes[0]} and "
                    f"{next(shape for shape in shapes if shape != shapes[0])}; resize them to one size"
                )
            largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            largest.insert(dim, 0)
            parts = [_padded(part, largest, dim, -1 if name.endswith("position_ids") else 0) for part in parts]
        joined[name] = torch.cat(parts, dim)
    return joined


def _padded(x: Tensor, sizes: list[int], dim: int, value: int) -> Tensor:
    """Return `x` with its sizes in other dimensions than `dim` made up by `value`."""
    padding = []
    for d in reversed(range(x.dim())):
        padding += [0, 0 if d == dim else sizes[d] - x.shape[d]]
    return torch.nn.functional.pad(x, padding, value=value)


def _read(name: str, prompt: Tensor, given: dict[str, Any], identities: Identities) -> PromptInputs | None:
    types = _token_types(name, len(prompt), given)
    known = {*OF_TEXT, *TOKEN_TYPES, *INPUTS["image"], *INPUTS["video"]}
    if unknown := sorted(key for key, value in given.items() if value is not None and key not in known):
        raise ValueError(
            f"{name} has {', '.join(unknown)}; flexpg knows images ({', '.join(sorted(INPUTS['image']))}) "
            f"and videos ({', '.join(sorted(INPUTS['video']))})"
        )
    items: list[Item] = []
    item, row = (np.full(len(prompt), -1) for _ in range(2))
    tokens = prompt.cpu().numpy()
    if given.get("input_ids") is not None:
        own_ids = torch.as_tensor(given["input_ids"]).flatten().cpu().numpy()
        if not np.array_equal(own_ids, tokens):
            raise ValueError(
                f"{name} has input_ids that are not those of its prompt; are the prompts in another order?"
            )
    for number, kind in KINDS.items():
        tensors = {key: _tensor(name, key, given[key]) for key in sorted(INPUTS[kind]) if given.get(key) is not None}
        has_pixels = PIXELS[kind] in tensors and tensors[PIXELS[kind]].numel() > 0
        if types is None and has_pixels:
            raise ValueError(
                f"{name} has {PIXELS[kind]} but neither {' nor '.join(TOKEN_TYPES)}, by which placeholder tokens are "
                "found; call the processor with return_mm_token_type_ids=True"
            )
        places = np.array([], dtype=np.int64)
        if types is not None:
            types[(types == number) & (tokens != _placeholder(tokens[types == number]))] = 0
            places = np.flatnonzero(types == number)
        if has_pixels != bool(len(places)):
            raise ValueError(
                f"{name} must have {PIXELS[kind]} if and only if its prompt has {kind} tokens, got {len(places)} "
                f"{kind} tokens and {'pixels' if has_pixels else 'no pixels'}; token types are those of "
                "return_mm_token_type_ids=True"
            )
        if not has_pixels:
            continue
        for loaded in _items(name, kind, tensors, places, identities):
            mine, places = places[: loaded.num_tokens], places[loaded.num_tokens :]
            item[mine], row[mine] = len(items), np.arange(len(mine))
            items.append(loaded)
    if not items:
        return None
    assert types is not None
    blocks = tuple(runs_of(np.flatnonzero(types)))
    compared = _compared(tokens, items, item, row, blocks, identities)
    return PromptInputs(name, identities.name, tuple(items), compared, item, row, types, blocks)


def _compared(
    tokens: np.ndarray,
    items: Sequence[Item],
    item: np.ndarray,
    row: np.ndarray,
    blocks: Sequence[tuple[int, int]],
    identities: Identities,
) -> np.ndarray:
    """Return [P] int64, token ids, and at placeholders numbers for the whole content of their block."""
    compared = tokens.copy()
    for start, stop in blocks:
        content = tuple((items[i].identity, int(r)) for i, r in zip(item[start:stop], row[start:stop], strict=True))
        compared[start:stop] = identities.of_block(content) + np.arange(stop - start)
    return compared


def _tensor(name: str, key: str, value: Any) -> Tensor:
    """Return what a processor returned as a tensor; a list of equal tensors is stacked."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        if any(tensor.shape != value[0].shape for tensor in value):
            raise ValueError(f'{name} has {key} as a list of tensors; call the processor with return_tensors="pt"')
        return torch.stack(list(value))
    return torch.as_tensor(value)


def _token_types(name: str, length: int, given: dict[str, Any]) -> np.ndarray | None:
    """Return [P] int64, the kind of each token; None if the processor returned none."""
    found = next((given[key] for key in TOKEN_TYPES if given.get(key) is not None), None)
    if found is None:
        return None
    types = torch.as_tensor(found).cpu().numpy().astype(np.int64)
    if types.ndim == 2 and len(types) == 1:
        types = types[0]
    if types.shape != (length,):
        raise ValueError(f"{name} must have token types for the {length} tokens of its prompt, got {list(types.shape)}")
    if other := set(types.tolist()) - {0, *KINDS}:
        raise ValueError(f"{name} must have token types 0 (text), 1 (image) and 2 (video), got {sorted(other)}")
    return types


def _placeholder(tokens: np.ndarray) -> int:
    """Return the placeholder among the tokens of an image; processors also count breaks between rows and the like.

    There are more placeholders than other tokens of a kind, or as many and before them.
    """
    ids, first, counts = np.unique(tokens, return_index=True, return_counts=True)
    return int(ids[np.lexsort((first, -counts))[0]]) if len(ids) else -1


def _items(name: str, kind: str, tensors: dict[str, Tensor], places: np.ndarray, identities: Identities) -> list[Item]:
    """Return the images or videos of a prompt whose placeholders are at `places`."""
    parts, sizes, dim = split_items(name, kind, tensors)
    total, runs = sum(sizes), runs_of(places)
    if len(parts) == 1:
        counts = [len(places)]
    elif total and all(len(places) * size % total == 0 for size in sizes):
        counts = [len(places) * size // total for size in sizes]
    elif len(parts) == len(runs):
        counts = [stop - start for start, stop in runs]
    else:
        parts, counts = [tensors], [len(places)]
    return [Item(kind, identities.of_item(part), part, dim, count) for part, count in zip(parts, counts, strict=True)]
