"""A tokenizer without a vocabulary file: one token per byte.

It follows torchtune's ModelTokenizer protocol by its methods alone, so flexpg does not import torchtune for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class ByteTokenizer:
    """Every UTF-8 text round-trips: byte values are the ids 0 to 255, special tokens follow.

    Args:
        max_seq_len: longest result of `tokenize_messages`, in tokens; None for no limit.
        stop: characters (ASCII) that end a completion besides the end-of-sequence token; "" for none.

    Raises:
        ValueError: for a stop character outside ASCII: it would be several tokens; or a max_seq_len below 1.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("1+1")
        [49, 43, 49]
        >>> tokenizer.decode([49, 43, 49, tokenizer.eos_id])
        '1+1'
    """

    def __init__(self, max_seq_len: int | None = None, stop: str = "\n") -> None:
        if max_seq_len is not None and (type(max_seq_len) is not int or max_seq_len < 1):
            raise ValueError(f"max_seq_len is {max_seq_len!r}; give a whole number, 1 or more, or None for no limit")
        if not isinstance(stop, str) or not stop.isascii():
            raise ValueError(f"stop is {stop!r}; a stop character must be ASCII to be one byte")
        self.special_tokens = {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258, "<|reserved|>": 259}
        self.pad_id, self.bos_id, self.eos_id = 256, 257, 258
        self.vocab_size = 260
        self.stop_tokens = [self.eos_id, *stop.encode()]
        self.max_seq_len = max_seq_len

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The bytes of the text as ids; special tokens are added on request, never parsed out of the text."""
        return [self.bos_id] * add_bos + list(text.encode()) + [self.eos_id] * add_eos

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of the ids: special tokens are left out, broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in token_ids]
        unknown = [i for i in ids if not 0 <= i < self.vocab_size]
        if unknown:
            raise ValueError(f"token id {unknown[0]} is outside this tokenizer's 0 to {self.vocab_size - 1}")
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def tokenize_messages(self, messages: Sequence[Any], add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """The messages' bytes one behind the other, without a template.

        Args:
            messages: torchtune Messages: `role`, `masked`, and `content` as a list of {"type": "text", "content": str}.
            add_end_tokens: whether an end-of-sequence token follows each assistant message.

        Returns:
            Token ids, and torchtune's mask of the same length, where True means NOT trained.

        Raises:
            ValueError: for content other than text.
        """
        tokens: list[int] = []
        mask: list[bool] = []
        for message in messages:
            for item in message.content:
                if item["type"] != "text":
                    raise ValueError(f"a {message.role} message holds {item['type']!r}; ByteTokenizer reads text only")
                tokens += self.encode(item["content"])
            if add_end_tokens and message.role == "assistant":
                tokens.append(self.eos_id)
            mask += [message.masked] * (len(tokens) - len(mask))
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """The sample with `tokens` and `mask` in the place of `messages`, as torchtune's datasets ask for."""
        rest = {key: value for key, value in sample.items() if key != "messages"}
        tokens, mask = self.tokenize_messages(sample["messages"], add_end_tokens=not inference)
        return {**rest, "tokens": tokens, "mask": mask}
