"""Bytes, tokens and seconds as people write and read them. The only place where 2**30 is spelt out.

Memory is counted in bytes everywhere and shown in GiB (2**30 bytes), because that is what a GPU's tools show; "GB" in
input means 10**9, so that 6GB and 6GiB, which differ by 7.4 %, are never confused.
"""

from __future__ import annotations

import math
import re

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """`"6GiB"`, `"500 MB"` or a plain number of bytes -> bytes.

    Raises:
        ValueError: the text is not a number followed by a known unit.
    """
    if isinstance(text, (int, float)):
        return int(text)
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size; write it like 6GiB, 500MB or 1073741824")
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(count: float) -> str:
    """Bytes -> `"4.67 GiB"`, `"312 MiB"`, `"12 KiB"`, `"7 B"`: three figures where they mean something."""
    for factor, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.2f} {name}" if name == "GiB" else f"{value:.0f} {name}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds -> `"12.3 s"`, `"4 min 05 s"`, `"3 h 07 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: float) -> str:
    """`1234567` -> `"1,234,567"`."""
    return f"{count:,.0f}"


def format_percent(percent: float, *, signed: bool = True) -> str:
    """`-43.8 %`; without the sign for "fell by 43.8 %"; never `-0.0`."""
    if not math.isfinite(percent):
        return "beyond measure"
    rounded = round(percent, 1) + 0.0
    return (f"{rounded:+,.1f} %" if rounded else "0.0 %") if signed else f"{abs(rounded):,.1f} %"


def plural(count: int, noun: str) -> str:
    """`1 document`, `1,007 documents`."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"
