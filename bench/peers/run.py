"""A comparison's groups, one after the other: prove side by side, time one at a time, stop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.cases import MISSION, Job, Setting
from bench.peers.entries import failed
from bench.peers.needs import Room, needed
from bench.peers.process import Process, environment_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a run is to do besides its jobs.

    Attributes:
        work: a folder for everything that is made.
        material: shape -> makes the model's folder, `work / shape`.
        gate_case, gate_steps: what the gate's steps without dropout are taken on.
        rounds, steps: how often, and how many steps at a time.
        overlap: whether processes prove themselves side by side; else they take turns.
        until: nothing new is begun after this many monotonic seconds.
        yardstick: the gate allows what this one, the mission's own stack, is off by.
    """

    work: Path
    material: dict[str, Callable[[], None]]
    gate_case: str
    gate_steps: int
    rounds: int
    steps: int
    overlap: bool = True
    until: float | None = None
    yardstick: Setting = MISSION

    def out_of_time(self) -> bool:
        """Whether nothing new should be begun."""
        return self.until is not None and time.monotonic() > self.until


Told = Callable[[list[Process], str], None]


class Run:
    """All groups of a task, one after the other; `told` hears of every step, with all there is so far."""

    def __init__(self, task: Task, groups: Sequence[Sequence[Job]], told: Told, card_bytes: int | None) -> None:
        self.task = task
        run = task.work / f"run-{os.getpid()}"
        names = iter(range(1000))
        self.groups = [[Process(j, run / f"{next(names):02d}-{j.shape}-{j.setting.system}") for j in g] for g in groups]
        self.everyone = [process for group in self.groups for process in group]
        self.told = lambda line: told(self.everyone, line)
        self.room = Room(card_bytes)
        self.made: dict[str, Future[None]] = {}
        self.imported: dict[int, Future[None]] = {}
        self.probe: subprocess.Popen[bytes] | None = None

    def all_groups(self) -> None:
        """Prove, time, stop; each group imports while the one before it proves itself."""
        with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as maker:
            self._import(pool, self.groups[0])
            if any(process.setting.options.get("plan") for process in self.everyone):
                self.probe = call_material(
                    self.task.work, "import drawplate.machine.speed; sys.stdin.read(); measure_device()"
                )
            self._make(maker)
            self.told("material made")
            for group, following in zip(self.groups, [*self.groups[1:], []], strict=True):
                if self.task.out_of_time():
                    break
                self._measure_device(group)
                self._import(pool, following)
                with ThreadPoolExecutor(len(group) if self.task.overlap else 1) as provers:
                    list(provers.map(self._prove, group))
                self._try_again(group)
                for waited in [*self.made.values(), *(self.imported[id(p)] for p in following)]:
                    waited.result()
                self.told("\n".join(f"{p.job.shape} {p.setting.label}: {_progress(p)}" for p in group))
                self._time(group)
                for process in group:
                    self._stop(process)
            for process in self.everyone:
                if id(process) in self.imported:
                    self._stop(process)
            if self.probe:
                self.probe.kill()

    def _make(self, maker: ThreadPoolExecutor) -> None:
        """One model after another; the first must be there before anything else begins."""
        for shape, make in self.task.material.items():
            self.made[shape] = maker.submit(make)
        next(iter(self.made.values())).result()

    def _measure_device(self, group: Sequence[Process]) -> None:
        """As planners will know it; while everybody waits, and once."""
        if any(p.setting.options.get("plan") for p in group) and self.probe and self.probe.poll() is None:
            for process in group:
                self.imported[id(process)].result()
            assert self.probe
            self.probe.communicate(b"now")

    def _import(self, pool: ThreadPoolExecutor, group: Sequence[Process]) -> None:
        def imports(process: Process) -> None:
            process.loaded.update(process.ask("imports"))

        for process in group:
            process.start(self.task.work / process.job.shape, self.task.work)
            self.imported[id(process)] = pool.submit(imports, process)

    def _prove(self, process: Process) -> None:
        """Load, the gate's steps, each case's first steps."""
        self.imported[id(process)].result()
        self.made[process.job.shape].result()
        if not failed(process.loaded):
            process.loaded.update(self._ask(process, "", "load"))
        if failed(process.loaded):
            return
        if process.job.curve:
            process.curve = self._ask(process, self.task.gate_case, "curve", self.task.gate_case, self.task.gate_steps)
        for case in process.job.cases:
            process.warm[case] = self._ask(process, case, "warm", case)
        if not process.job.timed and not any("memory" in answer for answer in [process.curve, *process.warm.values()]):
            self._stop(process)  # a yardstick leaves, and its memory serves others

    def _ask(self, process: Process, case: str, *command: object) -> dict[str, Any]:
        job = process.job
        with self.room.work(process, needed(job.shape, job.setting, case), needed(job.shape, job.setting)):
            return process.ask(*command)

    def _try_again(self, group: Sequence[Process]) -> None:
        """What found no memory beside others is tried alone."""
        for process in group:
            if "memory" in process.curve:
                process.curve = process.ask("curve", self.task.gate_case, self.task.gate_steps)
            for case, answer in process.warm.items():
                if "memory" in answer:
                    process.warm[case] = process.ask("warm", case)

    def _time(self, group: Sequence[Process]) -> None:
        """Rounds of one model and case after another."""
        for shape, case in dict.fromkeys((p.job.shape, case) for p in group for case in p.job.timed):
            ready = [p for p in group if p.job.shape == shape and case in p.job.timed and not failed(_warm(p, case))]
            if self.task.out_of_time():
                return
            for number in range(self.task.rounds):
                for process in ready if number % 2 == 0 else reversed(ready):
                    process.timed.setdefault(case, []).append(process.ask("time", case, self.task.steps))
            self.told(f"{shape} {case} timed")

    def _stop(self, process: Process) -> None:
        process.stop()
        self.room.leave(process)


def _warm(process: Process, case: str) -> dict[str, Any]:
    return process.warm.get(case, {})


def _progress(process: Process) -> str:
    if failed(process.loaded):
        return failed(process.loaded)
    curve = failed(process.curve) if process.job.curve else ""
    return curve or "; ".join(f"{case} {failed(warm) or 'ran'}" for case, warm in process.warm.items())


def call_material(work: Path, call: str) -> subprocess.Popen[bytes]:
    """Begun in a process of its own: its memory must be free again before anybody is measured."""
    code = f"import sys; from pathlib import Path; from bench.peers.material import *; {call}"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment_of(work))
