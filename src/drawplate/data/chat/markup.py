"""Conversations that somebody has already rendered into plain text: recognised, and parsed where that is asked for.

A column of text with `<|im_start|>user` in it was written for another program. Read as text, every control token comes
apart into letters, and what the user said is learnt like what the assistant said. With `data.chat_markup: parse` such
a text becomes messages again, which the model's own template then writes. ChatML's, Llama's and Gemma's markup is
known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KINDS = (
    ("<|im_start|>", re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)),
    (
        "<|start_header_id|>",
        re.compile(
            r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*(.*?)(?:<\|eot_id\|>|<\|end_of_text\|>|\Z)", re.DOTALL
        ),
    ),
    ("<start_of_turn>", re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)", re.DOTALL)),
)
"""What each begins a turn with, and a turn: its role and its words."""
BESIDE = re.compile(r"(?:<\|(?:begin_of_text|end_of_text|endoftext)\|>|<bos>|<eos>|</?s>|\s)*")
ROLES = {"model": "assistant"}


def markup_of(text: str) -> str:
    """What begins a turn in a text of at least a user's and an assistant's; empty where it is ordinary text."""
    for sign, turn in KINDS:
        if sign in text:
            roles = {ROLES.get(match[1], match[1]) for match in turn.finditer(text)}
            if {"user", "assistant"} <= roles:
                return sign
    return ""


def parsed(text: str, sign: str) -> list[Mapping[str, Any]]:
    """The messages of a text with that markup.

    Raises:
        ValueError: something stands between the turns.
    """
    turn = dict(KINDS)[sign]
    if not BESIDE.fullmatch(turn.sub("", text)):
        raise ValueError(f"text with {sign} in it has words outside of its turns")
    return [{"role": ROLES.get(m[1], m[1]), "content": m[2].strip()} for m in turn.finditer(text)]
