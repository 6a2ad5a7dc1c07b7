"""What disks, machines and strangers do to a run: it says so in a line, ends in time, and loses an interval at most."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from torchtune._cli import tune

from benchmarks.sharing import recipe
from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.distributed import World
from recipes.grpo import recipe_main
from tests.processes import run_processes, start_command
from tests.test_checkpoints import ALONE, CPU, flip, sharded
from tests.test_recipe import LORA
from tests.test_recipe_processes import ROOT, SMALL, TINY, newest, wait_until

pytestmark = pytest.mark.machines


class Touch:
    """What unpickling makes a file of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant_in_index(checkpoint: Path, planted: Path) -> None:
    index = dcp.FileSystemReader(checkpoint).read_metadata()
    index.planner_data = Touch(planted)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def plant_in_entry(name: str) -> Callable[[Path, Path], None]:
    def plant(checkpoint: Path, planted: Path) -> None:
        index = dcp.FileSystemReader(checkpoint).read_metadata()
        place = next(place for key, place in index.storage_data.items() if key.fqn == name)
        file, entry = checkpoint / place.relative_path, io.BytesIO()
        torch.save(Touch(planted), entry)
        place.offset, place.length = file.stat().st_size, len(entry.getvalue())
        file.write_bytes(file.read_bytes() + entry.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index))

    return plant


def point_elsewhere(checkpoint: Path, planted: Path) -> None:
    index = dcp.FileSystemReader(checkpoint).read_metadata()
    next(iter(index.storage_data.values())).relative_path = "../other.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def reseal(checkpoint: Path) -> None:
    """Makes the checksums right again, as a stranger would."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "files.json"]
    checksums = {name: zlib.crc32((checkpoint / name).read_bytes()) for name in names}
    (checkpoint / "files.json").write_text(json.dumps(checksums))


def flip_a_bit_of_the_last_process(checkpoint: Path, planted: Path) -> None:
    file = sorted(checkpoint.glob("*.distcp"))[-1]
    flip(file, file.stat().st_size // 2)


def saved(rank: int, folder: Path) -> None:
    world = World.join(CPU)
    save_checkpoint(folder, 1, *sharded("llama3_2", 0, world), {}, 1, world)
    world.leave()


def refused(rank: int, checkpoint: Path) -> tuple[str, bool]:
    """Why no process loads it, and whether model and optimizer are to the bit what they were."""
    world = World.join(CPU)
    model, optimizer = sharded("llama3_2", 1, world)
    before = [value.clone() for value in own(model)]
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_checkpoint(checkpoint, model, optimizer, world)
    is_same = all(map(torch.equal, own(model), before)) and not optimizer.state
    world.leave()
    return str(caught.value), is_same


def own(model: torch.nn.Module) -> list[torch.Tensor]:
    """This process's part of the weights."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in model.state_dict().values()]


DAMAGES = {
    "code in the index": (plant_in_index, r".metadata is no index of tensors: it names pathlib.Path.touch, which"),
    "code for an option": (plant_in_entry("optimizer.param_groups.0.lr"), "an entry is neither a tensor nor a plain"),
    "code for a tensor": (plant_in_entry("model.layers.1.mlp.w2.weight"), "an entry is neither a tensor nor a plain"),
    "another file": (point_elsewhere, ".metadata names ../other.distcp, which is no file of this checkpoint"),
    "a flipped bit": (flip_a_bit_of_the_last_process, ".distcp is damaged: it is not what was saved"),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_hostile_or_damaged_checkpoint_is_refused_by_every_process_and_runs_no_code(tmp_path, damage, count):
    harm, reason = DAMAGES[damage]
    checkpoint, planted = tmp_path / "step_000001", tmp_path / "planted"
    run_processes(count, saved, tmp_path)
    harm(checkpoint, planted)
    if damage != "a flipped bit":
        reseal(checkpoint)
    outcomes = run_processes(count, refused, checkpoint)
    assert not planted.exists()
    assert all(is_same for _, is_same in outcomes)
    assert len({message for message, _ in outcomes}) == 1
    message = outcomes[0][0]
    assert message.startswith(f"the checkpoint {checkpoint} cannot be loaded: ") and reason in message
    assert message.endswith("delete it to start anew")
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["code in the index", "code for an option"])
def test_pytorchs_own_reader_would_run_that_code(tmp_path, damage):
    saved(0, tmp_path)
    checkpoint, planted = tmp_path / "step_000001", tmp_path / "planted"
    DAMAGES[damage][0](checkpoint, planted)
    weights, moments = get_state_dict(*sharded("llama3_2", 1, ALONE))
    dcp.load({"model": weights, "optimizer": moments | {"state": {}}}, checkpoint_id=checkpoint, no_dist=True)
    assert planted.exists()


