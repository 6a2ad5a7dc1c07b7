"""Recorded conversations of an agent, what they share encoded once: one exact GRPO update.

python examples/agent_conversations.py [FILE] [--model CHECKPOINT]

FILE holds tau-bench's results; without one, the four conversations in examples/data. Without a checkpoint, the model is
a small one with random weights, and its tokenizer is made from the conversations.
"""

import argparse
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

import flexpg
from flexpg import Cost, PrefixTree, Rollouts, dense_cost, shared_cost
from flexpg.conversations import Conversation, conversation_rollouts
from flexpg.integrations.transformers import forward, output, register
from flexpg.training.tasks import tau_bench

DATA = Path(__file__).parent / "data"
MARKS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def trained_tokenizer(conversations: list[Conversation], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte pairs of the conversations' own texts, with a chat template in the manner of Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": MARKS, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    texts = [str(text) for each in conversations for message in each.messages for text in message.values()]
    tokenizer.train_from_iterator(texts, trainer)
    template = (DATA / "chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def small_model(tokenizer: PreTrainedTokenizerFast, attention: str = "flexpg") -> torch.nn.Module:
    """A Qwen2 of two layers, with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def costs(rollouts: Rollouts, tasks: list[int]) -> dict[str, Cost]:
    """Of the same sequences: each on its own, in one tree for each task, and in one tree over all."""
    order = sorted(range(len(rollouts)), key=tasks.__getitem__)
    members = [[rollouts.sequences[n] for n in own] for _, own in groupby(order, tasks.__getitem__)]
    whole = PrefixTree.from_sequences(rollouts.sequences)
    per_task = sum((shared_cost(PrefixTree.from_sequences(own)) for own in members), start=Cost(0, 0))
    return {"each on its own": dense_cost(whole), "a tree per task": per_task, "one tree": shared_cost(whole)}


def update(model: torch.nn.Module, rollouts: Rollouts, tasks: torch.Tensor, max_tokens: int) -> None:
    """Gradients of the step's loss; the trials of a task are compared with each other."""
    advantages = flexpg.group_advantages(rollouts.rewards, tasks)
    for batch in flexpg.pack(rollouts, max_tokens):
        mask = batch.rollouts.trained
        hidden = forward(model, batch.tree)
        logprobs = flexpg.token_logprobs(
            hidden, output(model), batch.tree, prompt_lens=batch.rollouts.prompt_lens, mask=mask
        )
        loss, _ = flexpg.grpo_loss(logprobs, None, advantages[batch.indices], mask, normalizer=rollouts.trained.sum())
        loss.backward()
        print(f"update: {int(batch.tree.lengths.sum()):,} tokens in {batch.tree.num_tokens:,}")


def main() -> None:
    """Counts, then updates once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=DATA / "tau_bench_sample.json")
    parser.add_argument("--model", help="a checkpoint whose tokenizer has a chat template")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a packed row")
    args = parser.parse_args()
    register()
    conversations = tau_bench(args.file)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="flexpg")
    else:
        tokenizer = trained_tokenizer(conversations)
        model = small_model(tokenizer)
    task_of = torch.tensor([conversation.task for conversation in conversations])
    for name, per_turn in (("a rollout per turn", True), ("a rollout per conversation", False)):
        rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=per_turn)
        tasks = task_of[origin]
        print(f"{name}: {len(rollouts)}, {int(rollouts.trained.sum()):,} tokens of them trained")
        for layout, cost in (by_layout := costs(rollouts, tasks.tolist())).items():
            unshared = by_layout["each on its own"]
            tokens, pairs = unshared.tokens / cost.tokens, unshared.attention_pairs / cost.attention_pairs
            print(f"  {layout:<16}{cost.tokens:>10,} tokens {tokens:>6.2f} x{pairs:>10.2f} x in attention pairs")
    update(model, rollouts, tasks, args.max_tokens)  # of whole conversations
    print("gradient norm", torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())


if __name__ == "__main__":
    main()
