"""The recipe with and without sharing, step by step in one process: how much faster, and are the updates the same?

    python -m benchmarks.sharing

Both runs start from one seed and alternate, step by step, so that other load affects both alike. Writes
benchmarks/results/sharing_cpu.json, or with `device=cuda` sharing_cuda.json.
"""

import argparse
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf

from benchmarks.record import commit, save
from benchmarks.timing import paired_ratio, quartiles
from flexpg.training.config import load_config
from recipes.grpo import GRPORecipe

CONFIG = "recipes/configs/tiny_cpu.yaml"


@dataclass(frozen=True)
class Pair:
    """Metrics of one step of both runs."""

    shared: dict[str, float]
    baseline: dict[str, float]

    def difference(self, metric: str) -> float:
        """Return the difference relative to the larger value, or to 0.01 if both are smaller."""
        a, b = self.shared[metric], self.baseline[metric]
        return abs(a - b) / max(abs(a), abs(b), 0.01)


def build_recipe(config: str, sharing: bool, overrides: list[str]) -> GRPORecipe:
    """Set a recipe up as `tune run` does with these overrides."""
    given = {"sharing": sharing, "self_check": False, "output_dir": "runs/sharing"}
    recipe = GRPORecipe(load_config(OmegaConf.merge(OmegaConf.load(config), given, OmegaConf.from_dotlist(overrides))))
    recipe.setup()
    return recipe


def train_step(recipe: GRPORecipe) -> dict[str, float]:
    """Take one step of the recipe's own loop, without evaluations and plots, and return its metrics."""

    def skip_evaluation() -> None:
        recipe.accuracies[recipe.steps_done] = 0.0

    recipe.evaluate, recipe.plot = skip_evaluation, lambda data: None
    recipe.cfg.num_steps = recipe.steps_done + 1
    recipe.train()
    return recipe.history[-1]


def token_ratio(pairs: list[Pair], count: str) -> float:
    """Return the baseline's tokens divided by "prompts_once" or "encoded" ones of the shared run."""
    return sum(p.shared["tokens_baseline"] for p in pairs) / sum(p.shared[f"tokens_{count}"] for p in pairs)


def parameter_difference(shared: GRPORecipe, baseline: GRPORecipe) -> float:
    """Return the norm of the difference of all parameters relative to their norm."""
    a, b = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (shared, baseline))
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    """Run both, and save the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="key=value, as for the recipe")
    args = parser.parse_args()
    commit()
    shared, baseline = (build_recipe(args.config, sharing, args.overrides) for sharing in (True, False))
    pairs = [Pair(train_step(shared), train_step(baseline)) for _ in range(args.steps)]
    times = {name: [getattr(pair, name)["train_s"] for pair in pairs] for name in ("shared", "baseline")}
    speedup = paired_ratio(times["baseline"], times["shared"])
    result = {
        "steps": args.steps,
        "train_s_shared": quartiles(times["shared"])["median"],
        "train_s_baseline": quartiles(times["baseline"])["median"],
        "train_speedup": speedup["median"],
        "train_speedup_quartiles": [speedup["low_quartile"], speedup["high_quartile"]],
        "token_ratio": token_ratio(pairs, "encoded"),
        "token_ratio_prompts_once": token_ratio(pairs, "prompts_once"),
        "largest_loss_difference": max(pair.difference("loss") for pair in pairs),
        "largest_grad_norm_difference": max(pair.difference("grad_norm") for pair in pairs),
        "parameter_difference": parameter_difference(shared, baseline),
    }
    device = shared.world.device
    save(f"sharing_{device.type}", device, result)


if __name__ == "__main__":
    main()
