"""Recorded conversations of an agent as prefix trees: what they share, and an update shared and unshared by turns.

    python -m benchmarks.conversations [FILE]

FILE holds tau-bench's results: 200 conversations, 50 tasks with 4 trials each. The tokenizer is made from them, the
model is a Qwen2 of two layers and width 128 with random weights. Unshared is a forward and backward of each sequence
alone by transformers' own attention, with logits of trained tokens only; shared is `pack` and what follows it.
All conversations are counted. Updates are on tasks of unequal rewards, as others have no gradient: the first such
tasks in float32, the shortest in float64, where nothing is timed.
Seconds are those of one CPU thread at work, so that other work on the machine counts little.
Writes benchmarks/results/conversations_cpu.json, which docs/conversations.md quotes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import save
from examples.agent_conversations import costs, small_model, trained_tokenizer
from flexpg import Rollouts, group_advantages, grpo_loss, pack, token_logprobs
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.integrations.transformers import forward, output, register
from flexpg.training.tasks import tau_bench

DATA = Path("../shared/data/tau_bench/gpt-4o-airline.json")


class Float64Norm(nn.Module):
    """Qwen2's norm without its round to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, Float64Norm(child))
    return model


def unshared_logprobs(model: nn.Module, rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """[N, C], 0 where nothing is trained; adds the gradients of the step's loss, one sequence after the other."""
    table = torch.zeros(rollouts.trained.shape, dtype=model.dtype)
    normalizer = rollouts.trained.sum()
    for n, (tokens, prompt_len) in enumerate(zip(rollouts.sequences, rollouts.prompt_lens.tolist(), strict=True)):
        trained = rollouts.trained[n, : len(tokens) - prompt_len]
        hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0]  # [P + T, E]
        scores = model.lm_head(hidden[prompt_len - 1 : -1][trained]).log_softmax(-1)  # [M, V]
        logprobs = scores.gather(-1, tokens[prompt_len:][trained, None])[:, 0]
        # On the policy that sampled, grpo_loss has this gradient.
        (-advantages[n] * logprobs.sum() / normalizer).backward()
        table[n, : len(trained)][trained] = logprobs.detach()
    return table


def shared_logprobs(model: nn.Module, rollouts: Rollouts, advantages: Tensor, max_tokens: int) -> Tensor:
    """The same, from packed rows."""
    table = torch.zeros(rollouts.trained.shape, dtype=model.dtype)
    normalizer = rollouts.trained.sum()
    for batch in pack(rollouts, max_tokens):
        mask, lens = batch.rollouts.trained, batch.rollouts.prompt_lens
        hidden = forward(model, batch.tree)
        logprobs = token_logprobs(hidden, output(model), batch.tree, prompt_lens=lens, mask=mask)
        grpo_loss(logprobs, None, advantages[batch.indices], mask, normalizer=normalizer)[0].backward()
        table[batch.indices, : mask.shape[1]] = logprobs.detach()
    return table


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one row."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compared(models: list[nn.Module], rollouts: Rollouts, tasks: Tensor, max_tokens: int, repeats: int) -> dict:
    """An update by turns, unshared and shared, after one turn that does not count where there are several."""
    advantages = group_advantages(rollouts.rewards, tasks)
    seconds, tables = [], []
    for _ in range(repeats):
        turn, tables = [], []
        for model, step in zip(models, (unshared_logprobs, shared_logprobs), strict=True):
            model.zero_grad()
            budget = (max_tokens,) if step is shared_logprobs else ()
            start = time.process_time()
            tables.append(step(model, rollouts, advantages, *budget))
            turn.append(time.process_time() - start)
        seconds.append(turn)
        print("CPU seconds, unshared and shared:", turn, flush=True)
    batches = pack(rollouts, max_tokens)
    unshared, shared = map(gradient, models)
    counted = seconds[1:] or seconds
    return {
        "sequences": len(rollouts),
        "tokens": sum(map(len, rollouts.sequences)),
        "packed_tokens": sum(batch.tree.num_tokens for batch in batches),
        "micro_batches": len(batches),
        "turns_timed": len(counted),
        "update_cpu_s_unshared": statistics.median(turn[0] for turn in counted),
        "update_cpu_s_shared": statistics.median(turn[1] for turn in counted),
        "speedup": statistics.median(turn[0] / turn[1] for turn in counted),
        "logprob_difference": (tables[0] - tables[1]).abs().max().item(),
        "gradient_difference": ((unshared - shared).norm() / unshared.norm()).item(),
    }


def main() -> None:
    """Counts, updates, prints, and writes the result with machine, versions and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DATA)
    parser.add_argument("--max-tokens", type=int, default=32768, help="of a packed row, as `pack` counts them")
    parser.add_argument("--tasks", type=int, default=2, help="updated on as whole conversations, in float32")
    parser.add_argument("--tasks-per-turn", type=int, default=1, help="updated on turn by turn, in float32")
    parser.add_argument("--repeats", type=int, default=8, help="turns in float32; the first is not timed")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} is not there; give tau-bench's historical_trajectories/gpt-4o-airline.json")
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    register()
    conversations = sorted(tau_bench(args.file), key=lambda conversation: conversation.task)
    tokenizer = trained_tokenizer(conversations)
    models = [small_model(tokenizer, attention) for attention in ("sdpa", "flexpg")]
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
    """[conversations] int64, the task of each."""
    return torch.tensor([conversation.task for conversation in conversations])


def of_tasks(rollouts: Rollouts, tasks: Tensor, kept: list[int]) -> tuple[Rollouts, Tensor]:
    """The rollouts of these tasks, and the task of each."""
    rows = torch.isin(tasks, torch.tensor(kept))
    return rollouts.select(rows.nonzero().flatten()), tasks[rows]


def counted(rollouts: Rollouts, tasks: Tensor) -> dict:
    """Sequences, tokens and ratios."""
    layouts = costs(rollouts, tasks.tolist())
    unshared = layouts["each on its own"]
    numbers = {"sequences": len(rollouts), "trained_tokens": int(rollouts.trained.sum()), "tokens": unshared.tokens}
    for name, layout in (("tree_per_task", "a tree per task"), ("one_tree", "one tree")):
        numbers[name] = {
            "tokens": layouts[layout].tokens,
            "token_ratio": unshared.tokens / layouts[layout].tokens,
            "attention_pair_ratio": unshared.attention_pairs / layouts[layout].attention_pairs,
        }
    return numbers


if __name__ == "__main__":
    main()
