"""GRPO by TRL on a CPU in a minute: a tiny model learns to add, and each prompt is encoded once for 16 completions.

    python examples/trl_grpo.py

SharedPrefixGRPOTrainer replaces GRPOTrainer; everything else is TRL without flexpg.
"""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from flexpg.integrations.trl import SharedPrefixGRPOTrainer
from flexpg.training.tasks import arithmetic, arithmetic_reward

CHECKPOINT = str(Path(__file__).parents[1] / "recipes/assets/tiny")
CONFIG = GRPOConfig(
    output_dir="runs/trl_grpo",
    model_init_kwargs={"dtype": "float32"},
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    max_steps=12,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    num_generations=16,
    per_device_train_batch_size=128,  # eight groups; a multiple of num_generations keeps groups whole
    max_completion_length=36,
    loss_type="dapo",
    epsilon_high=0.28,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def correct(completions, answer, **_):
    """Return 1 for correct sums, 0 for others."""
    return [arithmetic_reward(text, right) for text, right in zip(completions, answer, strict=True)]


def accuracy(trainer, problems):
    """Return the fraction of problems that greedy decoding solves."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.no_grad():
        sequences = model.generate(**prompts, do_sample=False, max_new_tokens=CONFIG.max_completion_length)
    texts = tokenizer.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(correct(texts, [problem.answer for problem in problems])) / len(problems)


class PrintStep(TrainerCallback):
    """Print a line per step."""

    def on_log(self, args, state, control, logs, **_):
        if "flexpg/tokens" in logs:
            print(
                f"step {state.global_step:2}  reward {logs['reward']:.2f}  loss {logs['loss']:7.4f}  "
                f"{logs['flexpg/tokens']:,.0f} tokens encoded, {logs['flexpg/tokens_saved']:,.0f} saved, "
                f"in {logs['flexpg/update_s']:.1f} s"
            )


def main():
    """Train, and print the accuracy on held-out problems before and after."""
    train, held_out = arithmetic("train", 1024), arithmetic("test", 128, seed=1)
    trainer = SharedPrefixGRPOTrainer(
        model=CHECKPOINT,
        reward_funcs=correct,
        args=CONFIG,
        train_dataset=Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in train]),
        callbacks=[PrintStep()],
    )
    trainer.remove_callback(PrinterCallback)
    print(f"held-out accuracy {accuracy(trainer, held_out):.2f}")
    trainer.train()
    print(f"held-out accuracy {accuracy(trainer, held_out):.2f}")


if __name__ == "__main__":
    main()
