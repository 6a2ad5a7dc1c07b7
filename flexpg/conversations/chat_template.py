"""A tokenizer's chat template: the tokens of each assistant turn, as a sampler sees and draws them."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

import numpy as np

from flexpg.conversations.messages import Message, template_tools
from flexpg.conversations.turn_texts import TurnText, turn_texts


class ChatTokenizer(Protocol):
    """The part of a tokenizer of transformers that is used."""

    eos_token_id: int | None
    name_or_path: str
    added_tokens_decoder: Mapping[int, Any]  # id -> a token with `content` and `special`

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the text of messages, with `tokenize=False`."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return token ids."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return text."""


@dataclass(frozen=True)
class Turn:
    """An assistant turn after its history.

    Attributes:
        message: The number of the message.
        history: [T] int64, the tokens that the model saw, generation prompt included.
        completion: [T] int64, the tokens that it would have generated.
    """

    message: int
    history: np.ndarray
    completion: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[T] int64, both."""
        return np.concatenate([self.history, self.completion])


def assistant_turns(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Any = None,
    stop_tokens: Sequence[int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[Turn]:
    """Return the assistant turns of a conversation, each after its history.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        messages: As `template_messages` takes them.
        tools: Schemas of the tools, which the template shows to the model.
        stop_tokens: Ids that end a turn; None for `default_stop_tokens(tokenizer)`.
        template_options: Further options of the template.

    Raises:
        ValueError: If a message cannot be converted, there is no assistant turn, the template leaves out what an
            assistant wrote, or where a turn begins or ends is unknown.
        Exception: What the template raises.
    """
    if stop_tokens is not None:
        check_stop_tokens(tokenizer, stop_tokens)
    texts = turn_texts(tokenizer, messages, template_tools(tools), template_options or {})
    ends = [_end_of_turn(tokenizer, text, stop_tokens) for text in texts]
    # Added tokens separate texts, which are encoded once each, unless one depends on the text around it. What that
    # gives must be what whole texts give.
    whole = _Whole(tokenizer)
    kinds = ("single_word", "lstrip", "rstrip")
    depends = any(getattr(added, kind, False) for added in tokenizer.added_tokens_decoder.values() for kind in kinds)
    pieces = whole if depends else _Pieces(tokenizer)
    turns = [_turn(tokenizer, text, end, pieces) for text, end in zip(texts, ends, strict=True)]
    last = _turn(tokenizer, texts[-1], ends[-1], whole)
    if np.array_equal(last.tokens, turns[-1].tokens) and len(last.history) == len(turns[-1].history):
        return turns
    return [_turn(tokenizer, text, end, whole) for text, end in zip(texts, ends, strict=True)]


class _Whole:
    """Encodes texts as they are."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class _Pieces(_Whole):
    """Encodes what is between added tokens separately, and each such text once."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        super().__init__(tokenizer)
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.separators = re.compile(f"({'|'.join(map(re.escape, filter(None, added)))})" if added else r"(?!)")
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in filter(None, self.separators.split(text)):
            if piece not in self.known:
                self.known[piece] = super().encode(piece)
            ids += self.known[piece]
        return ids


def _turn(tokenizer: ChatTokenizer, text: TurnText, end: int, encoder: _Whole) -> Turn:
    """Return the tokens of a turn, as a sampler sees and draws them: none spans the history and what follows."""
    written = text.written[:end]
    prompt, whole = encoder.encode(text.history), encoder.encode(text.history + written)
    completion = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # such as Qwen's token of two newlines, one on each side
        completion = encoder.encode(written)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        together, alone = (tokenizer.decode(ids, **options) for ids in ([*prompt, *completion], prompt))
        decoded = together.removeprefix(alone)
        if normalize("NFC", decoded) != normalize("NFC", written):  # such as a tokenizer that puts a space in front
            raise ValueError(
                f"messages[{text.message}]: the tokenizer must encode {written[:40]!r} separately, but decodes it as "
                f"{decoded[:40]!r}"
            )
    return Turn(text.message, np.asarray(prompt, dtype=np.int64), np.asarray(completion, dtype=np.int64))


def _end_of_turn(tokenizer: ChatTokenizer, text: TurnText, stop_tokens: Sequence[int] | None) -> int:
    """Return where in the text the first stop token after it ends; the end if there is none.

    After the text are only whitespace, special tokens and stop tokens.
    """
    j, written, added = text.message, text.written, tokenizer.added_tokens_decoder
    ids = default_stop_tokens(tokenizer) if stop_tokens is None else stop_tokens
    stops = {added[n].content if n in added else tokenizer.decode([n]) for n in ids} - {""}
    special = {token.content: n for n, token in added.items() if token.special and token.content}
    after: list[tuple[str, int, int]] = []  # tokens after the text, where they begin and end
    start = len(written)
    while True:
        end = len(written[:start].rstrip())
        token = max((stop for stop in {*stops, *special} if written.endswith(stop, 0, end)), key=len, default=None)
        if token is None:
            break
        start = end - len(token)
        after.insert(0, (token, start, end))
    first = next((n for n, (token, *_) in enumerate(after) if token in stops), None)
    unknown = after[0][0] if after and first is None else None
    if first and after[first - 1][2] < after[first][1]:
        piece = written[after[first - 1][1] : after[first][1]]  # a token and whitespace before the stop token
        unknown = None if text.content.endswith(piece) else after[first - 1][0]  # the whitespace is the template's
    if unknown and stop_tokens is None:
        raise ValueError(
            f"messages[{j}] ends with {written[start:]!r}, where {unknown!r} is not known as a stop token; pass "
            f"stop_tokens, such as [{special[unknown]}] for {unknown!r}, as in the model's generation_config.json"
        )
    if first is not None and len(after) > first + 1 and text.content.rstrip().endswith(after[first][0]):
        raise ValueError(f"messages[{j}] ends with {after[first][0]!r}, which the template writes too; remove it")
    stop = len(written) if first is None else after[first][2]
    if not stop:
        raise ValueError(f"messages[{j}] must have a token as the template renders it; drop the message")
    return stop


def check_stop_tokens(tokenizer: ChatTokenizer, stop_tokens: Sequence[int]) -> None:
    """Raise ValueError unless stop tokens are ids of the tokenizer."""
    try:
        texts = {n: tokenizer.decode([operator.index(n)]) for n in stop_tokens}
    except (OverflowError, TypeError) as error:
        raise ValueError(
            f"stop_tokens must be a list of token ids, got {stop_tokens!r}; of texts, "
            "tokenizer.convert_tokens_to_ids returns them"
        ) from error
    if unknown := [n for n, text in texts.items() if not text and n not in tokenizer.added_tokens_decoder]:
        raise ValueError(f"stop_tokens must be ids of the tokenizer, got {unknown[0]}, which it does not have")


def default_stop_tokens(tokenizer: ChatTokenizer) -> list[int]:
    """Return the `eos_token_id` of a tokenizer and of the generation_config.json in its folder or cached repository."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if file := _generation_config(tokenizer.name_or_path):
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops += given if isinstance(given, list) else [] if given is None else [given]
    return sorted(set(stops))


def _generation_config(name: str) -> Path | None:
    path = Path(name, "generation_config.json")
    if path.is_file():
        return path if name else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, path.name) if name and not Path(name).exists() else None
    except HFValidationError:  # not the name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
