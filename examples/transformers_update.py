"""One GRPO update of a transformers model in which the prompt is encoded once.

python examples/transformers_update.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexpg

CHECKPOINT = Path(__file__).parents[1] / "recipes/assets/tiny"  # or any decoder: Llama, Qwen, Mistral, Gemma, Phi ...

model = flexpg.enable(AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32))
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
rollouts = flexpg.Rollouts.from_groups(
    prompts=[tokenizer.encode("356+287:")],
    completions=[[tokenizer.encode(text) for text in (" 6+7=13 =643\n", " =643\n", " =543\n")]],
    rewards=[[1.0, 1.0, 0.0]],
)
advantages = flexpg.group_advantages(rollouts)
for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=4096):
    loss = flexpg.grpo_loss(logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens)
    loss.backward()
    print(batch)
print("gradient norm", torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
