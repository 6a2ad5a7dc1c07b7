"""A tokenizer without a vocabulary file: one token per byte.

It has the methods of torchtune's ModelTokenizer protocol, without importing torchtune.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ByteTokenizer:
    """A tokenizer whose ids 0 to 255 are byte values, followed by special tokens; any UTF-8 text round-trips.

    Args:
        max_seq_len: Tokens of the longest result of `tokenize_messages`; None for no limit.
        stop: ASCII characters that end a completion, in addition to the end-of-sequence token.

    Raises:
        ValueError: If a stop character is not ASCII, because it would be several tokens.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("1+1")
    [49, 43, 49]
    >>> tokenizer.decode([49, 43, 49, tokenizer.eos_id])
    '1+1'
    """

    def __init__(self, max_seq_len: int | None = None, stop: str = "\n") -> None:
        if not stop.isascii():
            raise ValueError(f"stop must be ASCII, got {stop!r}")
        self.special_tokens = {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258, "<|reserved|>": 259}
        self.pad_id, self.bos_id, self.eos_id = 256, 257, 258
        self.vocab_size = 260
        self.stop_tokens = [self.eos_id, *stop.encode()]
        self.max_seq_len = max_seq_len

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the bytes of the text as ids; special tokens are added on request, never parsed out of the text."""
        return [self.bos_id] * add_bos + list(text.encode()) + [self.eos_id] * add_eos

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of the ids, without special tokens; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def tokenize_messages(self, messages: Sequence[Any], add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """Return the bytes of messages, one after another, without a template.

        Args:
            messages: torchtune Messages: `role`, `masked`, and `content` as a list of {"type": "text", "content": str}.
            add_end_tokens: Whether an end-of-sequence token follows each assistant message.

        Returns:
            Token ids, and torchtune's mask of the same length, in which True means NOT trained.

        Raises:
            ValueError: If a message has content other than text.
        """
        tokens: list[int] = []
        mask: list[bool] = []
        for message in messages:
            for item in message.content:
                if item["type"] != "text":
                    raise ValueError(f"messages must have text content only, got {item['type']!r} from {message.role}")
                tokens += self.encode(item["content"])
            if add_end_tokens and message.role == "assistant":
                tokens.append(self.eos_id)
            mask += [message.masked] * (len(tokens) - len(mask))
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace `messages` of a sample by `tokens` and `mask`, as torchtune's datasets ask for."""
        rest = {key: value for key, value in sample.items() if key != "messages"}
        tokens, mask = self.tokenize_messages(sample["messages"], add_end_tokens=not inference)
        return {**rest, "tokens": tokens, "mask": mask}
