"""Text from outside (file names, model names, documents, messages) made safe to show.

A terminal obeys control characters and a browser obeys bidirectional overrides, so a file name could clear a screen or
make `exe.txt` read as `txt.exe`. Such characters are shown as their escape (`\x1b`, `\u202e`). HTML's own characters
are left to the template's autoescape. Left alone on purpose: zero-width joiners, which some scripts and emoji need.
"""

from __future__ import annotations

import unicodedata

_OBEYED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"


def visible(text: object, *, keep: str = "", encoding: str = "utf-8") -> str:
    r"""`text` with every character that would be obeyed instead of shown written as its escape.

    Args:
        text: anything; shown through `str`.
        keep: characters left as they are, such as `"\n\t"` where lines are wanted.
        encoding: characters it cannot write are escaped too, so that printing never raises.
    """
    allowed = keep + _JOINERS
    shown = "".join(c if c in allowed or unicodedata.category(c) not in _OBEYED else _escape(c) for c in str(text))
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the middle replaced by `...`: a file's folder and its end both say something."""
    if len(text) <= width:
        return text
    head = max(1, (width - 3) // 2)
    tail = max(1, width - 3 - head)
    return f"{text[:head]}...{text[-tail:]}"
