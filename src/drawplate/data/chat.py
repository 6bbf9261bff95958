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
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import TemplateError

from drawplate.data.messages import Turn, hidden, turn_of
from drawplate.data.tokens import Tokenizer, control_tokens
from drawplate.errors import DataError

Span = tuple[int, int]
Values = list[dict[str, Any]]
Apply = Callable[..., str]
MARKER, THINKING_MARKER, MESSAGE_MARKER = "\ue002", "\ue003", "\ue004"
CALL_MARKER = "drawplatemarkercall"  # plain letters: a template may escape others in JSON
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
THOUGHT = re.compile(r"\s*(<(think|thinking|reasoning|thought)>|\[THINK\])(.*?)(</\2>|\[/THINK\])(.*)", re.DOTALL)
THOUGHT_TAG = re.compile(r"</?(?:think|thinking|reasoning|thought)>|\[/?THINK\]")
DATE_WORD = "strftime_now"
NOT_IN_ONE_PLACE = "the chat template does not keep the assistant's words in one place"


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
    fixed = {DATE_WORD: now.strftime} if now else {}

    def apply(messages: Values, **variables: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **fixed, **variables))
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
        chat = _Chat(turns, lambda values, **more: apply(values, **{**variables, **more}), control)
        chat.require_written(variables.get("tools", ()))
        spans = [chat.span(i) for i, turn in enumerate(turns) if turn.learnt]
        controls = tuple(match.span() for match in control.finditer(chat.text))
        remarks = chat.remarks()
        rendered = RenderedChat(text=chat.text, trained_spans=tuple(spans), control_spans=controls, remarks=remarks)
        return _reveal(rendered, kept)

    return render


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


