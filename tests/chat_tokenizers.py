"""Byte-level BPE tokenizers with published pre-tokenization rules and the chat templates that TRL ships."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# How words are split before merging: newlines are merged with one another, as GPT-2's rules do not.
RULES = {
    name: rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for name, number in (("qwen2", r"\p{N}"), ("llama3", r"\p{N}{1,3}"))
}
TEXT = "You help. What is 6 times 7?\n\nreply: It is 42.\n\n\nfind the booking\n\n<think>\nhm\n</think>\n\nok\n" * 8

# By family: template, end of text and the marks of the template; tokens in brackets are not special.
FAMILIES = {
    "qwen2_5": ("qwen2", "<|im_end|>", "<|im_start|> <|endoftext|> [<tool_call>] [</tool_call>]"),
    "qwen3": ("qwen2", "<|im_end|>", "<|im_start|> <|endoftext|> [<tool_call>] [</tool_call>] [<think>] [</think>]"),
    "llama3": (
        "llama3",
        "<|eot_id|>",
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|python_tag|> <|eom_id|>",
    ),
    "phi3": ("llama3", "<|endoftext|>", "<|system|> <|user|> <|assistant|> <|end|>"),
    "gemma": ("llama3", "<eos>", "<bos> <start_of_turn> <end_of_turn>"),
    "gptoss": (
        "llama3",
        "<|return|>",
        "<|start|> <|end|> <|message|> <|channel|> <|call|> <|constrain|> <|endoftext|>",
    ),
    "deepseek": (
        "llama3",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> "
        "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
        "<｜tool▁output▁begin｜> <｜tool▁output▁end｜> [<think>] [</think>]",
    ),
}


def published_template(name: str) -> str:
    """Return a published chat template, as TRL includes it."""
    return (Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def trained(rules: str) -> str:
    """Train byte-level BPE on a short text, and return the tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(RULES[rules]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, **options))
    return tokenizer.to_str()


def chat_tokenizer(family: str, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a family's marks and a published template."""
    rules, eos, marks = FAMILIES[family]
    backend = Tokenizer.from_str(trained(rules))
    names = [eos, *marks.split()]
    backend.add_tokens([AddedToken(name.strip("[]"), special=name[0] != "[", normalized=False) for name in names])
    bos = next((name for name in names if name in ("<bos>", "<|begin_of_text|>")), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=published_template(template)
    )
