"""recipes/grpo.py with models of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from checkpoints_hf import save_tiny
from processes import run_processes
from recipe_runs import SHORT, SMALL, flat, make, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from flexpg.training.causal_lm import tokenizer
from flexpg.training.checkpoints import CheckpointError
from flexpg.training.config import SETUP_ERRORS
from flexpg.training.prompts import prompt_tokens
from flexpg.training.tasks import ByteTokenizer

pytestmark = pytest.mark.slow

CONFIG, TINY = "recipes/configs/tiny_transformers_cpu.yaml", "recipes/assets/tiny"
OPTIONS = (*SMALL, *SHORT, "num_steps=2")
LORA = ("model.lora.r=4", "model.lora.lora_alpha=8", "model.lora.target_modules=all-linear")
SEEN = ("reward", "loss", "grad_norm", "entropy", "completion_tokens", "tokens_encoded", "flop_ratio")


def run(output_dir: Path, *options: str, config: str = CONFIG):
    return train(make(output_dir, *OPTIONS, *options, config=config))


def assert_same_history(ours: list[dict], theirs: list[dict], names: tuple[str, ...] = SEEN, rel: float = 1e-5) -> None:
    for step, other in zip(ours, theirs, strict=True):
        for name in names:
            assert step[name] == pytest.approx(other[name], rel=rel, abs=1e-7), name


def test_run_equals_that_of_torchtunes_model_of_the_same_checkpoint(tmp_path):
    # Adam with a small eps makes a whole step of a gradient that is nearly 0, whichever sign rounding gives it.
    options = ("loss.beta=0.1", "minibatches=2", "optimizer.eps=1e-3")
    ours = run(tmp_path / "transformers", *options)
    theirs = run(tmp_path / "torchtune", *options, config="recipes/configs/tiny_cpu.yaml")
    assert_same_history(ours.history, theirs.history)
    for recipe in (ours, theirs):
        recipe.save_checkpoint()
    saved = [load_file(*(tmp_path / name / "epoch_0").glob("*.safetensors")) for name in ("transformers", "torchtune")]
    for name, weight in saved[0].items():
        torch.testing.assert_close(weight, saved[1][name].float(), rtol=0, atol=1e-7)
    ids = torch.arange(30)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers/epoch_0")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, ours.model.eval()(ids).logits)
    assert loaded.dtype == torch.float32 and "flexpg" not in (tmp_path / "transformers/epoch_0/config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "transformers/epoch_0").encode("1+1") == [49, 43, 49]


@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss", "gemma3", "lfm2", "nemotron_h"])
def test_shared_run_equals_the_baseline_run(tmp_path, name):
    options = (f"model.path={save_tiny(name, tmp_path / 'checkpoint')}", "self_check=true")
    shared, baseline = (run(tmp_path / sharing, *options, f"sharing={sharing}") for sharing in ("true", "false"))
    names = ("reward", "loss", "grad_norm", "entropy", "completion_tokens")
    assert_same_history(shared.history, baseline.history, names, rel=2e-4)
    assert shared.history[-1]["token_ratio"] > 2 > baseline.history[-1]["token_ratio"]
    assert min(entry["grad_norm"] for entry in shared.history) > 0.01
    ours, theirs = (flat(recipe.model.parameters()) for recipe in (shared, baseline))
    start = flat(make(tmp_path / "start", *OPTIONS, options[0], config=CONFIG).model.parameters())
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() < 0.1 * (ours - start).norm()


VARIANTS = {  # of LoRA, with the model and the number of trained tensors
    "all-linear": (None, LORA, 2 * 7 * 4),
    "dora": (
        "qwen3_5",
        (
            "model.lora.use_dora=true",
            r"model.lora.target_modules=.*\.(q_proj|up_proj|in_proj_qkv)",
            "model.lora.use_rslora=true",
            "model.lora.rank_pattern.q_proj=2",
            "model.lora.alpha_pattern.up_proj=3",
        ),
        3 * 4,
    ),
    "experts": (
        "gpt_oss",
        (
            "model.lora.target_modules=[q_proj,o_proj]",
            "model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
        ),
        2 * 2 * 4,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_run_trains_and_saves_adapters_only(tmp_path, variant):
    name, lora, trained = VARIANTS[variant]
    path = TINY if name is None else str(save_tiny(name, tmp_path / "base"))
    saving = ("save_weights=every_checkpoint", "checkpoint_every_n_steps=1", "keep_last_n_checkpoints=1")
    options = ("loss.beta=0.1", "optimizer.lr=0.01", "num_iterations=2", f"model.path={path}")
    recipe = run(tmp_path, *lora, *saving, *options)
    assert recipe.history[1]["kl"] > 0 and len(recipe.trained) == trained
    recipe.save_checkpoint()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert len(torch.load(checkpoint / "state.pt", weights_only=True)["model"]) == trained
    ids, base = torch.arange(30)[None], AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        expected = recipe.model.eval()(ids).logits
        assert (expected - before).abs().max() > 0.001
        for folder in (tmp_path, checkpoint):
            merged = AutoModelForCausalLM.from_pretrained(folder / "epoch_0")
            torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
            adapted = peft.PeftModel.from_pretrained(base, folder / "adapter/epoch_0")
            torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)
            base = adapted.unload()
            assert AutoTokenizer.from_pretrained(folder / "epoch_0").encode("1+1") == [49, 43, 49]
        with recipe.library.without_adapters(recipe.model):
            torch.testing.assert_close(recipe.model(ids).logits, before)


def test_composite_checkpoint_is_saved_with_its_tower_and_processor(tmp_path):
    path = save_tiny("gemma3_vl", tmp_path / "base")
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    lora = ("model.lora.r=4", r"model.lora.target_modules=.*language_model.*\.(q|up)_proj")
    recipe = make(tmp_path, *OPTIONS, f"model.path={path}", *lora, config=CONFIG)
    assert len(recipe.trained) == 2 * 2 * 2 and all(map(torch.count_nonzero, recipe.trained[::2]))
    with torch.no_grad():
        for parameter in recipe.trained:
            parameter.add_(0.1)
    recipe.save_checkpoint()
    ids, saved = torch.arange(100, 130)[None], tmp_path / "epoch_0"
    base, merged = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (path, saved))
    with torch.no_grad():
        expected = recipe.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert (base(input_ids=ids).logits - expected).abs().max() > 0.01
    for ours, theirs in zip(merged.model.vision_tower.parameters(), base.model.vision_tower.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (saved / "preprocessor_config.json").exists()


def test_resumed_run_takes_the_same_steps(tmp_path):
    options = (f"model.path={save_tiny('qwen3_5', tmp_path / 'checkpoint')}", *LORA)
    whole = run(tmp_path / "whole", *options)
    first = make(tmp_path / "cut", *OPTIONS, *options, "checkpoint_every_n_steps=1", config=CONFIG)
    first.is_finished = lambda: first.steps_done == 1
    first.should_stop = first.is_finished
    train(first)
    second = run(tmp_path / "cut", *options, "checkpoint_every_n_steps=1", "resume=true")
    assert min(entry["grad_norm"] for entry in whole.history) > 0.001
    assert_same_history(second.history, whole.history, rel=1e-9)
    assert torch.equal(flat(second.trained), flat(whole.trained))


def test_weights_are_saved_with_the_tokenizer_that_trained(tmp_path, capsys):
    saved = AutoTokenizer.from_pretrained(TINY)
    saved.chat_template = "{% for message in messages %}{{ message['content'] }}={% endfor %}"
    saved.save_pretrained(tmp_path / "tokenizer")
    options = (f"tokenizer.path={tmp_path / 'tokenizer'}", "prompt_format=chat", "tokenizer.system_prompt=Be brief.")
    make(tmp_path / "out", *OPTIONS, *options, config=CONFIG).save_checkpoint()
    assert re.search(r"^first prompt: 'Be brief.=.*:='$", capsys.readouterr().out, re.MULTILINE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out/epoch_0").chat_template == saved.chat_template


@pytest.mark.parametrize("part", ["epoch_0", "link", "engine/epoch_0"])
def test_base_model_where_the_weights_are_written_is_refused(tmp_path, part):
    (tmp_path / "link").symlink_to("epoch_0")
    save_tiny("llama", (tmp_path / part).resolve())
    options = (*OPTIONS, f"model.path={tmp_path / part}")
    with pytest.raises(
        ValueError, match=r"model.path must not be where this run writes its weights, got .*set another"
    ):
        make(tmp_path, *options, config=CONFIG)
    make(tmp_path, *options, "eval_only=true", config=CONFIG)


def test_missing_base_model_at_the_end_saves_progress_to_resume(tmp_path):
    checkpoint = save_tiny("llama", tmp_path / "checkpoint")
    options = (*OPTIONS, f"model.path={checkpoint}", "num_steps=1")
    trained = train(make(tmp_path / "out", *options, config=CONFIG))
    checkpoint.rename(tmp_path / "moved")
    message = r"epoch_0: no file .*/checkpoint; .*; the run is saved: free disk space, or put missing files back, and "
    with pytest.raises(CheckpointError, match=f"{message}run again with resume=true$"):
        trained.save_checkpoint()
    (tmp_path / "moved").rename(checkpoint)
    resumed = make(tmp_path / "out", *options, "resume=true", config=CONFIG)
    assert resumed.is_finished() and torch.equal(flat(resumed.trained), flat(trained.trained))
    resumed.save_checkpoint()
    assert (tmp_path / "out/epoch_0/model.safetensors").exists()


def test_bfloat16_run_keeps_trained_parameters_in_float32(tmp_path):
    recipe = run(tmp_path, f"model.path={save_tiny('qwen3_5', tmp_path / 'checkpoint')}", "dtype=bf16", *LORA)
    assert min(entry["grad_norm"] for entry in recipe.history) > 0.001
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in recipe.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    recipe.save_checkpoint()
    assert {weight.dtype for weight in load_file(tmp_path / "epoch_0/model.safetensors").values()} == {torch.float32}


def train_on_rank(rank: int, output_dir: Path, options: tuple[str, ...]) -> list[dict]:
    recipe = make(output_dir, *OPTIONS, "prompts_per_step=4", *options, config=CONFIG)
    recipe.train()
    recipe.save_checkpoint()
    recipe.cleanup()
    return recipe.history


REFERENCE = ("loss.beta=0.1", "activation_checkpointing=true")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "world_size", "options"),
    [
        pytest.param("qwen3_5", 2, (), id="qwen3_5-full"),
        pytest.param("qwen3_5", 2, (*LORA, *REFERENCE), id="qwen3_5-lora", marks=pytest.mark.proof),
        pytest.param("gpt_oss", 2, (), id="gpt_oss-full", marks=pytest.mark.proof),
        pytest.param("gpt_oss", 4, ("num_steps=1",), id="gpt_oss-four", marks=pytest.mark.proof),
        pytest.param("gpt_oss", 2, (*VARIANTS["experts"][1], *REFERENCE), id="gpt_oss-experts"),
    ],
)
def test_fsdp_update_is_the_same_on_any_world_size(tmp_path, name, world_size, options):
    options = (f"model.path={save_tiny(name, tmp_path / 'checkpoint')}", *options)
    one, many = (run_processes(size, train_on_rank, tmp_path / str(size), options)[0] for size in (1, world_size))
    assert_same_history(one, many, ("reward", "loss", "grad_norm", "entropy", "completion_tokens"), rel=2e-5)
    weights = [load_file(tmp_path / str(size) / "epoch_0/model.safetensors") for size in (1, world_size)]
    before = load_file(tmp_path / "checkpoint/model.safetensors")
    ours, theirs, start = (flat(state[key].float() for key in sorted(state)) for state in (*weights, before))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm() < (ours - start).norm()


def truncated(tmp_path: Path) -> str:
    folder = save_tiny("llama", tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return f"model.path={folder}"


def with_dropout(tmp_path: Path) -> str:
    folder = save_tiny("llama", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return f"model.path={folder}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(truncated, "does not fit its config: it has no model.layers.1.mlp.up_proj.weight", id="truncated"),
        pytest.param(
            with_dropout, "attention_dropout=0.1, which would differ between the copies of a prefix", id="dropout"
        ),
        ("compile=true", "compile must be false for transformers models"),
        ("model.path=nowhere", "tokenizer: no folder nowhere"),
        ("model.path=recipes/assets", "tokenizer: no config.json and no tokenizer.json in recipes/assets; pass the"),
        ("model.lora=true", "model: lora must be a mapping of options of peft.LoraConfig, got True"),
        ("model.lora.lora_dropout=0.1", r"lora.lora_dropout must be 0, got 0.1"),
        ("model.lora.modules_to_save=[lm_head]", r"lora.modules_to_save must not be set, got \['lm_head'\]"),
        pytest.param(
            "model.lora.bias=all", "lora.bias must not be set, got all: adapters must be all that is trained", id="bias"
        ),
        ("model.lora.lora_bias=true", "lora.lora_bias must not be set, got True"),
        pytest.param(
            "model.lora.target_modules=[embed_tokens]",
            "lora.target_modules must not name the embeddings or the output ",
            id="tied",
        ),
        pytest.param(
            "model.lora.target_modules=[q_proj,qkv_proj]",
            "lora.target_modules must name layers of the model, got qkv_proj, which Qwen2ForCausalLM does not have",
            id="unknown_layer",
        ),
        ("model.lora.trainable_token_indices=[3]", r"lora.trainable_token_indices must not be set, got \[3\]"),
        ("model.lora.init_lora_weights=pissa", "lora.init_lora_weights must be one of .*, got 'pissa': others change"),
        ("model.lora.rank=4", "lora: .*unexpected keyword argument 'rank'"),
        ("checkpointer._component_=torchtune.training.FullModelHFCheckpointer", "checkpointer must not be set"),
        ("tokenizer.stop_tokens=[ab]", "stop_tokens must be one token each, got 'ab', which is 2"),
        ("tokenizer.stop_tokens=ab", "stop_tokens must be a list of texts, such as .*, got 'ab'"),
        ("tokenizer.stop_tokens=[5]", "stop_tokens must be a list of texts, such as .*, got "),
        ("prompt_format=chat", "the tokenizer has no chat template; set prompt_format=plain or bos"),
        ("sampling.max_new_tokens=4097", "sequences must have at most max_position_embeddings=4096 tokens"),
    ],
)
def test_mistake_is_reported_before_training(tmp_path, option, message):
    option = option if isinstance(option, str) else option(tmp_path)
    with pytest.raises(SETUP_ERRORS, match=message):
        make(tmp_path / "out", *OPTIONS, option, config=CONFIG)


def test_tokenizer_encodes_prompts_in_every_format():
    loaded = tokenizer(TINY, stop_tokens=["\n"])
    assert loaded.stop_tokens == sorted([10, 258])
    for prompt_format in ("plain", "bos"):
        assert prompt_tokens(loaded, "1+1", prompt_format) == prompt_tokens(ByteTokenizer(), "1+1", prompt_format)
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{% if think %}!{% endif %}"
    )
    assert loaded.decode(prompt_tokens(loaded, "1+1", "chat")) == "<user>1+1<assistant>"
    loaded.template_options = {"think": True}
    assert loaded.decode(prompt_tokens(loaded, "1+1", "chat")) == "<user>1+1<assistant>!"
