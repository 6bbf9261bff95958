from __future__ import annotations

import io

import pytest
from rich.console import Console

from drawplate.records import Progress
from drawplate.report.live import PLAIN_SECONDS, LiveDisplay


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain_console(encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True, newline="\n")
    return Console(file=file, force_terminal=False, width=80, _environ={}), raw


def terminal_console(width: int = 100) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, force_interactive=True, width=width, height=30, _environ={"TERM": "xterm"}
    )
    return console, file


def step(done: float, **changes: object) -> Progress:
    fields: dict[str, object] = {"phase": "train", "done": done, "total": 1000, "unit": "steps"}
    return Progress(**(fields | changes))  # type: ignore[arg-type]


def test_a_file_gets_one_line_every_few_seconds(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        for n in range(1001):
            display(step(n, figures={"loss": "2.31"}))
            clock.now += 0.1
    lines = raw.getvalue().decode().splitlines()
    assert len(lines) == pytest.approx(100 / PLAIN_SECONDS, abs=2)
    assert all(line.startswith("Training: ") and "loss 2.31" in line for line in lines)
    assert "1,000/1,000 steps" in lines[-1]


def test_a_file_gets_no_control_character(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        display(Progress(phase="re\x1bad", figures={"fi\x07le": "a\u202eb\r" + "x" * 500}, message="one\x1b[2J\ntwo"))
    text = raw.getvalue().decode()
    assert not any(ord(c) < 32 for c in text.replace("\n", ""))
    assert "\u202e" not in text
    assert "one\\x1b[2J\ntwo\n" in text
    assert max(map(len, text.splitlines())) < 200


def test_phase_changes_and_messages_are_never_held_back(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        display(step(0))
        display(step(7))
        display(Progress(phase="evaluate", done=1, total=4))
        display(step(8, message="a spike in step 8"))
    assert raw.getvalue().decode().splitlines() == [
        "Training: 0/1,000 steps  0 %",
        "Training: 7/1,000 steps  1 %",
        "Evaluating: 1/4  25 %",
        "a spike in step 8",
        "Training: 8/1,000 steps  1 %",
    ]


def test_time_left_counts_only_the_phases_own_time(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        display(step(500))
        clock.now += 10
        display(step(510))  # a second each, from where it resumed
        display(Progress(phase="evaluate", done=0, total=1))
        clock.now += 300
        display(Progress(phase="evaluate", done=1, total=1))
        display(step(510))
        clock.now += 10
        display(step(520))
    assert "520/1,000 steps  52 %  8 min 00 s left" in raw.getvalue().decode().splitlines()[-1]


def test_a_message_in_passing_does_not_start_the_phase_over(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        display(step(0))
        clock.now += 10
        display(step(100))
        display(Progress(phase="train", message="Held-out perplexity 15.31 after step 100"))
        clock.now += 10
        display(step(200))
    lines = raw.getvalue().decode().splitlines()
    assert lines[-2:] == [
        "Held-out perplexity 15.31 after step 100",
        "Training: 200/1,000 steps  20 %  1 min 20 s left",
    ]


def test_a_share_is_not_said_twice(clock: Clock) -> None:
    console, raw = plain_console()
    with LiveDisplay(console, clock) as display:
        display(step(34.2, total=100, unit="%", figures={"step": "58"}))
    assert raw.getvalue().decode() == "Training: 34 %  step 58\n"


def test_an_output_that_cannot_write_a_letter_gets_its_escape(clock: Clock) -> None:
    console, raw = plain_console("ascii")
    with LiveDisplay(console, clock) as display:
        display(step(1, message="Grüße"))
    assert b"Gr\\xfc\\xdfe" in raw.getvalue()


def test_a_terminal_gets_a_bar_with_figures_and_the_message_above_it(clock: Clock) -> None:
    console, file = terminal_console(width=140)
    with LiveDisplay(console, clock) as display:
        display(step(0))
        clock.now += 10
        display(step(250, figures={"loss": "2.31", "tokens/s": "812"}, message="a \x1b[2J[bold]warning"))
        display._view._bars.refresh()  # type: ignore[union-attr]
    text = file.getvalue()
    assert "250/1,000 steps  25 %  30.0 s left  loss 2.31  tokens/s 812" in text
    assert "a \\x1b[2J[bold]warning" in text
    assert "\x1b[2J" not in text
    assert "━" in text
    assert text.index("a \\x1b") < text.rindex("loss 2.31")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor comes back


def test_a_finished_phase_leaves_its_line_on_the_terminal(clock: Clock) -> None:
    console, file = terminal_console()
    with LiveDisplay(console, clock) as display:
        display(Progress(phase="read", done=1, unit="documents"))
        clock.now += 2
        display(Progress(phase="read", done=1007, unit="documents"))
        display(step(0))
    assert "Reading documents  1,007 documents  2.0 s" in file.getvalue()


def test_the_terminal_is_put_back_when_the_run_fails(clock: Clock) -> None:
    console, file = terminal_console()

    def run() -> None:
        with LiveDisplay(console, clock) as display:
            display(step(3))
            raise RuntimeError("as in any run")

    with pytest.raises(RuntimeError, match="as in any run"):
        run()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


class GonePipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", [FullDisk(), GonePipe()])
def test_an_output_that_goes_away_does_not_end_the_run(
    clock: Clock, file: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)  # rich would redirect the test's own stdout
    seen = 0
    with LiveDisplay(Console(file=file, force_terminal=False, _environ={}), clock) as display:
        for n in range(3):
            display(step(n, message="m"))
            seen += 1
    assert seen == 3
