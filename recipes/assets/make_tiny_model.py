"""Train the tiny model of the GRPO demo: `python recipes/assets/make_tiny_model.py` (no downloads; some minutes).

The model learns three-digit addition from an unreliable teacher. The few-shot examples in its prompt are correct, but
the completion that it is trained on loses most carries on the way to the next digit. So the model can do the task and
usually does not, which is what GRPO is for. The loss covers the teacher's completions only, not the few-shot examples.

Many questions share one set of few-shot examples, so the batches are prefix trees, trained with the forward that GRPO
uses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules import TransformerDecoder

from flexpg import PrefixTree, SamplingParams, sample, token_logprobs
from flexpg.integrations.torchtune import forward, output
from flexpg.training.tasks import ByteTokenizer, Problem, arithmetic, arithmetic_reward
from flexpg.training.tasks.arithmetic import few_shot_examples, operands, worked

TOKENIZER = ByteTokenizer()
SHAPE = dict(
    vocab_size=TOKENIZER.vocab_size,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=128,
    intermediate_dim=384,
    max_seq_len=4096,
    norm_eps=1e-6,
    rope_base=10_000.0,
    tie_word_embeddings=True,
)
HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": SHAPE["vocab_size"],
    "hidden_size": SHAPE["embed_dim"],
    "intermediate_size": SHAPE["intermediate_dim"],
    "num_hidden_layers": SHAPE["num_layers"],
    "num_attention_heads": SHAPE["num_heads"],
    "num_key_value_heads": SHAPE["num_kv_heads"],
    "max_position_embeddings": SHAPE["max_seq_len"],
    "rms_norm_eps": SHAPE["norm_eps"],
    "rope_parameters": {"rope_type": "default", "rope_theta": SHAPE["rope_base"]},
    "tie_word_embeddings": SHAPE["tie_word_embeddings"],
    "hidden_act": "silu",
    "bos_token_id": TOKENIZER.bos_id,
    "eos_token_id": TOKENIZER.eos_id,
    "pad_token_id": TOKENIZER.pad_id,
    "dtype": "bfloat16",
}
HF_TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",  # which transformers takes for a qwen2 in any case
    "unk_token": None,
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "model_max_length": SHAPE["max_seq_len"],
}
HF_GENERATION_CONFIG = {
    "bos_token_id": TOKENIZER.bos_id,
    "eos_token_id": TOKENIZER.stop_tokens,
    "pad_token_id": TOKENIZER.pad_id,
}


def main() -> None:
    """Train, report held-out accuracy and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--forget", type=float, default=0.65, help="probability that the teacher loses a carry")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("recipes/assets/tiny"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = tiny_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    held_out = arithmetic("test", size=128, seed=args.seed)
    started = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args.steps)
        loss = teacher_loss(model, *batch(step, args.steps, args.forget, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            greedy, sampled = accuracy(model, held_out, temperature=0.0), accuracy(model, held_out, temperature=1.0)
            print(
                f"step {step + 1:5d}  loss {loss.item():.4f}  held-out: greedy {greedy:.3f}  sampled {sampled:.3f}  "
                f"{time.perf_counter() - started:4.0f} s",
                flush=True,
            )
    save(model, args.output_dir)
    print(f"saved to {args.output_dir}")


def tiny_model() -> TransformerDecoder:
    """Return an untrained Qwen2 of 0.8M parameters over bytes."""
    model = qwen2(**SHAPE)
    # The output layer is the embedding, and PyTorch's N(0, 1) would give initial logits of +-11.
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.05)
    return model


def lr_factor(step: int, steps: int, warmup: int = 30) -> float:
    """Return the factor of a linear warm-up followed by a cosine decay to a twentieth."""
    progress = step / steps
    return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch(step: int, steps: int, forget: float, rng: random.Random) -> tuple[PrefixTree, Tensor]:
    """Return a tree of few-shot examples followed by questions with the teacher's completions, and prompt_lens [N].

    Contexts are short at first, which teaches the digits quickly; later they have the eight examples of the task.
    """
    groups, examples, questions = (6, 1, 8) if step < steps * 0.4 else (2, 8, 16)
    contexts, answers, prompt_lens = [], [], []
    for _ in range(groups):
        context = few_shot_examples(examples, rng)
        asked = [operands("train", rng) for _ in range(questions)]
        texts = [(f"{a}+{b}:", worked(a, b, forget, rng)) for a, b in asked]
        contexts.append(TOKENIZER.encode(context))
        answers.append([TOKENIZER.encode(question + completion) for question, completion in texts])
        prompt_lens += [len(context) + len(question) for question, _ in texts]
    return PrefixTree.from_groups(contexts, answers), torch.tensor(prompt_lens)


def teacher_loss(model: TransformerDecoder, tree: PrefixTree, prompt_lens: Tensor) -> Tensor:
    """Return the mean cross-entropy over the teacher's tokens."""
    hidden, layer = forward(model, tree), output(model)
    return -token_logprobs(hidden, layer, tree, prompt_lens=prompt_lens).sum() / (tree.lengths - prompt_lens).sum()


def accuracy(model: TransformerDecoder, problems: list[Problem], temperature: float) -> float:
    """Return the share of problems whose completion earns the reward; temperature 0 is greedy."""
    prompts = [TOKENIZER.encode(problem.prompt) for problem in problems]
    params = SamplingParams(36, temperature, stop_tokens=TOKENIZER.stop_tokens)
    samples = sample(model, prompts, 1, params, seed=0)
    texts = [TOKENIZER.decode(tokens.tolist()) for tokens in samples.completions]
    return sum(arithmetic_reward(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems)


def save(model: TransformerDecoder, output_dir: Path) -> None:
    """Write a bf16 checkpoint and its tokenizer, for transformers and torchtune's FullModelHFCheckpointer."""
    weights = qwen2_tune_to_hf(
        {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()},
        num_heads=SHAPE["num_heads"],
        num_kv_heads=SHAPE["num_kv_heads"],
        dim=SHAPE["embed_dim"],
        tie_word_embeddings=True,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", HF_CONFIG),
        ("generation_config.json", HF_GENERATION_CONFIG),
        ("tokenizer_config.json", HF_TOKENIZER_CONFIG),
    ):
        (output_dir / name).write_text(json.dumps(content, indent=2) + "\n")
    hf_tokenizer().save(str(output_dir / "tokenizer.json"))


def hf_tokenizer() -> Tokenizer:
    """Return ByteTokenizer in Hugging Face's format: a byte-level BPE without merges."""
    visible = {
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    }  # in GPT-2's alphabet, these bytes represent themselves
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TOKENIZER.special_tokens))
    return tokenizer


if __name__ == "__main__":
    main()
