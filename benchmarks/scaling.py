"""How the time of an update grows with completions and with the prompt, and shrinks with threads and with processes.

    python -m benchmarks.scaling                    # CPU, fp32
    python -m benchmarks.scaling --device cuda      # bf16; two processes where there are two GPUs
    python -m benchmarks.scaling --tiny             # seconds, to see that it works

- completions: benchmarks.update's update of groups of growing size. A least-squares line through the times of each turn
  gives milliseconds per further completion: the work of its R tokens where the prompt is shared, of P + R where not.
- prompt_tokens: the same with growing prompts. A further token of the prompt is one more where it is shared, and G more
  where not. Attention grows with the square of the prompt, so a line is an average over the prompts that are given.
- threads: one flexpg update in a process with one thread and with two.
- ranks: a step of data parallelism as in the recipe: every process packs the rollouts for all, works through its own
  micro-batches, and the gradients are summed (gloo on CPU, NCCL on GPUs). One process does the whole step while the
  other waits, then both do it together, by turns; each has one thread.

All of a case is timed by turns in one process, or in two that keep in step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from benchmarks.models import SHAPES, decoder
from benchmarks.record import run
from benchmarks.turns import by_turns, median, ratio
from benchmarks.update import Case as Lengths
from benchmarks.update import Group, uneven, update, ways
from flexpg import Rollouts, group_advantages, grpo_loss, pack
from flexpg.integrations import torchtune as shared


@dataclass(frozen=True)
class Case:
    """Groups of `group` completions behind a prompt: what grows holds several values, all others one.

    Attributes:
        kind: what grows; threads and ranks are 1 and 2.
        prompt: tokens.
        completion: tokens of each, or of the longest.
        group: completions of one prompt.
        even: all completions have that length.
        num_groups: of a step, for ranks.
        compared: ways of benchmarks.update that are timed, where completions or prompts grow.
    """

    kind: Literal["completions", "prompt_tokens", "threads", "ranks"]
    prompt: tuple[int, ...]
    completion: int
    group: tuple[int, ...]
    even: bool = True
    num_groups: int | None = None
    compared: tuple[str, ...] = ("unshared", "flexpg")
    model: str = "small"
    checkpointing: bool = False


CASES = {
    "cpu": [
        Case("completions", (256,), 64, (1, 2, 4, 8, 16, 32)),
        Case("prompt_tokens", (256, 512, 1024), 64, (4,)),
        Case("prompt_tokens", (256, 512, 1024, 2048, 4096), 64, (8,), compared=("flexpg",)),
        Case("threads", (1024,), 64, (16,)),
        Case("threads", (1024,), 64, (16,), even=False),
        Case("ranks", (512,), 64, (8,), num_groups=4),
    ],
    "cuda": [
        Case("completions", (4096,), 256, (1, 2, 4, 8, 16, 32), model="0.5B", checkpointing=True),
        Case("prompt_tokens", (1024, 2048, 4096, 8192, 16_384), 256, (8,), model="0.5B", checkpointing=True),
        Case("ranks", (2048,), 256, (8,), num_groups=8, model="0.5B"),
    ],
    "tiny": [
        Case("completions", (64,), 16, (1, 2, 4), model="tiny"),
        Case("prompt_tokens", (32, 64, 128), 16, (2,), model="tiny"),
        Case("threads", (64,), 16, (4,), even=False, model="tiny"),
        Case("ranks", (64,), 16, (4,), num_groups=2, model="tiny"),
    ],
}


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """What the case's kind asks for."""
    if case.kind == "threads":
        return by_threads(case, device, turns)
    if case.kind == "ranks":
        return by_ranks(case, device, turns)
    return growth(case, device, turns)


