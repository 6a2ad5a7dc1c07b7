"""Peak memory of one update, compared with the cost model's estimate; and the largest group within a budget.

    python -m benchmarks.memory                    # CPU, float32
    python -m benchmarks.memory --device cuda      # bfloat16: 0.5B and 3B shapes
    python -m benchmarks.memory --tiny             # seconds, as a test

The implementations are those of benchmarks.update. A peak is the most memory that one update (forward,
log-probabilities, loss, backward) has allocated with torch's allocator at a time; what was there before does not count:
weights and tokens. torchtune's dense mask (G T^2 bytes) is built in the call and counts, as a recipe keeps it.
Gradients do not count, because each is freed as soon as it is computed. So a peak is what has to be free besides
weights and gradients, as in a training step from its second micro-batch on. The output layer is tied to the embeddings:
its gradient (V E entries) waits for theirs and counts, which the estimate leaves out.

The largest group is found by bisection over measured peaks, one update each, and over the estimate. An implementation
that runs out of memory is left out. Nothing is timed and peaks do not vary, so --repeats has no effect.
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
from torchtune.modules import TransformerDecoder

from benchmarks.models import build_decoder
from benchmarks.record import run
from benchmarks.update import Case as Lengths
from benchmarks.update import Group, Implementation, implementations, update
from flexpg import PrefixTree
from flexpg.analysis.flops import activation_bytes
from flexpg.analysis.torchtune_shape import shape_of

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Completions of one length: the peaks of a group of `group`, or the largest group with a peak of `budget_mib`.

    The budget does not include weights, gradients and optimizer state, just as peaks do not.
    """

    prompt: int
    completion: int
    group: int | None = None
    budget_mib: int | None = None
    model: str = "small"
    checkpointing: bool = False


def with_and_without_checkpointing(*lengths: int, **options: Any) -> list[Case]:
    """Return two cases."""
    return [Case(*lengths, **options, checkpointing=checkpointing) for checkpointing in (False, True)]


CASES = {
    "cpu": [
        *with_and_without_checkpointing(1024, 64, 16),
        *with_and_without_checkpointing(2048, 128, 8),
        Case(2048, 128, budget_mib=1024),
    ],
    "cuda": [
        *(
            case
            for model in ("0.5B", "3B")
            for lengths in ((1024, 256, 16), (4096, 512, 8), (4096, 128, 32), (16_384, 2048, 8))
            for case in with_and_without_checkpointing(*lengths, model=model)
        ),
        # Weights, gradients and AdamW's moments of a 3B model in bfloat16 leave about 55 GiB of an 80 GB GPU.
        *with_and_without_checkpointing(8192, 1024, budget_mib=52 * 1024, model="3B"),
    ],
    "tiny": [Case(96, 16, 4, model="tiny", checkpointing=True), Case(96, 16, budget_mib=2, model="tiny")],
}
ESTIMATED = ("baseline", "flexpg")  # implementations that the cost model knows


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return peaks or largest groups, measured and estimated."""
    model = build_decoder(case.model, device, case.checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free_gradient)
    if device.type == "cuda":
        for completion in (64, 128):  # workspaces of libraries stay; kernels compile, twice for dynamic lengths
            all_peaks_mib(model, Lengths(128, (completion,) * 2))
    if case.budget_mib is None:
        return {
            "parameters_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB,
            "peak_mib": all_peaks_mib(model, Lengths(case.prompt, (case.completion,) * case.group)),
            "estimate_mib": {name: estimate_mib(model, case, name, case.group) for name in ESTIMATED},
        }
    by_peak, by_estimate = (
        {name: largest(partial(mib, model, case, name), case.budget_mib) for name in ESTIMATED}
        for mib in (group_peak_mib, estimate_mib)
    )
    return {"largest_group": by_peak, "largest_group_by_estimate": by_estimate}


def free_gradient(parameter: Tensor) -> None:
    """Free a gradient while the backward continues."""
    parameter.grad = None


def largest(mib: Callable[[int], float], budget_mib: float) -> int:
    """Return the largest group whose MiB are within the budget; 0 if not even one completion's are."""
    low, high = 0, 1
    while mib(high) <= budget_mib:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mib(middle) <= budget_mib else (low, middle)
    return low


def group_peak_mib(model: TransformerDecoder, case: Case, name: str, size: int) -> float:
    """Return the peak of one implementation for a group of this size."""
    group = random_group(model, Lengths(case.prompt, (case.completion,) * size))
    return peak_mib(model, group, implementations(model, group)[name])


def estimate_mib(model: TransformerDecoder, case: Case, name: str, size: int) -> float:
    """Return the cost model's estimate of it."""
    tree = PrefixTree.from_lengths([case.prompt], [[case.completion] * size])
    estimate = activation_bytes(
        tree.num_tokens if name == "flexpg" else tree.baseline_tokens,
        size * case.completion,
        shape_of(model),
        itemsize=model.tok_embeddings.weight.itemsize,
        activation_checkpointing=case.checkpointing,
        expanded_kv=name == "baseline",
    )
    return estimate / MIB


def all_peaks_mib(model: TransformerDecoder, lengths: Lengths) -> dict[str, float]:
    """Return the peak of each implementation that did not run out of memory."""
    group = random_group(model, lengths)
    peaks = {name: peak_mib(model, group, each) for name, each in implementations(model, group).items()}
    return {name: peak for name, peak in peaks.items() if peak < math.inf}


def random_group(model: TransformerDecoder, lengths: Lengths) -> Group:
    """Return random tokens on the model's device."""
    embeddings = model.tok_embeddings
    return Group(lengths, embeddings.num_embeddings, embeddings.weight.device)


def peak_mib(model: TransformerDecoder, group: Group, implementation: Implementation) -> float:
    """Return the peak of one update; infinity if it runs out of memory."""
    gc.collect()  # what is left of another implementation must not count as held before
    try:
        return peak_bytes(lambda: update(model, group, implementation), group.batch.device) / MIB
    except torch.OutOfMemoryError:
        pass  # the traceback holds the update's tensors until here
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return math.inf


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that a call has allocated with torch's allocator at a time.

    On a CPU it is summed up from allocations and deallocations: the total that torch's profiler gives with them counts
    tensors that a thread of gloo frees as allocated for ever.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes, pending = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes: dict[int, int] = {}  # by address; an address that is allocated again was free
    held = peak = 0
    for _, address, size in sorted(changes, key=lambda change: change[0]):
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
            peak = max(peak, held)
    return peak


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    run("memory", __doc__, CASES, measure, argv)


if __name__ == "__main__":
    main()
