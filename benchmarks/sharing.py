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
from benchmarks.timing import call_ms, paired_ratio, quartiles
from flexpg import group_advantages
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
    given = {"sharing": sharing, "output_dir": "runs/sharing"}
    recipe = GRPORecipe(load_config(OmegaConf.merge(OmegaConf.load(config), given, OmegaConf.from_dotlist(overrides))))
    recipe.setup()
    return recipe


def train_step(recipe: GRPORecipe, number: int) -> dict[str, float]:
    """Take one step and return its metrics, with the milliseconds of its update."""
    samples, chosen = recipe.generate(number)
    rollouts, _ = recipe.score(samples, chosen)
    rollouts, packed = recipe.score_policies(rollouts, recipe.pack(rollouts))
    metrics = dict(packed.cost)

    def update() -> None:
        metrics.update(recipe.update(number, rollouts, packed, group_advantages(rollouts, recipe.cfg.scale_rewards)))

    metrics["train_ms"] = call_ms(update, recipe.world.device)
    recipe.lr_scheduler.step()
    return metrics


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
    pairs = [Pair(train_step(shared, step), train_step(baseline, step)) for step in range(1, args.steps + 1)]
    times = {name: [getattr(pair, name)["train_ms"] for pair in pairs] for name in ("shared", "baseline")}
    speedup = paired_ratio(times["baseline"], times["shared"])
    result = {
        "steps": args.steps,
        "train_s_shared": quartiles(times["shared"])["median"] / 1e3,
        "train_s_baseline": quartiles(times["baseline"])["median"] / 1e3,
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
