from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest
from lxml import html as lxml_html

from drawplate.records import (
    DocumentChange,
    EvaluationFacts,
    LedgerLine,
    RunRecord,
    from_json,
    to_json,
)
from drawplate.report.html import render_report, typeset
from drawplate.units import format_bytes

HOSTILE = "<script>alert(1)</script></style>{{7*7}}{% raw %}\x1b[2J\u202eexe.txt\x00\udc80\"'&amp;"


def parse(page: str) -> lxml_html.HtmlElement:
    return lxml_html.document_fromstring(page)


def section(page: str, key: str) -> str:
    found = parse(page).xpath(f"//section[@aria-labelledby='{key}']")
    text = " ".join(found[0].itertext()) if found else ""
    return " ".join(text.replace("\u00a0", " ").replace("\u2212", "-").split())


def hostile(record: RunRecord) -> RunRecord:
    assert record.plan is not None
    line = LedgerLine(name=HOSTILE, where="host", bytes=1, formula=HOSTILE)
    return dataclasses.replace(
        record,
        model=dataclasses.replace(record.model, name=HOSTILE, revision=HOSTILE, architecture=HOSTILE),
        machine=dataclasses.replace(record.machine, cpu=HOSTILE, platform=HOSTILE),
        training=dataclasses.replace(record.training, stopped_because=HOSTILE),
        plan=dataclasses.replace(record.plan, reasons={HOSTILE: HOSTILE}, warnings=(HOSTILE,), ledger=(line,)),
        recipe={"output_dir": HOSTILE, HOSTILE: [HOSTILE]},
        documents=(DocumentChange(document=HOSTILE, tokens=9, baseline_nats=27, final_nats=18),),
        memory_curve=tuple(dataclasses.replace(p, phase=p.phase + HOSTILE) for p in record.memory_curve),
        phase_seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
        error=HOSTILE,
        started=HOSTILE,
    )


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_hostile_text_is_shown_and_never_obeyed(
    record: RunRecord, status: Literal["finished", "stopped", "failed"]
) -> None:
    page = render_report(dataclasses.replace(hostile(record), status=status))
    assert "<script" not in page.lower()
    assert page.count("</style>") == 1
    assert not any(c in page for c in "\x1b\x00\u202e\udc80")
    assert "49" not in section(page, "documents")
    page.encode("utf-8")
    tree = parse(page)
    assert "<script>alert(1)</script></style>{{7*7}}{% raw %}\\x1b[2J\\u202eexe.txt\\x00\\udc80\"'&amp;" in (
        tree.xpath("//table[contains(@class, 'documents')]//th[@class='name']/text()")
    )


def test_the_page_runs_nothing_and_loads_nothing(record: RunRecord) -> None:
    tree = parse(render_report(record))
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert len(policy) == 1
    for rule in ("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"):
        assert rule in policy[0]
    assert not tree.xpath(
        "//script | //link | //iframe | //object | //@onload | //@src | //@href | //@*[name()='style']"
    )
    assert "url(" not in tree.xpath("//style/text()")[0]
    assert "@import" not in tree.xpath("//style/text()")[0]


def test_the_policy_stands_before_anything_it_governs(record: RunRecord) -> None:
    page = render_report(record)
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_verdict_is_the_first_thing_said(record: RunRecord) -> None:
    body = parse(render_report(record)).find("body")
    first = next(text.strip() for text in body.itertext() if text.strip())
    assert first == "Better: \u221243.8\u00a0% [\u221245.6, \u221241.9]"


def test_figures_are_the_records(gpu_record: RunRecord) -> None:
    results = section(render_report(gpu_record), "results")
    baseline, final = gpu_record.evaluation.baseline, gpu_record.evaluation.final
    assert baseline is not None
    assert final is not None
    for figure in (
        f"{baseline.perplexity:.2f}",
        f"{final.perplexity:.2f}",
        f"{baseline.bits_per_byte:.3f}",
        f"{final.bits_per_byte:.3f}",
        f"{gpu_record.data.documents:,}",
        f"{gpu_record.data.train_tokens:,}",
        f"Optimizer steps {gpu_record.training.optimizer_steps}",
        format_bytes(gpu_record.memory.device_peak_bytes),
        format_bytes(gpu_record.memory.device_peak_predicted_bytes),
        format_bytes(gpu_record.memory.host_peak_bytes),
        f"{gpu_record.model.trainable_parameters:,}",
        "runs/climate-demo/adapter",
        "-43.8 %",
    ):
        assert figure in results, figure


