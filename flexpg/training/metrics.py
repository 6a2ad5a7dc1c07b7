"""What a step did, in numbers: for loggers, and in words for the end of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexpg.analysis.flops import Cost, ModelShape, dense_cost, group_cost, update_flops
from flexpg.packing import MicroBatch, encoded_tokens, recomputed_tokens, run_cost, runs
from flexpg.rollouts import Rollouts
from flexpg.tree import padded_size

# Sharing that saves less than this is left: a packed row's own costs (masks, merging of partial results) may be more.
PAYS = 1.05


def rollout_metrics(rollouts: Rollouts, is_finished: Tensor) -> dict[str, float]:
    """Rewards and lengths of a step's rollouts.

    Args:
        rollouts: the whole step's.
        is_finished: [N] bool, False where the sampler's limit cut a completion off.

    Returns:
        "reward", the mean; "reward_std", the mean over groups of their standard deviation; "groups_without_spread", the
        share of groups whose rewards are equal, which teach nothing; "completion_tokens", the mean; "truncated", the
        share of completions that were cut off.
    """
    groups = [rollouts.rewards[rollouts.group_ids == group] for group in range(rollouts.num_groups)]
    return {
        "reward": rollouts.rewards.mean().item(),
        "reward_std": sum(rewards.std(correction=min(1, len(rewards) - 1)).item() for rewards in groups) / len(groups),
        "groups_without_spread": sum(bool((rewards == rewards[0]).all()) for rewards in groups) / len(groups),
        "completion_tokens": rollouts.completion_lens.float().mean().item(),
        "truncated": (~is_finished).float().mean().item(),
    }


def cost_metrics(
    minibatches: Sequence[Sequence[MicroBatch]], sharing: bool, shape: ModelShape, padded: bool = True
) -> dict[str, float]:
    """What a step's micro-batches cost.

    Args:
        minibatches: what `pack` gave for each, of all processes.
        sharing: whether they are trained on as packed rows; else as padded rows of whole sequences.
        shape: of the model.
        padded: packed rows keep their pads, as on a GPU or in compiled layers; else only a prompt of its own does.

    Returns:
        "tokens_unshared" with every prompt once per completion, "tokens_prompts_once" with every prompt once per
        micro-batch, or run of them, "tokens_trained" that the model encodes, "pads" beside them, "tokens_recomputed",
        those trained again because micro-batches have them in common, and "flop_ratio", how many times fewer FLOPs the
        layers need than without sharing. Idle micro-batches count in what is trained, and its pads, alone.
    """
    every_run = [run for batches in minibatches for run in runs(batches)]
    batches = [batch for run in every_run for batch in run]
    busy = [batch for batch in batches if not batch.is_idle]
    if sharing:
        trained = sum(map(encoded_tokens, minibatches))
        own = [batch.tree.num_tokens - batch.prefix_tokens for batch in batches]
        encoded = sum(map(padded_size, own) if padded else own)
        encoded += sum(padded_size(_prompt_tokens(run)) for run in every_run if len(run) > 1)
    else:
        trained = sum(dense_cost(batch.tree).tokens for batch in batches)
        encoded = sum(len(batch.tree.lengths) * batch.tree.max_length for batch in batches)
    again = sum(sum(batch.prefix_tokens for batch in run) - _prompt_tokens(run) for run in every_run)
    return {
        "tokens_unshared": sum(dense_cost(batch.tree).tokens for batch in busy),
        "tokens_prompts_once": sum(group_cost(batch.rollouts).tokens for batch in busy) - again,
        "tokens_trained": trained,
        "pads": encoded - trained,
        "tokens_recomputed": sum(map(recomputed_tokens, minibatches)) if sharing else 0,
        "flop_ratio": flop_ratio(minibatches, shape) if sharing else 1.0,
    }


def flop_ratio(minibatches: Sequence[Sequence[MicroBatch]], shape: ModelShape) -> float:
    """FLOPs of the layers without sharing over those of the packed rows; logits, which are alike, are left out.

    Args:
        minibatches: as in `cost_metrics`, packed with sharing.
        shape: of the model.
    """
    every_run = [run for batches in minibatches for run in runs(batches)]
    unshared = sum((dense_cost(batch.tree) for run in every_run for batch in run if not batch.is_idle), Cost(0, 0))
    packed = sum(map(run_cost, every_run), Cost(0, 0))
    return update_flops(unshared, 0, shape).total / update_flops(packed, 0, shape).total


def sharing_pays(minibatches: Sequence[Sequence[MicroBatch]], shape: ModelShape) -> tuple[bool, str]:
    """Whether packed rows save enough to be worth their masks, by the cost model, and a sentence that says so.

    Args:
        minibatches: as in `cost_metrics`, packed with sharing.
        shape: of the model.
    """
    ratio = flop_ratio(minibatches, shape)
    if ratio < PAYS:
        return False, f"every prompt is encoded once per completion, as sharing would save only {1 - 1 / ratio:.1%}"
    return True, f"prompts are shared, for {ratio:.1f} times fewer FLOPs in the layers of an update"


def _prompt_tokens(run: Sequence[MicroBatch]) -> int:
    """Of the prompt that a run's micro-batches have in common."""
    return max(batch.prefix_tokens for batch in run)


def rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Shares and ratios of a step's sums.

    Args:
        metrics: the step's, with `cost_metrics` and the seconds "sample_s", "score_s" and "train_s".

    Returns:
        "sample_fraction" of the seconds; "token_ratio", how many times fewer tokens were encoded than without sharing;
        "tokens_per_s", unshared ones by all seconds; "pad_waste", the share of pads in what was encoded.
    """
    total = metrics["sample_s"] + metrics["score_s"] + metrics["train_s"]
    return {
        "sample_fraction": metrics["sample_s"] / total,
        "token_ratio": metrics["tokens_unshared"] / metrics["tokens_trained"],
        "tokens_per_s": metrics["tokens_unshared"] / total,
        "pad_waste": metrics["pads"] / (metrics["pads"] + metrics["tokens_trained"]),
    }


def seconds(device: torch.device) -> float:
    """The time, when the device has done what it was given; differences of two count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def evaluated(history: Sequence[Mapping[str, float]], accuracies: Mapping[int, float]) -> str:
    """The latest evaluation in a line, with the mean reward of the steps since the one before.

    >>> evaluated([{"reward": 0.5}, {"reward": 1.0}], {0: 0.25, 2: 0.875})
    'step    2  held-out accuracy 0.875  reward 0.750'

    Args:
        history: the metrics of every step.
        accuracies: held-out accuracy by steps done.
    """
    *earlier, latest = sorted(accuracies)
    rewards = [metrics["reward"] for metrics in history[max(earlier, default=0) : latest]]
    trained_on = f"  reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    return f"step {latest:>4}  held-out accuracy {accuracies[latest]:.3f}{trained_on}"


def summary(history: Sequence[Mapping[str, float]], accuracies: Mapping[int, float]) -> str:
    """A table of what was learned, where the time went and what sharing saved.

    Args:
        history: every step's metrics, with the names above, "sample_s", "score_s" and "train_s".
        accuracies: held-out accuracy by step.
    """

    def mean(name: str) -> float:
        return sum(metrics[name] for metrics in history) / len(history)

    sample, score, train = (mean(name) for name in ("sample_s", "score_s", "train_s"))
    unshared, once, trained = (mean(f"tokens_{name}") for name in ("unshared", "prompts_once", "trained"))
    times = f"{sample + score + train:.2f}: sample {sample:.2f}, score {score:.2f}, train {train:.2f}"
    rows = [
        ("seconds per step", times),
        ("tokens per step", f"{unshared:,.0f} with every prompt once per completion"),
        ("", f"{once:,.0f} with every prompt once ({unshared / once:.1f} x fewer)"),
        ("", f"{trained:,.0f} is what this run trained on ({unshared / trained:.1f} x fewer)"),
        ("peak memory", f"{max(metrics['peak_memory_gib'] for metrics in history):.2f} GiB"),
    ]
    return "\n".join([*_evaluations(history, accuracies), *(f"{name:<20}{value}" for name, value in rows)])


def _evaluations(history: Sequence[Mapping[str, float]], accuracies: Mapping[int, float]) -> list[str]:
    """A line for each evaluation; reward and length are means over the steps since the one before."""
    lines = [f"{'step':>6}{'held-out accuracy':>20}{'reward':>9}{'completion tokens':>20}"]
    before = 0
    for step in sorted(accuracies):
        line = f"{step:>6}{accuracies[step]:>20.3f}"
        if since := history[before:step]:
            reward, tokens = (sum(m[name] for m in since) / len(since) for name in ("reward", "completion_tokens"))
            line += f"{reward:>9.3f}{tokens:>20.1f}"
        lines.append(line)
        before = step
    return lines
