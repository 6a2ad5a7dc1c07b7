"""Peak memory of one update, by everyone, against the cost model's estimate; and the largest group under a budget.

    python -m benchmarks.memory                    # CPU, fp32
    python -m benchmarks.memory --device cuda      # bf16: 0.5B and 3B shapes
    python -m benchmarks.memory --tiny             # seconds, to see that it works

The ways are those of benchmarks.update. A peak is the most that torch's allocator has given out at a time during one
update (forward, log-probabilities, loss, backward), less what it had given out before: the weights and the tokens.
torchtune's dense mask (G T^2 bytes) is made in the call and counts, as a recipe keeps it. Gradients do not count, as
each is dropped as soon as it is made. So a peak is what has to be free beside weights and gradients: what a training
step takes from its second micro-batch on, when each gradient is added to one that is there. The output layer is tied to
the embeddings: its gradient (V E entries) waits for theirs and counts meanwhile, which the estimate leaves out.

The largest group is found by bisection over measured peaks, one update each; beside it stands what the estimate alone
would have said. A way that runs out of memory is left out. Nothing is timed, and peaks are the same every time, so
--turns is not used.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from benchmarks.models import decoder
from benchmarks.record import run
from benchmarks.update import Case as Lengths
from benchmarks.update import Group, Way, update, ways
from flexpg import PrefixTree, activation_bytes, dense_cost, shared_cost
from flexpg.analysis.torchtune_shape import shape_of

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Completions of one length: peaks of a group of `group`, or the largest group whose peak is within `budget_mib`.

    The budget is beside weights, gradients and the optimizer's state, as peaks are.
    """

    prompt: int
    completion: int
    group: int | None = None
    budget_mib: int | None = None
    model: str = "small"
    checkpointing: bool = False


def both(*lengths: int, **more: Any) -> list[Case]:
    """Without activation checkpointing, and with it."""
    return [Case(*lengths, **more, checkpointing=checkpointing) for checkpointing in (False, True)]


CASES = {
    "cpu": [*both(1024, 64, 16), *both(2048, 128, 8), Case(2048, 128, budget_mib=1024)],
    "cuda": [
        *(
            case
            for model in ("0.5B", "3B")
            for lengths in ((1024, 256, 16), (4096, 512, 8), (4096, 128, 32), (16_384, 2048, 8))
            for case in both(*lengths, model=model)
        ),
        # An 80 GB GPU has about 55 GiB left beside weights, gradients and AdamW's two moments of 3B in bf16.
        *both(8192, 1024, budget_mib=52 * 1024, model="3B"),
    ],
    "tiny": [Case(96, 16, 4, model="tiny", checkpointing=True), Case(96, 16, budget_mib=2, model="tiny")],
}
ESTIMATED = ("unshared", "flexpg")  # the ways that the cost model knows


def measured(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Peaks or largest groups, measured and estimated."""
    model = decoder(case.model, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if case.checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    if device.type == "cuda":
        for completion in (64, 128):  # workspaces of libraries stay; kernels are compiled, twice, for dynamic lengths
            peaks_mib(model, Lengths(128, (completion,) * 2))
    if case.budget_mib is None:
        lengths = Lengths(case.prompt, (case.completion,) * case.group)
        return {
            "parameters_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB,
            "peak_mib": peaks_mib(model, lengths),
            "estimate_mib": {name: estimated_mib(model, case, name, case.group) for name in ESTIMATED},
        }
    by_peak, by_estimate = (
        {name: largest(partial(mib, model, case, name), case.budget_mib) for name in ESTIMATED}
        for mib in (measured_mib, estimated_mib)
    )
    return {"largest_group": by_peak, "largest_group_by_estimate": by_estimate}


def drop_gradient(parameter: Tensor) -> None:
    """Frees it while the backward goes on."""
    parameter.grad = None


def largest(mib: Callable[[int], float], budget_mib: float) -> int:
    """The largest group size whose MiB are within the budget, 0 if not even one completion's are."""
    low, high = 0, 1  # low fits, and from some doubling on high does not
    while mib(high) <= budget_mib:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mib(middle) <= budget_mib else (low, middle)
    return low


def measured_mib(model: TransformerDecoder, case: Case, name: str, size: int) -> float:
    """The peak of one way on a group of this size."""
    group = group_of(model, Lengths(case.prompt, (case.completion,) * size))
    return peak_mib(model, group, ways(model, group)[name])


def estimated_mib(model: TransformerDecoder, case: Case, name: str, size: int) -> float:
    """The same by the cost model."""
    tree = PrefixTree.from_lengths([case.prompt], [[case.completion] * size])
    estimate = activation_bytes(
        shared_cost(tree) if name == "flexpg" else dense_cost(tree),
        size * case.completion,
        shape_of(model),
        itemsize=model.tok_embeddings.weight.itemsize,
        activation_checkpointing=case.checkpointing,
        expanded_kv=name == "unshared",
    )
    return estimate / MIB


def peaks_mib(model: TransformerDecoder, lengths: Lengths) -> dict[str, float]:
    """The peak of each way whose memory suffices."""
    group = group_of(model, lengths)
    peaks = {name: peak_mib(model, group, way) for name, way in ways(model, group).items()}
    return {name: peak for name, peak in peaks.items() if peak < math.inf}


def group_of(model: TransformerDecoder, lengths: Lengths) -> Group:
    """On the model's device."""
    embeddings = model.tok_embeddings
    return Group(lengths, embeddings.num_embeddings, embeddings.weight.device)


def peak_mib(model: TransformerDecoder, group: Group, way: Way) -> float:
    """The peak of one update; infinite where the memory does not suffice."""
    gc.collect()  # what lingers from another way is not to count as there before
    try:
        return peak_bytes(lambda: update(model, group, way), group.rows.device) / MIB
    except torch.OutOfMemoryError:
        pass  # the traceback holds the update's tensors until here
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return math.inf


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator gives out at a time in the call, without what it has given out before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    allocations, waiting = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields))
    allocations.sort(key=lambda allocation: allocation[0])
    _, first = allocations[0]
    return max(fields.total_allocated for _, fields in allocations) - (first.total_allocated - first.alloc_size)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and saves."""
    run("memory", __doc__, CASES, measured, argv)


if __name__ == "__main__":
    main()
