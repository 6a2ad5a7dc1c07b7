"""The recipe with and without sharing, side by side in one process: are they the same, and what is faster?

    python -m benchmarks.sharing

Both runs start from one seed and take their steps in turn, so that whatever else the machine does hits both alike.
Writes benchmarks/results/sharing_cpu.json, which README quotes, or with `device=cuda` sharing_cuda.json.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from benchmarks.record import save
from recipes.grpo import GRPORecipe

CONFIG = "recipes/configs/tiny_cpu.yaml"


@dataclass(frozen=True)
class Pair:
    """The metrics of one step of both runs."""

    shared: dict[str, float]
    unshared: dict[str, float]

    def difference(self, metric: str) -> float:
        """How far the runs are apart, relative to the larger; to 0.01 where advantages cancel to next to nothing."""
        a, b = self.shared[metric], self.unshared[metric]
        return abs(a - b) / max(abs(a), abs(b), 0.01)


def recipe(config: str, sharing: bool, output_dir: Path, overrides: list[str]) -> GRPORecipe:
    """A recipe that is set up, as `tune run` would with these overrides."""
    own = {"sharing": sharing, "output_dir": str(output_dir)}
    cfg = OmegaConf.merge(OmegaConf.load(config), own, OmegaConf.from_dotlist(overrides))
    OmegaConf.resolve(cfg)
    made = GRPORecipe(cfg)
    made.setup()
    return made


def run_both(shared: GRPORecipe, unshared: GRPORecipe, num_steps: int) -> list[Pair]:
    """The same problems through both, step by step."""
    return [Pair(shared.step(number), unshared.step(number)) for number in range(1, num_steps + 1)]


def token_ratio(pairs: list[Pair], way: str) -> float:
    """Tokens of the unshared run over those of encoding "prompts_once", or of what was "trained" on."""
    return sum(p.shared["tokens_unshared"] for p in pairs) / sum(p.shared[f"tokens_{way}"] for p in pairs)


def parameter_difference(shared: GRPORecipe, unshared: GRPORecipe) -> float:
    """Norm of the difference of all parameters over their norm."""
    a, b = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (shared, unshared))
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    """Runs, prints, and writes the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="key=value, as on the command line of the recipe")
    args = parser.parse_args()
    runs = [recipe(args.config, sharing, Path("runs/sharing"), args.overrides) for sharing in (True, False)]
    pairs = run_both(*runs, args.steps)
    train_s = [[getattr(pair, side)["train_s"] for pair in pairs] for side in ("shared", "unshared")]
    ratios = sorted(slow / fast for fast, slow in zip(*train_s, strict=True))
    result = {
        "steps": args.steps,
        "train_s_shared": statistics.median(train_s[0]),
        "train_s_unshared": statistics.median(train_s[1]),
        "train_speedup": statistics.median(ratios),
        "train_speedup_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "token_ratio": token_ratio(pairs, "trained"),
        "token_ratio_prompts_once": token_ratio(pairs, "prompts_once"),
        "largest_loss_difference": max(pair.difference("loss") for pair in pairs),
        "largest_grad_norm_difference": max(pair.difference("grad_norm") for pair in pairs),
        "parameter_difference": parameter_difference(*runs),
    }
    save(f"sharing_{runs[0].world.device.type}", runs[0].world.device, result)


if __name__ == "__main__":
    main()
