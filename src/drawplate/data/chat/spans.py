"""Where in a rendered conversation each answer lies, found by rendering it again with markers in the answer's place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from drawplate.data.chat.messages import Turn

Span = tuple[int, int]
Values = list[dict[str, Any]]
Apply = Callable[..., str]
MARKER, THINKING_MARKER, MESSAGE_MARKER = "\ue002", "\ue003", "\ue004"
CALL_MARKER = "drawplatemarkercall"  # plain letters: a template may escape others in JSON
THOUGHT = re.compile(r"\s*(<(think|thinking|reasoning|thought)>|\[THINK\])(.*?)(</\2>|\[/THINK\])(.*)", re.DOTALL)
THOUGHT_TAG = re.compile(r"</?(?:think|thinking|reasoning|thought)>|\[/?THINK\]")
NOT_IN_ONE_PLACE = "the chat template does not keep the assistant's words in one place"


class Chat:
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
