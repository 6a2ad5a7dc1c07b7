"""TRL's trainer with shared prefixes where vLLM samples, next to the trainer; `make vllm` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_vllm import save_checkpoint

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "trl_with_vllm.py"
SEEN = ("loss", "grad_norm", "reward", "completions/mean_length", "sampling/importance_sampling_ratio/mean")


@pytest.mark.parametrize("adapters", ["full", "lora"])
def test_losses_with_vllm_sampling_are_those_of_trls_own_trainer(adapters, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", seed=0, tied=False)
    ours, theirs = (
        train(name, checkpoint, tmp_path / name, adapters) for name in ("SharedPrefixGRPOTrainer", "GRPOTrainer")
    )
    for step, other in zip(ours, theirs, strict=True):
        assert {key: step[key] for key in SEEN} == pytest.approx({key: other[key] for key in SEEN}, rel=1e-4, abs=1e-6)
        assert step["grad_norm"] > 0 and step["flexpg/tokens_saved"] > 0
        assert step["sampling/sampling_logp_difference/max"] < 1e-4  # vLLM has the weights of every update
    assert ours[0]["entropy"] != pytest.approx(ours[-1]["entropy"], rel=1e-3)  # which are other ones by then


def train(name: str, checkpoint: Path, folder: Path, adapters: str) -> list[dict]:
    command = [sys.executable, str(SCRIPT), name, str(checkpoint), str(folder), adapters]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in json.loads((folder / "history.json").read_text()) if "loss" in line]
