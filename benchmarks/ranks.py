"""The process group of benchmarks with several ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, count: int, device_type: str, folder: Path) -> torch.device:
    """Join a group of `count` processes with one thread each (gloo on CPUs, NCCL on GPUs); return its device.

    Args:
        rank: Of this process.
        count: How many there are.
        device_type: "cpu" or "cuda".
        folder: Where the ranks find one another.
    """
    torch.set_num_threads(1)
    on_cpu = device_type == "cpu"
    device = torch.device("cpu") if on_cpu else torch.device("cuda", rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo" if on_cpu else "nccl", init_method=store, rank=rank, world_size=count)
    return device
