"""Checkpoints in the format that models are published in: read, trained, and written for transformers and PEFT to read.

They are small ones of the shapes of Qwen2.5 (float32, one file, biases) and Llama 3.2 (bfloat16, several shards, scaled
rotary positions), with the published keys in config.json and random weights. No reward of a YAML is earned by random
text, so that these runs have one of their own.
"""

import base64
import json
import pickle
import re
import shutil
import signal
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from torch import Tensor
from torchtune.models.llama3 import llama3_tokenizer
from torchtune.models.qwen2._tokenizer import bytes_to_unicode
from torchtune.models.qwen2_5 import qwen2_5_tokenizer
from torchtune.modules.peft import get_adapter_params
from transformers import AutoConfig, AutoModelForCausalLM

from flexpg import Rollouts
from flexpg.training.setup import completion_text, component, prompt_tokens
from flexpg.training.tasks import ByteTokenizer
from recipes.grpo import SETUP_ERRORS, GRPORecipe
from tests.test_checkpoints import flip
from tests.test_faults import Touch

TINY = Path(__file__).parent.parent / "recipes/configs/tiny_cpu.yaml"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "tie_word_embeddings": True,
}
CONFIGS = {  # the other keys as Qwen/Qwen2.5-0.5B-Instruct and meta-llama/Llama-3.2-3B-Instruct have them
    "qwen2": {
        **SHAPE,
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "float32",
        "use_sliding_window": False,
    },
    "llama3_2": {
        **SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
}
SIZES = {
    "vocab_size": 260,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 1024,
    "tie_word_embeddings": True,
}
OWN = {  # what torchtune's builder of the published model gives; Llama's scale factor of 32 is its default
    "qwen2": {"norm_eps": 1e-6, "rope_base": 1e6},
    "llama3_2": {"norm_eps": 1e-5, "rope_base": 500_000},
}
LORA = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 12,
}
SMALL = [
    "num_steps=2",
    "prompts_per_step=2",
    "group_size=2",
    "sampling.max_new_tokens=6",
    "train_problems.size=8",
    "test_problems.size=2",
    "optimizer.lr=0.01",
    "self_check=false",
]
EXACT = 1e-5  # of the largest: round-off of float32 through the layers, in another order

every_model = pytest.mark.parametrize("name", OWN)


def evenly_spread(completion: str, answer: str) -> float:
    """A reward that random text earns more or less of."""
    return zlib.crc32(completion.encode()) % 7