class _Chat:
    """One conversation, rendered again and again with markers in it."""

    def __init__(self, turns: Seq[Turn], apply: Apply, control: re.Pattern[str]) -> None:
        self._turns, self._apply, self._control = turns, apply, control
        self._values = [turn.values for turn in turns]
        self._thoughts_written = self._thoughts_left_out = 0
        self.text = apply(self._values)

    def require_written(self, tools: Seq[Any]) -> None:
        """Refuse what the template leaves out: a message of somebody else than the assistant, or tools.

        Raises:
            ValueError: it does.
        """
        others = [
            i for i, turn in enumerate(self._turns) if turn.role != "assistant" and turn.values["content"].strip()
        ]
        marks = {i: f"{MESSAGE_MARKER}{i}{MESSAGE_MARKER}" for i in others}
        marked = [{**v, "content": marks.get(i, v["content"])} for i, v in enumerate(self._values)]
        try:
            written = self._apply(marked)
            missing = [i for i in others if marks[i] not in written]
        except ValueError:  # a template may look into what is said
            missing = [i for i in others if self._values[i]["content"].strip() not in self.text]
        if missing:
            raise ValueError(f"the chat template leaves out a message of {self._turns[missing[0]].role}")
        names = [str(name) for tool in tools if isinstance(tool, Mapping) and (name := _tool_name(tool))]
        if tools and (
            any(name not in self.text for name in names) or self.text == self._apply(self._values, tools=None)
        ):
            raise ValueError("the chat template leaves out the tools of the row")

    def span(self, i: int) -> Span:
        """Where turn `i` landed, with the control token that closes it.

        Raises:
            ValueError: it cannot be said, or not all of it was written.
        """
        turn = self._turns[i]
        if turn.calls:
            return self._calling(i)
        thought = THOUGHT.fullmatch(turn.values["content"])
        if turn.thinking:
            found = self._thinking(i, {turn.thinking: THINKING_MARKER, "content": MARKER})
        else:
            found = self._between(self._with(i, {"content": MARKER}), MARKER)
            if thought:
                found = self._spoken_thought(i, thought, found)
        if found is None:
            raise ValueError(NOT_IN_ONE_PLACE)
        start, end = found
        closing = self._control.search(self.text, end)
        return start, closing.end() if closing and self.text[end : closing.start()].strip() == "" else end

    def _spoken_thought(self, i: int, thought: re.Match[str], plain: Span | None) -> Span | None:
        """A turn whose words hold a thought in tags, which the template may take apart or leave out."""
        if plain:
            written = thought[3].strip() in self.text[slice(*plain)]
            self._thoughts_written += written
            self._thoughts_left_out += not written
            return plain
        content = f"{thought[1]}\n{THINKING_MARKER}\n{thought[4]}\n{MARKER}"
        return self._thinking(i, {"content": content})

    def _thinking(self, i: int, values: dict[str, str]) -> Span | None:
        """A turn of thinking and words: from the template's prompt for an answer, else from the thinking on."""
        marked = self._with(i, values)
        if THINKING_MARKER not in marked:
            self._thoughts_left_out += 1
            return self._between(marked, MARKER)
        self._thoughts_written += 1
        found = self._between(marked, THINKING_MARKER)
        prompt = self._prompt(i)
        return (len(prompt), found[1]) if found and prompt is not None and len(prompt) <= found[0] else found

    def _with(self, i: int, values: dict[str, Any]) -> str:
        return self._apply([*self._values[:i], {**self._values[i], **values}, *self._values[i + 1 :]])

    def _between(self, marked: str, first: str) -> Span | None:
        """The text between what stands before the first marker and what stands behind the last."""
        before, found, rest = marked.partition(first)
        middle, again, after = rest.partition(MARKER) if first != MARKER else ("", found, rest)
        if not (found and again) or MARKER in after or THINKING_MARKER in middle + after:
            return None
        start, end = len(before), len(self.text) - len(after)
        fits = start <= end and self.text.startswith(before) and self.text.endswith(after)
        return (start, end) if fits else None

    def _prompt(self, i: int) -> str | None:
        """All that stands before the answer when the model is asked for it; None where the template has no prompt."""
        try:
            prompt = self._apply(self._values[:i], add_generation_prompt=True)
            plain = self._apply(self._values[:i], add_generation_prompt=False)
        except ValueError:
            return None
        return prompt if prompt != plain and self.text.startswith(prompt) else None

    def _calling(self, i: int) -> Span:
        """A turn that calls tools: what the template writes behind its prompt for an answer."""
        turn, prompt = self._turns[i], self._prompt(i)
        upto = self._apply(self._values[: i + 1])
        if prompt is None or not (upto.startswith(prompt) and self.text.startswith(upto.rstrip())):
            raise ValueError("where the chat template writes the tool calls cannot be told from its prompt")
        calls = turn.values["tool_calls"]
        marked = [{**call, "function": _marked_call(n)} for n, call in enumerate(calls)]
        written = self._with(i, {"tool_calls": marked})
        if any(written.count(f"{CALL_MARKER}{kind}{n}x") != 1 for n in range(len(calls)) for kind in "nka"):
            raise ValueError("the chat template leaves out tool calls")
        answer = upto[len(prompt) :].rstrip()
        said = [turn.values[key].strip() for key in ("content", turn.thinking) if key]
        if any(words not in answer for words in said):
            raise ValueError("the chat template leaves out what the assistant says beside tool calls")
        return len(prompt), len(prompt) + len(answer)

    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the row, after its spans were asked for.

        Raises:
            ValueError: the template writes none of the thinking.
        """
        said = []
        if self._thoughts_left_out and not self._thoughts_written:
            raise ValueError("the chat template leaves out the thinking of its answers")
        if self._thoughts_left_out:
            said.append("the chat template leaves out the thinking of earlier answers")
        keys = sorted({key for turn in self._turns for key in turn.left_out})
        if keys:
            said.append(f"the chat template does not mention these keys of messages: {', '.join(keys)}")
        return tuple(said)


def _tool_name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    return (function if isinstance(function, Mapping) else tool).get("name")


def _marked_call(n: int) -> dict[str, Any]:
    return {"name": f"{CALL_MARKER}n{n}x", "arguments": {f"{CALL_MARKER}k{n}x": f"{CALL_MARKER}a{n}x"}}


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
