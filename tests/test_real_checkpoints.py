"""Tests with checkpoints in the format that models are published in: loaded, trained, saved for transformers and PEFT.

They are small ones of the shapes of Qwen2.5 (float32, one file, biases) and Llama 3.2 (bfloat16, several shards, scaled
RoPE), with the published keys in config.json and random weights.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipe_runs import make, train
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params
from transformers import AutoConfig, AutoModelForCausalLM

from flexpg import Rollouts
from flexpg.training.config import SETUP_ERRORS
from flexpg.training.packed_step import pack_step
from recipes.grpo import GRPORecipe

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 260, "tie_word_embeddings": True}
PUBLISHED = {  # the other keys in config.json of Qwen/Qwen2.5-0.5B-Instruct and meta-llama/Llama-3.2-3B-Instruct
    "qwen2": """{"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "torch_dtype": "float32", "use_sliding_window": false}""",
    "llama3_2": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 16,
        "hidden_act": "silu", "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}""",
}
CONFIGS = {name: SHAPE | json.loads(text) for name, text in PUBLISHED.items()}
SIZES = {"vocab_size": 260, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
SIZES |= {"intermediate_dim": 96, "max_seq_len": 1024, "tie_word_embeddings": True}
OWN = {  # what torchtune's builder of the published model passes; Llama's scale factor of 32 is its default
    "qwen2": {"norm_eps": 1e-6, "rope_base": 1e6},
    "llama3_2": {"norm_eps": 1e-5, "rope_base": 500_000},
}
LORA = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
LORA |= {"lora_rank": 4, "lora_alpha": 12}
SMALL = (
    *("num_steps=2", "prompts_per_step=2", "group_size=4", "sampling.max_new_tokens=6", "train_problems.size=8"),
    *("test_problems.size=2", "optimizer.lr=0.01", "self_check=false", "sharing=true"),
    "rewards.correct._component_=recipe_runs.spread_reward",  # random text earns no other
)
EXACT = 1e-5  # relative to the largest value: round-off of float32 through the layers, in another order

every_model = pytest.mark.parametrize("name", OWN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a checkpoint for each model, as a download leaves it."""
    made = {name: tmp_path_factory.mktemp(name) for name in OWN}
    for seed, (name, folder) in enumerate(made.items()):
        published = json.dumps(CONFIGS[name], indent=2)
        (folder / "config.json").write_text(published)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for key, value in model.named_parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.15 + ("norm" in key)
        model.to(getattr(torch, CONFIGS[name]["torch_dtype"]))
        model.tie_weights()
        model.save_pretrained(folder, max_shard_size="1GB" if name == "qwen2" else "60KB")
        (folder / "config.json").write_text(published)  # transformers 5 writes other keys
        (folder / "tokenizer.json").write_text("{}")
    assert len(files(made["qwen2"])) == 1
    assert len(files(made["llama3_2"])) > 2
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def make_recipe(folder: Path, name: str, output_dir: Path, *overrides: str, lora: bool = False) -> GRPORecipe:
    builder = f"torchtune.models.{name}.{'lora_' if lora else ''}{name}"
    model = {"_component_": builder, **SIZES, **OWN[name], **(LORA if lora else {})}
    checkpointer = {"checkpoint_dir": folder, "checkpoint_files": files(folder), "model_type": name.upper()}
    options = [f"model.{key}={value}" for key, value in model.items()]
    options += [f"checkpointer.{key}={value}" for key, value in checkpointer.items()]
    return make(output_dir, *SMALL, *options, *overrides)


@dataclass(frozen=True)
class Trained:
    """A run of two steps that has saved its weights, and the weights before and after it."""

    folder: Path
    run: GRPORecipe
    start: dict[str, Tensor]
    end: dict[str, Tensor]

    @property
    def saved(self) -> Path:
        return self.run.output_dir / "epoch_0"


def train_and_save(folder: Path, name: str, output_dir: Path, *overrides: str, lora: bool = False) -> Trained:
    run = make_recipe(folder, name, output_dir, *overrides, lora=lora)
    start = copy_weights(run.model)
    end = copy_weights(train(run).model)
    run.save_checkpoint()
    return Trained(folder, run, start, end)


@pytest.fixture(scope="module", params=OWN)
def full(request, folders, tmp_path_factory):
    return train_and_save(folders[request.param], request.param, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module", params=OWN)
def lora(request, folders, tmp_path_factory):
    name = request.param
    return train_and_save(folders[name], name, tmp_path_factory.mktemp("lora"), "loss.beta=0.1", lora=True)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def load(folder: Path, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of a torchtune or transformers model for some tokens."""
    out = model(torch.randint(260, (1, 600), generator=torch.Generator().manual_seed(7)))
    return (out if isinstance(out, Tensor) else out.logits).float()


@torch.no_grad()
def their_logprobs(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """Return [N, C], one rollout after the other."""
    found = torch.zeros(rollouts.loss_mask.shape)
    for row, sequence, start in zip(found, rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True):
        scores = model(sequence[None]).logits[0].float().log_softmax(-1)  # [T, V]
        completion = sequence[start:]
        row[: len(completion)] = scores[start - 1 : -1].gather(1, completion[:, None])[:, 0]
    return found


@torch.no_grad()
def sample_and_score(run: GRPORecipe) -> tuple[Rollouts, Tensor | None, Tensor]:
    """Return rollouts, the reference's log-probabilities [N, C] and the model's own."""
    problems = run.order.of_step(3, run.cfg.prompts_per_step)
    data, _ = run.score(3, problems, run.generate(problems, "step 3"))
    data, packed = run.score_policies(data, pack_step(data, run.cfg, run.world, run.shape))
    rollouts = data.rollouts
    return rollouts, rollouts.ref_logprobs, run.logprob_table(run.model, rollouts, packed)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Loading and saving.


@every_model
def test_loaded_model_equals_that_of_transformers(folders, tmp_path, name):
    expected = logits(load(folders[name], dtype=torch.float32))
    assert expected.std() > 1
    assert error(logits(make_recipe(folders[name], name, tmp_path).model), expected) < EXACT


def test_transformers_loads_saved_weights_config_and_tokenizer(full):
    assert len(files(full.saved)) == len(files(full.folder))
    loaded = load(full.saved)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert error(logits(loaded), logits(full.run.model)) < EXACT
    assert all(not torch.equal(value, full.end[name]) for name, value in full.start.items())
    saved, published = (json.loads((folder / "config.json").read_text()) for folder in (full.saved, full.folder))
    assert saved == published | {"torch_dtype": "float32"}
    assert (full.saved / "tokenizer.json").read_text() == "{}"


def assert_saving_changed_nothing(trained: Trained) -> None:
    now = trained.run.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in trained.end.items())


def test_saving_changes_no_parameter_of_the_model(full):
    assert_saving_changed_nothing(full)


def test_saving_does_not_merge_the_adapters_into_the_model(lora):
    assert_saving_changed_nothing(lora)


def test_lora_trains_only_adapters(lora):
    adapters = set(get_adapter_params(lora.run.model))
    trains = {name for name, value in lora.run.model.named_parameters() if value.requires_grad}
    assert len(adapters) == 2 * 2 * 7 and trains == adapters
    assert {name for name, value in lora.start.items() if not torch.equal(value, lora.end[name])} == adapters


def test_transformers_loads_merged_lora_and_peft_loads_the_adapters(lora):
    """Merged weights are those of the base plus the adapters that PEFT loads, module by module."""
    base, merged = load(lora.folder, dtype=torch.float32), load(lora.saved)
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    assert error(logits(merged), logits(lora.run.model)) < EXACT
    assert error(logits(base), logits(lora.run.model)) > 0.05
    before = copy_weights(base)
    adapted = PeftModel.from_pretrained(base, lora.run.output_dir / "adapter/epoch_0").eval()
    assert error(logits(adapted), logits(lora.run.model)) < EXACT
    found = 0
    for name, value in merged.named_parameters():
        module = adapted.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        if name.endswith("weight") and hasattr(module, "lora_A"):
            found += 1
            added = module.get_delta_weight("default")
            assert added.abs().max() > 1e-3
            assert error(value - added, before[name]) < 1e-6
        else:
            assert torch.equal(value, before[name]), name
    assert found == 2 * 7


# The reference of the KL term.


def test_lora_reference_is_the_model_without_adapters(lora):
    assert lora.run.reference is None
    rollouts, reference, policy = sample_and_score(lora.run)
    assert error(reference, their_logprobs(load(lora.folder, dtype=torch.float32), rollouts)) < EXACT
    assert error(policy, their_logprobs(load(lora.saved), rollouts)) < EXACT
    assert error(policy, reference) > 0.01


def test_full_reference_is_a_frozen_copy_and_needed_for_a_kl_term_only(folders, tmp_path, full):
    assert full.run.reference is None and sample_and_score(full.run)[1] is None
    run = train_and_save(folders["qwen2"], "qwen2", tmp_path, "loss.beta=0.1").run
    assert not any(value.requires_grad for value in run.reference.parameters())
    assert {id(value) for value in run.reference.parameters()}.isdisjoint(map(id, run.trained))
    rollouts, reference, policy = sample_and_score(run)
    assert error(reference, their_logprobs(load(folders["qwen2"], dtype=torch.float32), rollouts)) < EXACT
    assert error(policy, reference) > 0.01


# Precision.


def dtypes(model: nn.Module, requires_grad: bool) -> set[torch.dtype]:
    return {value.dtype for value in model.parameters() if value.requires_grad == requires_grad}


@every_model
def test_fp32_parameters_keep_small_steps_that_bf16_ones_lose(folders, tmp_path, name):
    changed = {}
    for param_dtype, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        options = ["dtype=bf16", f"param_dtype={param_dtype}", "optimizer.lr=1e-6", "num_steps=1"]
        run = make_recipe(folders[name], name, tmp_path / param_dtype, *options)
        start = copy_weights(run.model)
        end = train(run).model.state_dict()
        assert dtypes(run.model, requires_grad=True) == {dtype}
        assert sample_and_score(run)[2].dtype == torch.float32
        changed[param_dtype] = sum((end[key] != start[key]).sum().item() for key in start)
    total = sum(value.numel() for value in start.values())
    assert changed["fp32"] > 0.9 * total
    assert changed["bf16"] < 0.1 * total


@every_model
def test_lora_adapters_are_fp32_with_a_bf16_base(folders, tmp_path, name):
    options = ["dtype=bf16", "optimizer.lr=1e-6", "num_steps=1"]
    trained = train_and_save(folders[name], name, tmp_path, *options, lora=True)
    model = trained.run.model
    assert (dtypes(model, requires_grad=True), dtypes(model, requires_grad=False)) == (
        {torch.float32},
        {torch.bfloat16},
    )
    for key, value in trained.start.items():
        assert (value != trained.end[key]).any() == key.endswith("lora_b.weight")
    merged, base = (load(folder, dtype=torch.float32).state_dict() for folder in (trained.saved, folders[name]))
    added = {key: error(merged[key], value.bfloat16().float()) for key, value in base.items()}
    assert {key for key, size in added.items() if size > 0} == {key for key in added if key.endswith("_proj.weight")}
    assert max(added.values()) < 1e-4  # in bfloat16, it would be 0 or 4e-3


# Damaged and hostile files.


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_hostile_pickle_for_weights_runs_no_code(folders, tmp_path, is_zip):
    folder, created = tmp_path / "hostile", tmp_path / "created"
    folder.mkdir()
    shutil.copy(folders["qwen2"] / "config.json", folder)
    file, state = folder / "pytorch_model.bin", {"model.norm.weight": Touch(created)}
    torch.save(state, file) if is_zip else file.write_bytes(pickle.dumps(state))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        make_recipe(folder, "qwen2", tmp_path / "out", "checkpointer.checkpoint_files=[pytorch_model.bin]")
    assert not created.exists()


def truncate(folder: Path, shard: str) -> None:
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1000])


