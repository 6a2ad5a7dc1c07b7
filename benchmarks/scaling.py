"""How the time of an update grows with completions and prompt tokens, and falls with threads and ranks.

    python -m benchmarks.scaling                    # CPU, float32
    python -m benchmarks.scaling --device cuda      # bfloat16; two ranks if there are two GPUs
    python -m benchmarks.scaling --tiny             # seconds, as a test

- completions: updates of groups of growing size, as in benchmarks.update. A least-squares line through the times of
  each repeat gives the milliseconds of one more completion: R tokens if the prompt is shared, P + R if not.
- prompt_tokens: the same with growing prompts. One more prompt token is one token if it is shared, and G if not.
  Attention grows with the square of the prompt, so the line is an average over the given prompts.
- threads: one flexpg update with one thread and with two.
- ranks: a step of data parallelism as in the recipe: every rank packs the rollouts for all ranks and computes its own
  micro-batches, and the gradients are summed (gloo on CPU, NCCL on GPUs). One rank computes the whole step while the
  other waits, alternating with both computing it together; each has one thread.
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
from torchtune.modules import TransformerDecoder

import flexpg
from benchmarks.models import SHAPES, build_decoder
from benchmarks.ranks import join
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from benchmarks.update import Case as Lengths
from benchmarks.update import Group, implementations, uneven, update
from flexpg import Rollouts


@dataclass(frozen=True)
class Case:
    """Groups of one prompt; what grows has several values, everything else one.

    Attributes:
        kind: What grows; threads and ranks are 1 and 2.
        prompt: Prompt tokens.
        completion: Tokens of each completion, or of the longest.
        group: Completions of one prompt.
        even: Whether all completions have that length.
        num_groups: Groups of a step, for ranks.
        compared: Implementations of benchmarks.update that are timed if completions or prompts grow.
    """

    kind: Literal["completions", "prompt_tokens", "threads", "ranks"]
    prompt: tuple[int, ...]
    completion: int
    group: tuple[int, ...]
    even: bool = True
    num_groups: int | None = None
    compared: tuple[str, ...] = ("baseline", "flexpg")
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


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the results of a case of any kind."""
    return {"threads": measure_threads, "ranks": measure_ranks}.get(case.kind, measure_growth)(case, device, repeats)


def measure_growth(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of every size by each implementation, and the slope of the line through them."""
    model = build_decoder(case.model, device, case.checkpointing)
    if case.kind == "completions":
        (prompt,) = case.prompt
        sizes = {count: (prompt, count) for count in case.group}
        tokens = {"baseline": prompt + case.completion, "flexpg": case.completion}
    else:
        (count,) = case.group
        sizes = {prompt: (prompt, count) for prompt in case.prompt}
        tokens = {"baseline": count, "flexpg": 1}
    calls = {
        (name, size): update_call(name, model, group_lengths(case, *lens))
        for name in case.compared
        for size, lens in sizes.items()
    }
    times = alternate(calls, repeats, device)
    update_ms, slopes = {}, {}
    for name in case.compared:
        timed = {size: times[name, size] for size in sizes if (name, size) in times}  # those that fit in memory
        update_ms[name] = {size: quartiles(each) for size, each in timed.items()}
        slopes[name] = [linear_regression(list(timed), repeat).slope for repeat in zip(*timed.values(), strict=True)]
    return {
        "update_ms": update_ms,
        "slope_ms": {name: quartiles(each) for name, each in slopes.items()},
        "slope_tokens": {name: tokens[name] for name in case.compared},
        "slope_ratio": paired_ratio(slopes["baseline"], slopes["flexpg"]) if "baseline" in slopes else None,
    }


def measure_threads(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of a flexpg update with one thread and with two."""
    one_update = update_call(
        "flexpg", build_decoder(case.model, device), group_lengths(case, *case.prompt, *case.group)
    )

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        one_update()

    before = torch.get_num_threads()
    times = alternate({f"{threads}": partial(with_threads, threads) for threads in (1, 2)}, repeats, device)
    torch.set_num_threads(before)
    return {
        "update_ms": {threads: quartiles(each) for threads, each in times.items()},
        "speedup": paired_ratio(times["1"], times["2"]),
    }


def measure_ranks(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the times of a step on one rank and on two; on one only if there is only one GPU."""
    count = 2 if device.type == "cpu" else min(2, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (count, case, device.type, repeats, Path(folder)), nprocs=count)
        times = json.loads((Path(folder) / "times.json").read_text())
    return {
        "step_ms": {ranks: quartiles(each) for ranks, each in times.items()},
        "speedup": paired_ratio(times["1"], times["2"]) if count == 2 else None,
    }


def rank_main(rank: int, count: int, case: Case, device_type: str, repeats: int, folder: Path) -> None:
    """Run one of `count` ranks; the first writes the times into the folder."""
    device = join(rank, count, device_type, folder)
    model, rollouts = flexpg.enable(build_decoder(case.model, device)), random_rollouts(case, device)
    max_tokens = case.prompt[0] + case.group[0] * case.completion  # one group per micro-batch

    def step(ranks: int) -> None:
        dist.barrier()  # no rank starts while another is at the previous step; it takes next to no time
        if rank < ranks:
            training_step(model, rollouts, max_tokens, rank, ranks)

    times = alternate({f"{ranks}": partial(step, ranks) for ranks in range(1, count + 1)}, repeats, device)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def training_step(model: TransformerDecoder, rollouts: Rollouts, max_tokens: int, rank: int, ranks: int) -> None:
    """Compute the step's gradients on each of the ranks."""
    model.zero_grad()
    advantages = flexpg.group_advantages(rollouts)
    batches = [batch for batch in flexpg.pack(rollouts, max_tokens, world_size=ranks) if batch.rank == rank]
    for batch, logprobs in flexpg.packed_logprobs(model, batches):
        loss = flexpg.grpo_loss(
            logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens
        )
        loss.backward()
    if ranks > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)


def group_lengths(case: Case, prompt: int, count: int) -> Lengths:
    """Return the lengths of one group."""
    return Lengths(prompt, (case.completion,) * count if case.even else uneven(case.completion, count))


def update_call(name: str, model: TransformerDecoder, lengths: Lengths) -> Callable[[], object]:
    """Return a function that computes one update of one group."""
    embeddings = model.tok_embeddings
    group = Group(lengths, embeddings.num_embeddings, embeddings.weight.device)
    return partial(update, model, group, implementations(model, group)[name])


def random_rollouts(case: Case, device: torch.device) -> Rollouts:
    """Return the rollouts of a step, the same on every rank."""
    lengths = group_lengths(case, *case.prompt, *case.group)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(SHAPES[case.model]["vocab_size"], (count,), generator=generator).to(device)

    return Rollouts.from_groups(
        prompts=[tokens(lengths.prompt) for _ in range(case.num_groups)],
        completions=[[tokens(count) for count in lengths.completions] for _ in range(case.num_groups)],
        rewards=torch.rand(case.num_groups, *case.group, generator=generator),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("scaling", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