def saved_on_a_full_disk(rank: int, folder: Path, failing: int, max_bytes: int) -> tuple[str, float]:
    """What a process says of a second checkpoint when the disk of one of them is full, and after how many seconds.

    With space again, the third is saved.
    """
    world = World.join(CPU)
    model, optimizer = sharded("llama3_2", 0, world)
    progress = {"history": [0.1] * 100_000}
    save_checkpoint(folder, 1, model, optimizer, progress, 2, world)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    started = time.monotonic()
    with pytest.raises(ValueError, match="could not be saved") as caught:
        save_checkpoint(folder, 2, model, optimizer, progress, 2, world)
    seconds = time.monotonic() - started
    assert os.listdir(folder) == ["step_000001"]
    assert load_checkpoint(folder / "step_000001", model, optimizer, world) == progress
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save_checkpoint(folder, 3, model, optimizer, progress, 2, world)
    world.leave()
    return str(caught.value), seconds


@pytest.mark.parametrize(
    ("count", "failing", "max_bytes"),
    [(1, 0, 10_000), (1, 0, 400_000), (2, 0, 10_000), (2, 1, 10_000), (2, 0, 400_000)],
    ids=["tensors", "JSON", "tensors of the first of two", "tensors of the second of two", "JSON of two"],
)
def test_a_write_that_fails_halfway_keeps_the_old_checkpoint_and_every_process_says_so(
    tmp_path, count, failing, max_bytes
):
    outcomes = run_processes(count, saved_on_a_full_disk, tmp_path, failing, max_bytes)
    assert len({message for message, _ in outcomes}) == 1
    assert max(seconds for _, seconds in outcomes) < 30
    message = outcomes[0][0]
    assert message.startswith(f"the checkpoint {tmp_path}/step_000002 could not be saved: [Errno 27] File too large")
    assert message.endswith(f"; {tmp_path}/step_000001 is the last one; free space, or set another output_dir")
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000003"]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def saved_on(rank: int, disk: Path) -> list[str]:
    """What is said of a checkpoint on a disk that is full but for some pages, more of them until there are enough."""
    world = World.join(CPU)
    model, optimizer = sharded("llama3_2", 0, world)
    save_checkpoint(disk, 1, model, optimizer, {"step": 1}, 2, world)
    messages = []
    for free_pages in range(0, 200, 6):
        if world.is_first:
            fill(disk, free_pages * 4096)
        world.wait()
        try:
            save_checkpoint(disk, 2, model, optimizer, {"step": 2}, 2, world)
            break
        except ValueError as error:
            messages.append(str(error))
        world.wait()
    world.wait()
    assert load_checkpoint(disk / "step_000001", model, optimizer, world) == {"step": 1}
    assert load_checkpoint(disk / "step_000002", model, optimizer, world) == {"step": 2}
    world.leave()
    return messages


def fill(disk: Path, free_bytes: int) -> None:
    (disk / "filler").unlink(missing_ok=True)
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - free_bytes))


@pytest.mark.parametrize("count", [1, 2])
def test_wherever_the_disk_is_full_the_old_checkpoint_is_kept_until_a_new_one_is_whole(disk, count):
    outcomes = run_processes(count, saved_on, disk)
    assert len(outcomes[0]) > 5 and all(messages == outcomes[0] for messages in outcomes)
    for message in outcomes[0]:
        assert message.startswith(f"the checkpoint {disk}/step_000002 could not be saved: [Errno 28] No space left")
        assert message.endswith(f"; {disk}/step_000001 is the last one; free space, or set another output_dir")


def weights_on_a_full_disk(rank: int, folder: Path, overrides: list[str], max_bytes: int) -> str:
    """What is said of trained weights when the disk is full; those before stay, and with space again they are written.

    What a killed run has left is no part of them.
    """
    os.chdir(ROOT)
    run, place = recipe(TINY, True, folder, overrides), folder / "epoch_0"
    run.save_checkpoint()
    before = contents(folder)
    with torch.no_grad():
        for parameter in run.trained:
            parameter.add_(1.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limit[1]))
    with pytest.raises(CheckpointError) as caught:
        run.save_checkpoint()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(folder) == before
    for left in (place / "other.safetensors", folder / "unfinished/epoch_0/config.json"):
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_text("half")
    run.save_checkpoint()
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert after.keys() == before.keys()
    assert changed and all(name.endswith((".safetensors", ".pt")) for name in changed)
    return str(caught.value)


