"""docs/faults.md says what the tests hold, and every row has a test and a control."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.rows import FAULTS, HELD_ELSEWHERE, SEES
from tests.faults.write_docs import ROOT, TARGET, document, rows_held

HERE = Path(__file__).parent
WITHOUT_CONTROL = {9, 12, 16, 17, 25, 26, 27, 35, 36, 110}  # inside the test itself, or a measurement


def test_the_document_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), "run python tests/faults/write_docs.py"


def test_every_row_has_a_test_and_a_control() -> None:
    tests = rows_held()
    assert not FAULTS.keys() - tests.keys()
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    for row in FAULTS.keys() - WITHOUT_CONTROL:
        said = " ".join(tests[row])
        assert "control" in said or "the control" in text, row


def test_every_promised_sentence_is_asserted() -> None:
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    calls = re.findall(r"shows\((\d+), (.*)", text)
    for row, sentences in SEES.items():
        asserted = [rest for number, rest in calls if int(number) == row]
        numbers = {int(m[1]) for rest in asserted if (m := re.search(r", (\d+)\)$", rest))}
        by_variable = any(rest.rstrip().endswith("which)") for rest in asserted)
        plain = bool(asserted) - bool(numbers) > 0
        assert by_variable or plain or numbers >= set(range(len(sentences))), f"row {row}: {numbers}"


def test_tests_that_are_named_elsewhere_exist() -> None:
    for place, name in {test for tests in HELD_ELSEWHERE.values() for test in tests}:
        assert f"def test_{name}(" in (ROOT / place).read_text(encoding="utf-8"), name
