"""Per-step training metrics, and the summary of a run."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexpg.analysis.flops import ModelShape, update_flops
from flexpg.analysis.work import baseline_work, encoded_work, prompts_once_work, recomputed_tokens, total_work
from flexpg.micro_batches import MicroBatch, by_cache
from flexpg.training.distributed import World
from flexpg.training.episodes import Episode
from flexpg.tree import padded_length

# The seconds of a step, by what they were spent on.
SECONDS = {
    "sample_s": "sampling",
    "reward_s": "rewards",
    "sync_s": "weights to the engine",
    "logprobs_s": "old and reference log-probabilities",
    "train_s": "update",
}
MAXIMUM = "sampler_ratio_max"  # a metric whose largest value counts; of others, means over loss tokens


def episode_metrics(groups: Sequence[Sequence[Episode]], rewards: Tensor) -> dict[str, float]:
    """Return rewards and lengths of a step's episodes.

    Args:
        groups: For each problem its G episodes.
        rewards: [problems, G] float, the reward of each.

    Returns:
        "reward", "turns" and "completion_tokens" (of all turns), means over episodes; "reward_std", the mean over
        groups of their standard deviation; "groups_without_spread", the share of groups whose rewards are equal, which
        have no gradient; "truncated", the share of episodes that the sampler's limit truncated; "sampled_tokens",
        those of all completions.
    """
    episodes = [episode for group in groups for episode in group]
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "groups_without_spread": (~has_spread(rewards)).float().mean().item(),
        "completion_tokens": sum(len(turn.completion) for each in episodes for turn in each.turns) / len(episodes),
        "truncated": sum(not each.is_finished for each in episodes) / len(episodes),
        "turns": sum(len(each.turns) for each in episodes) / len(episodes),
        "sampled_tokens": sum(len(turn.completion) for each in episodes for turn in each.turns),
    }


def has_spread(rewards: Tensor) -> Tensor:
    """Return [problems] bool, False where all rewards [problems, G] of a problem are equal, so that advantages are 0.

    Dynamic sampling replaces these: DAPO, arXiv 2503.14476, section 3.2.
    """
    return (rewards != rewards[:, :1]).any(1)


def cost_metrics(
    minibatches: Sequence[Sequence[MicroBatch]], is_shared: bool, shape: ModelShape, keep_padding: bool
) -> dict[str, float]:
    """Return what a step's micro-batches cost.

    Args:
        minibatches: For each, the micro-batches of all ranks, as `pack` returned them.
        is_shared: Whether packed sequences are trained, or padded batches of whole sequences.
        shape: The model's shape.
        keep_padding: Whether packed sequences keep their padding, as on a GPU or in compiled layers.

    Returns:
        "tokens_baseline", with every prompt once per completion; "tokens_prompts_once", with every prompt once per
        micro-batch, or several that share a cache; "tokens_encoded", by the model; "padding" in addition;
        "tokens_recomputed", prefix tokens that several micro-batches encode; "flop_ratio", how many times fewer FLOPs
        the layers need than the baseline.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch]
    busy = [batch for batch in batches if not batch.is_idle]
    series = [cached for minibatch in minibatches for cached in by_cache(minibatch)]
    repeated = sum(sum(batch.cached_tokens for batch in cached) - _cached_prompt_tokens(cached) for cached in series)
    if is_shared:
        encoded = sum(encoded_work(minibatch).num_tokens for minibatch in minibatches)
        suffixes = [batch.tree.num_tokens - batch.cached_tokens for batch in batches]
        with_padding = sum(map(padded_length, suffixes) if keep_padding else suffixes)
        with_padding += sum(padded_length(_cached_prompt_tokens(cached)) for cached in series if len(cached) > 1)
    else:
        encoded = sum(batch.tree.baseline_tokens for batch in batches)
        with_padding = sum(len(batch.tree.lengths) * batch.tree.max_length for batch in batches)
    return {
        "tokens_baseline": sum(batch.tree.baseline_tokens for batch in busy),
        "tokens_prompts_once": sum(prompts_once_work(batch.rollouts).num_tokens for batch in busy) - repeated,
        "tokens_encoded": encoded,
        "padding": with_padding - encoded,
        "tokens_recomputed": sum(map(recomputed_tokens, minibatches)) if is_shared else 0,
        "flop_ratio": flop_ratio(minibatches, shape) if is_shared else 1.0,
    }


