from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.units import GIB, format_bytes, format_count, format_percent, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * 2**30),
        ("6GB", 6 * 10**9),
        ("6gb", 6 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("500 MB", 500_000_000),
        ("12KiB", 12_288),
        ("1TiB", 2**40),
        ("77", 77),
        ("77 B", 77),
        (1024, 1024),
        (2.0, 2),
    ],
)
def test_a_size_is_read_with_its_unit(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "six GiB", "6 GiBs", "-1GiB", "1e3", "6GiB 2", "6,5GiB"])
def test_what_is_not_a_size_is_refused_and_named(text):
    with pytest.raises(ValueError, match="is not a size") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


def test_gigabytes_and_gibibytes_differ():
    assert parse_bytes("6GiB") - parse_bytes("6GB") == pytest.approx(0.0737 * 6e9, rel=0.01)


@given(st.integers(0, 2**45))
def test_a_plain_number_of_bytes_survives(count):
    assert parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (312 * 2**20, "312 MiB"), (4.67 * GIB, "4.67 GiB")],
)
def test_bytes_are_shown_in_the_largest_unit_they_fill(count, text):
    assert format_bytes(count) == text


@given(st.floats(1.0, 500.0))
def test_shown_gibibytes_are_read_back_to_within_their_last_figure(gibibytes):
    assert parse_bytes(format_bytes(gibibytes * GIB)) / GIB == pytest.approx(gibibytes, abs=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (245, "4 min 05 s"), (3599.6, "1 h 00 min"), (11_220, "3 h 07 min")],
)
def test_seconds_are_shown_as_a_person_says_them(seconds, text):
    assert format_seconds(seconds) == text


def test_counts_have_thousands_separators():
    assert format_count(1_234_567) == "1,234,567"


def test_a_percentage_never_reads_minus_zero() -> None:
    assert format_percent(-0.01) == "0.0 %"
    assert format_percent(4.26) == "+4.3 %"
    assert format_percent(-4.26, signed=False) == "4.3 %"
    assert format_percent(float("inf")) == "beyond measure"
