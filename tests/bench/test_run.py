from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.peers import run
from bench.peers.cases import MISSION, REFERENCE, Job, Setting
from bench.peers.entries import results_of

OWN = Setting(system="drawplate", name="bf16, all kept", options={"precision": "bf16"})
OTHER = Setting(system="unsloth", name="bf16", dropout=0.0, options={"bits": 16})
CASES = ("2x16", "1x32")
TOKENS = 32


class Scripted(run.Process):
    """Answers at once; everybody writes into one list of what was asked of whom."""

    asked: list[tuple[str, ...]] = []
    losses: dict[str, list[float]] = {}
    out_of_memory_once: set[tuple[str, str]] = set()

    def start(self, folder: Path, cache: Path) -> None:
        self.alive = True

    def stop(self) -> None:
        self.alive = False

    def ask(self, *command: object) -> dict[str, Any]:
        kind, *rest = map(str, command)
        system = self.setting.system
        self.asked.append((system, kind, *rest))
        if not self.alive:
            return {"error": "the process ended"}
        if kind in ("imports", "load"):
            return {"load_seconds": 1.0}
        if (system, kind) in self.out_of_memory_once:
            self.out_of_memory_once.remove((system, kind))
            return {"memory": "OutOfMemoryError"}
        losses = self.losses.get(system, [3.0, 2.0])
        return {"losses": losses, "gradient_norms": [1.0, 1.0], "step_seconds": [0.5], "first_step_seconds": 9.0}


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Process", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(Scripted, "losses", {})
    monkeypatch.setattr(Scripted, "out_of_memory_once", set())


def job(setting: Setting, *timed: str) -> Job:
    return Job(shape="tiny", setting=setting, cases=CASES, timed=timed)


GROUPS = [[job(REFERENCE), job(MISSION), job(OTHER, *CASES), job(OWN, *CASES)]]


def results(tmp_path: Path, groups: list[list[Job]] = GROUPS, **more: Any) -> list[dict[str, Any]]:
    values = {"gate_case": "2x16", "gate_steps": 2, "rounds": 2, "steps": 1} | more
    task = run.Task(work=tmp_path, material={"tiny": lambda: None}, **values)
    found: list[dict[str, Any]] = []

    def told(everyone: list[run.Process], line: str) -> None:
        found[:] = results_of(everyone, MISSION)

    run.Run(task, groups, told, None).all_groups()
    return found


def test_every_timed_case_has_a_speed_behind_the_gate(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert [(r["system"], r["case"]) for r in found] == [(s, c) for s in ("unsloth", "drawplate") for c in CASES]
    assert {r["tokens_per_second"] for r in found} == {TOKENS / 0.5}
    assert {r["gate"]["difference"] for r in found} == {0.0}


def test_rounds_alternate_and_nothing_is_timed_before_all_are_proven(tmp_path: Path) -> None:
    results(tmp_path)
    kinds = [kind for _, kind, *_ in Scripted.asked]
    assert kinds.index("time") > max(i for i, kind in enumerate(kinds) if kind == "warm")
    order = [system for system, kind, *rest in Scripted.asked if kind == "time" and rest[0] == "2x16"]
    assert order == ["unsloth", "drawplate", "drawplate", "unsloth"]


def test_a_loss_far_from_the_reference_gives_no_speed(tmp_path: Path) -> None:
    Scripted.losses = {"drawplate": [3.0, 2.5]}
    own = [r for r in results(tmp_path) if r["system"] == "drawplate"]
    assert all("tokens_per_second" not in r and r["refused"].startswith("gate: the loss is") for r in own)


def test_what_found_no_memory_beside_others_is_tried_alone(tmp_path: Path) -> None:
    Scripted.out_of_memory_once = {("drawplate", "curve"), ("reference", "warm")}
    assert all("tokens_per_second" in r for r in results(tmp_path))


def test_a_process_of_the_same_setting_may_have_taken_the_gates_steps(tmp_path: Path) -> None:
    own = [Job(shape="tiny", setting=OWN, cases=(c,), timed=(c,), curve=c == CASES[0]) for c in CASES]
    found = results(tmp_path, [[job(REFERENCE), job(MISSION)], own])
    assert len(found) == 2
    assert all("tokens_per_second" in r for r in found)
    found = results(tmp_path, [[job(REFERENCE), job(MISSION)], own[1:]])
    assert found[0]["refused"] == "the fp32 reference or the gate's steps did not run"


def test_nothing_is_begun_after_the_time_is_up(tmp_path: Path) -> None:
    found = results(tmp_path, until=time.monotonic() - 1)
    assert not any(kind in ("load", "time") for _, kind, *_ in Scripted.asked)
    assert all(r["refused"] for r in found)
