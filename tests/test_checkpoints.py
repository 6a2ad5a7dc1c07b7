"""What is loaded is what was saved, to the bit, on any number of processes; and no moment of death leaves a half."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_processes, start_process
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_flatten
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from baseline import VOCAB, tiny_model

from flexpg.training.checkpoints import CheckpointError, checkpoints, load_checkpoint, read_progress, save_checkpoint
from flexpg.training.distributed import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def trainee(seed: int, layers: int = 3, width: int = 4) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    return model, AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def all_equal(left: Any, right: Any) -> bool:
    """Whether two nests of dicts and lists are the same, tensors to the bit."""
    (leaves, shape), (others, other_shape) = tree_flatten(left), tree_flatten(right)
    return shape == other_shape and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def test_a_loaded_run_goes_on_bit_for_bit_as_if_it_had_not_stopped(tmp_path):
    model, optimizer = trainee(seed=0)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.03
    save_checkpoint(tmp_path, 3, model, optimizer, {}, 1, ALONE)
    other, other_optimizer = trainee(seed=1)
    assert not all_equal(other.state_dict(), model.state_dict())
    load_checkpoint(tmp_path / "step_000003", other, other_optimizer, ALONE)
    assert other_optimizer.param_groups[0]["lr"] == 0.03
    for steps in (range(0), range(3, 6)):
        train(model, optimizer, steps)
        train(other, other_optimizer, steps)
        assert all_equal(other.state_dict(), model.state_dict())
        assert all_equal(other_optimizer.state_dict(), optimizer.state_dict())
    train(other, other_optimizer, range(1))
    assert not all_equal(other.state_dict(), model.state_dict())


def test_saving_changes_neither_the_run_nor_before_its_first_step_what_is_resumed(tmp_path):
    plain, plain_optimizer = trainee(seed=0)
    saved, saved_optimizer = trainee(seed=0)
    resumed, resumed_optimizer = trainee(seed=1)
    for step in range(3):
        save_checkpoint(tmp_path, step, saved, saved_optimizer, {}, 1, ALONE)
        if step == 0:
            load_checkpoint(tmp_path / "step_000000", resumed, resumed_optimizer, ALONE)
        for model, optimizer in ((plain, plain_optimizer), (saved, saved_optimizer), (resumed, resumed_optimizer)):
            train(model, optimizer, range(step, step + 1))
        assert all_equal(saved.state_dict(), plain.state_dict())
        assert all_equal(resumed.state_dict(), plain.state_dict())
        assert all_equal(resumed_optimizer.state_dict(), plain_optimizer.state_dict())


def test_an_optimizer_without_moments_is_loaded_too(tmp_path):
    model, other = trainee(seed=0)[0], trainee(seed=1)[0]
    optimizer, other_optimizer = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.5)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path, 2, model, optimizer, {}, 1, ALONE)
    load_checkpoint(tmp_path / "step_000002", other, other_optimizer, ALONE)
    assert all_equal(other.state_dict(), model.state_dict())
    assert all_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_progress_comes_back_as_json_holds_it(tmp_path):
    model, optimizer = trainee(seed=0)
    progress = {"steps_done": 7, "history": [{"loss": -0.1 + 0.2}, {"loss": 1e-300}], "name": "Grüße", "none": None}
    save_checkpoint(tmp_path, 7, model, optimizer, progress, 1, ALONE)
    assert load_checkpoint(tmp_path / "step_000007", model, optimizer, ALONE) == progress


def test_only_the_newest_are_kept_and_what_is_there_is_not_written_again(tmp_path):
    model, optimizer = trainee(seed=0)
    assert checkpoints(tmp_path / "not there") == []
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, step, model, optimizer, step, 2, ALONE)
    save_checkpoint(tmp_path, 100, model, optimizer, "again", 1, ALONE)
    assert (
        [path.name for path in checkpoints(tmp_path)] == ["step_000020", "step_000100"] == sorted(os.listdir(tmp_path))
    )
    assert [load_checkpoint(path, model, optimizer, ALONE) for path in checkpoints(tmp_path)] == [20, 100]


def test_frozen_parameters_are_neither_saved_nor_touched(tmp_path):
    model, other = tiny_model("llama3_2_lora", seed=0), tiny_model("llama3_2_lora", seed=1)
    optimizers = []
    for each in (model, other):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora" in name)
        optimizers.append(AdamW([parameter for parameter in each.parameters() if parameter.requires_grad]))
    save_checkpoint(tmp_path, 1, model, optimizers[0], {}, 1, ALONE)
    written = dcp.FileSystemReader(tmp_path / "step_000001").read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.") for name in written if name.startswith("model.")}
    assert weights == {name for name in model.state_dict() if "lora" in name} < set(model.state_dict())
    before = copy.deepcopy(other.state_dict())
    load_checkpoint(tmp_path / "step_000001", other, optimizers[1], ALONE)
    for name, value in other.state_dict().items():
        assert torch.equal(value, (model.state_dict() if "lora" in name else before)[name])
        assert not torch.equal(model.state_dict()[name], before[name])


def checkpointed(model: nn.Module) -> None:
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})


@pytest.mark.parametrize("wrap", [training.compile_model, checkpointed])
def test_a_model_whose_layers_are_wrapped_shares_checkpoints_with_one_that_is_plain(tmp_path, wrap):
    plain, wrapped, again = (tiny_model("llama3_2", seed) for seed in range(3))
    wrap(wrapped)
    optimizers = [AdamW(model.parameters()) for model in (plain, wrapped, again)]
    save_checkpoint(tmp_path, 1, plain, optimizers[0], {}, 2, ALONE)
    load_checkpoint(tmp_path / "step_000001", wrapped, optimizers[1], ALONE)
    save_checkpoint(tmp_path, 2, wrapped, optimizers[1], {}, 2, ALONE)
    load_checkpoint(tmp_path / "step_000002", again, optimizers[2], ALONE)
    for model in (wrapped, again):
        for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(value, expected)


def truncated(pattern: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (file,) = checkpoint.glob(pattern)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def deleted(pattern: str) -> Callable[[Path], None]:
    return lambda checkpoint: [file.unlink() for file in checkpoint.glob(pattern)]


def flipped(pattern: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (file,) = checkpoint.glob(pattern)
        flip(file, file.stat().st_size // 2)

    return damage


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def refusal(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> str:
    """Why a checkpoint is not loaded; model and optimizer are to the bit what they were."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(
        CheckpointError, match=r"^the checkpoint .*/step_0*\d+ cannot be loaded: \S.* delete it to "
    ) as caught:
        load_checkpoint(checkpoint, model, optimizer, ALONE)
    assert "\n" not in str(caught.value)
    assert all_equal((model.state_dict(), optimizer.state_dict()), before)
    return str(caught.value)


