"""A whole step of the recipe with and without sharing: sampling, log-probabilities, update.

    python -m benchmarks.step                    # CPU, float32
    python -m benchmarks.step --device cuda      # bfloat16
    python -m benchmarks.step --tiny             # as a test

Two recipes start from one seed and take the same steps of GSM8K with few-shot prompts of about 2,300 bytes
(recipes/configs/gsm8k_bytes_cpu.yaml), by turns in one process: one with `sharing=true`, the other with
`sharing=false`, which encodes every sequence on its own in the update and for log-probabilities of old policy and
reference. Both sample by `flexpg.sample`, which encodes a prompt once; `benchmarks.sampling` compares it with others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import run
from benchmarks.sharing import build_recipe, train_step
from benchmarks.timing import paired_ratio, quartiles
from recipes.grpo import GRPORecipe

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "recipes/configs/gsm8k_bytes_cpu.yaml"
STAGES = ("sample_s", "logprobs_s", "train_s")


@dataclass(frozen=True)
class Case:
    """A step: prompts, completions of each, their longest length in tokens, and few-shot examples of a prompt."""

    prompts: int
    group: int
    completion: int
    shots: int = 6
    minibatches: int = 1


CASES = {
    "cpu": [Case(2, 8, 64), Case(2, 8, 64, minibatches=2)],
    "cuda": [Case(8, 16, 256), Case(8, 16, 256, minibatches=2)],
    "tiny": [Case(2, 2, 4, shots=0, minibatches=2)],
}


def recipe_of(case: Case, device: torch.device, sharing: bool, folder: str) -> GRPORecipe:
    """Set a recipe up, with a reference and without the self-check."""
    overrides = [
        f"device={device}",
        f"dtype={'fp32' if device.type == 'cpu' else 'bf16'}",
        f"output_dir={folder}/{'shared' if sharing else 'baseline'}",
        f"checkpointer.checkpoint_dir={ROOT}/recipes/assets/tiny",
        *(f"{name}.source={ROOT}/recipes/assets/gsm8k_sample.jsonl" for name in ("train_problems", "test_problems")),
        *(f"{name}.shots={case.shots}" for name in ("train_problems", "test_problems")),
        f"prompts_per_step={case.prompts}",
        f"group_size={case.group}",
        f"minibatches={case.minibatches}",
        f"sampling.max_new_tokens={case.completion}",
        "max_tokens=16384",
    ]
    return build_recipe(str(CONFIG), sharing, overrides)


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the seconds of every stage and of whole steps, after a step of each that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        recipes = {name: recipe_of(case, device, name == "shared", folder) for name in ("baseline", "shared")}
        for step in range(repeats + 1):
            for name in recipes if step % 2 == 0 else reversed(recipes):
                train_step(recipes[name])
    steps = {name: recipe.history[1:] for name, recipe in recipes.items()}
    seconds = {name: [sum(step[stage] for stage in STAGES) for step in series] for name, series in steps.items()}
    pairs = list(zip(steps["shared"], steps["baseline"], strict=True))
    return {
        "prompt_tokens": sum(map(len, recipes["shared"].prompts)) / len(recipes["shared"].prompts),
        "token_ratio": sum(a["tokens_baseline"] for a, _ in pairs) / sum(a["tokens_encoded"] for a, _ in pairs),
        "stage_s": {
            name: {stage: quartiles([step[stage] for step in series])["median"] for stage in STAGES}
            for name, series in steps.items()
        },
        "step_s": {name: quartiles(values) for name, values in seconds.items()},
        "speedup": paired_ratio(seconds["baseline"], seconds["shared"]),
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) / max(abs(b["loss"]), 0.01) for a, b in pairs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("step", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
