"""Makes the tiny model of the GRPO demo: `python recipes/warm_start.py` (no download; minutes on two cores).

The model learns three-digit addition from a sloppy teacher. The worked examples in its prompt are right, but the
completion it is trained on loses most carries on the way to the next digit. So it can do the task and usually does
not: what GRPO is for. Only the teacher's completions are trained, never the worked examples.

Many questions stand behind one set of worked examples: prefix trees, trained with the forward that GRPO uses.
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
from flexpg.integrations import torchtune as flexpg_torchtune
from flexpg.training.tasks import ByteTokenizer, Problem, arithmetic, arithmetic_reward
from flexpg.training.tasks.arithmetic import operands, worked, worked_examples

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
    """Trains, reports held-out accuracy, saves."""
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
    """An untrained Qwen2 of 0.8M parameters over bytes."""
    model = qwen2(**SHAPE)
    # The output layer is the embedding: PyTorch's N(0, 1) would start at logits of +-11.
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.05)
    return model


def lr_factor(step: int, steps: int, warmup: int = 30) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    progress = step / steps
    return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch(step: int, steps: int, forget: float, rng: random.Random) -> tuple[PrefixTree, Tensor]:
    """A packed row of worked examples with questions and the teacher's completions behind them, and prompt_lens [N].

    Short contexts at first, which teach the digits quickly; then the eight worked examples of the task.
    """
    groups, examples, questions = (6, 1, 8) if step < steps * 0.4 else (2, 8, 16)
    contexts, answers, prompt_lens = [], [], []
    for _ in range(groups):
        context = worked_examples(examples, rng)
        asked = [operands("train", rng) for _ in range(questions)]
        texts = [(f"{a}+{b}:", worked(a, b, forget, rng)) for a, b in asked]
        contexts.append(TOKENIZER.encode(context))
        answers.append([TOKENIZER.encode(question + completion) for question, completion in texts])
        prompt_lens += [len(context) + len(question) for question, _ in texts]
    return PrefixTree.from_groups(contexts, answers), torch.tensor(prompt_lens)


def teacher_loss(model: TransformerDecoder, tree: PrefixTree, prompt_lens: Tensor) -> Tensor:
    """Mean cross-entropy over the teacher's tokens."""
    hidden, output = flexpg_torchtune.forward(model, tree), flexpg_torchtune.output(model)
    return -token_logprobs(hidden, output, tree, prompt_lens=prompt_lens).sum() / (tree.lengths - prompt_lens).sum()


def accuracy(model: TransformerDecoder, problems: list[Problem], temperature: float) -> float:
    """Share of the problems whose completion earns the reward; temperature 0 is greedy."""
    prompts = [TOKENIZER.encode(problem.prompt) for problem in problems]
    params = SamplingParams(36, temperature, stop_tokens=TOKENIZER.stop_tokens)
    decoder, output = flexpg_torchtune.decoder(model), flexpg_torchtune.output(model)
    uniforms = torch.rand(
        len(prompts), params.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    samples = sample(decoder, output, prompts, 1, params, uniforms)
    texts = [TOKENIZER.decode(tokens.tolist()) for tokens in samples.completions]
    return sum(arithmetic_reward(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems)


def save(model: TransformerDecoder, output_dir: Path) -> None:
    """A checkpoint in bf16 that transformers reads, with its tokenizer, and torchtune's FullModelHFCheckpointer."""
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
    """ByteTokenizer's ids in Hugging Face's format: a byte-level BPE that merges nothing."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's: these bytes are written as they are
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TOKENIZER.special_tokens))
    return tokenizer


if __name__ == "__main__":
    main()
