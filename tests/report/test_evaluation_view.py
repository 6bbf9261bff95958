from __future__ import annotations

import dataclasses

import pytest

from drawplate.records import EvaluationFacts, RunRecord
from drawplate.report.evaluation_view import change_rows, intervals_svg, leak_sentences, token_rows
from drawplate.report.html import render_report
from tests.report.test_html import parse, section


def test_every_change_that_was_measured_has_its_figures_and_interval(record: RunRecord) -> None:
    text = section(render_report(record), "changes")
    for words in (
        "on the 4-bit base model (nf4), without and with adapter, 101 documents 24.48 13.76 -43.8 % [-45.6, -41.9]",
        "what was forgotten 31.20 31.45 +0.8 % [-0.6, +2.2]",
        "31 held-out documents 19.69 24.48 +24.3 % [+22.9, +25.8]",
    ):
        assert words in text


def test_the_verdicts_own_base_comes_first_and_the_other_beside_it(deployed_record: RunRecord) -> None:
    names = ["Held-out documents, as released", "Held-out documents, nf4", "General text", "Quantization"]
    assert [row.name for row in change_rows(deployed_record)] == names
    page = render_report(deployed_record)
    text = section(page, "results")
    first, second = "on the base model as released (bf16), without", "on the 4-bit base model (nf4), without"
    assert text.index(first) < text.index("19.69") < text.index(second) < text.index("24.48")
    assert "easier to predict on the base model as released (bf16)." in section(page, "documents")


def test_what_was_not_measured_has_no_row(record: RunRecord, failure: RunRecord) -> None:
    facts = EvaluationFacts(baseline=record.evaluation.baseline, final=record.evaluation.final)
    bare = dataclasses.replace(record, evaluation=facts)
    assert [row.name for row in change_rows(bare)] == ["Held-out documents, nf4"]
    assert not change_rows(failure)
    assert not parse(render_report(failure)).xpath("//section[@aria-labelledby='changes']")


def test_a_dot_lies_on_its_interval_and_zero_on_the_axis(record: RunRecord) -> None:
    svg = parse(str(intervals_svg(change_rows(record))))
    place = {key: float(svg.xpath(path)[0].rstrip("%")) for key, path in PLACES.items()}
    assert place["low"] < place["change"] < place["high"] < place["zero"] < place["tax"]
    assert [bar.get("class") for bar in svg.xpath("//circle")] == ["good", "neutral", "bad"]
    assert "No" not in svg.xpath("//svg/@aria-label")[0].split(":")[0]


PLACES = {
    "zero": "//line[@class='zero']/@x1",
    "low": "//line[@class='reach good']/@x1",
    "high": "//line[@class='reach good']/@x2",
    "change": "//circle[@class='good']/@cx",
    "tax": "//circle[@class='bad']/@cx",
}


def test_a_change_without_an_interval_is_a_dot_alone(record: RunRecord) -> None:
    facts = dataclasses.replace(record.evaluation, general_ci95_percent=None)
    svg = parse(str(intervals_svg(change_rows(dataclasses.replace(record, evaluation=facts)))))
    assert len(svg.xpath("//circle")) == 3
    assert len(svg.xpath("//line[starts-with(@class, 'reach')]")) == 2


def test_leaks_are_said_in_words(record: RunRecord) -> None:
    leaks = record.data.leaks
    assert leaks is not None
    first, longest = leak_sentences(leaks)
    assert first.startswith("3 training documents nearly repeated a held-out one (70 %")
    assert "2 of them were set aside" in first
    assert longest.endswith("is 14 words, in wg2.html#12 and wg2.html#911.")
    assert leak_sentences(dataclasses.replace(leaks, similar_pairs=0))[0].startswith("No training document repeats")
    assert leak_sentences(None) == []
    assert "14 words" in section(render_report(record), "data")


def test_a_hostile_document_name_among_the_leaks_is_text(record: RunRecord) -> None:
    assert record.data.leaks is not None
    leaks = dataclasses.replace(record.data.leaks, train_document="<script>alert(1)</script>\x1b")
    page = render_report(dataclasses.replace(record, data=dataclasses.replace(record.data, leaks=leaks)))
    assert not parse(page).xpath("//script")
    assert "\x1b" not in page


@pytest.mark.parametrize("side", [0, 1])
def test_every_token_has_its_line(record: RunRecord, side: int) -> None:
    rows = {row.label: row.value for row in token_rows(record)}
    seen = rows.pop("seen by all optimizer steps")
    counts = {name: int(value.split(" | ")[side].replace(",", "")) for name, value in rows.items()}
    parts = ("counted by the loss", "first of a window", "masked", "dropped")
    assert counts["Tokens"] == sum(counts[name] for name in parts)
    assert seen == "370,386"


def test_a_rows_name_stays_inside_the_chart(record: RunRecord) -> None:
    heldout, _, tax = change_rows(record)
    alone, beside = str(intervals_svg([heldout])), str(intervals_svg([heldout, tax]))
    assert 'text-anchor="start">Held-out documents, nf4' in alone, "the interval lies at the chart's left edge"
    assert 'text-anchor="end">Quantization' in beside