def flip_bit(part: bytes) -> Callable[[Path, str], None]:
    """Flip the first bit of a part of a shard's header: its length, which comes first, or a word."""

    def damage(folder: Path, shard: str) -> None:
        data = bytearray((folder / shard).read_bytes())
        data[data.index(part)] ^= 1
        (folder / shard).write_bytes(data)

    return damage


DAMAGES = {
    "missing shard": (lambda folder, shard: (folder / shard).unlink(), [], "{shard}"),
    "truncated shard": (truncate, [], "{shard}"),
    "bit of a length": (flip_bit(b""), [], "{shard}"),
    "bit of a header": (flip_bit(b'{"'), [], "{shard}"),
    "bit of a name": (flip_bit(b"weight"), [], r'unexpected key: "\S+\.veight"'),
    "missing config": (lambda folder, shard: (folder / "config.json").unlink(), [], r"config\.json"),
    "shard left out": (
        lambda *_: None,
        ["checkpointer.checkpoint_files=[{shard}]"],
        r"the checkpoint in \S+ does not fit `model`: it has no \S+ \(\d+ differences\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_before_anything_is_written(folders, tmp_path, damage):
    apply, overrides, message = DAMAGES[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(folders["llama3_2"], folder)
    shards = files(folder)
    apply(folder, shards[1])
    overrides = [
        f"checkpointer.checkpoint_files=[{','.join(shards)}]",
        *(override.format(shard=shards[1]) for override in overrides),
    ]
    with pytest.raises(SETUP_ERRORS, match=message.format(shard=re.escape(shards[1]))) as caught:
        make_recipe(folder, "llama3_2", tmp_path / "out", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
