"""Processes that are killed, stopped or hang: what goes on is bit for bit what would have been (rows 1 to 5 and 21)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from drawplate.records import RunRecord, from_json
from tests.faults.conftest import COUNTS, STEPS, Server, Tally, same_adapter, write_recipe
from tests.faults.rows import shows
from tests.run.test_tune import stable

WHOLE = bool(os.environ.get(COUNTS))
"""Every call and a hundred moments, as bench/kill_sweep.py asks for; else a sample, because each kill is two runs."""
RANDOM_KILLS = 100 if WHOLE else 16
SAMPLED = 3
"""One of so many calls in turn, and the first of each kind."""
CHUNKS = 4


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def finish(server: Server, run: Path, recipe: Path, out: Path) -> None:
    """Whatever is left of a run, ended with the command that a person would give."""
    begun = (run / "recipe.yaml").is_file()
    done = (run / "record.json").is_file() and json.loads((run / "record.json").read_text())["status"] == "finished"
    if not done:
        code = server.run(out, "resume", run) if begun else server.run(out, "tune", recipe)
        assert code == 0, out.read_text()[-3000:]


def record_of(run: Path) -> dict[str, Any]:
    values = stable(from_json(RunRecord, json.loads((run / "record.json").read_text())))
    for name in ("resumed", "warnings", "plan"):  # the plan holds this machine's speed of the moment
        del values[name]
    return values


# --- row 1 -------------------------------------------------------------------------------------------------------


def test_row_01_killed_at_every_write_fsync_and_rename(
    server: Server, small: Path, clean: Path, tmp_path: Path, tally: Tally
) -> None:
    """Three consecutive checkpoints and the one at the end: SIGKILL before each of the calls in turn."""
    began, counted = time.monotonic(), tmp_path / "calls"
    whole = tmp_path / "whole"
    count = ["count_calls", {"into": str(counted)}]
    assert server.run(tmp_path / "out", "tune", write_recipe(small, whole), faults=[count]) == 0
    calls = counted.read_text().split()
    assert {name: calls.count(name) > 4 for name in ("write", "fsync", "rename")} == dict.fromkeys(calls, True)
    said = ""
    numbers = range(len(calls)) if WHOLE else sorted({*range(0, len(calls), SAMPLED), *map(calls.index, set(calls))})
    for number in numbers:
        run, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        recipe = write_recipe(small, run)
        assert server.run(out, "tune", recipe, faults=[["kill_at_call", {"number": number}]]) == -signal.SIGKILL
        finish(server, run, recipe, out)
        assert same_adapter(run, clean), f"killed before call {number} ({calls[number]})"
        assert record_of(run) == record_of(clean)
        assert all("tmp" not in name and "old" not in name for name in checkpoints(run))
        said += out.read_text()
    shows(1, said, 0)
    shows(1, said, 1)
    tally(1, len(numbers), time.monotonic() - began)


def test_row_01_control_checkpoints_written_in_place_are_lost(
    server: Server, small: Path, clean: Path, tmp_path: Path
) -> None:
    """Without staging and verification some kill leaves something that is taken for a checkpoint."""
    broken = 0
    for number in range(2, 14, 3):
        run, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        kill = ["kill_at_call", {"number": number}]
        server.run(out, "tune", write_recipe(small, run), faults=[["write_in_place", {}], kill])
        code = server.run(out, "resume", run, faults=[["believe_everything", {}]])
        broken += code != 0 or not same_adapter(run, clean)
    assert broken


# --- row 2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_row_02_killed_at_random_moments(
    server: Server, small: Path, clean: Path, tmp_path: Path, chunk: int, tally: Tally
) -> None:
    began, rng = time.monotonic(), random.Random(chunk)
    usual = tmp_path / "usual"
    server.run(tmp_path / "usual.txt", "tune", write_recipe(small, usual))
    longest, killed = time.monotonic() - began, 0
    wanted = RANDOM_KILLS // CHUNKS
    for number in range(2 * wanted):  # some end before they are killed
        run, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        recipe = write_recipe(small, run)
        process = server.start(out, "tune", recipe)
        time.sleep(rng.uniform(0.02, 0.9 * longest))
        os.kill(process, signal.SIGKILL)
        killed += server.wait(process) == -signal.SIGKILL
        finish(server, run, recipe, out)
        assert same_adapter(run, clean), number
        if killed == wanted:
            break
    assert killed == wanted
    tally(2, killed, time.monotonic() - began)


@pytest.mark.parametrize("what", ["forward", "backward", "optimizer"])
def test_row_02_killed_inside_a_step(server: Server, small: Path, clean: Path, tmp_path: Path, what: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    kill = ["kill_in", {"what": what, "number": 6}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[kill]) == -signal.SIGKILL
    assert checkpoints(run) == ["step-000000", "step-000003"], "at most one save interval is lost"
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)
    assert record_of(run) == record_of(clean)
    shows(2, out.read_text())


@pytest.mark.parametrize("what", ["moment", "position", "schedule"])
def test_row_02_control_a_state_with_something_left_out_goes_elsewhere(
    server: Server, small: Path, clean: Path, tmp_path: Path, what: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    server.run(out, "tune", write_recipe(small, run), faults=[["kill_in", {"what": "forward", "number": 6}]])
    assert server.run(out, "resume", run, faults=[["forget", {"what": what}]]) == 0, out.read_text()
    assert not same_adapter(run, clean)


def test_row_02_the_end_of_a_run_is_proved_by_replay(server: Server, clean: Path, tmp_path: Path) -> None:
    assert server.run(tmp_path / "out", "resume", clean, "--prove") == 0
    said = (tmp_path / "out").read_text()
    assert "Equal: from step-000006 to step-000009" in said
    assert server.run(tmp_path / "out", "resume", clean, "--prove", faults=[["forget", {"what": "moment"}]]) == 0


# --- rows 3 and 4 ------------------------------------------------------------------------------------------------


def test_row_03_sigterm_finishes_the_step_saves_and_exits_75(
    server: Server, small: Path, clean: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    stop = ["signals_at", {"step": 5, "names": ["SIGTERM"]}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[stop]) == 75
    for which in range(3):
        shows(3, out.read_text(), which)
    assert "step-000005" in checkpoints(run)
    assert json.loads((run / "record.json").read_text())["status"] == "stopped"
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)


def test_row_03_a_long_step_is_left_between_two_micro_batches(server: Server, small: Path, tmp_path: Path) -> None:
    """The half gradient is part of the checkpoint, and the step goes on where it was left."""
    one = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 5,
        "effective_batch_size": 5,
        "max_steps": 4,
    }
    whole, run, out = tmp_path / "whole", tmp_path / "run", tmp_path / "out"
    assert server.run(out, "tune", write_recipe(small, whole, train=one)) == 0, out.read_text()
    stop = [["no_short_steps", {}], ["signals_at", {"step": 3, "names": ["SIGTERM"]}]]
    assert server.run(out, "tune", write_recipe(small, run, train=one), faults=stop) == 75
    assert "step-000002+000001" in checkpoints(run), out.read_text()
    assert server.run(out, "resume", run) == 0, out.read_text()
    assert same_adapter(run, whole)
    assert record_of(run) == record_of(whole)


def test_row_03_killed_after_sigterm_the_checkpoint_before_is_good(
    server: Server, small: Path, clean: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    stop = ["signals_at", {"step": 5, "names": ["SIGTERM", "SIGKILL"]}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[stop]) == -signal.SIGKILL
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)


def test_row_03_control_without_the_handler_sigterm_ends_the_process(
    server: Server, small: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    faults = [["no_signals", {}], ["signals_at", {"step": 5, "names": ["SIGTERM"]}]]
    assert server.run(out, "tune", write_recipe(small, run), faults=faults) == -signal.SIGTERM
    assert "step-000005" not in checkpoints(run)


def test_row_04_ctrl_c_once_is_as_sigterm(server: Server, small: Path, clean: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    stop = ["signals_at", {"step": 5, "names": ["SIGINT"]}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[stop]) == 75
    shows(4, out.read_text(), 0)
    assert (run / "checkpoints" / "step-000005" / "optimizer.safetensors").is_file()
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)


def test_row_04_ctrl_c_twice_stops_now_and_names_the_last_good_checkpoint(
    server: Server, small: Path, clean: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    stop = ["signals_at", {"step": 5, "names": ["SIGINT", "SIGINT"]}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[stop]) == 75
    shows(4, out.read_text(), 1)
    shows(4, out.read_text(), 2)
    assert "step-000003" in out.read_text()
    assert "step-000005" not in checkpoints(run), "the second one does not wait"
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)


def test_row_04_control_without_the_handler_nothing_is_saved_at_ctrl_c(
    server: Server, small: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    faults = [["no_signals", {}], ["signals_at", {"step": 5, "names": ["SIGINT"]}]]
    server.run(out, "tune", write_recipe(small, run), faults=faults)
    assert "step-000005" not in checkpoints(run)


# --- row 5 -------------------------------------------------------------------------------------------------------


def test_row_05_a_closed_terminal_changes_nothing(server: Server, small: Path, clean: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    hup = ["signals_at", {"step": 5, "names": ["SIGHUP"]}]
    assert server.run(out, "tune", write_recipe(small, run), faults=[hup]) == 0
    assert same_adapter(run, clean)
    other = tmp_path / "other"
    faults = [["no_signals", {}], hup]
    assert server.run(out, "tune", write_recipe(small, other), faults=faults) == -signal.SIGHUP, "the control"


@pytest.mark.parametrize("watched", [True, False], ids=["", "control"])
def test_row_05_suspended_seconds_are_not_counted(
    server: Server, small: Path, clean: Path, tmp_path: Path, watched: bool
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    faults: list[Any] = [["signals_at", {"step": 5, "names": ["SIGSTOP"]}]]
    faults += [] if watched else [["plain_clock", {}]]
    process = server.start(out, "tune", write_recipe(small, run), faults=faults)
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)
    time.sleep(4.0)
    os.kill(process, signal.SIGCONT)
    assert server.wait(process) == 0
    assert same_adapter(run, clean)
    slowest = max(step["seconds"] for step in json.loads((run / "record.json").read_text())["steps"])
    assert (slowest < 3.0) == watched, "a step of four seconds would be a lie"


# --- row 21 ------------------------------------------------------------------------------------------------------


def test_row_21_a_hang_is_noticed_and_left(server: Server, small: Path, clean: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    hang = ["hang_at", {"step": 8, "seconds": 60, "least_seconds": 1.5}]
    began = time.monotonic()
    assert server.run(out, "tune", write_recipe(small, run), faults=[hang]) == 75, out.read_text()
    assert time.monotonic() - began < 30
    shows(21, out.read_text())
    assert "time.sleep" in (run / "stacks.txt").read_text() or "inject.py" in (run / "stacks.txt").read_text()
    assert server.run(out, "resume", run) == 0
    assert same_adapter(run, clean)


def test_row_21_control_without_the_watchdog_a_hang_lasts(server: Server, small: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    faults = [["no_watchdog", {}], ["hang_at", {"step": 8, "seconds": 3, "least_seconds": 0.5}]]
    assert server.run(out, "tune", write_recipe(small, run), faults=faults) == 0
    assert not (run / "stacks.txt").exists()
    assert f"step-{STEPS:06d}" in checkpoints(run)