FILES = {
    "*.distcp": r"__0_0\.distcp",
    ".meta*": r"\.metadata",
    **{name: re.escape(name) for name in ("progress.json", "trained.json", "files.json")},
}


@pytest.mark.parametrize("has_moments", [True, False])
@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("change", [truncated, deleted, flipped])
def test_a_damaged_checkpoint_is_named_in_one_line_and_nothing_of_it_is_used(tmp_path, change, pattern, has_moments):
    model, optimizer = trainee(seed=0)
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model, optimizer, {"steps_done": 1}, 1, ALONE)
    load_checkpoint(tmp_path / "step_000001", model, optimizer, ALONE)
    change(pattern)(tmp_path / "step_000001")
    other, other_optimizer = trainee(seed=1)
    train(other, other_optimizer, range(2 * has_moments))
    reason = refusal(tmp_path / "step_000001", other, other_optimizer)
    assert re.search(FILES[pattern], reason) or pattern == "files.json"  # then others are not what it says
    if pattern == "progress.json":
        with pytest.raises(
            ValueError, match=r"^the checkpoint .*/step_000001 cannot be loaded: \S.*; delete it to start anew$"
        ):
            read_progress(tmp_path / "step_000001")


def test_a_checkpoint_that_is_gone_is_named(tmp_path):
    refusal(tmp_path / "step_000001", *trainee(seed=0))


