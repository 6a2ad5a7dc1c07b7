"""GRPO in one file: a transformers model, one process, no YAML. Copy it and change it.

    python recipes/grpo_minimal.py

It trains the 0.8M-parameter model in recipes/assets/tiny on three-digit addition: on a CPU, in one or two minutes, to a
held-out accuracy above 0.9. Every prompt is encoded once per update, whatever the size of its group.

What is left out, and where it is: several ranks, LoRA, checkpoints, logs and a reference model are in recipes/grpo.py.
There is one optimizer step per batch of rollouts, so the policy that samples is the policy that is trained: ratios are
1 and nothing is clipped.
"""

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexpg
from flexpg.training.tasks import arithmetic, arithmetic_reward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="recipes/assets/tiny", help="a transformers checkpoint")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--prompts-per-step", type=int, default=8)
parser.add_argument("--group-size", type=int, default=16, help="completions per prompt")
parser.add_argument("--max-new-tokens", type=int, default=36)
parser.add_argument("--max-tokens", type=int, default=8192, help="token budget of a micro-batch")
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--eval-every", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last held-out accuracy."""
    args = parser.parse_args(argv)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    # The task: problems with a prompt and an answer, and a reward function of (completion text, answer).
    train, test = arithmetic("train", size=4096, seed=args.seed), arithmetic("test", size=128, seed=1)
    reward_function = arithmetic_reward

    # The model. After flexpg.enable, ordinary calls such as generate are unchanged.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model = flexpg.enable(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    stop_tokens = [tokenizer.eos_token_id, *tokenizer.encode("\n", add_special_tokens=False)]

    @torch.no_grad()
    def generate(problems, group_size, **options):
        """Return generated sequences [problems * group_size, P + T], the prompts' attention mask and the texts."""
        inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True).to(args.device)
        sequences = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            num_return_sequences=group_size,
            eos_token_id=stop_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        completions = sequences[:, inputs.input_ids.shape[1] :]
        return sequences, inputs.attention_mask, tokenizer.batch_decode(completions, skip_special_tokens=True)

    def evaluate():
        *_, texts = generate(test, 1, do_sample=False)
        return sum(reward_function(text, problem.answer) for text, problem in zip(texts, test, strict=True)) / len(test)

    accuracy = evaluate()
    print(f"step   0  held-out accuracy {accuracy:.3f}")
    for step in range(1, args.steps + 1):
        # Sample a group of completions for each problem, and score them.
        problems = random.sample(train, args.prompts_per_step)
        sequences, prompt_mask, texts = generate(problems, args.group_size, do_sample=True, temperature=1.0, top_k=0)
        answers = [problem.answer for problem in problems for _ in range(args.group_size)]
        rewards = [reward_function(text, answer) for text, answer in zip(texts, answers, strict=True)]
        rollouts = flexpg.Rollouts.from_generate(sequences, prompt_mask, rewards, eos_token_id=stop_tokens)

        # Compare each reward with those of its group.
        advantages = flexpg.group_advantages(rollouts)

        # Update. Losses of micro-batches sum to the loss of the step, so that gradients accumulate exactly.
        loss_sum = 0.0
        for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=args.max_tokens):
            loss = flexpg.grpo_loss(
                logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens
            )
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        reward, fewer = rollouts.rewards.mean().item(), rollouts.tree.baseline_tokens / rollouts.tree.num_tokens
        print(f"step {step:>3}  reward {reward:.3f}  loss {loss_sum:+.4f}  {fewer:.1f}x fewer tokens encoded")
        if step % args.eval_every == 0 or step == args.steps:
            accuracy = evaluate()
            print(f"step {step:>3}  held-out accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
