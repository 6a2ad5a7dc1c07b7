"""A tokenizer's chat template: the text and the tokens of each assistant turn, as a sampler sees and draws them.

The template renders the messages before a turn, with a generation prompt, and those up to it; what the second text has
after the first is what the model would have generated. So it needs no {% generation %} markers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flexpg.conversations.messages import REASONING_KEYS, Message, template_messages, template_tools


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


LEFT_OUT = "leaves out its text"  # in an error: another form of the messages may be what the template takes


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
    forms, tools = _forms(messages), template_tools(tools)
    trained = [j for j, own in enumerate(forms[0]) if own["role"] == "assistant" and own.get("weight", 1) != 0]
    if not trained:
        raise ValueError("messages must have one of role assistant in the loss; drop the conversation")
    stops = default_stop_tokens(tokenizer) if stop_tokens is None else stop_tokens
    errors: list[Exception] = []
    for form in forms:
        chat = _Chat(tokenizer, form, tools, template_options or {}, stops, stop_tokens is None)
        try:
            return [chat.turn(j) for j in trained]
        except Exception as error:  # templates raise TemplateError, TypeError and others
            errors.append(error)
    other = (error for error in errors if isinstance(error, ValueError) and LEFT_OUT not in str(error))
    raise next(other, errors[0])


def _forms(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the forms in which templates take messages; the first that they render completely is used."""
    usual = template_messages(messages)
    forms = [usual]
    if any(message.get("tool_calls") for message in usual):  # DeepSeek's: arguments are concatenated
        forms.append(template_messages(messages, parse_arguments=False))
    if any("</think>" in message["content"] for message in usual):  # Qwen3.8's: reasoning is not part of the content
        forms.append([_split_reasoning(message) for message in usual])
    forms.append([m | {"content": [{"type": "text", "text": m["content"]}]} for m in usual])  # SmolVLM's, LLaVA's
    return forms


def _split_reasoning(message: Message) -> Message:
    reasoning, closed, text = message["content"].partition("</think>")
    if message["role"] != "assistant" or not closed or message.get("reasoning_content"):
        return message
    reasoning = reasoning.rpartition("<think>")[2].strip("\n")
    return message | {"content": text.lstrip("\n"), **dict.fromkeys(REASONING_KEYS, reasoning)}


