"""bitsandbytes in recipes/grpo.py: LoRA above 4-bit weights (QLoRA), and an optimizer whose state has 8 bits."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import peft
import pytest
import torch
from checkpoints_hf import save_tiny
from recipe_runs import SMALL, flat, load, make, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from flexpg.training.config import SETUP_ERRORS
from flexpg.training.distributed import World
from flexpg.training.models import build_model, library_of

IS_INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not IS_INSTALLED, reason="bitsandbytes is not installed")
CONFIG = "recipes/configs/tiny_transformers_cpu.yaml"
QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QLORA = (
    *(f"model.quantization.{name}={value}" for name, value in QUANTIZATION.items()),
    *("model.lora.r=4", "model.lora.target_modules=all-linear"),
)


def own_options(tmp_path: Any) -> tuple[str, ...]:
    reward = "rewards.correct._component_=recipe_runs.spread_reward"
    return (*SMALL, f"model.path={save_tiny('llama', tmp_path / 'checkpoint')}", reward, "optimizer.lr=0.01", *QLORA)


@needs_bitsandbytes
@pytest.mark.slow
def test_qlora_run_trains_resumes_and_saves_what_it_computes_with(tmp_path):
    options = (*own_options(tmp_path), "checkpoint_every_n_steps=1", "self_check=true", "loss.beta=0.1")
    recipe = train(make(tmp_path / "run", *options, "num_steps=2", config=CONFIG))
    assert min(entry["grad_norm"] for entry in recipe.history) > 0.001 and recipe.history[1]["kl"] > 0
    assert len(recipe.trained) == 2 * 7 * 2
    recipe.save_checkpoint()
    path, ids = tmp_path / "checkpoint", torch.arange(30)[None]
    with torch.no_grad():
        expected = recipe.model.eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/epoch_0", dtype=torch.float32)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
        quantized = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**QUANTIZATION)
        )
        with recipe.library.without_adapters(recipe.model):
            torch.testing.assert_close(quantized(ids).logits, recipe.model(ids).logits)
        adapted = peft.PeftModel.from_pretrained(quantized, tmp_path / "run/adapter/epoch_0")
        torch.testing.assert_close(adapted(ids).logits, expected)
        exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert (exact(ids).logits - expected).abs().max() > 0.01
    state = torch.load(tmp_path / "run/checkpoints/step_000002/state.pt", weights_only=True)["model"]
    assert len(state) == len(recipe.trained) and all("lora_" in name for name in state)
    resumed = make(tmp_path / "run", *options, "num_steps=2", "resume=true", config=CONFIG)
    assert torch.equal(flat(resumed.trained), flat(recipe.trained))


@needs_bitsandbytes
@pytest.mark.slow
def test_run_with_8bit_optimizer_state_resumes_with_the_same_steps(tmp_path):
    options = (*own_options(tmp_path)[: -len(QLORA)], "num_steps=2", "checkpoint_every_n_steps=1")
    options += ("optimizer._component_=bitsandbytes.optim.AdamW8bit", "optimizer.lr=0.001")
    whole = train(make(tmp_path / "whole", *options, config=CONFIG))
    states = [state["state1"] for state in whole.optimizer.state.values()]
    assert {state.dtype for state in states if state.numel() >= 4096} == {torch.uint8}
    shutil.rmtree(tmp_path / "whole/checkpoints/step_000002")
    resumed = train(make(tmp_path / "whole", *options, "resume=true", config=CONFIG))
    assert resumed.history[0] == whole.history[0]
    assert torch.equal(flat(resumed.trained), flat(whole.trained))


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.quantization.load_in_8bit=true", "quantization must have load_in_4bit: true and none of"),
        ("model.quantization.load_in_4bit=false", "quantization must have load_in_4bit: true and none of"),
        ("model.lora.use_dora=true", "quantization needs lora without use_dora"),
        ("model.lora=null", "quantization needs lora without use_dora"),
    ],
)
def test_quantization_that_is_not_exact_is_refused(tmp_path, option, message):
    with pytest.raises(SETUP_ERRORS, match=message):
        make(tmp_path / "run", *own_options(tmp_path), option, config=CONFIG)


@needs_bitsandbytes
def test_quantization_under_fsdp_is_refused(tmp_path):
    cfg = load(CONFIG, tmp_path, *own_options(tmp_path))
    model = build_model(cfg, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="quantization needs a single process, got 2: FSDP2 does not shard 4-bit"):
        library_of(model).materialize(model, {}, World(0, 2, torch.device("cpu")), seed=0)


@pytest.mark.skipif(IS_INSTALLED, reason="bitsandbytes is installed")
def test_quantization_without_bitsandbytes_names_the_command(tmp_path):
    with pytest.raises(SETUP_ERRORS, match=r"model\.quantization needs it, run: pip install bitsandbytes"):
        make(tmp_path / "run", *own_options(tmp_path), config=CONFIG)
