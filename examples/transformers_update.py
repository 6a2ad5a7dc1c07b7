"""A group in, gradients out: one exact update of a transformers model, its prompt encoded once.

python examples/transformers_update.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexpg import Rollouts, group_advantages, grpo_loss, pack, token_logprobs
from flexpg.integrations.transformers import forward, output, register

CHECKPOINT = "recipes/assets/tiny"  # any decoder: Llama, Qwen, Mistral, Gemma, Phi ...

register()
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, attn_implementation="flexpg", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
rollouts = Rollouts(
    prompts=[torch.tensor(tokenizer.encode("356+287:"))],
    completions=[torch.tensor(tokenizer.encode(text)) for text in (" 6+7=13 =643\n", " =643\n", " =543\n")],
    group_ids=torch.tensor([0, 0, 0]),
    rewards=torch.tensor([1.0, 1.0, 0.0]),
)
advantages = group_advantages(rollouts.rewards, rollouts.group_ids)
for batch in pack(rollouts, max_tokens=4096):  # one micro-batch here
    hidden = forward(model, batch.tree)
    logprobs = token_logprobs(hidden, output(model), batch.tree, prompt_lens=batch.rollouts.prompt_lens)
    loss, metrics = grpo_loss(
        logprobs, None, advantages[batch.indices], batch.rollouts.trained, normalizer=rollouts.trained.sum()
    )
    loss.backward()
    print(f"{sum(len(sequence) for sequence in batch.rollouts.sequences)} tokens in {batch.tree.num_tokens}")
print("gradient norm", torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
