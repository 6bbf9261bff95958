"""What a value in a recipe is taken for, by the type of its key.

Text stays text where a key takes text; elsewhere `1e1` is ten, `no` is False, and a size has a unit. Values that mean
the same in TrainingArguments and LoraConfig are accepted: `max_steps: -1`, `report_to: none`, `target_modules: q_proj`.
"""

from __future__ import annotations

import re
import types
import typing
from contextlib import suppress
from typing import Any, Literal

from drawplate.units import MIB, parse_bytes

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+")
_NAMES = re.compile(r"\w+(\s*,\s*\w+)*")
_TRUTH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
ALL_LINEAR = "all-linear"
SAME: dict[str, dict[Any, Any]] = {
    "optim": {"adamw_bnb_8bit": "adamw_8bit", "adamw_torch_fused": "adamw_torch"},
    "init_lora_weights": {True: "default"},
    "max_steps": {-1: None},
    "report_to": {"none": []},
}
"""Key -> what others write there -> what it means here."""


def as_meant(key: str, value: Any, annotation: Any) -> Any:
    """A value as its key's type asks for it.

    Args:
        key: the key's last part.
        value: as the file or the caller has it.
        annotation: the field's type.

    Raises:
        ValueError: an empty text, or a truth value where a number is needed.
    """
    with suppress(TypeError):  # a list or mapping, which is no key of a table
        value = SAME.get(key, {}).get(value, value)
    kinds = set(_kinds(annotation))
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise ValueError("a number is needed, not true or false")
    if str in kinds and (value == "" or (isinstance(value, list) and "" in value)):
        raise ValueError("it is empty; an empty path does not mean the current folder, `.` does")
    if isinstance(value, str):
        return _from_text(value, kinds)
    return value


def _from_text(text: str, kinds: set[Any]) -> Any:
    if bool in kinds and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if int in kinds and float not in kinds and _EXPONENT.fullmatch(text):
        number = float(text.replace("_", ""))
        return int(number) if number.is_integer() else text
    return text


def _kinds(annotation: Any) -> typing.Iterator[Any]:
    """Every plain type in an annotation, and bool where true and false are among the words."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _kinds(inside[0])
    elif origin in (typing.Union, types.UnionType, list):
        for part in inside:
            yield from _kinds(part)
    elif origin is Literal:
        if any(isinstance(word, bool) for word in inside):
            yield bool
    else:
        yield annotation


def memory_size(given: str | int | float) -> int:
    """A size of memory -> bytes; a small number without a unit is refused, because nobody means six bytes.

    Raises:
        ValueError: not a size.
    """
    if isinstance(given, str):
        size, number = parse_bytes(given), given.strip()
    elif given == given and abs(given) != float("inf"):
        size, number = int(given), f"{given:g}"
    else:
        raise ValueError(f"{given!r} is not a size; write it like 6GiB")
    if size < 0:
        raise ValueError(f"{given!r} is not a size; write it like 6GiB")
    if size < MIB and number.replace(".", "", 1).isdigit():
        unit = "GiB" if float(number) < 1024 else "MiB"
        raise ValueError(f"{number} is {number} bytes; write {number}{unit} if that is meant")
    return size


def layer_names(given: Any) -> Any:
    """`lora.target_modules`: a list of names, one regular expression, `all-linear`, or names with commas.

    Raises:
        ValueError: a regular expression that is none, or all-linear beside other names.
    """
    if isinstance(given, list) and ALL_LINEAR in given:
        if len(given) > 1:
            raise ValueError("all-linear is every linear layer; give it alone, or give names alone")
        return ALL_LINEAR
    if not isinstance(given, str) or given in ("auto", ALL_LINEAR):
        return given
    if _NAMES.fullmatch(given):  # no regular expression: a layer's full name has dots in it
        return [name.strip() for name in given.split(",")]
    try:
        re.compile(given)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"it is read as a regular expression and is none ({error}); names of layers are written [q_proj, v_proj]"
        ) from None
    return given
