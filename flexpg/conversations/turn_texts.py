"""The text of each assistant turn, as a chat template writes it after the history of the turn.

The template renders the messages before a turn, with a generation prompt, and those up to it; what the second text has
after the first is what the model would have generated. So it needs no {% generation %} markers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexpg.conversations.left_out import left_out, text_of
from flexpg.conversations.messages import REASONING_KEYS, Message, template_messages

LEFT_OUT = "leaves out its text"  # in an error: another form of the messages may be what the template takes


class ChatTemplate(Protocol):
    """The part of a tokenizer of transformers that renders messages."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the text of messages, with `tokenize=False`."""


@dataclass(frozen=True)
class TurnText:
    """An assistant turn after its history.

    Attributes:
        message: The number of the message.
        history: What the model saw, generation prompt included.
        written: What the model would have generated, and what the template adds after it.
        content: The text of the message.
    """

    message: int
    history: str
    written: str
    content: str


def turn_texts(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    template_options: Mapping[str, Any],
) -> list[TurnText]:
    """Return the text of the assistant turns of a conversation.

    Args:
        template: A tokenizer with a chat template.
        messages: As `template_messages` takes them.
        tools: As `template_tools` returns them.
        template_options: Further options of the template.

    Raises:
        ValueError: If a message cannot be converted, there is no assistant turn, the template leaves out what an
            assistant wrote, or where a turn begins is unknown.
        Exception: What the template raises.
    """
    if reserved := {"tools", "tokenize", "add_generation_prompt", "conversation"} & template_options.keys():
        raise ValueError(f"template_options must not have {', '.join(sorted(reserved))}, which flexpg sets itself")
    forms = _forms(messages)
    trained = [j for j, turn in enumerate(forms[0]) if turn["role"] == "assistant" and turn.get("weight", 1) != 0]
    if not trained:
        raise ValueError("messages must have one of role assistant in the loss; drop the conversation")
    errors: list[Exception] = []
    for form in forms:
        chat = _Chat(template, form, tools, template_options)
        try:
            found = [chat.turn(j) for j in trained]
            chat.check_users(trained[-1], found[-1].history)
            return found
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


class _Chat:
    """The messages of a conversation in the form that its template takes."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.template, self.tools, self.options = template, tools, options
        self.as_text: dict[str, str] = {}  # a mark in the messages -> the arguments, which are text
        self.messages = [self._with_marks(message) for message in messages]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of messages."""
        options = {"tools": self.tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        text = str(self.template.apply_chat_template(messages, **options, **self.options))
        for mark, arguments in self.as_text.items():  # a template that writes JSON would quote them
            text = text.replace(f'"{mark}"', arguments).replace(mark, arguments)
        return text

    def check_users(self, j: int, history: str) -> None:
        """Raise ValueError if a template leaves out what a user wrote before message j."""
        for i, message in enumerate(self.messages[:j]):
            if message["role"] == "user" and text_of(message).strip() not in history:
                text = text_of(message).strip()[:40]
                raise ValueError(f"messages[{i}]: the template {LEFT_OUT} {text!r}; use a template that renders it")

    def turn(self, j: int) -> TurnText:
        """Return message j after its history."""
        before, message = self.messages[:j], self.messages[j]
        through = self.render([*before, message])
        history = self.render(before, True) if j else _first_history(through, self.render([message], True))
        if not history:
            raise ValueError(f"messages[{j}] must have a token before it; put a system or user message in front")
        written = _written(message, history, through)
        if written is None and any(earlier.get("reasoning_content") for earlier in before):
            # gpt-oss: the template drops earlier reasoning once an answer follows, which the model still saw.
            plain = [{key: value for key, value in earlier.items() if key not in REASONING_KEYS} for earlier in before]
            written = _written(message, self.render(plain, True), through)
        if written is None:
            prompted, rendered = _differing(history, through)
            follows = j > 0 and before[-1]["role"] == "assistant"
            raise ValueError(
                f"messages[{j}]: where it begins is unknown: the template's generation prompt continues with "
                f"{prompted!r}, and the message itself with {rendered!r}; use template_options under which they agree, "
                "such as enable_thinking, a template that writes both alike, or reasoning inside the content, as the "
                f"model wrote it{f'; or join it with messages[{j - 1}]' * follows}"
            )
        _check_think_tags(j, message, history, written)
        if missing := left_out(lambda other: self.render([*before, other]), message, written):
            raise ValueError(
                f"messages[{j}]: the template leaves out its {missing}; use a template that renders it, or remove it "
                "from the message if the model did not generate it"
            )
        return TurnText(j, history, written, text_of(message))

    def _with_marks(self, message: Message) -> Message:
        """Put marks in place of arguments that are text, such as JSON that was cut off."""
        if not message.get("tool_calls"):
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                mark = f"FLEXPG-ARGUMENTS-{len(self.as_text)}."
                self.as_text[mark] = arguments
                arguments = mark
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        return message | {"tool_calls": calls}


def _check_think_tags(j: int, message: Message, history: str, written: str) -> None:
    """Raise ValueError if <think> is opened twice, or not closed where the template writes reasoning of its own."""
    if history.rstrip().endswith("<think>") and re.match(r"\s*(</think>\s*)?<think>", written):
        raise ValueError(f"messages[{j}] must not open <think>, which the template's generation prompt does already")
    text = text_of(message).lstrip()
    if text.startswith("<think>") and "</think>" not in text and "</think>" in written:  # reasoning was cut off
        raise ValueError(
            f"messages[{j}] must close <think>, as the template writes reasoning of its own in front; drop the "
            "message, or set its weight to 0"
        )


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
    # DeepSeek's: the generation prompt opens the reasoning, which is left out when the message is rendered.
    before, opening, space = history.rpartition("<think>")
    if not opening or space.strip() or not through.startswith(before):
        return None
    content, rendered = text_of(message), through[len(before) :]
    reasoning, closed, text = content.removeprefix(opening + space).rpartition("</think>")
    if not closed:
        return None
    kept = next((part for part in (content, text) if rendered.startswith(part)), None)
    return None if kept is None else reasoning + closed + text + rendered[len(kept) :]


def _differing(history: str, through: str) -> tuple[str, str]:
    """Return both texts around the first character in which they differ."""
    shared = _common(history, through)
    a, b = (text[max(0, shared - 20) : shared + 20] for text in (history, through))
    return a, b


def _common(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
