"""Tests of checkpoints: exact resumption on any world size, damage, hostile files, full disks and kills."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline import VOCAB, tiny_model
from processes import run_processes, start_process
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.distributed import World

CPU = torch.device("cpu")
SINGLE = World(0, 1, CPU)
FULL_STATE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def linear_model(
    seed: int, optimizer_class: type[Optimizer] = AdamW, layers: int = 3, width: int = 4
) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    return model, optimizer_class(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def all_equal(left: Any, right: Any) -> bool:
    """Return whether two nests of dicts and sequences are equal, tensors bitwise; torch turns tuples into lists."""
    (leaves, _), (others, _) = tree_flatten_with_path(left), tree_flatten_with_path(right)
    return [keystr(path) for path, _ in leaves] == [keystr(path) for path, _ in others] and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for (_, a), (_, b) in zip(leaves, others, strict=True)
    )


# Saving and loading.


@pytest.mark.parametrize("optimizer_class", [AdamW, SGD])  # SGD without momentum never has state
def test_resumed_training_is_bitwise_identical(tmp_path, optimizer_class):
    (model, optimizer), (other, other_optimizer) = (linear_model(seed, optimizer_class) for seed in (0, 1))
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.03
    save_checkpoint(tmp_path, 3, model, optimizer, {}, 1, SINGLE)
    load_checkpoint(tmp_path / "step_000003", other, other_optimizer, SINGLE)
    assert other_optimizer.param_groups[0]["lr"] == 0.03
    for steps in (range(0), range(3, 6)):
        train(model, optimizer, steps)
        train(other, other_optimizer, steps)
        assert all_equal(other.state_dict(), model.state_dict())
        assert all_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_save_before_the_first_step_adds_no_optimizer_state(tmp_path):
    """torch gives an optimizer without state one by a step of size zero, which would count as a step."""
    plain, saved, resumed = (linear_model(seed) for seed in (0, 0, 1))
    train(*resumed, range(2))
    for step in range(3):
        save_checkpoint(tmp_path, step, *saved, {}, 1, SINGLE)
        if step == 0:
            load_checkpoint(tmp_path / "step_000000", *resumed, SINGLE)
        for each in (plain, saved, resumed):
            train(*each, range(step, step + 1))
        for model, optimizer in (saved, resumed):
            assert all_equal(model.state_dict(), plain[0].state_dict())
            assert all_equal(optimizer.state_dict(), plain[1].state_dict())


def test_only_the_newest_checkpoints_are_kept_and_none_is_written_twice(tmp_path):
    model, optimizer = linear_model(seed=0)
    assert checkpoints(tmp_path / "missing") == []
    for step in (1, 5, 20, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {"step": step, "loss": 0.1 + 0.2, "name": "ü"}, 2, SINGLE)
    save_checkpoint(tmp_path, 1_000_000, model, optimizer, "again", 1, SINGLE)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000020", "step_1000000"]
    assert len(os.listdir(tmp_path)) == 2
    for path, step in zip(checkpoints(tmp_path), (20, 1_000_000), strict=True):
        assert read_progress(path) == {"step": step, "loss": 0.1 + 0.2, "name": "ü"}


def test_best_checkpoint_is_kept_besides_the_newest_and_named_in_a_file(tmp_path):
    model, optimizer = linear_model(seed=0)
    kept = {}
    for step, best in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, None)):  # 0 was not saved
        save_checkpoint(tmp_path, step, model, optimizer, {}, 1, SINGLE, best)
        named = (tmp_path / "best.txt").read_text() if (tmp_path / "best.txt").exists() else ""
        kept[step] = [int(path.name.removeprefix("step_")) for path in checkpoints(tmp_path)], named
    second, fifth = "step_000002\n", "step_000005\n"
    assert kept == {
        **{1: ([1], ""), 2: ([2], second), 3: ([2, 3], second), 4: ([2, 4], second)},
        **{5: ([5], fifth), 6: ([5, 6], fifth), 7: ([5, 7], fifth)},  # kept if the run resumes without the option
    }


def test_frozen_parameters_are_neither_saved_nor_changed(tmp_path):
    pairs = [sharded_model("llama3_2_lora", seed, SINGLE) for seed in (0, 1)]
    (model, optimizer), (other, other_optimizer) = pairs
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, SINGLE)
    saved = torch.load(tmp_path / "step_000001/state.pt", weights_only=True)["model"]
    assert set(saved) == {name for name in model.state_dict() if "lora" in name} < set(model.state_dict())
    before = copy.deepcopy(other.state_dict())
    load_checkpoint(tmp_path / "step_000001", other, other_optimizer, SINGLE)
    for name, value in other.state_dict().items():
        assert torch.equal(value, (saved if "lora" in name else before)[name])
        assert not torch.equal(model.state_dict()[name], before[name])


def checkpoint_activations(model: nn.Module) -> None:
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})


@pytest.mark.parametrize("wrap", [training.compile_model, checkpoint_activations])
def test_wrapped_layers_share_checkpoints_with_plain_ones(tmp_path, wrap):
    plain, wrapped, again = (tiny_model("llama3_2", seed) for seed in range(3))
    wrap(wrapped)
    optimizers = [AdamW(model.parameters()) for model in (plain, wrapped, again)]
    save_checkpoint(tmp_path, 1, plain, optimizers[0], {}, 2, SINGLE)
    load_checkpoint(tmp_path / "step_000001", wrapped, optimizers[1], SINGLE)
    save_checkpoint(tmp_path, 2, wrapped, optimizers[1], {}, 2, SINGLE)
    load_checkpoint(tmp_path / "step_000002", again, optimizers[2], SINGLE)
    for model in (wrapped, again):
        for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(value, expected)


def sharded_model(name: str, seed: int, world: World) -> tuple[nn.Module, Optimizer]:
    """Build a torchtune model, sharded by FSDP2 on several ranks; of LoRA only the adapters are trained."""
    model = tiny_model(name, seed)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in parameter_name or "lora" not in name)
    if world.size > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)


def train_and_save(rank: int, folder: Path, name: str) -> Any:
    """Return the full state on rank 0."""
    world = World.init(CPU)
    model, optimizer = sharded_model(name, 0, world)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.arange(step, 30).remainder(VOCAB)[None]).square().mean().backward()
        optimizer.step()
    save_checkpoint(folder, 2, model, optimizer, {"world_size": world.size}, 1, world)
    state = get_state_dict(model, optimizer, options=FULL_STATE)
    world.shutdown()
    return state


def load(rank: int, folder: Path, name: str) -> Any:
    world = World.init(CPU)
    model, optimizer = sharded_model(name, 1, world)
    load_checkpoint(folder / "step_000002", model, optimizer, world)
    state = get_state_dict(model, optimizer, options=FULL_STATE)
    world.shutdown()
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "name"), [(2, 1, "llama3_2"), (1, 2, "llama3_2_lora"), (3, 2, "llama3_2"), (2, 3, "llama3_2")]
)
def test_fsdp_checkpoint_loads_on_another_world_size(tmp_path, before, after, name):
    saved = run_processes(before, train_and_save, tmp_path, name)[0]
    assert read_progress(tmp_path / "step_000002") == {"world_size": before}
    assert all_equal(run_processes(after, load, tmp_path, name)[0], saved)


# Damaged and foreign checkpoints.


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def refusal(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> str:
    """Return why a checkpoint is not loaded; model and optimizer stay bitwise identical."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=rf"^the checkpoint {checkpoint} cannot be loaded: \S.* to \S") as caught:
        load_checkpoint(checkpoint, model, optimizer, SINGLE)
    assert "\n" not in str(caught.value)
    assert all_equal((model.state_dict(), optimizer.state_dict()), before)
    return str(caught.value)


