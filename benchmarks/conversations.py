"""Recorded conversations of an agent as prefix trees: shared tokens, and an update with and without sharing.

    python -m benchmarks.conversations [FILE]

FILE is tau-bench's results file: 200 conversations, 50 tasks with 4 trials each. The tokenizer is trained on them, the
model is a Qwen2 of two layers and width 128 with random weights. The baseline runs a forward and backward of each
sequence on its own by transformers' attention, with logits only of tokens in the loss; shared is `packed_logprobs`.
All conversations are counted. Updates use tasks with unequal rewards, as others have no gradient: the first such tasks
in float32, the shortest in float64, where nothing is timed.
Seconds are CPU time of one thread, so that other work on the machine has little effect.
Writes benchmarks/results/conversations_cpu.json, which docs/conversations.md quotes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import flexpg
from benchmarks.record import commit, save
from examples.agent_conversations import costs, small_model, trained_tokenizer
from flexpg import Rollouts, group_advantages, grpo_loss, pack, packed_logprobs
from flexpg.conversations import Conversation, conversation_rollouts, read_conversations

DATA = Path("../shared/data/tau_bench/gpt-4o-airline.json")


class Float64Norm(nn.Module):
    """Qwen2's norm without rounding to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def in_float64(model: nn.Module) -> nn.Module:
    """Convert the model to float64, norms included."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, Float64Norm(child))
    return model


def baseline_logprobs(model: nn.Module, rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """Return [N, C], 0 outside the loss mask, and add the gradients of the step's loss, sequence by sequence."""
    table = torch.zeros(rollouts.loss_mask.shape, dtype=model.dtype)
    for n, (tokens, prompt_len) in enumerate(zip(rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True)):
        mask = rollouts.loss_mask[n, : len(tokens) - prompt_len]
        hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0]  # [P + T, E]
        scores = model.lm_head(hidden[prompt_len - 1 : -1][mask]).log_softmax(-1)  # [M, V]
        logprobs = scores.gather(-1, tokens[prompt_len:][mask, None])[:, 0]
        # On the policy that sampled, grpo_loss has this gradient.
        (-advantages[n] * logprobs.sum() / rollouts.num_loss_tokens).backward()
        table[n, : len(mask)][mask] = logprobs.detach()
    return table


def shared_logprobs(model: nn.Module, rollouts: Rollouts, advantages: Tensor, max_tokens: int) -> Tensor:
    """Return the same from packed sequences."""
    table = torch.zeros(rollouts.loss_mask.shape, dtype=model.dtype)
    for batch, logprobs in packed_logprobs(model, rollouts, max_tokens=max_tokens):
        mask = batch.loss_mask
        grpo_loss(logprobs, advantages[batch.indices], mask, total_tokens=rollouts.num_loss_tokens).backward()
        table[batch.indices, : mask.shape[1]] = logprobs.detach()
    return table


