"""One group over the ranks of a context-parallel group: time, peak memory per rank and bytes of communication.

    python -m benchmarks.context_parallel                    # CPU, float32: gloo, one thread per rank
    python -m benchmarks.context_parallel --device cuda      # bfloat16, NCCL; as many ranks as there are GPUs
    python -m benchmarks.context_parallel --tiny             # seconds, as a test

An update is forward, log-probabilities, loss and backward of one group in one packed sequence, with activation
checkpointing, so that layers keep their inputs only. On one rank it is the usual one; on several, each computes a part
of the tokens. All numbers of ranks alternate in the same processes, those that take no part wait.

A peak is the most memory that an update has allocated with torch's allocator at a time, the highest of all ranks and of
`PEAKS` updates that are not timed. Gradients of parameters do not count: each is freed as soon as it is computed. Only
that of the output layer, which is tied to the embeddings, waits for theirs. The limit is what a rank may need if
activations are divided: 1 / N of one rank's peak plus 10 %, and the keys and values of all tokens in one layer; the
gradient of the output layer is not divided. The estimate is the cost model's,
`flexpg.analysis.ranks.context_parallel_bytes`. Bytes are those of the tensors that a rank gathers and sums in one
update, its own part included: keys and values in the forward and again when a layer is recomputed, and their gradients.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

import flexpg
from benchmarks.memory import MIB, free_gradient, peak_bytes
from benchmarks.models import SHAPES, build_decoder
from benchmarks.ranks import join
from benchmarks.record import run
from benchmarks.timing import alternate, paired_ratio, quartiles
from flexpg import Rollouts
from flexpg.analysis.ranks import context_parallel_bytes
from flexpg.analysis.torchtune_shape import shape_of


@dataclass(frozen=True)
class Case:
    """A group of completions of one length; times are of the numbers of ranks in `timed`, peaks of those in `ranks`."""

    prompt: int
    completion: int
    group: int
    model: str = "small"
    timed: tuple[int, ...] = (1, 2)
    ranks: tuple[int, ...] = (1, 2, 4)


CASES = {
    "cpu": [Case(4096, 64, 8), Case(16_384, 64, 8)],
    "cuda": [Case(prompt, 512, 8, "0.5B", (1, 2, 4, 8), (1, 2, 4, 8)) for prompt in (16_384, 65_536)],
    "tiny": [Case(300, 16, 4, "tiny", ranks=(1, 2))],
}
PEAKS = 3


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return times, peaks and bytes by number of ranks, those for which there are enough GPUs."""
    count = max(case.ranks) if device.type == "cpu" else min(max(case.ranks), torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (count, case, device.type, repeats, Path(folder)), nprocs=count)
        parts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    times, first = parts[0]["times"], parts[0]
    itemsize = 4 if device.type == "cpu" else 2
    peaks = {ranks: max(part["peaks"].get(ranks, 0) for part in parts) for ranks in first["peaks"]}
    return {
        "layers": SHAPES[case.model]["num_layers"],
        "update_ms": {ranks: quartiles(values) for ranks, values in times.items()},
        "speedup": {ranks: paired_ratio(times["1"], values) for ranks, values in times.items() if ranks != "1"},
        "peak_mib": peaks,
        "limit_mib": {ranks: limit_mib(case, int(ranks), peaks["1"], itemsize) for ranks in peaks},
        "estimate_mib": first["estimates"],
        "collective_mib": {ranks: max(part["received"].get(ranks, 0) for part in parts) for ranks in first["received"]},
        "largest_difference": max(part["largest_difference"] for part in parts),
    }


