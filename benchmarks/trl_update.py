"""TRL's GRPOTrainer against SharedPrefixGRPOTrainer, side by side in one process: one update of one group.

    python -m benchmarks.trl_update                 # CPU, fp32
    python -m benchmarks.trl_update --device cuda   # bf16

Loss and backward of the same rows by turns; generation, rewards and the optimizer are TRL's in both and are not timed.
The vocabulary is small: without Triton, TRL's output layer scores prompts too, and sharing would win that as well.
Writes benchmarks/results/trl_update_cpu.json, which README quotes, or trl_update_cuda.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.record import save
from flexpg import PrefixTree, dense_cost, shared_cost
from flexpg.integrations.trl import SharedPrefixGRPOTrainer
from recipes.warm_start import SHAPE

TOKENIZER = Path("recipes/assets/tiny")
MODEL = dict(
    vocab_size=SHAPE["vocab_size"],
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


def rows(prompt: int, completions: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL's loss takes it: one prompt, and its completions padded on the right."""
    generator = torch.Generator().manual_seed(0)
    longest = max(completions)
    mask = torch.arange(longest) < torch.tensor(completions)[:, None]
    ids = torch.randint(256, (len(completions), longest), generator=generator)
    batch = {
        "prompt_ids": torch.randint(256, (1, prompt), generator=generator).expand(len(completions), -1),
        "prompt_mask": torch.ones(len(completions), prompt, dtype=torch.int64),
        "completion_ids": ids.where(mask, 256),
        "completion_mask": mask.long(),
        "advantages": torch.randn(len(completions), generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(device) for name, value in batch.items()}


def update_s(trainer: GRPOTrainer, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one loss and its backward."""
    trainer.model.zero_grad()
    synchronize(trainer.args.device)
    start = time.perf_counter()
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    synchronize(trainer.args.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def gradient(trainer: GRPOTrainer) -> torch.Tensor:
    """All gradients in one row."""
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def main() -> None:
    """Runs, prints, and writes the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**MODEL)).save_pretrained(folder)
        trainers = [trainer(kind, folder, args) for kind in (GRPOTrainer, SharedPrefixGRPOTrainer)]
    even = [args.completion] * args.group
    uneven = [max(1, args.completion * (n + 1) // args.group) for n in range(args.group)]
    result = {name: compare(*trainers, args, lengths) for name, lengths in (("even", even), ("uneven", uneven))}
    save(f"trl_update_{args.device}", trainers[0].args.device, result)


def trainer(kind: type[GRPOTrainer], folder: str, args: argparse.Namespace) -> GRPOTrainer:
    """A trainer of TRL's or ours, ready for a loss."""
    config = GRPOConfig(
        output_dir=f"{folder}/run",
        model_init_kwargs={"dtype": "float32"},
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        per_device_train_batch_size=args.group,
        num_generations=args.group,
        report_to="none",
    )
    made = kind(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def compare(theirs: GRPOTrainer, ours: GRPOTrainer, args: argparse.Namespace, lengths: list[int]) -> dict[str, object]:
    """Both by turns, after one turn that does not count."""
    batch = rows(args.prompt, lengths, theirs.args.device)
    turns = [(update_s(theirs, batch), update_s(ours, batch)) for _ in range(args.repeats + 1)][1:]
    ratios = sorted(slow / fast for slow, fast in turns)
    tree = PrefixTree.from_lengths([args.prompt], [lengths])
    before, after = dense_cost(tree), shared_cost(tree)
    return {
        "prompt_tokens": args.prompt,
        "completion_tokens": lengths,
        "update_s_trl": statistics.median(slow for slow, _ in turns),
        "update_s_shared": statistics.median(fast for _, fast in turns),
        "speedup": statistics.median(ratios),
        "speedup_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "token_ratio": before.tokens / after.tokens,
        "attention_pair_ratio": before.attention_pairs / after.attention_pairs,
        "gradient_difference": ((gradient(ours) - gradient(theirs)).norm() / gradient(theirs).norm()).item(),
    }


if __name__ == "__main__":
    main()
