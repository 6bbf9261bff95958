from __future__ import annotations

import importlib.util
import math
import threading

import pytest

from drawplate.errors import UsageError
from drawplate.recipe import load_recipe
from drawplate.records import Evaluation, EvaluationPoint, MemoryPoint, MemorySample, StepRecord
from drawplate.run import trackers
from drawplate.run.trackers import Trackers, figures, open_trackers


def a_step(step: int = 1, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        step=step, epoch=0.5, loss=loss, learning_rate=1e-4, grad_norm=1.0, tokens=10, counted_tokens=9, seconds=0.1
    )


MEMORY = MemoryPoint(step=0, phase="read", seconds=0.0, sample=MemorySample(process_bytes=7, process_peak_bytes=9))
EVALUATION = EvaluationPoint(step=3, result=Evaluation(nats=20.0, tokens=10, bytes=40))


class Recorder:
    """A tracker that keeps what it is given, or fails or hangs where it is told to."""

    def __init__(self, fails_in: str = "", hangs: threading.Event | None = None) -> None:
        self.fails_in, self.hangs = fails_in, hangs
        self.started = self.finished = False
        self.configuration: dict = {}
        self.logged: list[tuple[int | None, dict]] = []

    def _maybe_fail(self, where: str) -> None:
        if self.fails_in == where:
            raise ConnectionError(f"{where} went wrong\nand more")

    def start(self) -> None:
        self._maybe_fail("start")
        self.started = True

    def store_init_configuration(self, values) -> None:
        self.configuration = values

    def log(self, values, step=None) -> None:
        self._maybe_fail("log")
        if self.hangs is not None:
            self.hangs.wait()
        self.logged.append((step, values))

    def finish(self) -> None:
        self._maybe_fail("finish")
        self.finished = True


def observed(events, **made: Recorder) -> list[str]:
    warnings: list[str] = []
    makers = {name: (lambda tracker=tracker: tracker) for name, tracker in made.items()}
    with Trackers(makers, {"train.seed": 42}, warnings.append) as observe:
        for event in events:
            observe(event)
    return warnings


def test_every_record_reaches_every_tracker_in_order():
    one, two = Recorder(), Recorder()
    assert observed([MEMORY, a_step(1), a_step(2), EVALUATION], one=one, two=two) == []
    assert [step for step, _ in one.logged] == [0, 1, 2, 3]
    assert one.logged == two.logged
    assert one.configuration == {"train.seed": 42}
    assert one.finished


def test_no_tracker_starts_before_the_run_has_its_folder():
    tracker = Recorder()
    observed([MEMORY, MEMORY], one=tracker)
    assert not tracker.started


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_dies_is_one_warning_and_the_others_go_on(where):
    dying, living = Recorder(fails_in=where), Recorder()
    warnings = observed([a_step(step) for step in range(1, 6)], dying=dying, living=living)
    assert len(warnings) == 1
    assert "dying failed" in warnings[0]
    assert f"{where} went wrong" in warnings[0]
    assert "and more" not in warnings[0], "one line"
    assert len(living.logged) == 5


def test_a_tracker_that_cannot_be_made_is_one_warning():
    def make():
        raise RuntimeError("no account")

    warnings: list[str] = []
    with Trackers({"one": make}, {}, warnings.append) as observe:
        observe(a_step())
    assert len(warnings) == 1
    assert "no account" in warnings[0]


def test_a_tracker_that_hangs_neither_blocks_nor_hides_what_it_missed(monkeypatch):
    monkeypatch.setattr(trackers, "EVENTS_WAITING", 2)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    release = threading.Event()
    warnings = observed([a_step(step) for step in range(1, 50)], stuck=Recorder(hangs=release))
    release.set()
    text = "\n".join(warnings)
    assert "does not keep up" in text
    assert "left behind" in text
    assert "missed 4" in text, "46 or 47 of 49 records: one in its hands, two in the queue"


def test_figures_are_the_records_own():
    assert figures(EVALUATION) == {
        "heldout/loss": 2.0,
        "heldout/perplexity": pytest.approx(math.exp(2)),
        "heldout/bits_per_byte": EVALUATION.result.bits_per_byte,
    }
    assert figures(a_step())["train/tokens_per_second"] == pytest.approx(100.0)
    assert figures(MEMORY)["memory/process_bytes"] == 7


def test_a_figure_that_is_not_finite_is_left_out():
    assert "train/loss" not in figures(a_step(loss=math.nan))


def recipe_for(tmp_path, *names: str):
    return load_recipe(
        {
            "model": {"name_or_path": "m"},
            "data": {"files": ["x"]},
            "output_dir": str(tmp_path / "run"),
            "tracking": {"report_to": list(names)},
        }
    )


def test_no_tracker_asked_for_is_none_made(tmp_path):
    warnings: list[str] = []
    with open_trackers(recipe_for(tmp_path), warnings.append) as observe:
        observe(a_step())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_missing_extra_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        open_trackers(recipe_for(tmp_path, name), print)
    assert f'pip install "drawplate[{name}]"' in error.value.next_step


@pytest.fixture
def without_login(tmp_path, monkeypatch):
    """W&B seems to be installed, and nobody is logged in; gives the file that a login is kept in."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_without_a_login_is_refused_before_it_could_ask(tmp_path, without_login):
    with pytest.raises(UsageError, match="not logged in") as error:
        open_trackers(recipe_for(tmp_path, "wandb"), print)
    assert "wandb login" in error.value.next_step
    assert "WANDB_MODE=offline" in error.value.next_step
    without_login.write_text("machine elsewhere.example login user password x\n")
    with pytest.raises(UsageError, match="not logged in"):
        open_trackers(recipe_for(tmp_path, "wandb"), print)


@pytest.mark.parametrize("way", ["offline", "key", "netrc", "own server"])
def test_wandb_with_a_login_or_offline_is_taken(tmp_path, without_login, monkeypatch, way):
    host = "wandb.example" if way == "own server" else "api.wandb.ai"
    if way == "own server":
        monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}")
    if way in ("netrc", "own server"):
        without_login.write_text(f"machine {host} login user password x\n")
    if way == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    if way == "key":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    open_trackers(recipe_for(tmp_path, "wandb"), print)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_can_read_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings: list[str] = []
    with open_trackers(recipe_for(tmp_path, "tensorboard"), warnings.append) as observe:
        observe(MEMORY)
        for step in (1, 2, 3):
            observe(a_step(step, loss=3.0 - step / 2))
        observe(EVALUATION)
    assert warnings == []
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("train/loss")] == [(1, 2.5), (2, 2.0), (3, 1.5)]
    assert [event.value for event in written.Scalars("heldout/loss")] == [2.0]