@pytest.fixture(autouse=True, scope="module")
def _sigterm_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint for each model, as a download leaves it."""
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
        (folder / "config.json").write_text(published)  # transformers 5 has other keys
        (folder / "tokenizer.json").write_text("{}")
    assert len(files(made["qwen2"])) == 1
    assert len(files(made["llama3_2"])) > 2
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def recipe(folder: Path, name: str, output_dir: Path, *overrides: str, lora: bool = False) -> GRPORecipe:
    """The recipe on a checkpoint, set up as `tune run` would."""
    cfg = OmegaConf.load(TINY)
    builder = f"lora_{name}" if lora else name
    cfg.model = {"_component_": f"torchtune.models.{name}.{builder}", **SIZES, **OWN[name], **(LORA if lora else {})}
    cfg.checkpointer.checkpoint_dir = str(folder)
    cfg.checkpointer.checkpoint_files = files(folder)
    cfg.checkpointer.model_type = name.upper()
    cfg.output_dir = str(output_dir)
    cfg.rewards = {"spread": {"function": f"{__name__}.evenly_spread"}}
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([*SMALL, *overrides]))
    OmegaConf.resolve(cfg)
    made = GRPORecipe(cfg)
    made.setup()
    return made


@dataclass(frozen=True)
class Trained:
    """A run of two steps that has saved its weights."""

    folder: Path
    recipe: GRPORecipe
    start: dict[str, Tensor]
    end: dict[str, Tensor]

    @property
    def saved(self) -> Path:
        return self.recipe.output_dir / "epoch_0"


def trained(folder: Path, name: str, output_dir: Path, *overrides: str, lora: bool = False) -> Trained:
    run = recipe(folder, name, output_dir, *overrides, lora=lora)
    start = weights(run.model)
    run.train()
    end = weights(run.model)
    run.save_checkpoint()
    return Trained(folder, run, start, end)


@pytest.fixture(scope="module", params=OWN)
def full(request, folders, tmp_path_factory):
    return trained(folders[request.param], request.param, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module", params=OWN)
def lora(request, folders, tmp_path_factory):
    name = request.param
    return trained(folders[name], name, tmp_path_factory.mktemp("lora"), "loss.beta=0.1", lora=True)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def some_tokens(length: int = 600) -> Tensor:
    return torch.randint(260, (1, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def ours(run: GRPORecipe) -> Tensor:
    return run.model(some_tokens())


def their_model(folder: Path, **kwargs) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def theirs(model: torch.nn.Module) -> Tensor:
    return model(some_tokens()).logits.float()


@torch.no_grad()
def their_logprobs(model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
    """[N, C], one rollout after the other."""
    found = torch.zeros(rollouts.trained.shape)
    for row, sequence, start in zip(found, rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True):
        scores = model(sequence[None]).logits[0].float().log_softmax(-1)  # [T, V]
        completion = sequence[start:]
        row[: len(completion)] = scores[start - 1 : -1].gather(1, completion[:, None])[:, 0]
    return found


def logprobs(run: GRPORecipe) -> tuple[Rollouts, Tensor | None, Tensor]:
    """Rollouts that the model samples now, the reference's log-probabilities [N, C] and the model's own."""
    [[batch]], _ = run.packed(run.sample(3)[0])
    _, [reference] = run.old_and_ref([batch])
    [(policy, _)] = run.logprobs(run.model, [batch])
    return batch.rollouts, reference, policy.detach()


def error(found: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - right).abs().max() / right.abs().max()).item()


@every_model
def test_the_recipes_model_is_the_one_that_transformers_loads(folders, tmp_path, name):
    logits = theirs(their_model(folders[name], dtype=torch.float32))
    assert logits.std() > 1
    assert error(ours(recipe(folders[name], name, tmp_path)), logits) < EXACT


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("qwen2", "model.norm_eps=1e-5"),
        ("qwen2", "model.rope_base=500000"),
        ("llama3_2", "model.norm_eps=1e-6"),
        ("llama3_2", "model.scale_factor=8"),  # of Llama 3.1
    ],
)
def test_logits_tell_apart_what_no_weight_shows(folders, tmp_path, name, override):
    logits = theirs(their_model(folders[name], dtype=torch.float32))
    assert error(ours(recipe(folders[name], name, tmp_path, override)), logits) > 10 * EXACT


def test_transformers_loads_what_was_trained_and_rounds_nothing(full):
    assert files(full.saved) and len(files(full.saved)) == len(files(full.folder))
    loaded = their_model(full.saved)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert error(theirs(loaded), ours(full.recipe)) < EXACT
    rounded = their_model(full.saved, dtype=torch.bfloat16).float()
    assert error(theirs(rounded), ours(full.recipe)) > 100 * EXACT
    assert all(not torch.equal(value, full.end[name]) for name, value in full.start.items())


def test_the_saved_folder_has_the_tokenizer_and_the_config_with_the_trained_dtype(full):
    described, published = (json.loads((folder / "config.json").read_text()) for folder in (full.saved, full.folder))
    assert described == published | {"torch_dtype": "float32"}
    assert (full.saved / "tokenizer.json").read_text() == "{}"


def test_saving_leaves_all_parameters_as_they_are(full):
    now = full.recipe.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in full.end.items())


def test_saving_does_not_merge_the_adapters_of_the_model_itself(lora):
    now = lora.recipe.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in lora.end.items())


def test_with_lora_adapters_alone_are_trained(lora):
    adapters = set(get_adapter_params(lora.recipe.model))
    trains = {name for name, value in lora.recipe.model.named_parameters() if value.requires_grad}
    assert len(adapters) == 2 * 2 * 7 and trains == adapters
    changed = {name for name, value in lora.start.items() if not torch.equal(value, lora.end[name])}
    assert changed == adapters


def test_transformers_loads_merged_adapters(lora):
    merged = their_model(lora.saved)
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    assert error(theirs(merged), ours(lora.recipe)) < EXACT
    base = their_model(lora.folder, dtype=torch.float32)
    assert error(theirs(base), ours(lora.recipe)) > 0.05


def with_adapters(lora: Trained) -> PeftModel:
    base = their_model(lora.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, lora.recipe.output_dir / "adapter" / "epoch_0").eval()


def test_peft_loads_the_adapters(lora):
    adapted = with_adapters(lora)
    assert error(theirs(adapted), ours(lora.recipe)) < EXACT


def test_merged_weights_are_those_of_the_checkpoint_and_the_adapters(lora):
    folders = (lora.folder, lora.saved)
    base, merged = (dict(their_model(folder, dtype=torch.float32).named_parameters()) for folder in folders)
    adapted = with_adapters(lora)
    found = 0
    for name, value in base.items():
        module = adapted.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        if name.endswith("weight") and hasattr(module, "lora_A"):
            found += 1
            added = module.get_delta_weight("default")
            assert added.abs().max() > 1e-3
            assert error(merged[name] - added, value) < 1e-6
        else:
            assert torch.equal(merged[name], value), name
    assert found == 2 * 7


def test_the_reference_of_lora_is_the_checkpoint_and_no_second_model(lora):
    assert lora.recipe.reference is None
    rollouts, reference, policy = logprobs(lora.recipe)
    base = their_logprobs(their_model(lora.folder, dtype=torch.float32), rollouts)
    assert error(reference, base) < EXACT
    assert error(policy, their_logprobs(their_model(lora.saved), rollouts)) < EXACT
    assert error(policy, reference) > 0.01


def test_without_a_kl_term_there_is_no_reference(full):
    assert full.recipe.reference is None
    _, reference, policy = logprobs(full.recipe)
    assert reference is None and policy.min() < 0


def test_the_reference_of_full_fine_tuning_is_a_frozen_copy(folders, tmp_path):
    run = trained(folders["qwen2"], "qwen2", tmp_path, "loss.beta=0.1").recipe
    assert run.reference is not run.model
    assert not any(value.requires_grad for value in run.reference.parameters())
    assert {id(value) for value in run.reference.parameters()}.isdisjoint(map(id, run.trained))
    unchanged = weights(recipe(folders["qwen2"], "qwen2", tmp_path / "again").model)
    now = run.reference.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in unchanged.items())
    rollouts, reference, policy = logprobs(run)
    base = their_logprobs(their_model(folders["qwen2"], dtype=torch.float32), rollouts)
    assert error(reference, base) < EXACT
    assert error(policy, reference) > 0.01


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_a_checkpoint_cannot_run_code(folders, tmp_path, way):
    folder, planted = tmp_path / "from_a_stranger", tmp_path / "planted"
    folder.mkdir()
    (folder / "config.json").write_text((folders["qwen2"] / "config.json").read_text())
    file = folder / "pytorch_model.bin"
    if way == "torch.save":
        torch.save({"model.norm.weight": Touch(planted)}, file)
    else:
        file.write_bytes(pickle.dumps({"model.norm.weight": Touch(planted)}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        recipe(folder, "qwen2", tmp_path / "out", "checkpointer.checkpoint_files=[pytorch_model.bin]")
    assert not planted.exists()
    torch.load(file, weights_only=False) if way == "torch.save" else pickle.loads(file.read_bytes())
    assert planted.exists()  # as it would have been


def halved(name: str):
    def damage(folder: Path, shard: str) -> None:
        file = folder / name.format(shard=shard)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def flipped(part: bytes):
    """A bit of the header of a shard: of its length, which comes first, or of a word."""

    def damage(folder: Path, shard: str) -> None:
        flip(folder / shard, (folder / shard).read_bytes().index(part))

    return damage


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (lambda folder, shard: (folder / shard).unlink(), [], "{shard}"),
        (halved("{shard}"), [], "{shard}"),
        (lambda folder, shard: (folder / shard).write_bytes(b""), [], "{shard}"),
        (flipped(b""), [], "{shard}"),
        (flipped(b'{"'), [], "{shard}"),
        (flipped(b"weight"), [], r'unexpected key: "\S+\.veight"'),
        (halved("config.json"), [], "checkpointer: "),
        (lambda folder, shard: (folder / "config.json").unlink(), [], r"config\.json"),
        (lambda *_: None, ["checkpointer.checkpoint_files=[{shard}]"], r"it has no \S+ \(\d+ differences\)"),
        (
            lambda *_: None,
            ["model.vocab_size=261"],
            r"tok_embeddings\.weight is \[260, 64\] there and \[261, 64\] in the model",
        ),
    ],
    ids=[
        *("missing shard", "halved shard", "empty shard", "bit of a length", "bit of a header", "bit of a name"),
        *("halved config.json", "missing config.json", "shard left out", "other vocabulary"),
    ],
)
def test_a_broken_checkpoint_is_named_before_anything_is_trained(folders, tmp_path, damage, overrides, message):
    folder = tmp_path / "broken"
    shutil.copytree(folders["llama3_2"], folder)
    shards = files(folder)
    damage(folder, shards[1])
    overrides = [
        f"checkpointer.checkpoint_files=[{','.join(shards)}]",
        *(override.format(shard=shards[1]) for override in overrides),
    ]
    with pytest.raises(SETUP_ERRORS, match=message.format(shard=re.escape(shards[1]))) as caught:
        recipe(folder, "llama3_2", tmp_path / "out", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


TOKENIZERS = {
    "qwen2": ["qwen2_5.qwen2_5_tokenizer", "path={folder}/vocab.json", "merges_file={folder}/merges.txt"],
    "llama3_2": ["llama3.llama3_tokenizer", "path={folder}/tokenizer.model"],
}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("qwen2", "vocab.json", b'{"a": 0, "b', "tokenizer: "),
        ("qwen2", "merges.txt", b"#version: 0.2\n\xff\xfe", "tokenizer: .*utf-8"),
        ("llama3_2", "tokenizer.model", b"YQ== 0\nYg", r"tokenizer: .*b'Yg' in \S+/tokenizer\.model"),
        ("llama3_2", "tokenizer.model", b"", "tokenizer: "),
    ],
)
def test_a_damaged_tokenizer_is_named_before_anything_is_trained(folders, tmp_path, name, file, content, message):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / file).write_bytes(content)
    builder, *arguments = (each.format(folder=tmp_path) for each in TOKENIZERS[name])
    options = [f"_component_=torchtune.models.{builder}", *arguments]
    with pytest.raises(SETUP_ERRORS, match=f"^{message}") as caught:
        recipe(folders[name], name, tmp_path / "out", *(f"tokenizer.{option}" for option in options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows[: len(rows) // 2], r"rows\.jsonl line 21 is not JSON"),
        (lambda rows: rows.replace(b"7", b"\xb7"), r"rows\.jsonl line 8 .*utf-8"),
        (lambda rows: b"", r"rows\.jsonl"),
    ],
    ids=["halved", "flipped bit", "empty"],
)
def test_a_damaged_data_file_is_named_with_its_line_before_anything_is_trained(tmp_path, damage, message):
    rows = "".join(json.dumps({"question": f"{n}+0", "answer": str(n)}) + "\n" for n in range(40)).encode()
    (tmp_path / "rows.jsonl").write_bytes(damage(rows))
    data = {"_component_": "flexpg.training.tasks.problems", "source": str(tmp_path / "rows.jsonl")}
    data |= {"template": "{question}", "answer": "{answer}", "size": 8}
    with pytest.raises(SETUP_ERRORS, match=f"^train_problems: .*{message}") as caught:
        component("train_problems", OmegaConf.create({"train_problems": data}))
    assert "\n" not in str(caught.value)


def in_bf16(folders, tmp_path, name: str, param_dtype: str, *, lora: bool) -> GRPORecipe:
    dtypes = ["dtype=bf16", f"param_dtype={param_dtype}", "optimizer.lr=1e-6"]
    return recipe(folders[name], name, tmp_path / param_dtype, *dtypes, lora=lora)


def dtypes_of(model: torch.nn.Module, requires_grad: bool) -> set[torch.dtype]:
    return {value.dtype for value in model.parameters() if value.requires_grad == requires_grad}


@every_model
def test_with_param_dtype_a_small_step_is_not_lost(folders, tmp_path, name):
    changed = {}
    for param_dtype, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        run = in_bf16(folders, tmp_path, name, param_dtype, lora=False)
        assert dtypes_of(run.model, requires_grad=True) == {dtype}
        start = weights(run.model)
        run.step(1)
        assert dtypes_of(run.model, requires_grad=True) == {dtype}
        assert logprobs(run)[2].dtype == torch.float32
        end = run.model.state_dict()
        changed[param_dtype] = sum((end[key] != start[key]).sum().item() for key in start)
    total = sum(value.numel() for value in start.values())
    assert changed["fp32"] > 0.9 * total
    assert changed["bf16"] < 0.1 * total


@every_model
def test_adapters_are_float32_beside_a_bfloat16_base(folders, tmp_path, name):
    run = in_bf16(folders, tmp_path, name, "fp32", lora=True)
    start = weights(run.model)
    run.step(1)
    assert dtypes_of(run.model, requires_grad=True) == {torch.float32}
    assert dtypes_of(run.model, requires_grad=False) == {torch.bfloat16}
    assert logprobs(run)[2].dtype == torch.float32
    end = run.model.state_dict()
    assert all((value != end[key]).any() == key.endswith("lora_b.weight") for key, value in start.items())
    run.save_checkpoint()
    merged = their_model(run.output_dir / "epoch_0").state_dict()
    base = their_model(folders[name], dtype=torch.float32).state_dict()
    added = {key: error(merged[key], value.bfloat16().float()) for key, value in base.items()}
    assert {key for key, size in added.items() if size > 0} == {key for key in added if key.endswith("_proj.weight")}
    assert max(added.values()) < 1e-4  # in bfloat16, it would be 0 or 4e-3


@pytest.fixture
def qwen_tokenizer(tmp_path):
    alphabet = bytes_to_unicode()
    merges = ["h i", "u s", "e r", "us er", "Ċ Ċ"]
    words = [*alphabet.values(), *(merge.replace(" ", "") for merge in merges)]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return qwen2_5_tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))


@pytest.fixture
def llama_tokenizer(tmp_path):
    words = [*(bytes([i]) for i in range(256)), b"hi", b"us", b"er", b"user", b"\n\n"]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    return llama3_tokenizer(str(tmp_path / "tokenizer.model"))


def test_a_chat_prompt_of_qwen_ends_with_the_assistants_header(qwen_tokenizer):
    tokens = prompt_tokens(qwen_tokenizer, "hi", "chat")
    assert qwen_tokenizer.decode(tokens) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens[-1] not in qwen_tokenizer.stop_tokens
    assert tokens.count(qwen_tokenizer.im_start_id) == 2 and tokens.count(qwen_tokenizer.im_end_id) == 1
    assert len(tokens) == 7 + len("assistant\n")  # "user" and "hi" are a token each


def test_a_chat_prompt_of_llama_ends_with_the_assistants_header(llama_tokenizer):
    tokens = prompt_tokens(llama_tokenizer, "hi", "chat")
    text = llama_tokenizer.decode(tokens, truncate_at_eos=False, skip_special_tokens=False)
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert text == f"<|begin_of_text|>{user}hi<|eot_id|>{assistant}"
    assert tokens[0] == llama_tokenizer.bos_id and tokens[-1] not in llama_tokenizer.stop_tokens


def test_other_formats_add_at_most_the_beginning(qwen_tokenizer, llama_tokenizer):
    assert qwen_tokenizer.decode(prompt_tokens(qwen_tokenizer, "hi user", "plain")) == "hi user"
    assert prompt_tokens(qwen_tokenizer, "hi", "bos") == prompt_tokens(qwen_tokenizer, "hi", "plain")  # Qwen has none
    plain = prompt_tokens(llama_tokenizer, "hi user", "plain")
    assert prompt_tokens(llama_tokenizer, "hi user", "bos") == [llama_tokenizer.bos_id, *plain]
    assert prompt_tokens(ByteTokenizer(), "hi\n", "chat") == [*b"hi\n"]


def test_a_chat_prompt_that_the_tokenizer_cuts_is_refused(qwen_tokenizer):
    whole = prompt_tokens(qwen_tokenizer, "hi", "chat")
    qwen_tokenizer.max_seq_len = len(whole)
    with pytest.raises(ValueError, match=f"max_seq_len={len(whole)} cuts the prompt; set it to null"):
        prompt_tokens(qwen_tokenizer, "hi", "chat")


def test_a_completion_is_read_without_its_stop_token_and_with_a_mark_for_ids_that_are_no_text(
    qwen_tokenizer, llama_tokenizer
):
    for tokenizer, unknown in ((qwen_tokenizer, 151_700), (llama_tokenizer, 128_011), (ByteTokenizer(), 300)):
        words = prompt_tokens(tokenizer, "hi h\u00e9", "plain")
        for stop in tokenizer.stop_tokens:
            assert completion_text(tokenizer, [*words, stop]) == "hi h\u00e9"
            assert completion_text(tokenizer, [stop]) == ""
        assert completion_text(tokenizer, words) == "hi h\u00e9"
        assert completion_text(tokenizer, [*words, unknown, unknown, *words]) == "hi h\u00e9\ufffd\ufffdhi h\u00e9"
