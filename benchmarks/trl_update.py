"""TRL's GRPOTrainer and SharedPrefixGRPOTrainer alternating in one process: an update of one group.

    python -m benchmarks.trl_update                 # CPU, float32
    python -m benchmarks.trl_update --device cuda   # bfloat16

Loss and backward of the same micro-batch are timed; generation, rewards and the optimizer are TRL's in both. The
vocabulary is small, because without Triton TRL's output layer also scores prompts, and sharing would save that too.
Writes benchmarks/results/trl_update_cpu.json or trl_update_cuda.json.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.record import commit, save
from benchmarks.timing import alternate, paired_ratio, quartiles
from flexpg import PrefixTree
from flexpg.integrations.trl import SharedPrefixGRPOTrainer

TOKENIZER = Path(__file__).parents[1] / "recipes/assets/tiny"
PADDING_ID = 256
MODEL = dict(
    vocab_size=260,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


def random_batch(prompt: int, completions: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a micro-batch as TRL's loss takes it: one prompt, and its completions padded on the right."""
    generator = torch.Generator().manual_seed(0)
    longest = max(completions)
    mask = torch.arange(longest) < torch.tensor(completions)[:, None]
    ids = torch.randint(256, (len(completions), longest), generator=generator)
    batch = {
        "prompt_ids": torch.randint(256, (1, prompt), generator=generator).expand(len(completions), -1),
        "prompt_mask": torch.ones(len(completions), prompt, dtype=torch.int64),
        "completion_ids": ids.where(mask, PADDING_ID),
        "completion_mask": mask.long(),
        "advantages": torch.randn(len(completions), generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(device) for name, value in batch.items()}


def build_trainer(trainer_class: type[GRPOTrainer], folder: str, args: argparse.Namespace) -> GRPOTrainer:
    """Return a trainer that is ready to compute a loss."""
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
    trainer = trainer_class(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def update(trainer: GRPOTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Compute one loss and its backward."""
    trainer.model.zero_grad()
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))


def gradient(trainer: GRPOTrainer) -> torch.Tensor:
    """Return all gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def compare(trainers: dict[str, GRPOTrainer], args: argparse.Namespace, lengths: list[int]) -> dict[str, object]:
    """Return the times of both trainers, the ratios of their work, and the difference of their gradients."""
    device = trainers["trl"].args.device
    batch = random_batch(args.prompt, lengths, device)
    times = alternate({name: partial(update, each, batch) for name, each in trainers.items()}, args.repeats, device)
    speedup = paired_ratio(times["trl"], times["shared"])
    tree = PrefixTree.from_lengths([args.prompt], [lengths])
    expected, shared = gradient(trainers["trl"]), gradient(trainers["shared"])
    return {
        "prompt_tokens": args.prompt,
        "completion_tokens": lengths,
        "update_s_trl": quartiles(times["trl"])["median"] / 1e3,
        "update_s_shared": quartiles(times["shared"])["median"] / 1e3,
        "speedup": speedup["median"],
        "speedup_quartiles": [speedup["low_quartile"], speedup["high_quartile"]],
        "token_ratio": tree.baseline_tokens / tree.num_tokens,
        "pair_ratio": tree.baseline_pairs / tree.num_pairs,
        "gradient_difference": ((shared - expected).norm() / expected.norm()).item(),
    }


def main() -> None:
    """Compare even and uneven completions, and save the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    commit()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**MODEL)).save_pretrained(folder)
        classes = {"trl": GRPOTrainer, "shared": SharedPrefixGRPOTrainer}
        trainers = {name: build_trainer(cls, folder, args) for name, cls in classes.items()}
    even = [args.completion] * args.group
    uneven = [max(1, args.completion * (n + 1) // args.group) for n in range(args.group)]
    result = {name: compare(trainers, args, lengths) for name, lengths in (("even", even), ("uneven", uneven))}
    save(f"trl_update_{args.device}", trainers["trl"].args.device, result)


if __name__ == "__main__":
    main()