def contents(folder: Path) -> dict[str, int]:
    """The files that a trained model is made of, and anything that is no whole one, with their checksums."""
    parts = ("epoch_0", "adapter", "unfinished")
    files = [file for part in parts for file in (folder / part).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in files}


@pytest.mark.parametrize(
    ("overrides", "max_bytes"),
    [([], 10_000), (LORA, 10_000), (LORA, 1_500_000)],
    ids=["the model", "adapters", "the model behind its adapters"],
)
def test_trained_weights_that_do_not_fit_on_the_disk_end_in_one_line_and_spare_those_before(
    tmp_path, overrides, max_bytes
):
    (message,) = run_processes(1, weights_on_a_full_disk, tmp_path, overrides, max_bytes)
    assert message.startswith(f"the trained weights could not be written to {tmp_path}/epoch_0: ")
    assert message.endswith("; free space and run again with resume=true") and "\n" not in message


FUNCTIONS = """
import os
import zlib

from flexpg.training.tasks import arithmetic, arithmetic_reward


def spread(completion, answer):
    return zlib.crc32(completion.encode()) % 7


class Reason(Exception):
    pass


def reward(completion, answer):
    if os.environ["RANK"] == "1":
        raise Reason("no judge answers")
    return arithmetic_reward(completion, answer)


def problems(**kwargs):
    if os.environ["RANK"] == "1":
        open("/no/such/file.jsonl")
    return arithmetic(**kwargs)
"""


DEATH = r"Root Cause .*\n\[0\]:\n(.*\n)* +rank +: 1 .*\n +exitcode +: -9 .*\n(.*\n)* +traceback : Signal 9 \(SIGKILL\)"


