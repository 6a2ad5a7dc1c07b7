"""Tests of the wrappers over torch.distributed, and of the processes in which tests run ranks."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from flexpg.training.distributed import World

CPU = torch.device("cpu")


def shard_and_gather(rank: int) -> list[tuple[list[int], list[str]]]:
    world = World.init(CPU)
    results = []
    for length in range(8):
        shard = world.shard(range(length))
        results.append((shard, world.all_gather([f"result {n}" for n in shard])))
    world.shutdown()
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shard_is_even_and_all_gather_restores_the_order(world_size):
    by_rank = run_processes(world_size, shard_and_gather)
    for length in range(8):
        shards = [results[length][0] for results in by_rank]
        assert sorted(n for shard in shards for n in shard) == list(range(length))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        assert all(results[length][1] == [f"result {n}" for n in range(length)] for results in by_rank)


def reduce(rank: int) -> Any:
    world = World.init(CPU)
    total = world.all_reduce_sum({"whole": 2**40 + rank, "part": rank + 0.1})
    largest = [world.all_reduce_max(-1.0 - rank), world.all_reduce_max(rank), world.all_reduce_max(rank == 1)]
    world.shutdown()
    return total, largest


def test_all_reduce_sum_is_float64_and_all_reduce_max_covers_all_ranks():
    total = {"whole": 3 * 2**40 + 3, "part": pytest.approx(3.3, rel=1e-15)}  # 2**40 + 1 does not fit in float32
    assert run_processes(3, reduce) == [(total, [-1.0, 2, True])] * 3
    assert run_processes(1, reduce) == [({"whole": 2**40, "part": 0.1}, [-1.0, 0, False])]


def raise_error(world: World, failing: dict[int, Exception]) -> str:
    """Return the message of what is raised on this rank."""
    try:
        with world.raise_on_all_ranks(OSError):
            if world.rank in failing:
                raise failing[world.rank]
        return "no error"
    except ValueError as error:
        assert (error.__cause__ is failing.get(world.rank)) and isinstance(error.__cause__, OSError | None)
        return str(error)


def raise_errors(rank: int) -> list[str]:
    world = World.init(CPU)
    full, gone = OSError(28, "No space left"), OSError("gone:\nthe disk")
    cases = [{}, {1: full}, {0: gone, 1: full}, dict.fromkeys(range(3), full), {0: OSError()}]
    messages = [raise_error(world, failing) for failing in cases]
    world.shutdown()
    return messages


def test_raise_on_all_ranks_raises_the_first_ranks_message_everywhere():
    one, first, every, without_message = (
        "[Errno 28] No space left (on rank 1 of 3)",
        "gone: the disk (on rank 0 of 3)",
        "[Errno 28] No space left",
        "OSError (on rank 0 of 3)",
    )
    assert run_processes(3, raise_errors) == [["no error", one, first, every, without_message]] * 3
    assert run_processes(1, raise_errors) == [["no error", "no error", "gone: the disk", every, "OSError"]]


def raise_key_error(rank: int) -> str:
    return raise_error(World.init(CPU), {1: KeyError("no such name")})


def test_raise_on_all_ranks_passes_other_errors_on_unchanged():
    with pytest.raises(KeyError, match="no such name"):
        run_processes(2, raise_key_error)


def raise_together(rank: int) -> list[Any]:
    """Return type and message of what is raised on this rank, and the type of its cause."""
    world = World.init(CPU)
    cases = [{}, {1: KeyError("no such\nname")}, {0: OSError(28, "No space left"), 1: ValueError("wrong")}]
    found = []
    for failing in cases:
        try:
            with world.raise_together():
                if world.rank in failing:
                    raise failing[world.rank]
            found.append("no error")
        except Exception as error:
            found.append((type(error).__name__, str(error), type(error.__cause__).__name__))
    world.shutdown()
    return found


def test_raise_together_names_the_first_rank_and_keeps_each_ranks_own_error():
    one = "rank 1 of 3 raised KeyError: 'no such\\nname'"
    first = "rank 0 of 3 raised OSError: [Errno 28] No space left"
    expected = [("NoneType", "OSError"), ("KeyError", "ValueError"), ("NoneType", "NoneType")]
    assert run_processes(3, raise_together) == [
        ["no error", ("RankError", one, second), ("RankError", first, third)] for second, third in expected
    ]
    assert run_processes(1, raise_together) == [
        ["no error", "no error", ("OSError", "[Errno 28] No space left", "NoneType")]
    ]


def wait_at_barrier(rank: int) -> tuple[float, float]:
    world = World.init(CPU)
    time.sleep(0.2 * rank)
    arrived = time.monotonic()
    world.barrier()
    return arrived, time.monotonic()


def test_barrier_waits_for_the_last_rank():
    arrived, left = zip(*run_processes(3, wait_at_barrier), strict=True)
    assert min(left) >= max(arrived) > min(arrived) + 0.2


def init_twice(rank: int) -> list[Any]:
    world = World.init(CPU)
    seen = [(world.rank, world.size, world.is_first, dist.is_initialized()), World.init(CPU) == world]
    world.shutdown()
    return [*seen, dist.is_initialized()]


def test_init_creates_a_process_group_and_shutdown_destroys_it():
    assert run_processes(2, init_twice) == [[(0, 2, True, True), True, False], [(1, 2, False, True), True, False]]
    assert run_processes(1, init_twice) == [[(0, 1, True, False), True, False]]


def test_world_of_one_needs_no_launcher_and_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    world = World.init(CPU)
    assert world == World(0, 1, CPU) and world.is_first and not dist.is_initialized()
    world.barrier()
    world.shutdown()
    assert world.all_gather(world.shard("abc")) == ["a", "b", "c"]
    assert (world.all_reduce_sum({"a": 0.5}), world.all_reduce_max(2.0)) == ({"a": 0.5}, 2.0)


def crash(rank: int) -> None:
    world = World.init(CPU)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def test_run_processes_names_a_crashed_rank():
    with pytest.raises(RuntimeError, match="rank 1 of 2 died with exit code -9"):
        run_processes(2, crash)
