from __future__ import annotations

import pytest

from drawplate.report.visible import shorten, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("report\u202etxt.exe", "report\\u202etxt.exe"),
        ("a\nb\tc\x00", "a\\x0ab\\x09c\\x00"),
        ("lone \udc80 surrogate", "lone \\udc80 surrogate"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("line\u2028separator", "line\\u2028separator"),
    ],
)
def test_what_a_terminal_or_browser_would_obey_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_ordinary_text_of_any_script_is_left_alone() -> None:
    text = "Grüße, 气候变化, नमस्\u200dते <b>&amp; {{7*7}}"
    assert visible(text) == text


def test_lines_are_kept_only_where_asked_for() -> None:
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_an_encoding_that_cannot_write_a_character_gets_its_escape() -> None:
    assert visible("é", encoding="ascii") == "\\xe9"


def test_shortening_keeps_both_ends_within_the_width() -> None:
    short = shorten("folder/" + "x" * 500 + "/end.html", 40)
    assert len(short) == 40
    assert short.startswith("folder/")
    assert short.endswith("end.html")
