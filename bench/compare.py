"""Drawplate and its peers on the same model, tokens, adapter and optimizer; a speed only behind the gate.

    python bench/compare.py OUT.json --model 3b --cases 7x512,2x2048,7x2048 --systems drawplate,mission,liger,unsloth

Each setting (bench/peers/cases.py) is a process of its own. Up to `--together` of them load, prove themselves and warm
up side by side; steps are timed one process at a time while the others wait, in rounds whose order alternates. A speed
is the case's tokens over the median of all timed steps. Peak memory is the most the allocator ever reserved in a case;
the process's own device memory, which includes the CUDA context, is beside it. A budget holds for all of the process
(bench/peers/memory.py). The gate is bench/peers/gate.py. Systems
that are not installed, cases that do not fit and runs that the gate refused are listed with the reason.

Left out: several GPUs, evaluation, whole runs. `first_step_seconds` (process start to the end of the first step,
compilation included) is only comparable with `--together 1`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import machine  # noqa: E402
from bench.peers.cases import CACHE, MAIN, MISSION, OTHERS, REFERENCE, Setting, parse_case, settings  # noqa: E402
from bench.peers.entries import failed, results_of  # noqa: E402
from bench.peers.table import table  # noqa: E402

LOG_CHARACTERS = 3000
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth", "unsloth_zoo", "trl")


@dataclass
class Process:
    """One setting's process and all it has answered."""

    setting: Setting
    out: Path
    loaded: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def start(self, folder: Path) -> None:
        """Begin to import; nothing is loaded yet."""
        self.out.mkdir(parents=True, exist_ok=True)
        job = {"setting": dataclasses.asdict(self.setting), "folder": str(folder), "out": str(self.out)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.out / "log.txt").open("w"),
            text=True,
            cwd=self.out,
            env=environment_of(folder),
        )

    def ask(self, *command: object) -> dict[str, Any]:
        """One command, one answer; a process that died answers with an error."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(" ".join(map(str, command)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"error": f"the process ended: {(self.out / 'log.txt').read_text()[-600:]}"}

    def stop(self) -> None:
        """End the process, which may be in any state."""
        if self.process.poll() is None:
            self.ask("quit")
            self.process.kill()
        self.process.wait()


def environment_of(folder: Path) -> dict[str, str]:
    """For processes that import from here; all share one cache folder, and with it what is known of the device."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return {**environment, "DRAWPLATE_CACHE": str(folder / CACHE)}


