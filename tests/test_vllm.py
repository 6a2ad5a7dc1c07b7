"""The vLLM engine, next to the trainer and as a server, against transformers; `make vllm` runs it.

vLLM takes half a minute to start, so that all tests share an engine of each kind. Those at the end break it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
import transformers
from recipe_runs import SMALL, make, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flexpg
from benchmarks.servers import START_S, start_vllm, stop_vllm
from flexpg.integrations.vllm import Engine, engine
from flexpg.sampling import Samples, SamplingParams

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes/assets/tiny"
CONFIG = "recipes/configs/tiny_transformers_cpu.yaml"
G = 3
PROMPTS = [torch.arange(65, 265 - 65), torch.tensor([70]), torch.arange(40, 60)]  # the first fills a block of the cache
SAMPLED = SamplingParams(12, temperature=0.7, stop_tokens=range(0, 260, 9))
GREEDY = SamplingParams(12, temperature=0.0)
TOLERANCE = 2e-5  # both compute in float32


@dataclass
class Live:
    """An engine, its checkpoint, and what connects to it again.

    Attributes:
        engine: The engine.
        path: The checkpoint that it was started with.
        address: Of the server, or None.
        process: The server or None.
    """

    engine: Engine
    path: Path
    address: str | None = None
    process: subprocess.Popen | None = None

    def load_initial(self) -> Live:
        self.engine.load_weights(self.path, 0)
        return self


def save_checkpoint(folder: Path, seed: int, tied: bool) -> Path:
    """Write random weights that sample varied tokens, with options for generation that an engine must not use."""
    config = transformers.AutoConfig.from_pretrained(TINY)
    config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    options = {"do_sample": True, "top_k": 2, "repetition_penalty": 1.5, "eos_token_id": list(range(128))}
    (folder / "generation_config.json").write_text(json.dumps(options))
    return folder


@pytest.fixture(scope="module", params=["colocate", "server"])
def running(request, tmp_path_factory):
    """Return an engine: next to the trainer with tied embeddings, and as a server with untied ones."""
    tied = request.param == "colocate"
    path = save_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", 0, tied)
    if tied:
        made = engine(str(path), dtype="float32", max_model_len=1024, timeout_s=START_S)
        yield Live(made, path)
        made.close()
        return
    process, address = start_vllm(path, tmp_path_factory.mktemp("log") / "log.txt")
    try:
        yield Live(engine(str(path), "server", address, timeout_s=60), path, address, process)
    finally:
        stop_vllm(process)


@pytest.fixture
def live(running):
    """Return the engine with the weights of its checkpoint."""
    return running.load_initial()


@pytest.fixture
def other(live, tmp_path):
    return save_checkpoint(tmp_path / "other", 1, tied=live.address is None)


def load_model(path: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def logprobs_of(model: nn.Module, samples: Samples, size: int, temperature: float) -> Tensor:
    """Compute the log-probabilities of samples [N, C], one sequence after the other."""
    found = torch.zeros_like(samples.logprobs)
    for n, completion in enumerate(samples.completions):
        prompt = PROMPTS[n // size]
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        found[n, : len(completion)] = (logits / temperature).log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return found


def assert_sampled_from(path: Path, samples: Samples) -> None:
    expected = logprobs_of(load_model(path), samples, G, SAMPLED.temperature)
    torch.testing.assert_close(samples.logprobs, expected, rtol=0, atol=TOLERANCE)


def test_sample_logprobs_equal_transformers(live):
    samples = live.engine.sample(PROMPTS, G, SAMPLED, [1, 2**63 - 1, 3])
    assert_sampled_from(live.path, samples)
    assert 0 < samples.is_finished.sum() < len(PROMPTS) * G
    for tokens, is_finished in zip(samples.completions, samples.is_finished.tolist(), strict=True):
        stops = [token % 9 == 0 for token in tokens.tolist()]
        assert stops[-1] == is_finished and not any(stops[:-1])  # other ends of sequence do not stop it
    assert len({tuple(tokens.tolist()) for tokens in samples.completions}) > 6


def test_sample_same_seeds_give_same_completions(live):
    first, again = (live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3]) for _ in range(2))
    assert all(map(torch.equal, first.completions, again.completions))
    others = live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 4])
    assert list(map(torch.equal, first.completions, others.completions)) == [True] * 6 + [False] * 3


def test_sample_with_seeds_takes_more_prompts_than_fit_in_a_batch(live):
    draw = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(256, (48, 400), generator=draw))  # 19,200 tokens; vLLM's batches have at most 8,192
    samples = live.engine.sample(prompts, 1, replace(SAMPLED, max_new_tokens=2), list(range(48)))
    assert len(samples.completions) == 48


def test_sample_greedy_equals_flexpg_sample(live):
    samples = live.engine.sample(PROMPTS, 2, GREEDY, None)
    expected = flexpg.sample(flexpg.enable(load_model(live.path)), PROMPTS, 2, GREEDY)
    assert all(map(torch.equal, samples.completions, expected.completions))
    torch.testing.assert_close(samples.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE)


def test_load_weights_samples_from_changed_model(live, other):
    before = live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])  # its keys and values are in the prefix cache
    live.engine.load_weights(other, 5)
    assert live.engine.version == 5
    samples = live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
    assert_sampled_from(other, samples)
    live.engine.load_weights(live.path, 6)
    back = live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
    assert_sampled_from(live.path, back)
    assert all(map(torch.equal, before.completions, back.completions))
    assert (logprobs_of(load_model(live.path), samples, G, 0.7) - samples.logprobs).abs().max() > 1


def test_load_weights_of_other_shape_keeps_engine(live, tmp_path):
    weights = load_file(live.path / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight in .* must have the shape of the checkpoint's"):
        live.engine.load_weights(tmp_path, 5)
    assert_sampled_from(live.path, live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3]))


@pytest.mark.parametrize("running", ["server"], indirect=True)
def test_engine_gives_used_server_initial_weights(live, other):
    live.engine.load_weights(other, 5)
    again = engine(str(live.path), "server", live.address)
    assert again.version == 0
    assert_sampled_from(live.path, again.sample(PROMPTS, G, SAMPLED, [1, 2, 3]))
    with pytest.raises(RuntimeError, match="must have weights of version 5, got 0"):
        live.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])


def test_recipe_samples_from_engine(live, tmp_path):
    """Two steps, on two ranks with a server; the recipe compares log-probabilities after each."""
    sampler = {"_component_": "flexpg.integrations.vllm.engine", "path": "${model.path}", "dtype": "float32"}
    sampler |= {"max_model_len": 1024, "timeout_s": START_S}
    if live.address:
        sampler |= {"mode": "server", "base_url": live.address}
    tune = Path(sys.executable).with_name("tune")
    command = [tune, "run", "--nproc_per_node", "2" if live.address else "1", "recipes/grpo.py"]
    command += ["--config", "recipes/configs/tiny_transformers_cpu.yaml", f"model.path={live.path}", "num_steps=2"]
    command += ["prompts_per_step=2", "group_size=4", "test_problems.size=4", f"output_dir={tmp_path}/run"]
    command += [f"sampler.{name}={value}" for name, value in sampler.items()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    if live.address:
        with urlopen(f"{live.address}/weight_info") as response:
            assert json.load(response) == {"weight_version": "2"}


def recipe_with(live: Live, folder: Path, *options: str):
    """Return a recipe whose sampler is the server, with learning rates at which the policy moves in one step."""
    sampler = ("_component_=flexpg.integrations.vllm.engine", "path=${model.path}", "mode=server")
    given = [f"sampler.{option}" for option in (*sampler, f"base_url={live.address}")]
    given += [f"model.path={live.path}", "rewards.correct._component_=recipe_runs.spread_reward", *options]
    return make(folder, *SMALL, *given, "num_steps=3", "sampling.max_new_tokens=12", config=CONFIG)


@pytest.mark.parametrize("running", ["server"], indirect=True)
def test_async_recipe_trains_on_samples_one_step_old(live, tmp_path):
    recipe = recipe_with(live, tmp_path, "async_steps=1", "optimizer.lr=0.002")
    versions, generate = [], recipe.engine._transport.generate

    def recorded(requests):
        groups = generate(requests)
        versions.append({label for group in groups for output in group for label in output.versions})
        return groups

    recipe.engine._transport.generate = recorded
    train(recipe)
    # Held-out accuracy, steps 1 and 2; the check of version 1, step 3; checks of versions 2 and 3, held-out accuracy.
    assert versions == [{"0"}, {"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"3"}, {"3"}]
    first, *later = recipe.history
    assert first["sampler_kl"] < 1e-8 and abs(first["sampler_ratio_max"] - 1) < 1e-3
    for entry in later:  # the correction for the older weights is on
        assert entry["sampler_kl"] > 1e-5 and entry["sampler_ratio_max"] > 1.01
        assert entry["loss"] != 0 and entry["grad_norm"] > 0


@pytest.mark.parametrize("running", ["server"], indirect=True)
def test_lora_recipe_loads_merged_weights_into_the_server(live, tmp_path):
    lora = ("model.lora.r=4", "model.lora.target_modules=all-linear", "optimizer.lr=0.02")
    recipe = train(recipe_with(live, tmp_path, *lora))
    samples = recipe.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
    trained = logprobs_of(recipe.model, samples, G, SAMPLED.temperature)
    torch.testing.assert_close(samples.logprobs, trained, rtol=0, atol=TOLERANCE)
    base = logprobs_of(load_model(live.path), samples, G, SAMPLED.temperature)
    assert (samples.logprobs - base).abs().max() > 0.1


# Tests that break the engine


def test_load_weights_incomplete_leaves_engine_unusable(running, tmp_path):
    running.load_initial()
    weights = load_file(running.path / "model.safetensors")
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"must have all weights, got none for model.layers.2.mlp.down_proj.weight"):
        running.engine.load_weights(tmp_path, 5)
    with pytest.raises(RuntimeError, match="has no complete weights"):
        running.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
    with pytest.raises(RuntimeError, match="an earlier update of the weights failed"):
        running.load_initial()


def test_engine_that_hangs_or_dies_raises(running):
    is_child = running.address is None
    pid = running.engine._transport.children[0].pid if is_child else running.process.pid
    running.engine._transport.timeout_s = 2
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"did not (respond|answer .*) within timeout_s=2"):
        running.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
    if not is_child:  # a child is killed if it does not respond
        os.kill(pid, signal.SIGKILL)
        running.process.wait()
    with pytest.raises(RuntimeError, match="died with exit code -9" if is_child else "does not answer"):
        running.engine.sample(PROMPTS, G, SAMPLED, [1, 2, 3])