@pytest.mark.parametrize("name", ["state.pt", "progress.json", "files.json"])
def test_damaged_file_is_named_and_nothing_is_loaded(tmp_path, name):
    model, optimizer = linear_model(seed=0)
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model, optimizer, {"steps_done": 1}, 1, SINGLE)
    checkpoint, rng = tmp_path / "step_000001", random.Random(0)
    file, whole = checkpoint / name, (checkpoint / name).read_bytes()
    other = linear_model(seed=1)
    for damaged in (whole[: len(whole) // 2], b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert name == "files.json" or name in refusal(checkpoint, *other)
        if name != "state.pt":
            with pytest.raises(CheckpointError, match="delete it to start from scratch"):
                read_progress(checkpoint)
    for position in rng.choices(range(len(whole)), k=40):
        file.write_bytes(whole)
        flip_bit(file, position)
        refusal(checkpoint, *other)
    file.write_bytes(whole)
    load_checkpoint(checkpoint, *other, SINGLE)


def test_damaged_checkpoint_names_the_older_one_to_resume_from(tmp_path):
    model, optimizer = linear_model(seed=0)
    refusal(tmp_path / "step_000001", model, optimizer)  # missing
    for step in (9, 10, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {}, 3, SINGLE)
        flip_bit(tmp_path / f"step_{step:06d}/state.pt", 100)
    for step, older in ((10, 9), (1_000_000, 10)):
        message = refusal(tmp_path / f"step_{step:06d}", model, optimizer)
        assert "state.pt is damaged: its checksum differs" in message
        assert message.endswith(f"delete it to resume from {tmp_path}/step_{older:06d}")
    assert refusal(tmp_path / "step_000009", model, optimizer).endswith("delete it to start from scratch")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"layers": 2}, "the model has no 2.weight (2 differences)"),
        ({"layers": 4}, "it has no 3.weight (2 differences)"),
        ({"width": 5}, "0.weight is [4, 4] in it and [5, 5] in the model (6 differences)"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, shape, reason):
    save_checkpoint(tmp_path, 1, *linear_model(seed=0), {}, 1, SINGLE)
    assert f"cannot be loaded: {reason}; " in refusal(tmp_path / "step_000001", *linear_model(seed=1, **shape))


