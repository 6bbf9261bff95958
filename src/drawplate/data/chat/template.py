"""A conversation as its model's chat template writes it, with the places that the loss counts.

Only what the assistant said is trained on, its closing control token included, so that the model learns to stop. The
template is the model's own (Jinja, run in transformers' sandbox). It is run once more for each assistant turn, with a
marker in the turn's place, to see where the turn lands: that works for any template, also for those that drop old
thinking. Where an answer comes apart into thinking and words there are two markers, and the answer is what lies from
the first to the second; where it calls tools, it is what the template writes behind its own prompt for an answer.

Nothing that a row holds is dropped in silence. What the template does not write (a message, tools, all of the
thinking) refuses the row; thinking of earlier turns, which many templates leave out on purpose, is a remark.
"""

from __future__ import annotations

import datetime
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import TemplateError

from drawplate.data.chat.messages import Turn, hidden, turn_of
from drawplate.data.chat.spans import THOUGHT_TAG, Chat, Span, Values
from drawplate.data.tokens import Tokenizer, control_tokens
from drawplate.errors import DataError

PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
DATE_WORD = "strftime_now"
DATE_CALL = re.compile(DATE_WORD + r"""\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """The text of a conversation, the assistant's part of it, and where the template wrote control tokens."""

    text: str
    trained_spans: tuple[Span, ...]
    control_spans: tuple[Span, ...]
    remarks: tuple[str, ...] = ()


class ChatRenderer(Protocol):
    """Messages -> text with spans; raises ValueError for messages that the template refuses, or does not write."""

    def __call__(
        self, messages: Seq[Mapping[str, Any]], tools: Seq[Any] = (), settings: Mapping[str, Any] | None = None
    ) -> RenderedChat:
        """Render one conversation; `settings` are further variables of the template."""


def template_source(tokenizer: Tokenizer) -> str:
    """The chat template, or all of them where there are several under names; empty where there is none."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


def writes_a_date(tokenizer: Tokenizer) -> bool:
    """Whether what the chat template writes depends on the day."""
    return DATE_WORD in template_source(tokenizer)


def chat_renderer(tokenizer: Tokenizer, now: datetime.datetime | None = None) -> ChatRenderer:
    """A renderer that uses the tokenizer's chat template; `now` is the time that the template may write.

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
    mentioned = frozenset(re.findall(r"[A-Za-z_]\w*", template_source(tokenizer)))
    own = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents"}

    def apply(messages: Values, **variables: Any) -> str:
        try:
            template = _dated(tokenizer.get_chat_template(None, variables.get("tools")), now)
            return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **variables))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from None

    def render(
        messages: Seq[Mapping[str, Any]], tools: Seq[Any] = (), settings: Mapping[str, Any] | None = None
    ) -> RenderedChat:
        kept: list[str] = []
        turns = [turn_of(m, mentioned, _hider(control, kept, m.get("role") == "assistant")) for m in messages]
        if not any(turn.learnt for turn in turns):
            raise ValueError("no message of the assistant" + (" is learnt" if _speaks(turns) else ""))
        for name in settings or {}:
            if name in own or name not in mentioned:
                raise ValueError(f"the chat template has no variable {name} (chat_template_kwargs)")
        variables: dict[str, Any] = dict(settings or {})
        if tools:
            variables["tools"] = hidden(list(tools), _hider(control, kept, False))
        chat = Chat(turns, lambda values, **more: apply(values, **{**variables, **more}), control)
        chat.require_written(variables.get("tools", ()))
        spans = [chat.span(i) for i, turn in enumerate(turns) if turn.learnt]
        controls = tuple(match.span() for match in control.finditer(chat.text))
        remarks = chat.remarks()
        rendered = RenderedChat(text=chat.text, trained_spans=tuple(spans), control_spans=controls, remarks=remarks)
        return _reveal(rendered, kept)

    return render


def _dated(template: str, now: datetime.datetime | None) -> str:
    """The template with the date in place of each question for it (transformers passes functions to no template)."""
    if now is None:
        return template
    return DATE_CALL.sub(lambda match: json.dumps(now.strftime(match[2]), ensure_ascii=False), template)


def _speaks(turns: Seq[Turn]) -> bool:
    return any(turn.role == "assistant" for turn in turns)


def _hider(control: re.Pattern[str], kept: list[str], thinks: bool) -> Callable[[str], str]:
    """Puts placeholders for control tokens' names that a text holds, so that the template's own can be told apart.

    Tags around the assistant's thinking stay: templates look for them, whether or not they are control tokens.
    """

    def hide(match: re.Match[str]) -> str:
        if thinks and THOUGHT_TAG.fullmatch(match[0]):
            return match[0]
        kept.append(match[0])
        return f"\ue000{len(kept) - 1}\ue001"

    return lambda text: re.sub(f"{PLACEHOLDER.pattern}|{control.pattern}", hide, text)


def _reveal(chat: RenderedChat, kept: list[str]) -> RenderedChat:
    """Put the hidden names back, and move every span by what that changes."""
    borders = [*itertools.chain.from_iterable((*chat.trained_spans, *chat.control_spans))]
    moved = list(borders)
    for match in PLACEHOLDER.finditer(chat.text):
        shift = len(kept[int(match[1])]) - len(match[0])
        moved = [new + shift if old >= match.end() else new for old, new in zip(borders, moved, strict=True)]
    pairs = list(zip(moved[::2], moved[1::2], strict=True))
    count = len(chat.trained_spans)
    return replace(
        chat,
        text=PLACEHOLDER.sub(lambda match: kept[int(match[1])], chat.text),
        trained_spans=tuple(pairs[:count]),
        control_spans=tuple(pairs[count:]),
    )
