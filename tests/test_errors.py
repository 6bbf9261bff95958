from __future__ import annotations

import pytest

from drawplate.errors import reason_of


@pytest.mark.parametrize(
    ("said", "reason"),
    [("none of: \n(1) this", "none of"), ("no such file.", "no such file"), ("", "OSError"), (": ", "OSError")],
)
def test_a_librarys_reason_ends_a_sentence_whatever_it_says(said: str, reason: str) -> None:
    assert reason_of(OSError(said)) == reason
