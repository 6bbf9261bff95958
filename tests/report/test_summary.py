from __future__ import annotations

import dataclasses
import io
import shlex

import pytest
from rich.console import Console, RenderableType

from drawplate.records import ModelScore, RunRecord
from drawplate.report.plan_view import plan_table
from drawplate.report.summary import evaluation_table, show, summary_table


def printed(renderable: RenderableType, terminal: bool = False, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    show(renderable, Console(file=file, force_terminal=terminal, width=width, color_system=None, _environ={}))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_end_of_a_run_says_all_a_person_asks_for(record: RunRecord, terminal: bool) -> None:
    text = printed(summary_table(record, "runs/x"), terminal, width=100)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("Better: -43.8 % [-45.6, -41.9], held-out perplexity 24.48 -> 13.76 on the 4-bit base")
    for start in (
        "Documents 1,007",
        "Tokens 137,156",
        "Before perplexity 24.48",
        "After perplexity 13.76",
        "Change -43.8 %",
        "Optimizer steps 171",
        "Time 5 min 08 s",
        "Peak host memory 1.31 GiB",
        "Adapter runs/x/adapter",
        "Report runs/x/report.html",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_the_next_command_is_one_that_a_shell_takes(record: RunRecord) -> None:
    model = dataclasses.replace(record.model, name="my model; rm -rf ~")
    text = printed(
        summary_table(dataclasses.replace(record, model=model, recipe={}), "runs/it's"), terminal=True, width=60
    )
    command = text[text.index("drawplate eval") :].replace("\\\n", " ")
    options = {"--model": "my model; rm -rf ~", "--adapter": "runs/it's/adapter", "--data": "YOUR_DOCUMENTS"}
    assert shlex.split(command) == ["drawplate", "eval", *(word for pair in options.items() for word in pair)]


def test_each_of_two_adapters_has_its_base_and_its_next_command(deployed_record: RunRecord) -> None:
    text = printed(summary_table(deployed_record, "runs/x"), width=100)
    for name, base, precision in (
        ("adapter", "the 4-bit base model (nf4)", "nf4"),
        ("adapter_unquantized", "the base model as released (bf16)", "bf16"),
    ):
        assert f"runs/x/{name}  (for {base})" in text
        command = text[text.index(f", for {base}:") :].partition(":\n")[2].partition("\n\n")[0].replace("\\\n", " ")
        words = shlex.split(command)
        assert words[words.index("--adapter") + 1] == f"runs/x/{name}"
        assert words[words.index("--set") + 1] == f"quantization.precision={precision}"


def test_a_pipe_gets_plain_text_with_unbroken_lines(record: RunRecord) -> None:
    folder = "runs/" + "deep/" * 40
    text = printed(summary_table(record, folder), width=80)
    assert "\x1b" not in text
    assert text.isascii()
    assert f"{folder}/report.html" in text


def test_control_characters_and_markup_are_shown(record: RunRecord) -> None:
    hostile = dataclasses.replace(record, warnings=("[red]x[/red] \x1b[2J\u202e",))
    assert "[red]x[/red] \\x1b[2J\\u202e" in printed(summary_table(hostile, "runs/x"), terminal=True)


def test_an_output_that_cannot_write_a_letter_gets_its_escape(record: RunRecord) -> None:
    text = printed(summary_table(dataclasses.replace(record, warnings=("Grüße",)), "runs/x"), encoding="ascii")
    assert "Gr\\xfc\\xdfe" in text


def test_a_failure_has_no_adapter_and_no_next_command(failure: RunRecord) -> None:
    text = printed(summary_table(failure, "runs/x"))
    assert "failed" in text
    assert "Adapter" not in text
    assert "drawplate eval" not in text


def test_the_plan_is_shown_with_reasons_peaks_and_warnings(record: RunRecord) -> None:
    assert record.plan is not None
    text = printed(plan_table(record.plan))
    for reason in (*record.plan.reasons.values(), *record.plan.warnings):
        assert reason in text
    assert "1.29 GiB" in text


def test_an_evaluation_shows_each_measurement_and_the_verdict() -> None:
    base = ModelScore(nats=3000.0, tokens=1000, bytes=4000, documents=7, precision="nf4")
    tuned = dataclasses.replace(
        base,
        nats=2500.0,
        verdict="better: -39.3 % [-41.0, -37.0]",
        perplexity_change_percent=-39.3,
        bits_per_byte_change_percent=-16.7,
        bits_per_byte_ci95_percent=(-18.0, -15.0),
    )
    other = dataclasses.replace(tuned, perplexity_change_percent=None)
    text = printed(evaluation_table({"base": base, "tuned": tuned, "other": other}), width=150)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Documents 7"
    assert lines[1].startswith("base perplexity 20.09 (1.0820 bits per byte, loss 3.0000, 1,000 tokens, nf4)")
    assert lines[3].startswith("against the first better: -39.3 % [-41.0, -37.0]")
    assert "bits per byte -16.7 % [-18.0, -15.0]" in lines[3]
    assert "tokenizers differ" in lines[5]
    assert "against" not in printed(evaluation_table({"base": base}))


def test_an_evaluation_of_nothing_says_so() -> None:
    assert "Nothing was measured" in printed(evaluation_table({"base": ModelScore(nats=0, tokens=0, bytes=0)}))