def growth(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Times of every size by each way, and the slope of the line through them."""
    model = model_of(case, device)
    if case.kind == "completions":
        (prompt,) = case.prompt
        groups = {count: (prompt, count) for count in case.group}
        tokens = {"unshared": prompt + case.completion, "flexpg": case.completion}
    else:
        (count,) = case.group
        groups = {prompt: (prompt, count) for prompt in case.prompt}
        tokens = {"unshared": count, "flexpg": 1}
    updates = {
        f"{way} {size}": update_by(way, model, lengths_of(case, *group))
        for way in case.compared
        for size, group in groups.items()
    }
    times = by_turns(updates, turns, device)
    update_ms, slopes = {}, {}
    for way in case.compared:
        of_way = {size: times[f"{way} {size}"] for size in groups if f"{way} {size}" in times}  # the memory sufficed
        update_ms[way] = {size: median(each) for size, each in of_way.items()}
        slopes[way] = [linear_regression(list(of_way), turn).slope for turn in zip(*of_way.values(), strict=True)]
    return {
        "update_ms": update_ms,
        "slope_ms": {way: median(each) for way, each in slopes.items()},
        "slope_tokens": {way: tokens[way] for way in case.compared},
        "slope_ratio": ratio(slopes["unshared"], slopes["flexpg"]) if "unshared" in slopes else None,
    }


def by_threads(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """A flexpg update with one thread and with two."""
    one_update = update_by("flexpg", model_of(case, device), lengths_of(case, *case.prompt, *case.group))

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        one_update()

    before = torch.get_num_threads()
    times = by_turns({f"{threads}": partial(with_threads, threads) for threads in (1, 2)}, turns, device)
    torch.set_num_threads(before)
    return {
        "update_ms": {threads: median(each) for threads, each in times.items()},
        "speedup": ratio(times["1"], times["2"]),
    }


def by_ranks(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """A step of one process and of two, or of one alone where there is but one GPU."""
    count = 2 if device.type == "cpu" else min(2, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_times, (count, case, device.type, turns, Path(folder)), nprocs=count)
        times = json.loads((Path(folder) / "times.json").read_text())
    return {
        "step_ms": {ranks: median(each) for ranks, each in times.items()},
        "speedup": ratio(times["1"], times["2"]) if count == 2 else None,
    }


def rank_times(rank: int, count: int, case: Case, kind_of_device: str, turns: int, folder: Path) -> None:
    """One of `count` processes, which take the same turns; the first writes the times into the folder."""
    torch.set_num_threads(1)
    on_cpu = kind_of_device == "cpu"
    device = torch.device("cpu") if on_cpu else torch.device("cuda", rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo" if on_cpu else "nccl", init_method=store, rank=rank, world_size=count)
    model, rollouts = model_of(case, device), rollouts_of(case, device)
    max_tokens = case.prompt[0] + case.group[0] * case.completion  # a group each

    def step(ranks: int) -> None:
        dist.barrier()  # nobody begins while others are at the turn before; it counts, as next to nothing
        if rank < ranks:
            training_step(model, rollouts, max_tokens, rank, ranks)

    times = by_turns({f"{ranks}": partial(step, ranks) for ranks in range(1, count + 1)}, turns, device)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def training_step(model: TransformerDecoder, rollouts: Rollouts, max_tokens: int, rank: int, ranks: int) -> None:
    """The whole step's gradients in each of the processes."""
    model.zero_grad()
    advantages = group_advantages(rollouts.rewards, rollouts.group_ids)
    for batch in pack(rollouts, max_tokens, ranks):
        if batch.rank == rank:
            logprobs, _ = shared.logprobs(model, batch)
            trained, normalizer = batch.rollouts.trained, rollouts.trained.sum()
            grpo_loss(logprobs, None, advantages[batch.indices], trained, normalizer=normalizer)[0].backward()
    if ranks > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)


def model_of(case: Case, device: torch.device) -> TransformerDecoder:
    """The same weights in every process."""
    model = decoder(case.model, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if case.checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


def lengths_of(case: Case, prompt: int, count: int) -> Lengths:
    """Of one group."""
    return Lengths(prompt, (case.completion,) * count if case.even else uneven(case.completion, count))


def update_by(way: str, model: TransformerDecoder, lengths: Lengths) -> Callable[[], object]:
    """An update of one group, ready to be called."""
    embeddings = model.tok_embeddings
    group = Group(lengths, embeddings.num_embeddings, embeddings.weight.device)
    return partial(update, model, group, ways(model, group)[way])


def rollouts_of(case: Case, device: torch.device) -> Rollouts:
    """Random ones of a step, the same in every process."""
    of_group = [lengths_of(case, *case.prompt, *case.group)] * case.num_groups
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(SHAPES[case.model]["vocab_size"], (count,), generator=generator).to(device)

    completions = [tokens(count) for lengths in of_group for count in lengths.completions]
    return Rollouts(
        prompts=[tokens(lengths.prompt) for lengths in of_group],
        completions=completions,
        group_ids=torch.arange(case.num_groups, device=device).repeat_interleave(*case.group),
        rewards=torch.rand(len(completions), generator=generator).to(device),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("scaling", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
