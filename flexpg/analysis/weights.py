"""The matrices of a decoder's layers: how many entries, and which of them take which gradients."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer.

    Attributes:
        path: The parameter's path in its layer, such as "self_attn.q_proj.weight".
        entries: The entries that a token is multiplied with.
        is_trained: Whether it requires grad.
    """

    path: str
    entries: int
    is_trained: bool

    @property
    def projection(self) -> str:
        """The path without the names of adapters: equal for a matrix and the adapters that are added to it."""
        return re.sub(r"\.(weight|base_layer\.|lora_).*", "", self.path)

    @property
    def block(self) -> str:
        """The layer's submodule that it belongs to: its attention or its MLP."""
        return self.path.split(".")[0]

    @property
    def is_adapter(self) -> bool:
        """Whether it belongs to a LoRA adapter."""
        return ".lora_" in self.path


def layer_matrices(
    layer: nn.Module, experts_per_token: int = 0, no_matrices: Collection[nn.Module] = ()
) -> list[Matrix]:
    """Return the matrices of a layer in the order of its modules.

    Args:
        layer: A decoder layer.
        experts_per_token: How many experts of a 3-D parameter [experts, ., .] a token is routed to; 0 without experts.
        no_matrices: Modules whose own parameters, those of submodules excluded, are no such matrices.

    Raises:
        TypeError: If it is unknown what a token does with a parameter.
    """
    found = []
    for path, module in layer.named_modules():
        if module in no_matrices or "Norm" in type(module).__name__:  # Cohere's norms have a weight per head
            continue
        for name, parameter in module.named_parameters(recurse=False):
            label = f"{path}.{name}"
            if "original_module." in label:  # PEFT keeps the original of a module that it trains
                continue
            if parameter.dim() < 2 or name.endswith("bias"):  # experts have one bias each, [experts, .]
                continue
            entries = parameter.numel()
            if parameter.dim() == 3 and experts_per_token:
                entries = entries * experts_per_token // len(parameter)
            elif parameter.dim() > 2 or isinstance(module, nn.Embedding):
                raise TypeError(
                    f"{label} of shape {list(parameter.shape)} must be a matrix that every token is multiplied with; "
                    "write the ModelShape by hand"
                )
            found.append(Matrix(label, entries, parameter.requires_grad))
    return found


def keeps_input(matrices: Sequence[Matrix]) -> bool:
    """Return whether the input of the last projection is kept for the backward: a frozen matrix does not need it."""
    return any(matrix.is_trained for matrix in matrices if matrix.projection == matrices[-1].projection)


def weight_fields(
    layers: Sequence[Sequence[Matrix]], *, embeds_are_trained: bool, is_parallel: bool = False
) -> dict[str, Any]:
    """Return the fields of a ModelShape that count entries of the layers' matrices.

    Args:
        layers: The matrices of each layer, in the order in which they are applied: attention, then the MLP, the
            output projection of each last.
        embeds_are_trained: Whether the input of the first layer requires grad.
        is_parallel: Whether the MLP has the same input as attention.

    Raises:
        ValueError: If no matrix is trained.
    """
    trained = sum(matrix.entries for layer in layers for matrix in layer if matrix.is_trained)
    if not trained:
        raise ValueError("the model must have layers with parameters that require grad")
    total = sum(matrix.entries for layer in layers for matrix in layer)
    return {
        "layer_weights": total // len(layers),
        "frozen_weights": (total - trained) // len(layers),
        "first_inputs": 0 if embeds_are_trained else _first_inputs(layers, is_parallel),
    }


def _first_inputs(layers: Sequence[Sequence[Matrix]], is_parallel: bool) -> int:
    """Count the entries of the first layers' matrices whose input needs no gradient."""
    entries = 0
    for matrices in layers:
        entries += _without_input_gradient(matrices, is_parallel)
        if any(matrix.is_trained for matrix in matrices):
            break
    return entries


def _without_input_gradient(matrices: Sequence[Matrix], is_parallel: bool) -> int:
    """Count the entries of a first layer's matrices whose input needs no gradient."""
    attention = [m for m in matrices if m.block == matrices[0].block]
    mlp = [m for m in matrices if m not in attention] or attention
    attention_in = [m for m in attention if re.search(r"in_proj|[qkv]|c_attn", m.projection.split(".")[-1])]
    mlp_out = [m for m in mlp if m.projection == mlp[-1].projection]
    stages = [  # matrices with the same input
        [attention_in, [m for m in attention if m not in attention_in]],
        [[m for m in mlp if m not in mlp_out], mlp_out],
    ]
    entries = 0
    for chain in stages if is_parallel else [stages[0] + stages[1]]:
        for stage in chain:
            entries += sum(m.entries for m in stage if not re.search(r"\.lora_[bB]\.", m.path))
            if any(m.is_trained for m in stage):
                break
    return entries
