"""One GRPO update on recorded conversations of an agent, in which shared prefixes are encoded once.

python examples/agent_conversations.py [FILE] [--model CHECKPOINT]

FILE has recorded conversations (default: four of tau-bench in examples/data). Without a checkpoint, the model is
small with random weights, and its tokenizer is trained on the conversations.
"""

import argparse
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

import flexpg
from flexpg import PrefixTree, Rollouts
from flexpg.conversations import Conversation, conversation_rollouts, read_conversations, template_messages

DATA = Path(__file__).parent / "data"
MARKS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def trained_tokenizer(conversations: list[Conversation], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding on the conversations, with a chat template like Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": MARKS, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    messages = (message for each in conversations for message in template_messages(each.messages))
    texts = [str(text) for message in messages for text in message.values()]
    tokenizer.train_from_iterator(texts, trainer)
    template = (DATA / "chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def small_model(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """Build a Qwen2 of two layers with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def costs(rollouts: Rollouts, tasks: list[int]) -> dict[str, tuple[int, int]]:
    """Return tokens and visible pairs of the baseline, of one tree per task, and of one tree."""
    order = sorted(range(len(rollouts)), key=tasks.__getitem__)
    members = [[rollouts.sequences[n] for n in numbers] for _, numbers in groupby(order, tasks.__getitem__)]
    trees = [PrefixTree.from_sequences(sequences) for sequences in members]
    whole = rollouts.tree
    return {
        "baseline": (whole.baseline_tokens, whole.baseline_pairs),
        "one tree per task": (sum(tree.num_tokens for tree in trees), sum(tree.num_pairs for tree in trees)),
        "one tree": (whole.num_tokens, whole.num_pairs),
    }


def update(model: torch.nn.Module, rollouts: Rollouts, tasks: torch.Tensor, max_tokens: int) -> None:
    """Compute the gradients of the step's loss; the trials of a task are compared with each other."""
    advantages = flexpg.group_advantages(rollouts, group_ids=tasks)
    for batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=max_tokens):
        loss = flexpg.grpo_loss(
            logprobs, advantages[batch.indices], batch.loss_mask, total_tokens=rollouts.num_loss_tokens
        )
        loss.backward()
        print(f"update: {batch.tree.baseline_tokens:,} tokens in {batch.tree.num_tokens:,}")


def main() -> None:
    """Count tokens, then compute one update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=DATA / "tau_bench_sample.json")
    parser.add_argument("--model", help="a checkpoint whose tokenizer has a chat template")
    parser.add_argument("--max-tokens", type=int, default=16384, help="token budget of a micro-batch")
    args = parser.parse_args()
    conversations = read_conversations(args.file)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    else:
        tokenizer = trained_tokenizer(conversations)
        model = small_model(tokenizer)
    flexpg.enable(model)
    task_of = torch.tensor([conversation.task for conversation in conversations])
    for name, per_turn in (("a rollout per turn", True), ("a rollout per conversation", False)):
        rollouts, origin = conversation_rollouts(conversations, tokenizer, per_turn=per_turn)
        tasks = task_of[origin]
        print(f"{name}: {len(rollouts)}, {rollouts.num_loss_tokens:,} tokens in the loss")
        by_layout = costs(rollouts, tasks.tolist())
        for layout, (tokens, pairs) in by_layout.items():
            fewer = [before / after for before, after in zip(by_layout["baseline"], (tokens, pairs), strict=True)]
            print(f"  {layout:<18}{tokens:>10,} tokens {fewer[0]:>6.2f}x{fewer[1]:>10.2f}x in visible pairs")
    update(model, rollouts, tasks, args.max_tokens)  # of whole conversations
    print("gradient norm", torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())


if __name__ == "__main__":
    main()
