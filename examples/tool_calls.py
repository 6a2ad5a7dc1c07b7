"""Teach a model of 0.1M parameters to use two tools: `python examples/tool_calls.py` (CPU, about two minutes).

The task and its environment are in `flexpg.training.tasks.shop`. First the model imitates the conversations of a
teacher who usually calls the wrong tool and often misreads the answer. Then recipes/grpo.py trains it on its own
conversations, by recipes/configs/tiny_tools_cpu.yaml. Every turn is a rollout of its own, whose prompt is what the
model saw; the prefix tree encodes the common history of all turns and all episodes once.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flexpg
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.training.tasks.shop import ITEMS, NUMBERS, QUESTIONS, WORDS, shop_problems

CHECKPOINT = Path("runs/tiny_tools_cpu/imitation")
MARKS = ("<pad>", "<end>", "<user>", "<assistant>", "<tool>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the shop's words, with a chat template."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate((*MARKS, *WORDS))}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", additional_special_tokens=list(MARKS[2:])
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def random_model(vocab_size: int, end: int) -> LlamaForCausalLM:
    """Return an untrained Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.1,  # with the usual 0.02, so small a model learns to copy much later
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def teacher_conversation(rng: random.Random) -> Conversation:
    """Return a conversation in which the tool is usually wrong, and the item and the answer often are."""
    (problem,) = shop_problems("train", 1, seed=rng.getrandbits(32))
    right, wrong = sorted(QUESTIONS, key=lambda tool: tool != problem.columns["tool"])
    tool = right if rng.random() < 0.4 else wrong
    item = rng.choice((problem.columns["item"], rng.choice(ITEMS)))
    number = problem.columns["numbers"][f"{tool} {item}"]
    texts = (f"{tool} {item}", number, rng.choice((number, rng.choice(NUMBERS))))
    roles = ("assistant", "tool", "assistant")
    messages = [{"role": "user", "content": problem.prompt}]
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Conversation(messages)


def imitate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 150) -> None:
    """Train on the teacher's turns."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    flexpg.enable(model)
    for step in range(steps):
        rollouts, _ = conversation_rollouts([teacher_conversation(rng) for _ in range(32)], tokenizer, per_turn=False)
        for _, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=8192):
            (-logprobs.sum() / rollouts.num_loss_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"imitation step {step + 1}: loss {-logprobs.sum().item() / rollouts.num_loss_tokens:.3f}", flush=True
            )


def main() -> None:
    """Write the model that imitates the teacher, and train it with the recipe."""
    torch.set_num_threads(1)  # a model of this size is slower with several threads
    tokenizer = word_tokenizer()
    model = random_model(len(tokenizer), tokenizer.eos_token_id)
    imitate(model, tokenizer)
    model.save_pretrained(CHECKPOINT)
    tokenizer.save_pretrained(CHECKPOINT)
    tune = str(Path(sys.executable).with_name("tune"))
    command = (tune, "run", "--nproc_per_node", "1", "recipes/grpo.py")
    options = ("--config", "recipes/configs/tiny_tools_cpu.yaml", *sys.argv[1:])
    sys.exit(subprocess.run([*command, *options]).returncode)


if __name__ == "__main__":
    main()
