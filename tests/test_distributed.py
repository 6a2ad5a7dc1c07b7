"""Processes share out work, and every one of them ends with all of what came of it; a failure of one is reported."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from flexpg.training.distributed import World

CPU = torch.device("cpu")


def shares_and_gathered(rank: int) -> list[tuple[list[int], list[str]]]:
    world = World.join(CPU)
    results = []
    for length in range(8):
        share = world.share(range(length))
        results.append((share, world.gather([f"result {n}" for n in share])))
    world.leave()
    return results


@pytest.mark.parametrize("count", [1, 2, 3])
def test_items_are_shared_out_evenly_and_their_results_gathered_in_order_everywhere(count):
    everywhere = run_processes(count, shares_and_gathered)
    for length in range(8):
        shares = [results[length][0] for results in everywhere]
        assert sorted(n for share in shares for n in share) == list(range(length))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for results in everywhere:
            assert results[length][1] == [f"result {n}" for n in range(length)]
        # The processes' results one after the other would not be in order.
        one_by_one = [n for share in shares for n in share]
        assert one_by_one != list(range(length)) or count == 1 or length <= count


def numbers(rank: int) -> Any:
    world = World.join(CPU)
    total = world.total({"whole": 2**40 + rank, "part": rank + 0.1})
    largest = [world.largest(-1.0 - rank), world.largest(rank), world.largest(rank == 1)]
    world.leave()
    return total, largest


def test_totals_and_maxima_are_over_all_processes_and_exact_in_float64():
    total = {"whole": 3 * 2**40 + 3, "part": pytest.approx(3.3, rel=1e-15)}  # float32 has no 2**40 + 1
    assert run_processes(3, numbers) == [(total, [-1.0, 2, True])] * 3
    assert run_processes(1, numbers) == [({"whole": 2**40, "part": 0.1}, [-1.0, 0, False])]


def block(world: World, failing: dict[int, Exception]) -> str:
    """What comes of a block that fails on some processes."""
    try:
        with world.together(OSError):
            if world.rank in failing:
                raise failing[world.rank]
        return "done"
    except ValueError as error:
        assert (error.__cause__ is failing.get(world.rank)) and isinstance(error.__cause__, OSError | None)
        return str(error)


def blocks(rank: int) -> list[str]:
    world = World.join(CPU)
    full, gone = OSError(28, "No space left"), OSError("gone:\nthe disk")
    cases = [{}, {1: full}, {0: gone, 1: full}, dict.fromkeys(range(3), full), {0: OSError()}]
    outcomes = [block(world, failing) for failing in cases]
    world.leave()
    return outcomes


def test_a_block_that_fails_on_one_process_fails_on_all_with_one_message_and_nobody_waits():
    one, other, every, nameless = (
        "[Errno 28] No space left (process 1 of 3, from 0)",
        "gone: the disk (process 0 of 3, from 0)",
        "[Errno 28] No space left",
        "OSError (process 0 of 3, from 0)",
    )
    assert run_processes(3, blocks) == [["done", one, other, every, nameless]] * 3
    assert run_processes(1, blocks) == [["done", "done", "gone: the disk", every, "OSError"]]


def unforeseen(rank: int) -> str:
    world = World.join(CPU)
    return block(world, {1: KeyError("no such name")})


def test_what_a_block_does_not_name_is_raised_as_it_is():
    with pytest.raises(KeyError, match="no such name"):
        run_processes(2, unforeseen)


def arrivals(rank: int) -> tuple[float, float]:
    world = World.join(CPU)
    time.sleep(0.2 * rank)
    arrived = time.monotonic()
    world.wait()
    return arrived, time.monotonic()


def test_nobody_waits_for_less_than_the_last_to_arrive():
    arrived, left = zip(*run_processes(3, arrivals), strict=True)
    assert min(left) >= max(arrived) > min(arrived) + 0.2


def memberships(rank: int) -> list[Any]:
    world = World.join(CPU)
    seen = [(world.rank, world.size, world.is_first, dist.is_initialized()), World.join(CPU) == world]
    world.leave()
    return [*seen, dist.is_initialized()]


def test_a_process_joins_once_and_leaves():
    assert run_processes(2, memberships) == [[(0, 2, True, True), True, False], [(1, 2, False, True), True, False]]
    assert run_processes(1, memberships) == [[(0, 1, True, False), True, False]]


def test_a_process_that_nobody_launched_stands_alone_without_a_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    world = World.join(CPU)
    assert world == World(0, 1, CPU) and world.is_first and not dist.is_initialized()
    world.wait()
    world.leave()
    assert world.gather(world.share("abc")) == ["a", "b", "c"]
    assert (world.total({"a": 0.5}), world.largest(2.0)) == ({"a": 0.5}, 2.0)


class Reason(Exception):
    """An error with a signature of its own, which pickle cannot restore."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} because {why}")


def fail(rank: int, how: str) -> None:
    """Process 1 fails while the others wait for it in a collective."""
    world = World.join(CPU)
    if rank == 1:
        if how == "error":
            raise ValueError("one too many")
        if how == "reason":
            raise Reason("it broke", "it was old")
        if how == "exit":
            sys.exit("error: no such option")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    world.wait()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("error", ValueError, "^one too many$"),
        ("reason", RuntimeError, "^Reason: it broke because it was old$"),
        ("exit", SystemExit, "^error: no such option$"),
        ("kill", RuntimeError, r"^process 1 of 2 \(from 0\) died with exit code -9$"),
    ],
)
def test_what_fails_in_one_process_is_raised_with_its_traceback(how, error, message):
    with pytest.raises(error, match=message) as caught:
        run_processes(2, fail, how)
    if how != "kill":
        assert "in process 1 of 2" in str(caught.value.__cause__) and ", in fail\n" in str(caught.value.__cause__)


def test_processes_that_hang_are_named():
    with pytest.raises(TimeoutError, match=r"process 0, 1 of 2 \(from 0\) was not done after 1 seconds"):
        run_processes(2, fail, "hang", timeout_s=1)


def surroundings(rank: int) -> tuple[str, int, str]:
    return os.environ["FLEXPG_TEST"], torch.get_num_threads(), os.environ["RANK"]


def test_processes_have_the_environment_of_their_test_and_one_thread_each(monkeypatch):
    for value in ("one", "other"):
        monkeypatch.setenv("FLEXPG_TEST", value)
        assert run_processes(2, surroundings) == [(value, 1, "0"), (value, 1, "1")]