def test_no_flipped_bit_of_any_file_is_loaded(tmp_path):
    model, optimizer = trainee(seed=0)
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, ALONE)
    whole, rng = tmp_path / "step_000001", random.Random(0)
    for file in sorted(whole.iterdir()):
        for position in rng.choices(range(file.stat().st_size), k=20):
            flip(file, position)
            refusal(whole, model, optimizer)
            flip(file, position)
    load_checkpoint(whole, model, optimizer, ALONE)


def test_without_checksums_a_flipped_bit_of_a_weight_would_be_loaded(tmp_path):
    model, optimizer = trainee(seed=0)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, ALONE)
    file = tmp_path / "step_000001/__0_0.distcp"
    flip(file, file.read_bytes().index(model[1].weight.detach().numpy().tobytes()))
    weights = copy.deepcopy(get_state_dict(model, optimizer)[0])
    dcp.load({"model": weights}, checkpoint_id=file.parent, no_dist=True)
    assert (weights["1.weight"] != model[1].weight).sum() == 1
    assert "__0_0.distcp is damaged" in refusal(file.parent, model, optimizer)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"layers": 2}, "the model has no 2.weight (2 differences)"),
        ({"layers": 4}, "it has no 3.weight (2 differences)"),
        ({"width": 5}, "0.weight is [4, 4] there and [5, 5] in the model (6 differences)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tmp_path, shape, reason):
    model, optimizer = trainee(seed=0)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, ALONE)
    advice = "load it into the model and optimizer that it was saved from, or delete it to start anew"
    assert refusal(tmp_path / "step_000001", *trainee(seed=1, **shape)).endswith(
        f"step_000001 cannot be loaded: {reason}; {advice}"
    )


def test_of_a_damaged_checkpoint_it_is_said_which_one_to_go_on_from(tmp_path):
    model, optimizer = trainee(seed=0)
    for step in (9, 10, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, model, optimizer, {}, 4, ALONE)
        truncated("*.distcp")(tmp_path / f"step_{step:06d}")
    for step, before in ((10, 9), (1_000_000, 10), (1_000_001, 1_000_000)):
        message = refusal(tmp_path / f"step_{step:06d}", model, optimizer)
        assert message.endswith(f"what was saved; delete it to go on from {tmp_path}/step_{before:06d}")
    assert refusal(tmp_path / "step_000009", model, optimizer).endswith("; delete it to start anew")


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    model, optimizer = trainee(seed=0)
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 1, ALONE)
    assert "momentum" in refusal(tmp_path / "step_000001", model, SGD(model.parameters(), momentum=0.9))
    first, last = list(model.parameters())[:1], list(model.parameters())[1:]
    two_groups = AdamW([{"params": first}, {"params": last}])
    assert "param_groups.1" in refusal(tmp_path / "step_000001", model, two_groups)
    save_checkpoint(tmp_path, 2, model, two_groups, {}, 1, ALONE)
    fewer = refusal(tmp_path / "step_000002", model, optimizer)
    assert "the optimizer's groups have other parameters there" in fewer


def sharded(name: str, seed: int, world: World) -> tuple[nn.Module, Optimizer]:
    """A torchtune model, sharded by FSDP2 where others share it; of LoRA the adapters are trained alone."""
    model = tiny_model(name, seed)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in parameter_name or "lora" not in name)
    if world.size > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)


def saved_state(rank: int, folder: Path, name: str) -> Any:
    """Trains, saves, and returns the whole state where the first process is."""
    world = World.join(CPU)
    model, optimizer = sharded(name, 0, world)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.arange(step, 30).remainder(VOCAB)[None]).square().mean().backward()
        optimizer.step()
    save_checkpoint(folder, 2, model, optimizer, {"by": world.size}, 1, world)
    state = get_state_dict(model, optimizer, options=WHOLE)
    world.leave()
    return state


def loaded_state(rank: int, folder: Path, name: str) -> Any:
    """Loads, and returns progress and the whole state where the first process is."""
    world = World.join(CPU)
    model, optimizer = sharded(name, 1, world)
    progress = load_checkpoint(folder / "step_000002", model, optimizer, world)
    state = get_state_dict(model, optimizer, options=WHOLE)
    world.leave()
    return progress, state