@dataclass
class _Chat:
    """The messages of a conversation in the form that its template takes."""

    tokenizer: ChatTokenizer
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    options: Mapping[str, Any]
    stop_tokens: Sequence[int]
    are_default_stops: bool

    def render(self, count: int, add_generation_prompt: bool) -> str:
        """Return the text of the first `count` messages."""
        return str(
            self.tokenizer.apply_chat_template(
                self.messages[:count],
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        )

    def turn(self, j: int) -> Turn:
        """Return message j after its history."""
        through = self.render(j + 1, False)
        history = self.render(j, True) if j else _first_history(through, self.render(1, True))
        if not history:
            raise ValueError(f"messages[{j}] must have a token before it; put a system or user message in front")
        written = _written(self.messages[j], history, through)
        if written is None:
            raise ValueError(_unknown_beginning(j, history, through))
        self._check_complete(j, history, written)
        end = self._end_of_turn(j, written)
        if not written[:end]:
            raise ValueError(f"messages[{j}] must have a token as the template renders it; drop the message")
        return Turn(j, *_encode(self.tokenizer, history, written[:end]))

    def _check_complete(self, j: int, history: str, written: str) -> None:
        """Refuse a template that leaves out or changes what the assistant wrote."""
        message = self.messages[j]
        if history.rstrip().endswith("<think>") and "<think>" in written:
            raise ValueError(
                f"messages[{j}] must not open <think>, which the template's generation prompt does already"
            )
        parts = {"text": _text_of(message), "reasoning": message.get("reasoning_content", "")}
        missing = [
            f"{name} {piece.strip()[:40]!r}"
            for name, text in parts.items()
            for piece in re.split(r"</?think>", text)
            if piece.strip() not in written
        ]
        if "{'type': 'text'" in written and "{'type': 'text'" not in _text_of(message):  # Python's repr
            missing.append("text")
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        names = Counter(call["name"] for call in calls)
        missing += [f"tool call of {name}" for name, count in names.items() if written.count(name) < count]
        missing += [f"arguments {own}" for call in calls if _is_json(own := call["arguments"]) and own not in written]
        if missing:
            raise ValueError(
                f"messages[{j}]: the template leaves out its {missing[0]}; use a template that renders it, or remove "
                "it from the message if the model did not generate it"
            )

    def _end_of_turn(self, j: int, written: str) -> int:
        """Return where the first stop token after the text ends; the end if there is none.

        After the text are only whitespace, special tokens and stop tokens.
        """
        added = self.tokenizer.added_tokens_decoder
        stops = {added[n].content if n in added else self.tokenizer.decode([n]) for n in self.stop_tokens} - {""}
        special = {token.content: n for n, token in added.items() if token.special and token.content}
        after: list[tuple[str, int, int]] = []  # tokens after the text, where they begin and end
        start = len(written)
        while True:
            end = len(written[:start].rstrip())
            token = max((own for own in {*stops, *special} if written.endswith(own, 0, end)), key=len, default=None)
            if token is None:
                break
            start = end - len(token)
            after.insert(0, (token, start, end))
        first = next((n for n, (token, *_) in enumerate(after) if token in stops), None)
        unknown = after[0][0] if after and first is None else None
        if first and after[first - 1][2] < after[first][1]:  # whitespace between the two is the template's
            unknown = after[first - 1][0]
        if unknown and self.are_default_stops:
            raise ValueError(
                f"messages[{j}] ends with {written[start:]!r}, where {unknown!r} is not known as a stop token; pass "
                f"stop_tokens, such as [{special[unknown]}] for {unknown!r}, as in the model's generation_config.json"
            )
        return len(written) if first is None else after[first][2]


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


def _first_history(through: str, prompted: str) -> str:
    """Return what precedes an assistant message that opens the conversation, its generation prompt included.

    Templates cannot render an empty list of messages. But what a generation prompt adds after the message also precedes
    it, possibly after a default system prompt.
    """
    added = prompted[_common(through, prompted) :]
    if not added:
        return ""
    if through.count(added) != 1:
        raise ValueError(
            f"messages[0]: where it begins is unknown: the template writes its generation prompt {added!r} "
            f"{through.count(added)} times; put a system or user message in front"
        )
    return through[: through.index(added) + len(added)]


def _written(message: Message, history: str, through: str) -> str | None:
    """Return the text of a turn and what the template adds after it; None if where it begins is unknown."""
    if through.startswith(history):
        return through[len(history) :]
    # DeepSeek-R1-Distill: the generation prompt opens the reasoning, which is left out when the message is rendered.
    shared = _common(history, through)
    reasoning, closed, text = _text_of(message).removeprefix(history[shared:]).rpartition("</think>")
    if closed and through.startswith(text, shared):
        return reasoning + closed + through[shared:]
    return None


def _is_json(arguments: Any) -> bool:
    """Return whether arguments are text that a template should write as it is."""
    try:
        return isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"] if content else ""


def _encode(tokenizer: ChatTokenizer, history: str, written: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of both texts, as a sampler sees and draws them: a token never spans both."""
    prompt, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (history, history + written))
    completion = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # such as Qwen's token of two newlines, one on each side
        completion = tokenizer.encode(written, add_special_tokens=False)
        decoded = tokenizer.decode(completion, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != written:  # such as a tokenizer that puts a space in front
            raise ValueError(
                f"the tokenizer must encode {written[:40]!r} separately, but decodes it as {decoded[:40]!r}"
            )
    return np.asarray(prompt, dtype=np.int64), np.asarray(completion, dtype=np.int64)


def _unknown_beginning(j: int, history: str, through: str) -> str:
    shared = _common(history, through)
    prompted, rendered = (text[max(0, shared - 20) : shared + 20] for text in (history, through))
    return (
        f"messages[{j}]: where it begins is unknown: the template's generation prompt continues with {prompted!r}, and "
        f"the message itself with {rendered!r}; use template_options under which they agree, such as enable_thinking, "
        "or a template that writes both alike"
    )


def _common(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
