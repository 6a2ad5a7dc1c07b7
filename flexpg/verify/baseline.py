"""The baseline of a user's model: every sequence in full, without sharing, and the norms of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flexpg.integrations import autocast, integration_for
from flexpg.integrations.fsdp import run_as_forward
from flexpg.logprobs import chunked_logprobs
from flexpg.rollouts import Rollouts


def baseline_logprobs(
    model: nn.Module,
    rollouts: Rollouts,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Compute log-probabilities without sharing: every sequence in full, through the model's own attention.

    Sequences are padded on the right to one batch. Only rows that predict a loss token go through the output layer.

    Args:
        model: A torchtune or transformers model.
        rollouts: Rollouts on the model's device.
        temperature: Divides the logits.
        return_entropy: Also return entropies.
        entropy_grad: Whether entropies have a gradient.
        autocast_dtype: Run the forward under torch.autocast with this dtype.

    Returns:
        [n, C] log-probabilities, 0 where the loss mask is False and, with `return_entropy`, [n, C] entropies in nats.
    """
    integration = integration_for(model)

    def score() -> tuple[Tensor, ...]:
        input_ids = pad_sequence(rollouts.sequences, batch_first=True)  # [n, T]
        hidden = integration.baseline_forward(model, input_ids, rollouts.sequence_inputs)  # [n, T, E]
        row, step = rollouts.loss_mask.nonzero(as_tuple=True)  # [M] each
        parents = row * input_ids.shape[1] + rollouts.prompt_lens[row] + step - 1  # [M], in the flattened batch
        flat = chunked_logprobs(
            hidden.flatten(0, 1).index_select(0, parents),
            input_ids.flatten()[parents + 1],
            integration.output(model),
            temperature=temperature,
            return_entropy=return_entropy,
            entropy_grad=entropy_grad,
        )
        return tuple(x.new_zeros(rollouts.loss_mask.shape).index_put((row, step), x) for x in flat)

    with autocast(model, autocast_dtype):
        return run_as_forward(model, score)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of every gradient by the name of its parameter, over all ranks, which must all call it."""
    from torch.distributed.tensor import DTensor  # here, because it takes a second

    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms
