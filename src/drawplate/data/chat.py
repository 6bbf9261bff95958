"""A conversation as its model's chat template writes it, with the places that the loss counts.

Only what the assistant said is trained on, its closing control token included, so that the model learns to stop. The
template is the model's own (Jinja, run in transformers' sandbox). It is run once more for each assistant turn, with a
marker in the turn's place, to see where the turn lands: that works for any template, also for those that drop old
"thinking". Tool calls and images are refused, not dropped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from drawplate.data.tokens import Tokenizer, control_tokens
from drawplate.errors import DataError

Span = tuple[int, int]
Apply = Callable[[list[dict[str, str]]], str]
MARKER = "\ue002"
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """The text of a conversation, the assistant's part of it, and where the template wrote control tokens."""

    text: str
    trained_spans: tuple[Span, ...]
    control_spans: tuple[Span, ...]


class ChatRenderer(Protocol):
    """Messages -> text with spans; raises ValueError for messages that the template refuses."""

    def __call__(self, messages: list[Mapping[str, Any]]) -> RenderedChat:
        """Render one conversation."""


def chat_renderer(tokenizer: Tokenizer) -> ChatRenderer:
    """A renderer that uses the tokenizer's chat template.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"The data holds conversations, but the tokenizer of {tokenizer.name_or_path} has no chat template.",
            safe="Nothing was written.",
            next_step="Use the model's instruct version, or give the data as text or prompt/completion.",
        )
    names = sorted(control_tokens(tokenizer), key=len, reverse=True)
    control = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")

    def apply(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from None

    def render(messages: list[Mapping[str, Any]]) -> RenderedChat:
        hidden: list[str] = []
        plain = [{"role": _role(m), "content": _hide(_content(m), control, hidden)} for m in messages]
        if not any(message["role"] == "assistant" for message in plain):
            raise ValueError("no message of the assistant")
        text = apply(plain)
        spans = [
            _assistant_span(plain, i, text, apply, control) for i, m in enumerate(plain) if m["role"] == "assistant"
        ]
        controls = [match.span() for match in control.finditer(text)]
        return _reveal(RenderedChat(text=text, trained_spans=tuple(spans), control_spans=tuple(controls)), hidden)

    return render


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError("a message without a role")
    if message.get("tool_calls"):
        raise ValueError("tool calls are not supported")
    return role


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("a message whose content is not text")
    return content


def _hide(content: str, control: re.Pattern[str], hidden: list[str]) -> str:
    """Put placeholders for control tokens' names that a message holds, so that the template's own can be told apart."""

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"\ue000{len(hidden) - 1}\ue001"

    return re.sub(f"{PLACEHOLDER.pattern}|{control.pattern}", hide, content)


def _assistant_span(messages: list[dict[str, str]], i: int, text: str, apply: Apply, control: re.Pattern[str]) -> Span:
    """Where turn `i` landed: rendered with a marker in its place, the text before and after the marker is unchanged."""
    marked = [*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]]
    before, marker, after = apply(marked).partition(MARKER)
    start, end = len(before), len(text) - len(after)
    if not (marker and MARKER not in after and start <= end and text.startswith(before) and text.endswith(after)):
        raise ValueError("the chat template does not keep the assistant's words in one place")
    closing = control.search(text, end)
    return start, closing.end() if closing and text[end : closing.start()].strip() == "" else end


def _reveal(chat: RenderedChat, hidden: list[str]) -> RenderedChat:
    """Put the hidden names back, and move every span by what that changes."""
    borders = [*itertools.chain.from_iterable((*chat.trained_spans, *chat.control_spans))]
    moved = list(borders)
    for match in PLACEHOLDER.finditer(chat.text):
        shift = len(hidden[int(match[1])]) - len(match[0])
        moved = [new + shift if old >= match.end() else new for old, new in zip(borders, moved, strict=True)]
    pairs = list(zip(moved[::2], moved[1::2], strict=True))
    count = len(chat.trained_spans)
    return RenderedChat(
        text=PLACEHOLDER.sub(lambda match: hidden[int(match[1])], chat.text),
        trained_spans=tuple(pairs[:count]),
        control_spans=tuple(pairs[count:]),
    )
