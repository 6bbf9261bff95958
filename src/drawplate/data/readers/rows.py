"""One row of a table -> the text to learn, and which part of it the loss counts.

The first form that a row has is taken: a text column, a conversation in any of the forms of data/chat/conversations.py
(the assistant's turns count), and `prompt` with `completion` (the completion counts). Control characters and broken
Unicode are mended and counted here, so that no later step meets them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawplate.data.chat.conversations import Conversation, conversation_of
from drawplate.data.chat.markup import markup_of, parsed
from drawplate.data.chat.template import ChatRenderer

Span = tuple[int, int]
LINE_ENDS = re.compile("\r\n?|\f")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text before it becomes a document; spans and group as in `records.Document`.

    Attributes:
        mended: characters that were taken out, or are U+FFFD.
        remarks: what a person should know of it.
    """

    text: str
    trained_spans: tuple[Span, ...] | None = None
    control_spans: tuple[Span, ...] | None = None
    mended: int = 0
    group: str = ""
    remarks: tuple[str, ...] = ()


def clean(text: str) -> tuple[str, int]:
    """Line ends become newlines, control characters go, broken characters are U+FFFD; counts the last two."""
    text, removed = CONTROL.subn("", LINE_ENDS.sub("\n", text))
    text = SURROGATES.sub("\ufffd", text)
    return text, removed + text.count("\ufffd")


def words_sha256(text: str) -> str:
    """The same for two texts that differ in nothing but the spaces between their words."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def row_text(row: Mapping[str, Any], text_field: str, render: ChatRenderer | None, *, parse: bool = False) -> Text:
    """The text of one row; `parse` takes chat markup in a text for a conversation.

    Raises:
        ValueError: the row has none of the known columns, or one of them holds something else than it should; the
            message says what, without the row's content.
    """
    if row.get(text_field) is not None:
        return _plain(_string(row[text_field], text_field), render, parse)
    conversation = conversation_of(row)
    if conversation is not None:
        return _conversation(conversation, render)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, mended = clean(_string(row["prompt"], "prompt"))
        completion, more = clean(_string(row["completion"], "completion"))
        if not completion.strip():
            return Text(text="", mended=mended + more)
        text = prompt + completion
        return Text(text=text, trained_spans=((len(prompt), len(text)),), mended=mended + more)
    raise ValueError(no_column(text_field, [str(column) for column in row]))


def no_column(text_field: str, there: list[str]) -> str:
    """Why a row, or a whole table, cannot be read."""
    shown = ", ".join(there[:8]) or "none"
    return (
        f"no column {text_field}, messages, or prompt with completion (there are: {shown}); data.text_field names "
        "the column that holds the text"
    )


def plain_text(text: str, render: ChatRenderer | None, *, parse: bool) -> Text:
    """A text outside of a table."""
    return _plain(text, render, parse)


def _plain(text: str, render: ChatRenderer | None, parse: bool) -> Text:
    text, mended = clean(text)
    text = text.strip()
    sign = markup_of(text)
    if sign and parse:
        return _conversation(Conversation(messages=parsed(text, sign)), render)
    remarks = (
        f"{sign} and what follows it are read as plain text, and what users say is learnt like the rest; "
        "data.chat_markup: parse makes messages of it",
    )
    return Text(text=text, mended=mended, remarks=remarks if sign else ())


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not text")
    return value


def _conversation(conversation: Conversation, render: ChatRenderer | None) -> Text:
    if render is None:
        raise ValueError("conversations need a tokenizer with a chat template")
    if not conversation.messages:
        return Text(text="")
    messages, mended = _cleaned(conversation.messages)
    tools, more = _cleaned(conversation.tools)
    chat = render(messages, tools, conversation.settings)
    return Text(
        text=chat.text,
        trained_spans=chat.trained_spans,
        control_spans=chat.control_spans,
        mended=mended + more,
        remarks=chat.remarks,
    )


def _cleaned(value: Any) -> tuple[Any, int]:
    """Every string within, cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        inner = {key: _cleaned(item) for key, item in value.items()}
        return {key: item for key, (item, _) in inner.items()}, sum(count for _, count in inner.values())
    if isinstance(value, (list, tuple)):
        items = [_cleaned(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    return value, 0
