"""The work of a vision encoder, counted by running it once for every different image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexpg.integrations.transformers.checks import unwrap
from flexpg.integrations.transformers.images import image_features
from flexpg.rollouts import Rollouts


def image_flops(model: nn.Module, rollouts: Rollouts) -> dict[int, int]:
    """Count the FLOPs of the vision encoder's forward and backward for every different image or video.

    Matrix products, convolutions and attention count, as in torch's FlopCounterMode. Parameters that do not require
    grad have no backward; without any that does, the encoder has none.

    Args:
        model: A transformers model that takes images, with weights; its gradients do not change.
        rollouts: The rollouts; the images of their prompts are counted.

    Returns:
        FLOPs by `Item.identity`.

    Raises:
        TypeError: If the model takes no images.
    """
    base = unwrap(model)
    items = {item.identity: item for each in rollouts.prompt_inputs or () if each is not None for item in each.items}
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    counts = {}
    for identity, item in items.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a CPU's flash is not counted
            features = image_features(base, item)
            total = torch.stack([feature.sum() for feature in features]).sum()
            if total.requires_grad:
                torch.autograd.grad(total, trained, allow_unused=True)
        counts[identity] = counter.get_total_flops()
    return counts