def test_checkpoint_with_other_optimizer_groups_is_refused(tmp_path):
    model, optimizer = linear_model(seed=0)
    first, *others = model.parameters()
    two_groups = AdamW([{"params": [first]}, {"params": others}])
    for step, (saved, other) in enumerate([(optimizer, two_groups), (two_groups, optimizer)]):
        train(model, saved, range(1))
        save_checkpoint(tmp_path, step, model, saved, {}, 2, SINGLE)
        assert "its optimizer has other parameter groups" in refusal(tmp_path / f"step_{step:06d}", model, other)


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant_code(checkpoint: Path, created: Path, legacy: bool) -> None:
    """Put code into the optimizer's state, with a valid checksum."""
    state = torch.load(checkpoint / "state.pt", weights_only=True) | {"optimizer": Touch(created)}
    if legacy:
        (checkpoint / "state.pt").write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, checkpoint / "state.pt")
    names = ("state.pt", "progress.json")
    (checkpoint / "files.json").write_text(json.dumps({n: zlib.crc32((checkpoint / n).read_bytes()) for n in names}))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_and_runs_no_code(tmp_path, legacy):
    model, optimizer = linear_model(seed=0)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, SINGLE)
    plant_code(tmp_path / "step_000001", tmp_path / "created", legacy)
    refusal(tmp_path / "step_000001", model, optimizer)
    assert not (tmp_path / "created").exists()


def refused_on_rank(rank: int, checkpoint: Path) -> tuple[str, bool]:
    """Return why no rank loads it, and whether model and optimizer stay bitwise identical."""
    world = World.init(CPU)
    model, optimizer = sharded_model("llama3_2", 1, world)

    def local() -> list[Tensor]:
        values = model.state_dict().values()
        return [value.to_local() if isinstance(value, DTensor) else value for value in values]

    before = [value.clone() for value in local()]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint, model, optimizer, world)
    is_same = all(map(torch.equal, local(), before)) and not optimizer.state
    world.shutdown()
    return str(caught.value), is_same


@pytest.mark.parametrize("damage", ["hostile pickle", "flipped bit"])
def test_fsdp_ranks_refuse_a_bad_checkpoint_with_one_message(tmp_path, damage):
    run_processes(2, train_and_save, tmp_path, "llama3_2")
    checkpoint, created = tmp_path / "step_000002", tmp_path / "created"
    plant_code(checkpoint, created, False) if damage == "hostile pickle" else flip_bit(checkpoint / "state.pt", 5000)
    (message, is_same), other = run_processes(2, refused_on_rank, checkpoint)
    assert other == (message, is_same) and is_same and "(on rank 0 of 2)" in message
    assert not created.exists()


