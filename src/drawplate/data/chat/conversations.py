"""The forms in which conversations lie in rows -> messages with what belongs to them.

Known are `messages` (also as a JSON string), `prompt` with `completion` where they are messages, ShareGPT's
`conversations`, and Alpaca's `instruction`, `input` and `output`. Beside them a row may hold `tools`, `system` and
`chat_template_kwargs`. A row that means more than that is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drawplate.data.chat.messages import refuse_meaning

COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history"),
    *("system", "tools", "functions", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios"),
)
"""What is read of a row beside its text."""
SHARE_GPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and what else the template is given."""

    messages: list[Mapping[str, Any]]
    tools: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def conversation_of(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation that a row holds; None where it holds none.

    Raises:
        ValueError: it holds one that cannot be read; the message says what, without the row's content.
    """
    messages = _messages(row)
    if messages is None:
        return None
    refuse_meaning(row, "the row")
    system = row.get("system")
    if system:
        if not isinstance(system, str) or any(message.get("role") == "system" for message in messages):
            raise ValueError("the row has system beside a message of the system")
        messages = [{"role": "system", "content": system}, *messages]
    tools = _parsed(row.get("tools"), "tools") or []
    settings = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(tools, list) or not isinstance(settings, Mapping):
        raise ValueError(
            "tools is not a list" if isinstance(settings, Mapping) else "chat_template_kwargs is no object"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    return Conversation(messages=messages, tools=[_parsed(tool, "a tool") for tool in tools], settings=given)


def _messages(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    if row.get("messages") is not None:
        return _listed(row["messages"], "messages")
    if row.get("conversations") is not None:
        return [_share_gpt(message) for message in _listed(row["conversations"], "conversations")]
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and completion is not None:
        return _completed(prompt, completion)
    if isinstance(row.get("instruction"), str) and row.get("output") is not None:
        return _alpaca(row)
    return None


def _listed(messages: Any, column: str) -> list[Mapping[str, Any]]:
    messages = _parsed(messages, column)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{column} is not a list of {{role, content}}")
    return messages


def _parsed(value: Any, column: str) -> Any:
    """What a column holds, also where a writer has put JSON into a string."""
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{column} is a string and no JSON") from None


def _share_gpt(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "role" in message:
        return message
    speaker = message.get("from")
    if speaker not in SHARE_GPT:
        shown = speaker if isinstance(speaker, str) and len(speaker) < 30 else "nobody"
        raise ValueError(f"a message from {shown}; known are {', '.join(SHARE_GPT)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**rest, "role": SHARE_GPT[speaker], "content": message.get("value")}


def _completed(prompt: list[Any], completion: Any) -> list[Mapping[str, Any]]:
    """Messages of which the completion alone is learnt."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    asked = [
        {**message, "train": False} if message.get("role") == "assistant" else message
        for message in _listed(prompt, "prompt")
    ]
    return [*asked, *_listed(completion, "completion")]


def _alpaca(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if row.get("history"):
        raise ValueError("the row has a history, which is not read; write its turns as messages")
    given = row.get("input")
    if not isinstance(given or "", str) or not isinstance(row["output"], str):
        raise ValueError("instruction, input or output is not text")
    question = row["instruction"] + (f"\n{given}" if given else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
