"""Runs of TRL's trainers in float64, and their comparison.

Float64Head                            TRL's fused output layer without its round to float32
Run, assert_trained_alike(a, b)        trainers that sampled, logged and learned the same
QUIET, GROUP_OPTIONS, STEPS            options of short runs on a CPU
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, cat, nn

STEPS = 4
GROUP_OPTIONS = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
QUIET = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "report_to": []}
QUIET |= {"save_strategy": "no", "disable_tqdm": True, "learning_rate": 3e-3, "max_steps": STEPS, "seed": 7}


class Float64Head:
    """TRL's fused output layer in the dtype of the hidden states; TRL's own computes in float32 inside."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        logits = nn.functional.linear(hidden, weight, bias) * scale
        logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / temperature
        scores = logits.log_softmax(-1)
        found = {
            "entropy": -(scores.exp() * scores).sum(-1),
            "log_sum_sq_probs": (2 * scores.detach()).logsumexp(-1),
            "mean_logits": logits.detach().mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
        log_probs = scores.gather(-1, targets[:, None])[:, 0]
        return log_probs, *(values if name in outputs else None for name, values in found.items())


@dataclass(frozen=True)
class Run:
    """A trainer, and the token ids of (prompt, completion) in each batch that it has sampled."""

    trainer: Any
    batches: list[list[tuple[tuple[int, ...], tuple[int, ...]]]]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.trainer.state.log_history

    @property
    def parameters(self) -> Tensor:
        return cat([p.detach().flatten() for p in self.trainer.model.parameters() if p.requires_grad])

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.history if name in line]


def assert_trained_alike(
    ours: Run, expected: Run, names: set[str] | None = None, tolerance: float = 1e-12, without: str = "^$"
) -> None:
    """Compare samples, parameters, and the log (or only `names`) but for times and what matches `without`."""
    assert ours.batches == expected.batches
    without = f"runtime|per_second|step_time|^flexpg/|{without}"
    lines, expected_lines = (
        [
            {
                name: "none" if value is None else value  # of a mean over nothing, which approx does not take
                for name, value in line.items()
                if (name in names if names else not re.search(without, name))
            }
            for line in run.history
        ]
        for run in (ours, expected)
    )
    assert len(lines) == len(expected_lines) >= STEPS
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected_line, rel=tolerance, abs=tolerance)
    assert (ours.parameters - expected.parameters).norm() < tolerance * expected.parameters.norm()