# Full disks and kills.


def save_on_a_full_disk(rank: int, folder: Path, limits: range) -> list[str]:
    """Return the message on this rank when no file may exceed a limit, for each limit until a checkpoint fits."""
    world = World.init(CPU)
    model, optimizer = sharded_model("llama3_2", 0, world)
    progress = {"history": [0.1] * 100_000}  # longer than the tensors
    save_checkpoint(folder, 1, model, optimizer, progress, 2, world)
    before, messages = resource.getrlimit(resource.RLIMIT_FSIZE), []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save_checkpoint(folder, 2, model, optimizer, progress, 2, world)
            break
        except CheckpointError as error:
            messages.append(str(error))
            assert os.listdir(folder) == ["step_000001"]
        world.barrier()
    for step in (1, 2):
        load_checkpoint(folder / f"step_{step:06d}", model, optimizer, world)
    world.shutdown()
    return messages


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_disk_keeps_the_old_checkpoint_and_raises_on_all_ranks(tmp_path, world_size):
    by_rank = run_processes(world_size, save_on_a_full_disk, tmp_path, range(1000, 1_000_000, 33_000))
    assert len(by_rank[0]) > 10 and all(messages == by_rank[0] for messages in by_rank)
    for message in by_rank[0]:
        assert message.startswith(f"the checkpoint {tmp_path}/step_000002 could not be saved: ")
        assert message.endswith(f"; {tmp_path}/step_000001 is the last one; free disk space or set another output_dir")
    assert "File too large" in by_rank[0][-1]


def constant_model(step: int) -> tuple[nn.Module, Optimizer]:
    """Return weights and moments that all equal `step`, of 200 KiB, so that writing them takes a while."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    optimizer = AdamW(model.parameters())
    model(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    for tensor in tree_leaves([model.state_dict(), optimizer.state_dict()["state"]]):
        tensor.detach().fill_(step)
    return model, optimizer


def save_until_killed(folder: Path) -> None:
    step = 1 + max([int(path.name[5:]) for path in checkpoints(folder)], default=0)
    while True:
        save_checkpoint(folder, step, *constant_model(step), {"step": step, "history": [step] * 2000}, 2, SINGLE)
        step += 1


def load_all(folder: Path) -> list[int]:
    """Load every checkpoint in a folder, compare what it holds, and return the steps."""
    steps = []
    for checkpoint in checkpoints(folder):
        step = int(checkpoint.name.removeprefix("step_"))
        model, optimizer = constant_model(-1)
        load_checkpoint(checkpoint, model, optimizer, SINGLE)
        assert read_progress(checkpoint) == {"step": step, "history": [step] * 2000}
        tensors = tree_leaves([model.state_dict(), optimizer.state_dict()["state"]])
        assert len(tensors) == 32 and all((tensor == step).all() for tensor in tensors)
        steps.append(step)
    return steps


@pytest.mark.distributed
def test_sigkill_at_any_moment_leaves_complete_checkpoints(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(12):
        before = checkpoints(tmp_path)[-1:]
        process, end = start_process(save_until_killed, tmp_path), time.monotonic() + 60
        while checkpoints(tmp_path)[-1:] == before:
            assert time.monotonic() < end and process.is_alive(), "the process saves nothing"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.005, 0.3))
        process.kill()
        process.join()
        steps = load_all(tmp_path)
        assert steps[-1] > newest and len(steps) <= 3  # one more than is kept, before the oldest is deleted
        newest = steps[-1]


def test_leftovers_of_a_kill_are_ignored_and_deleted_by_the_next_save(tmp_path):
    model, optimizer = linear_model(seed=0)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 3, SINGLE)
    for name in ("step_000099.unfinished", "step_000002.unfinished", "step_000000.deleted"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
        (tmp_path / name / "progress.json").unlink()
    assert checkpoints(tmp_path) == [tmp_path / "step_000001"]
    save_checkpoint(tmp_path, 2, model, optimizer, {}, 3, SINGLE)
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]
