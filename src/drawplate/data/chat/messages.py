"""The messages of a conversation, key by key: what is learnt, what the template is given, what is refused.

`role` and `content` are read always. A weight of 0, or `train: false`, keeps a turn from being learnt. Thinking and
tool calls go to the template. What carries meaning and has no place here (images, the function calls of the old API)
refuses the row, by name. Any other key goes to the template if the template mentions it; if not, it is left out and
named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

LEARN = ("weight", "train", "training", "trainable", "loss")
THINKING = ("reasoning_content", "reasoning", "thinking")
REFUSED = {
    "function_call": "write it as tool_calls",
    "functions": "write them as tools",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is learnt"),
}
TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message.

    Attributes:
        values: for the template.
        learnt: the loss counts it.
        thinking: the key in `values` under which the template is given the thinking; empty where there is none.
        left_out: keys that the template does not mention.
    """

    values: dict[str, Any]
    learnt: bool
    thinking: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """Who speaks."""
        return str(self.values["role"])

    @property
    def calls(self) -> bool:
        """Whether it calls tools."""
        return bool(self.values.get("tool_calls"))


def turn_of(message: Mapping[str, Any], mentioned: Collection[str], hide: Callable[[str], str]) -> Turn:
    """A message as the template is given it, every string through `hide`; `mentioned` are the template's words.

    Raises:
        ValueError: it holds something that cannot be learnt; the message says what.
    """
    given = {key: value for key, value in message.items() if value is not None and value != [] and value != {}}
    role = given.pop("role", None)
    if not isinstance(role, str):
        raise ValueError("a message without a role")
    refuse_meaning(given, "a message")
    learnt = _learnt(given, role)
    values: dict[str, Any] = {"role": role, "content": ""}
    if "tool_calls" in given:
        values["tool_calls"] = [_call(call, hide) for call in _calls(given.pop("tool_calls"))]
        given.setdefault("content", "")
    thinking = _take_thinking(given, values, mentioned, hide)
    values["content"] = hide(_content(given.pop("content", None)))
    values |= {key: hidden(given.pop(key), hide) for key in list(given) if key in mentioned}
    if learnt and not values["content"].strip() and not values.get("tool_calls") and not thinking:
        raise ValueError("an answer of the assistant is empty")
    return Turn(values=values, learnt=learnt, thinking=thinking, left_out=tuple(sorted(given)))


def refuse_meaning(values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that carry meaning and cannot be learnt.

    Raises:
        ValueError: there is one that is not empty.
    """
    for key, advice in REFUSED.items():
        if values.get(key):
            raise ValueError(f"{where} holds {key}: {advice}")


def hidden(value: Any, hide: Callable[[str], str]) -> Any:
    """Every string within, through `hide`."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {key: hidden(inner, hide) for key, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, hide) for inner in value]
    return value


def _learnt(given: dict[str, Any], role: str) -> bool:
    learnt = role == "assistant"
    for key in LEARN:
        flag = given.pop(key, None)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise ValueError(f"a message has {key}: only 0 and 1, or false and true, are known")
        if flag and role != "assistant":
            raise ValueError(f"a message of {role} has {key}: only what the assistant says is learnt")
        learnt = learnt and bool(flag)
    return learnt


def _take_thinking(
    given: dict[str, Any], values: dict[str, Any], mentioned: Collection[str], hide: Callable[[str], str]
) -> str:
    """Move the thinking into `values`, under the name by which the template asks for it."""
    found = {key: text for key in THINKING if (text := given.pop(key, None))}
    if not found:
        return ""
    key, text = next(iter(found.items()))
    if not isinstance(text, str) or any(other != text for other in found.values()):
        raise ValueError(f"the {key} of a message is not one text")
    name = key if key in mentioned else next((name for name in THINKING if name in mentioned), "")
    if not name:
        raise ValueError(f"the chat template has no place for the {key} of a message")
    values[name] = hide(text)
    return name


def _calls(calls: Any) -> list[Any]:
    if isinstance(calls, str):
        calls = json.loads(calls)
    if not isinstance(calls, list):
        raise ValueError("tool_calls is not a list")
    return calls


def _call(call: Any, hide: Callable[[str], str]) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates expect; OpenAI's files have them as a string."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    function = {**function, "arguments": {} if arguments is None else arguments}
    outer = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    whole: dict[str, Any] = hidden({"type": "function", **outer, "function": function}, hide)
    return whole


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ValueError("a message whose content is not text")
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError("a message whose content is not text")
    refuse_meaning({**part, "image": part.get("image") or part.get("image_url")}, "a message")
    if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(f"a message whose content is not text but {part.get('type') or 'something else'}")
    return str(part["text"])
