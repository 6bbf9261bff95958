"""Records to plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from drawplate.records.run import StepRecord
from drawplate.records.scores import Evaluation, ModelScore

_DERIVED = {
    Evaluation: ("loss", "perplexity", "bits_per_byte"),
    ModelScore: ("loss", "perplexity", "bits_per_byte"),
    StepRecord: ("tokens_per_second",),
}


def to_json(record: Any) -> Any:
    """A record as plain JSON values; ratios (perplexity, tokens_per_second) are written out beside their sums."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
        values.update({name: to_json(getattr(record, name)) for name in _DERIVED.get(type(record), ())})
        return values
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(value) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        return str(record)
    return record


def json_text(values: Any, *, indent: int | None = None, encoding: str = "utf-8") -> str:
    """Plain JSON values as text that the encoding can hold: readable, or escaped where a path has other bytes."""
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(values, indent=indent)
    return text


Record = TypeVar("Record")


def from_json(kind: type[Record], values: dict[str, Any]) -> Record:
    """The record that `to_json` wrote; derived values and fields of a newer version are left out.

    Raises:
        TypeError: a field without a default is missing.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: _parse(hints[f.name], values[f.name]) for f in dataclasses.fields(kind) if f.name in values}  # type: ignore[arg-type]
    return kind(**known)


def _parse(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _parse(next(a for a in arguments if a is not type(None)), value)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        return tuple(_parse(inner or arguments[i], item) for i, item in enumerate(value))
    return float(value) if hint is float else value