def rank_main(rank: int, count: int, case: Case, device_type: str, repeats: int, folder: Path) -> None:
    """Run one of `count` ranks, which writes what it measured into the folder."""
    device = join(rank, count, device_type, folder)
    model = flexpg.enable(build_decoder(case.model, device, checkpointing=True))
    rollouts = random_rollouts(case, device)
    groups = {n: dist.new_group(range(n)) for n in case.ranks if n <= count}
    taking_part = [n for n in groups if rank < n]

    def step(ranks: int) -> None:
        dist.barrier()  # no rank starts while another is at the previous step; it takes next to no time
        if ranks in taking_part:
            update(model, rollouts, None if ranks == 1 else groups[ranks])

    times = alternate({f"{n}": partial(step, n) for n in case.timed if n <= count}, repeats, device)
    whole = update(model, rollouts, None)
    found: dict[str, Any] = {"times": times, "peaks": {}, "received": {}, "estimates": {}, "largest_difference": 0.0}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free_gradient)
    for n in taking_part:
        group = None if n == 1 else groups[n]
        with counted_bytes() as counts:
            table = update(model, rollouts, group)
        found["largest_difference"] = max(found["largest_difference"], float((table - whole).abs().max()))
        found["received"][f"{n}"] = sum(counts.values()) / MIB
        one_update = partial(update, model, rollouts, group)
        found["peaks"][f"{n}"] = max(peak_bytes(one_update, device) for _ in range(PEAKS)) / MIB
        found["estimates"][f"{n}"] = estimate_mib(model, rollouts, n)
        dist.barrier(groups[n])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def update(model: nn.Module, rollouts: Rollouts, group: dist.ProcessGroup | None) -> Tensor:
    """Compute the gradients of one packed sequence, and return its log-probabilities."""
    model.zero_grad()
    advantages, total = flexpg.group_advantages(rollouts), rollouts.num_loss_tokens
    max_tokens = rollouts.tree.num_tokens
    for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=max_tokens, context_parallel=group):
        flexpg.grpo_loss(logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=total).backward()
    return logprobs.detach()


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes of what a rank gathers, its own part included, and of the gradients that it sums."""
    counts = {"all_gather": 0, "reduce_scatter": 0}
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def counting_all_gather(parts: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        counts["all_gather"] += sum(part.nbytes for part in parts)
        return all_gather(parts, tensor, **options)

    def counting_reduce_scatter(tensor: Tensor, parts: list[Tensor], **options: Any) -> Any:
        counts["reduce_scatter"] += sum(part.nbytes for part in parts)
        return reduce_scatter(tensor, parts, **options)

    dist.all_gather, dist.reduce_scatter = counting_all_gather, counting_reduce_scatter
    try:
        yield counts
    finally:
        dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def limit_mib(case: Case, ranks: int, peak_of_one: float, itemsize: int) -> float:
    """Return what a rank may need if activations are divided; that of one rank is its peak."""
    if ranks == 1:
        return peak_of_one
    shape = SHAPES[case.model]
    head_dim = shape["embed_dim"] // shape["num_heads"]
    tokens = case.prompt + case.group * case.completion
    output_gradient = shape["vocab_size"] * shape["embed_dim"] * itemsize / MIB
    keys_and_values = tokens * 2 * shape["num_kv_heads"] * head_dim * itemsize / MIB
    return (peak_of_one - output_gradient) / ranks * 1.1 + keys_and_values + output_gradient


def estimate_mib(model: nn.Module, rollouts: Rollouts, ranks: int) -> float:
    """Return the cost model's estimate of a rank's peak."""
    shape, itemsize, tokens = shape_of(model), next(model.parameters()).itemsize, rollouts.tree.num_tokens
    return context_parallel_bytes(tokens, rollouts.num_loss_tokens, shape, ranks, itemsize=itemsize) / MIB


def random_rollouts(case: Case, device: torch.device) -> Rollouts:
    """Return one group, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(SHAPES[case.model]["vocab_size"], (count,), generator=generator).to(device)

    completions = [tokens(case.completion) for _ in range(case.group)]
    return Rollouts.from_groups([tokens(case.prompt)], [completions], torch.rand(1, case.group, generator=generator))


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("context_parallel", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