def log_of(process: Process) -> str:
    """The end of what a process said, without the place of this checkout."""
    text = (process.out / "log.txt").read_text(errors="replace")
    return text[-LOG_CHARACTERS:].replace(f"{ROOT}/", "")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The command line. Without `overlap` the processes of a group take turns; `until` is in monotonic seconds.

    The gate allows what `yardstick`, the mission's own stack, is off by. Those `untimed` only go through the gate.
    """

    cases: list[str]
    folder: Path
    work: Path
    together: int
    rounds: int
    steps: int
    gate_case: str
    gate_steps: int
    overlap: bool = True
    until: float | None = None
    yardstick: Setting = MISSION
    untimed: tuple[Setting, ...] = ()

    def out_of_time(self) -> bool:
        """Whether nothing new should be begun."""
        return self.until is not None and time.monotonic() > self.until


def run_all(
    task: Task, chosen: Sequence[Setting], material: Callable[[], None], told: Callable[[list[Process], str], None]
) -> None:
    """Reference first, then the settings, in groups that share the machine while nothing is timed.

    Everybody imports while the material is made. Then, while all of them wait, the device is measured for Drawplate's
    planner, as a user's would be. `told` hears after each case, with all there is so far.
    """
    everyone = [Process(s, task.work / f"{i:02d}-{s.system}") for i, s in enumerate([REFERENCE, *chosen])]
    for process in everyone:
        process.start(task.folder)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(material)
        for process, answer in _answers(task, everyone, "imports"):
            process.loaded = answer
        made.result()
    if any(process.setting.options.get("plan") for process in everyone):
        call_material(task.folder, "measure_device()")
    told(everyone, "material made, libraries imported")
    for start in range(0, len(everyone), task.together):
        group = [p for p in everyone[start : start + task.together] if not failed(p.loaded)]
        run_group(task, group, lambda line: told(everyone, line))
        for process in group:
            process.stop()
        told(everyone, "\n".join(f"{p.setting.label}: {_progress(p)}" for p in group))


def _progress(process: Process) -> str:
    if failed(process.loaded):
        return failed(process.loaded)
    return failed(process.curve) or "; ".join(f"{case} {failed(warm) or 'ran'}" for case, warm in process.warm.items())


def run_group(task: Task, group: Sequence[Process], told: Callable[[str], None]) -> None:
    """Load, gate curve and warm-up side by side, then time one at a time; out of memory is tried again alone."""
    if task.out_of_time():
        return
    for process, answer in _answers(task, group, "load"):
        process.loaded.update(answer)
    told("loaded")
    alive = [p for p in group if not failed(p.loaded)]
    for reference in [p for p in alive if p.setting is REFERENCE]:  # alone: it needs the most memory, and leaves
        reference.curve = reference.ask("curve", task.gate_case, task.gate_steps)
        reference.warm = {case: reference.ask("warm", case) for case in task.cases}
        reference.stop()
        alive.remove(reference)
    for process, answer in _answers(task, alive, "curve", task.gate_case, task.gate_steps):
        process.curve = answer
    alive = [p for p in alive if not failed(p.curve)]
    told("through the gate's steps")
    for case in task.cases:
        if task.out_of_time():
            return
        for process, answer in _answers(task, alive, "warm", case):
            process.warm[case] = answer
        ready = [p for p in alive if not failed(p.warm[case]) and p.setting not in task.untimed]
        for number in range(task.rounds):
            for process in ready if number % 2 == 0 else reversed(ready):
                process.timed.setdefault(case, []).append(process.ask("time", case, task.steps))
        told(f"{case} timed")


def _answers(task: Task, group: Sequence[Process], *command: object) -> list[tuple[Process, dict[str, Any]]]:
    with ThreadPoolExecutor(max(len(group), 1) if task.overlap else 1) as pool:
        answers = list(pool.map(lambda process: process.ask(*command), group))
    again = [i for i, answer in enumerate(answers) if "memory" in answer and len(group) > 1 and command[0] != "load"]
    for i in again:
        answers[i] = group[i].ask(*command)
    return list(zip(group, answers, strict=True))


def versions() -> dict[str, str]:
    """Of what is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    systems = sorted({s.system for s in MAIN + OTHERS})
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="3b", help="a shape of bench/shapes.py")
    parser.add_argument("--layers", type=int, help="cut the model short")
    parser.add_argument("--cases", default="7x512,2x2048,7x2048")
    parser.add_argument("--systems", default=",".join(systems))
    parser.add_argument("--budgets", default="full", help="full, or GiB, or both: full,6")
    parser.add_argument(
        "--only", default="", help="a regular expression for labels; the mission's stack is timed if it matches"
    )
    parser.add_argument("--together", type=int, default=1, help="processes that load and warm up side by side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed, in each round")
    parser.add_argument("--gate-case", help="default: the first case")
    parser.add_argument("--gate-steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, help="begin no further case after this time")
    parser.add_argument("--work", type=Path, default=Path("/tmp/drawplate-compare"))
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what was asked for; write the JSON after all, print the table."""
    asked = parse_arguments(sys.argv[1:])
    budgets = [None if b == "full" else float(b) for b in asked.budgets.split(",")]
    chosen = [s for s in settings(asked.systems.split(","), budgets) if s == MISSION or re.search(asked.only, s.label)]
    if asked.list:
        print("\n".join(s.label for s in chosen))
        return 0
    cases = asked.cases.split(",")
    task = Task(
        cases=cases,
        folder=asked.work / f"{asked.model}-{asked.layers or 'all'}",
        work=asked.work / f"run-{os.getpid()}",
        together=asked.together,
        rounds=asked.rounds,
        steps=asked.steps,
        gate_case=asked.gate_case or cases[0],
        gate_steps=asked.gate_steps,
        untimed=() if re.search(asked.only, MISSION.label) else (MISSION,),
        until=time.monotonic() + asked.seconds if asked.seconds else None,
    )
    for case in [*cases, task.gate_case]:
        parse_case(case)
    model = {"shape": asked.model, "layers": asked.layers}
    call = f"make_material(Path({str(task.folder)!r}), {asked.model!r}, {asked.layers!r})"
    record = measure(task, chosen, model, asked.out, lambda: call_material(task.folder, call))
    print(table([record]))
    return 0


def measure(
    task: Task, chosen: Sequence[Setting], model: dict[str, Any], out: Path, material: Callable[[], None]
) -> dict[str, Any]:
    """Run everything; the record, which is written after each case, so that a run cut short is not lost."""
    began, record = time.monotonic(), {}

    def told(everyone: list[Process], line: str) -> None:
        record.update(
            command=" ".join(["python", *sys.argv]),
            commit=os.environ.get("DRAWPLATE_COMMIT", ""),
            model=model,
            gate={"case": task.gate_case, "reference": everyone[0].curve, "reference_loaded": everyone[0].loaded},
            seconds=round(time.monotonic() - began, 1),
            machine=machine(),
            measured_device=measured_device(task.folder),
            versions=versions(),
            results=results_of(task.cases, everyone, task.yardstick),
            logs={p.out.name: log_of(p) for p in everyone},
        )
        out.write_text(json.dumps(record, indent=1))
        print(f"{line}\n{time.monotonic() - began:.0f} s so far", flush=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    run_all(task, chosen, material, told)
    return record


def call_material(folder: Path, call: str) -> None:
    """In a process of its own: its memory must be free again before anybody is measured."""
    code = f"from pathlib import Path; from bench.peers.material import *; {call}"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment_of(folder))


def measured_device(folder: Path) -> dict[str, Any] | None:
    """What the planned settings were planned with; None where nobody plans."""
    found = sorted((folder / CACHE / "speed").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else None


if __name__ == "__main__":
    sys.exit(main())
