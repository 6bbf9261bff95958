"""One row of a table -> the text to learn, and which part of it the loss counts.

Three forms are known, and the first that a row has is taken: a text column, `messages` (a conversation; the assistant's
turns count) and `prompt` with `completion` (the completion counts). Control characters and broken Unicode are mended
and counted here, so that no later step meets them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawplate.data.chat import ChatRenderer

Span = tuple[int, int]
LINE_ENDS = re.compile("\r\n?|\f")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text before it becomes a document; spans and group as in `records.Document`. `mended` counts characters."""

    text: str
    trained_spans: tuple[Span, ...] | None = None
    control_spans: tuple[Span, ...] | None = None
    mended: int = 0
    group: str = ""


def clean(text: str) -> tuple[str, int]:
    """Line ends become newlines, control characters go, bytes that were no UTF-8 become U+FFFD; counts the last two."""
    text, removed = CONTROL.subn("", LINE_ENDS.sub("\n", text))
    text, replaced = SURROGATES.subn("\ufffd", text)
    return text, removed + replaced


def words_sha256(text: str) -> str:
    """The same for two texts that differ in nothing but the spaces between their words."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def row_text(row: Mapping[str, Any], text_field: str, render: ChatRenderer | None) -> Text:
    """The text of one row.

    Raises:
        ValueError: the row has none of the known columns, or one of them holds something else than it should; the
            message says what, without the row's content.
    """
    if row.get(text_field) is not None:
        text, mended = clean(_string(row[text_field], text_field))
        return Text(text=text.strip(), mended=mended)
    if row.get("messages") is not None:
        return _conversation(row["messages"], render)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, mended = clean(_string(row["prompt"], "prompt"))
        completion, more = clean(_string(row["completion"], "completion"))
        if not completion.strip():
            return Text(text="", mended=mended + more)
        text = prompt + completion
        return Text(text=text, trained_spans=((len(prompt), len(text)),), mended=mended + more)
    columns = ", ".join(str(column) for column in list(row)[:8]) or "none"
    raise ValueError(f"no column {text_field}, messages, or prompt with completion (there are: {columns})")


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not text")
    return value


def _conversation(messages: Any, render: ChatRenderer | None) -> Text:
    if render is None:
        raise ValueError("conversations need a tokenizer with a chat template")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("messages is not a list of {role, content}")
    if not messages:
        return Text(text="")
    mended = 0
    cleaned: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content, count = clean(content)
            mended += count
        cleaned.append({**message, "content": content})
    chat = render(cleaned)
    return Text(text=chat.text, trained_spans=chat.trained_spans, control_spans=chat.control_spans, mended=mended)