@pytest.mark.parametrize("name", ["llama3_2", "llama3_2_lora"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_loads_the_same_bits(tmp_path, before, after, name):
    saved = run_processes(before, saved_state, tmp_path, name)[0]
    progress, loaded = run_processes(after, loaded_state, tmp_path, name)[0]
    assert progress == {"by": before}
    assert all_equal(loaded, saved)
    next(iter(saved[0].values()))[-1, -1] += 1e-3
    assert not all_equal(loaded, saved)


Save = Callable[..., None]


def filled(step: int) -> tuple[nn.Module, Optimizer]:
    """Weights and moments that are all `step`, of 200 KiB, so that writing them takes a while."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    optimizer = AdamW(model.parameters())
    model(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    for tensor in tree_flatten([model.state_dict(), optimizer.state_dict()["state"]])[0]:
        tensor.detach().fill_(step)
    return model, optimizer


def save_until_killed(folder: Path, save: Save) -> None:
    step = 1 + max([int(path.name[5:]) for path in checkpoints(folder)], default=0)
    while True:
        save(folder, step, *filled(step), {"step": step, "history": [step] * 2000}, 2, ALONE)
        step += 1


def save_in_place(folder, step, model, optimizer, progress, keep_last, world):
    """The mutation: the same files, straight into the folder that will be loaded."""
    final = folder / f"step_{step:06d}"
    final.mkdir(parents=True)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=final, no_dist=True)
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    (final / "trained.json").write_text(json.dumps({"shapes": shapes, "has_moments": True}))
    (final / "progress.json").write_text(json.dumps(progress))
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def survivors(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, each loaded; it fails where one is not whole."""
    steps = []
    for checkpoint in checkpoints(folder):
        step = int(checkpoint.name.removeprefix("step_"))
        model, optimizer = filled(-1)
        assert load_checkpoint(checkpoint, model, optimizer, ALONE) == {"step": step, "history": [step] * 2000}
        tensors = tree_flatten([model.state_dict(), optimizer.state_dict()["state"]])[0]
        assert len(tensors) == 32 and all((tensor == step).all() for tensor in tensors)
        steps.append(step)
    assert steps
    return steps


def saved_by_the_killed(folder: Path, save: Save, rng: random.Random) -> list[int]:
    """Kills a process that saves, at a random moment after its first checkpoint, and returns what it left."""
    before = checkpoints(folder)[-1:]
    process = start_process(save_until_killed, folder, save)
    end = time.monotonic() + 60
    while checkpoints(folder)[-1:] == before:
        assert time.monotonic() < end and process.is_alive(), "the process saves nothing"
        time.sleep(0.002)
    time.sleep(rng.uniform(0.005, 0.3))
    process.kill()
    process.join()
    return survivors(folder)


@pytest.mark.machines
def test_a_process_that_is_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(12):
        steps = saved_by_the_killed(tmp_path, save_checkpoint, rng)
        assert steps[-1] > newest and len(steps) <= 3  # one more than is kept, before the oldest is deleted
        newest = steps[-1]
    save_checkpoint(tmp_path, newest + 1, *filled(0), {}, 1, ALONE)
    assert os.listdir(tmp_path) == [f"step_{newest + 1:06d}"]


@pytest.mark.machines
def test_the_kills_catch_a_checkpoint_that_is_written_in_its_place(tmp_path):
    rng = random.Random(0)
    with pytest.raises((AssertionError, ValueError, OSError)):
        for _ in range(12):
            saved_by_the_killed(tmp_path, save_in_place, rng)


def test_what_a_kill_left_is_no_checkpoint_and_goes_with_the_next_save(tmp_path):
    model, optimizer = trainee(seed=0)
    save_checkpoint(tmp_path, 1, model, optimizer, {}, 3, ALONE)
    for name in ("step_000099.unfinished", "step_000002.unfinished", "step_000000.deleted"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
        (tmp_path / name / "progress.json").unlink()
    assert checkpoints(tmp_path) == [tmp_path / "step_000001"]
    save_checkpoint(tmp_path, 2, model, optimizer, {}, 3, ALONE)
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]
    assert load_checkpoint(tmp_path / "step_000002", model, optimizer, ALONE) == {}
