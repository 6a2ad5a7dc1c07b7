"""Train with a trainer of TRL that samples with vLLM in its own process: `TRAINER CHECKPOINT FOLDER ADAPTERS`.

vLLM's CPU build packs the weights of linear layers as it loads them and drops the originals, so TRL could not load new
ones: here its layers are torch's. It also computes in float32, which TRL has no option for.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from flexpg.integrations.trl import SharedPrefixGRPOTrainer


def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def reward(completions: list[str], **columns) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


if __name__ == "__main__":
    from vllm.model_executor.layers import utils  # not at the top: pytest imports this file to look for doctests

    name, checkpoint, folder, adapters = sys.argv[1:]
    utils.dispatch_cpu_unquantized_gemm = keep_weights
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)
    trainer = {cls.__name__: cls for cls in (GRPOTrainer, SharedPrefixGRPOTrainer)}[name](
        checkpoint,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=folder,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=128,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=12,
            learning_rate=1e-2,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{n} plus {n + 1} is" for n in range(8)]}),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapters == "lora" else None,
    )
    trainer.train()
    Path(folder, "history.json").write_text(json.dumps(trainer.state.log_history))