class Launched:
    """`tune run` on two processes, as a command."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.file, self.folder = folder / "printed.txt", folder
        options = [*SMALL, "num_steps=1000", f"output_dir={folder / 'out'}", *overrides]
        command = ["run", "--nproc_per_node", "2", "recipes/grpo.py", "--config", TINY, *options]
        self.process = start_command(tune.main, command, self.file)
        self.workers: dict[int, int] = {}  # their ids, by rank

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, self.process, self.file)

    def has_two_workers(self) -> bool:
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for worker in map(int, children.read_text().split()):
                variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
                self.workers |= {int(each[5:]): worker for each in variables if each.startswith(b"RANK=")}
        return len(self.workers) == 2

    def has_trained(self) -> bool:
        return any("loss:" in log.read_text() for log in self.folder.glob("out/logs/*"))

    def ended(self, since: float) -> tuple[str, float]:
        """What it has printed, and the seconds until it had ended; not with success, and nothing is left."""
        self.process.join(120)
        seconds = time.monotonic() - since
        printed = self.file.read_text()
        assert self.process.exitcode not in (None, 0), printed
        assert not [worker for worker in self.workers.values() if Path(f"/proc/{worker}").exists()]
        return printed, seconds


@pytest.fixture
def launch(tmp_path, monkeypatch):
    (tmp_path / "of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.chdir(ROOT)
    return lambda *overrides: Launched(tmp_path, *overrides)


def test_a_process_that_is_killed_ends_the_others_and_the_command_names_it(launch):
    run = launch()
    run.wait_until(run.has_two_workers)
    run.wait_until(run.has_trained)
    os.kill(run.workers[1], signal.SIGKILL)
    printed, seconds = run.ended(time.monotonic())
    assert seconds < 60
    assert re.search(DEATH, printed), printed


@pytest.mark.proof
def test_a_process_that_hears_no_signal_does_not_outlive_one_that_was_killed(launch):
    """As one that waits for the dead in a collective of NCCL; the launcher gives it 30 seconds."""
    run = launch()
    run.wait_until(run.has_two_workers)
    run.wait_until(run.has_trained)
    os.kill(run.workers[0], signal.SIGSTOP)
    os.kill(run.workers[1], signal.SIGKILL)
    printed, seconds = run.ended(time.monotonic())
    assert seconds < 60
    assert re.search(DEATH, printed), printed


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("rewards.correct.function=of_a_test.reward", "error: reward 'correct': .* raised Reason: no judge answers"),
        ("train_problems._component_=of_a_test.problems", "error: train_problems: .*/no/such/file.jsonl"),
    ],
    ids=["reward", "setup"],
)
def test_what_one_process_alone_raises_ends_the_others_and_is_shown(launch, override, error):
    run = launch(override)
    run.wait_until(run.has_two_workers)
    run.wait_until(lambda: re.search(error, run.file.read_text()) is not None)
    _, seconds = run.ended(time.monotonic())
    assert seconds < 60


TINIEST = [
    *("prompts_per_step=2", "group_size=4", "sampling.max_new_tokens=8", "sampling.temperature=2.0", "sharing=true"),
    *("train_problems.size=16", "test_problems.size=2", "eval_every_n_steps=100000", "self_check=false"),
    *("rewards.correct.function=of_a_test.spread", "optimizer.lr=1e-3"),
]
INTERVAL = 2


def command(folder: Path, *overrides: str) -> BaseProcess:
    """The recipe in one process; what it prints stands in `folder`/printed.txt."""
    options = ["--config", TINY, *TINIEST, f"output_dir={folder}", *overrides]
    return start_command(recipe_main, options, folder / "printed.txt")


def logged(folder: Path) -> int:
    """The last step in the logs of all runs."""
    text = "".join(log.read_text() for log in (folder / "logs").glob("*"))
    return max(map(int, re.findall(r"^Step (\d+) \| .* loss:", text, re.MULTILINE)), default=0)


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("*.unfinished"))


def killed(folder: Path, moment: str, rng: random.Random) -> None:
    """Goes on with the run, and kills it: at any moment, in a step, or while a checkpoint is written."""
    run, before = (
        command(folder, "num_steps=100000", f"checkpoint_every_n_steps={INTERVAL}", "resume=true"),
        newest(folder),
    )
    if moment == "in a step":
        wait_until(lambda: logged(folder) > before, run, folder / "printed.txt")
    if moment == "in a checkpoint":
        wait_until(lambda: newest(folder) > before, run, folder / "printed.txt")  # of this run, not left by another
        while not unfinished(folder):
            assert run.is_alive()
    time.sleep(rng.uniform(0, {"any": 4.0, "in a step": 1.0, "in a checkpoint": 0.05}[moment]))
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert before <= newest(folder) and logged(folder) - newest(folder) <= INTERVAL
    printed = (folder / "printed.txt").read_text()
    assert f"going on after step {before}" in printed or "going on" not in printed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.proof)])
def test_a_run_killed_at_any_moment_and_resumed_loses_one_interval_and_ends_bit_for_bit_as_one_left_alone(
    tmp_path, monkeypatch, kills
):
    (tmp_path / "of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    rng, folder, alone, halves = random.Random(kills), tmp_path / "killed", tmp_path / "alone", 0
    folder.mkdir()
    alone.mkdir()
    for n in range(kills):
        killed(folder, ["in a checkpoint", "in a step", "any"][n % 3], rng)
        halves += bool(unfinished(folder))
    assert halves >= kills // 10 + 1
    steps = newest(folder) + 2 * INTERVAL
    runs = [command(folder, f"num_steps={steps}", "resume=true", f"checkpoint_every_n_steps={INTERVAL}")]
    runs += [command(alone, f"num_steps={steps}", f"checkpoint_every_n_steps={steps}")]
    for run, where in zip(runs, (folder, alone), strict=True):
        run.join(300)
        assert run.exitcode == 0, (where / "printed.txt").read_text()
    assert not unfinished(folder)
    ours, theirs = (metrics(where) for where in (folder, alone))
    assert len(ours) == steps and ours == theirs
    assert sum(step["grad_norm"] > 0 for step in theirs) > steps / 2  # they did learn
    files = [next((where / "epoch_0").glob("*.safetensors")) for where in (folder, alone)]
    assert files[0].read_bytes() == files[1].read_bytes()


def metrics(folder: Path) -> list[dict[str, float]]:
    """Of every step, what does not depend on the machine."""
    history = read_progress(checkpoints(folder / "checkpoints")[-1])["history"]
    names = ("reward", "loss", "grad_norm", "entropy", "tokens_trained", "lr")
    return [{name: step[name] for name in names} for step in history]