def gradient(model: nn.Module) -> Tensor:
    """Return all gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compared(models: list[nn.Module], rollouts: Rollouts, tasks: Tensor, max_tokens: int, repeats: int) -> dict:
    """Time updates by the baseline and shared, alternating; the first pair is a warm-up if there are several."""
    advantages = group_advantages(rollouts, group_ids=tasks)
    seconds, tables = [], []
    for _ in range(repeats):
        pair, tables = [], []
        for model, step in zip(models, (baseline_logprobs, shared_logprobs), strict=True):
            model.zero_grad()
            budget = (max_tokens,) if step is shared_logprobs else ()
            start = time.process_time()
            tables.append(step(model, rollouts, advantages, *budget))
            pair.append(time.process_time() - start)
        seconds.append(pair)
        print("CPU seconds, baseline and shared:", pair, flush=True)
    batches = pack(rollouts, max_tokens)
    expected, shared = map(gradient, models)
    counted = seconds[1:] or seconds
    return {
        "sequences": len(rollouts),
        "tokens": sum(map(len, rollouts.sequences)),
        "packed_tokens": sum(batch.tree.num_tokens for batch in batches),
        "micro_batches": len(batches),
        "repeats_timed": len(counted),
        "update_cpu_s_baseline": statistics.median(pair[0] for pair in counted),
        "update_cpu_s_shared": statistics.median(pair[1] for pair in counted),
        "speedup": statistics.median(pair[0] / pair[1] for pair in counted),
        "logprob_difference": (tables[0] - tables[1]).abs().max().item(),
        "gradient_difference": ((expected - shared).norm() / expected.norm()).item(),
    }


def main() -> None:
    """Count, update, print, and write the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DATA)
    parser.add_argument("--max-tokens", type=int, default=32768, help="token budget of a micro-batch")
    parser.add_argument("--tasks", type=int, default=2, help="tasks of the update per conversation, in float32")
    parser.add_argument("--tasks-per-turn", type=int, default=1, help="tasks of the update per turn, in float32")
    parser.add_argument("--repeats", type=int, default=8, help="repetitions in float32; the first is not timed")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(
            f"FILE must exist, got {args.file}; it is historical_trajectories/gpt-4o-airline.json of tau-bench"
        )
    commit()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    conversations = sorted(read_conversations(args.file), key=lambda conversation: conversation.task)
    tokenizer = trained_tokenizer(conversations)
    models = [small_model(tokenizer), flexpg.enable(small_model(tokenizer))]
    result = {"conversations": len(conversations), "tasks": len({each.task for each in conversations})}
    steps: list[tuple[str, int, Rollouts, Tensor]] = []
    for name, per_turn, count in (("whole", False, args.tasks), ("per_turn", True, args.tasks_per_turn)):
        start = time.process_time()
        rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=per_turn)
        seconds = time.process_time() - start
        result[name] = {"rollouts_cpu_s": seconds, **counted(rollouts, tasks_of(conversations)[origin])}
        print(name, result[name], flush=True)
        tasks = tasks_of(conversations)[origin]
        unequal = [task for task in tasks.unique().tolist() if len(rollouts.rewards[tasks == task].unique()) > 1]
        shortest = min(unequal, key=lambda task: int(rollouts.completion_lens[tasks == task].sum()))
        steps.append((name, args.repeats, *of_tasks(rollouts, tasks, unequal[:count])))
        steps.append((f"{name}_float64", 1, *of_tasks(rollouts, tasks, [shortest])))
    for name, repeats, rollouts, tasks in sorted(steps, key=lambda step: step[0].endswith("float64")):
        if name.endswith("float64"):
            models = [in_float64(model) for model in models]
        numbers = compared(models, rollouts, tasks, args.max_tokens, repeats)
        result[f"update_{name}"] = {"tasks": tasks.unique().tolist()} | numbers
    save("conversations_cpu", torch.device("cpu"), result)


def tasks_of(conversations: list[Conversation]) -> Tensor:
    """Return [conversations] int64, the task of each."""
    return torch.tensor([conversation.task for conversation in conversations])


def of_tasks(rollouts: Rollouts, tasks: Tensor, kept: list[int]) -> tuple[Rollouts, Tensor]:
    """Return the rollouts of these tasks, and the task of each."""
    rows = torch.isin(tasks, torch.tensor(kept))
    return rollouts.select(rows.nonzero().flatten()), tasks[rows]


def counted(rollouts: Rollouts, tasks: Tensor) -> dict:
    """Return sequences, tokens and ratios."""
    layouts = costs(rollouts, tasks.tolist())
    baseline = layouts["baseline"]
    numbers = {"sequences": len(rollouts), "loss_tokens": rollouts.num_loss_tokens, "tokens": baseline[0]}
    for name, layout in (("tree_per_task", "one tree per task"), ("one_tree", "one tree")):
        tokens, pairs = layouts[layout]
        ratios = {"token_ratio": baseline[0] / tokens, "pair_ratio": baseline[1] / pairs}
        numbers[name] = {"tokens": tokens, **ratios}
    return numbers


if __name__ == "__main__":
    main()