def flop_ratio(minibatches: Sequence[Sequence[MicroBatch]], shape: ModelShape) -> float:
    """Return the FLOPs of the baseline's layers over those of the packed sequences, without logits, which are equal.

    Args:
        minibatches: For each, the micro-batches of all ranks, as `pack` returned them with sharing.
        shape: The model's shape.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch if not batch.is_idle]
    baseline = total_work([baseline_work(batch.tree) for batch in batches])
    shared = total_work([encoded_work(minibatch) for minibatch in minibatches])
    return update_flops(baseline, 0, shape).total / update_flops(shared, 0, shape).total


class UpdateMetrics:
    """Metrics of an optimizer step, added up over its micro-batches.

    Args:
        total_tokens: Loss tokens of the mini-batch, of all ranks.
    """

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.sums = {"loss": 0.0}
        self.largest: dict[str, float] = {}

    def add(self, batch: MicroBatch, loss: Tensor, entropies: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a micro-batch.

        Args:
            batch: The micro-batch.
            loss: Its part of the mini-batch's loss.
            entropies: [n, C] float, 0 where a token does not count.
            metrics: Means over its loss tokens, and MAXIMUM.
        """
        tokens = batch.rollouts.num_loss_tokens
        weight = tokens / self.total_tokens
        self.sums["loss"] += loss.item()
        means = {**metrics, "entropy": entropies.detach().sum() / max(tokens, 1)}
        if MAXIMUM in means:
            self.largest[MAXIMUM] = max(means.pop(MAXIMUM).item(), self.largest.get(MAXIMUM, 0.0))
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean.item() * weight

    def of_all_ranks(self, world: World) -> dict[str, float]:
        """Return the metrics of the mini-batch; all ranks call it."""
        largest = {name: world.all_reduce_max(value) for name, value in self.largest.items()}
        return world.all_reduce_sum(self.sums) | largest


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the optimizer steps that have it.

    >>> mean_metrics([{"loss": 1.0, "kl": 0.5}, {"loss": 2.0}])
    {'loss': 1.5, 'kl': 0.5}
    """
    columns: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return shares and ratios of a step's sums.

    Args:
        metrics: With `cost_metrics`, "sampled_tokens", and those of `SECONDS` that the run has.

    Returns:
        "sample_fraction" of the seconds; "sampled_tokens_per_s" of sampling; "token_ratio", how many times fewer tokens
        were encoded than by the baseline; "tokens_per_s", baseline tokens per second of the step; "padding_fraction" of
        what was encoded.
    """
    total = sum(metrics.get(name, 0.0) for name in SECONDS)
    return {
        "sampled_tokens_per_s": metrics["sampled_tokens"] / metrics["sample_s"],
        "sample_fraction": metrics["sample_s"] / total,
        "token_ratio": metrics["tokens_baseline"] / metrics["tokens_encoded"],
        "tokens_per_s": metrics["tokens_baseline"] / total,
        "padding_fraction": metrics["padding"] / (metrics["padding"] + metrics["tokens_encoded"]),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def best_step(accuracies: Mapping[int, float]) -> int | None:
    """Return the step of the highest accuracy, the first of several, None if there is none.

    >>> best_step({0: 0.25, 10: 0.5, 20: 0.75, 30: 0.75})
    20

    Args:
        accuracies: Held-out accuracy by completed steps.
    """
    return min(accuracies, key=lambda step: (-accuracies[step], step), default=None)


def format_eval(history: Sequence[Mapping[str, float]], accuracies: Mapping[int, float]) -> str:
    """Return the latest evaluation in one line, with the mean reward since the one before.

    >>> format_eval([{"reward": 0.5}, {"reward": 1.0}], {0: 0.25, 2: 0.875})
    'step    2  held-out accuracy 0.875  reward 0.750'

    Args:
        history: The metrics of every step.
        accuracies: Held-out accuracy by completed steps.
    """
    *earlier, latest = sorted(accuracies)
    rewards = [metrics["reward"] for metrics in history[max(earlier, default=0) : latest]]
    reward = f"  reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    return f"step {latest:>4}  held-out accuracy {accuracies[latest]:.3f}{reward}"


def format_summary(history: Sequence[Mapping[str, float]], accuracies: Mapping[int, float]) -> str:
    """Return a table of what was learned, where time went and what sharing saved.

    Args:
        history: The metrics of every step.
        accuracies: Held-out accuracy by completed steps.
    """

    def mean(name: str) -> float:
        values = [metrics[name] for metrics in history if name in metrics]  # earlier versions had fewer
        return sum(values) / max(len(values), 1)

    lines = [f"{'step':>6}{'held-out accuracy':>20}{'reward':>9}{'completion tokens':>20}"]
    before = 0
    for step in sorted(accuracies):
        line = f"{step:>6}{accuracies[step]:>20.3f}"
        if since := history[before:step]:
            reward, tokens = (sum(m[name] for m in since) / len(since) for name in ("reward", "completion_tokens"))
            line += f"{reward:>9.3f}{tokens:>20.1f}"
        lines.append(line)
        before = step
    seconds = {label: mean(name) for name, label in SECONDS.items() if name in history[-1]}
    baseline, once, encoded = (mean(f"tokens_{name}") for name in ("baseline", "prompts_once", "encoded"))
    rows = {
        "seconds per step": f"{sum(seconds.values()):.2f}: "
        + ", ".join(f"{label} {value:.2f}" for label, value in seconds.items()),
        "sampling": f"{mean('sampled_tokens_per_s'):,.0f} completion tokens per second",
        "tokens per step": f"{baseline:,.0f} with every prompt once per completion (baseline)",
        " ": f"{once:,.0f} with every prompt once ({baseline / once:.1f}x fewer)",
        "  ": f"{encoded:,.0f} encoded in this run ({baseline / encoded:.1f}x fewer)",
        "peak memory": f"{max(metrics['peak_memory_gib'] for metrics in history):.2f} GiB",
    }
    return "\n".join([*lines, *(f"{name:<20}{value}" for name, value in rows.items())])


def _cached_prompt_tokens(series: Sequence[MicroBatch]) -> int:
    return max(batch.cached_tokens for batch in series)