def test_every_plan_decision_reason_warning_and_ledger_line_is_there(record: RunRecord) -> None:
    page = render_report(record)
    assert record.plan is not None
    for reason in record.plan.reasons.values():
        assert reason in section(page, "plan")
    for warning in (*record.plan.warnings, *record.warnings):
        assert warning in section(page, "warnings")
    for line in record.plan.ledger:
        assert line.name in section(page, "ledger")
        assert line.formula in section(page, "ledger")
    assert format_bytes(record.plan.predicted_bytes("host")) in section(page, "ledger")


def test_best_and_worst_documents_are_ranked_by_what_training_did(record: RunRecord) -> None:
    tables = parse(render_report(record)).xpath("//table[contains(@class, 'documents')]")
    names = [table.xpath(".//th[@class='name']/text()") for table in tables]
    ranked = sorted(record.documents, key=lambda d: (d.final_nats - d.baseline_nats) / d.tokens)
    assert names[0] == [d.document for d in ranked[:5]]
    assert names[1] == [d.document for d in reversed(ranked[-5:])]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_documents_are_listed_once_each(record: RunRecord, count: int) -> None:
    page = render_report(dataclasses.replace(record, documents=record.documents[:count]))
    names = parse(page).xpath("//table[contains(@class, 'documents')]//th[@class='name']/text()")
    assert sorted(names) == sorted(d.document for d in record.documents[:count])


def test_both_curves_have_a_picture_and_a_table(record: RunRecord) -> None:
    tree = parse(render_report(record))
    assert len(tree.xpath("//figure//svg[@class='plot']")) == 2
    tables = tree.xpath("//details//table")
    assert len(tables) == 2
    steps = [row.xpath("td[1]/text()")[0] for row in tables[0].xpath("tbody/tr")]
    assert {"0", "1", "40", "171"} <= set(steps)
    assert len(steps) < 80


def test_the_device_is_drawn_only_where_there_is_one(record: RunRecord, gpu_record: RunRecord) -> None:
    assert "Predicted device peak" in section(render_report(gpu_record), "memory")
    assert "evice" not in section(render_report(record), "memory")


def test_a_record_of_nothing_but_a_failure_is_a_page(failure: RunRecord) -> None:
    page = render_report(failure)
    tree = parse(page)
    assert "failed before the first optimizer step" in tree.findtext(".//h1")
    assert tree.xpath("//pre[@class='error']")[0].text == failure.error
    keys = tree.xpath("//section/@aria-labelledby")
    assert not {"results", "loss", "memory", "plan", "ledger", "documents", "recipe", "data"} & set(keys)
    assert not any(table.xpath("count(.//tr)") == 0 for table in tree.xpath("//table"))


@pytest.mark.parametrize(
    "missing",
    [
        {"evaluation": EvaluationFacts()},
        {"plan": None},
        {"steps": ()},
        {"evaluations": ()},
        {"memory_curve": ()},
        {"documents": ()},
        {"recipe": {}},
        {"phase_seconds": {}},
        {"status": "stopped"},
    ],
)
def test_any_part_may_be_missing(record: RunRecord, missing: dict[str, object]) -> None:
    page = render_report(dataclasses.replace(record, **missing))  # type: ignore[arg-type]
    assert "None" not in parse(page).text_content()


def test_the_page_is_the_same_from_record_json(record: RunRecord) -> None:
    again = from_json(RunRecord, json.loads(json.dumps(to_json(record))))
    assert render_report(again) == render_report(record)


def test_headings_ids_and_labels_agree(record: RunRecord) -> None:
    tree = parse(render_report(record))
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))
    for label in tree.xpath("//@aria-labelledby"):
        assert set(label.split()) <= set(ids)


def test_signs_and_units_are_set_well() -> None:
    assert typeset("-43.8 % (24.48 -> 13.76), 1.31 GiB") == "\u221243.8\u00a0% (24.48 \u2192 13.76), 1.31\u00a0GiB"
    assert typeset("runs/climate-2 and nf4") == "runs/climate-2 and nf4"
