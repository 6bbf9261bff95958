"""Drawplate and its peers on the same model, tokens, adapter and optimizer; a speed only behind the gate.

    python bench/compare.py OUT.json --suite whole (packing, small-3b, small-8b)      the goals of docs/benchmark.md
    python bench/compare.py OUT.json --model 3b --cases 7x512,2x2048 --systems drawplate,mission,liger,unsloth

Each job (bench/peers/cases.py) is a process of its own. A group of them load, prove themselves and warm up side by
side, as far as there is room on the card (bench/peers/needs.py), while the next group imports; then steps are timed
one process at a time while all others wait, in rounds whose order alternates. A speed is the case's tokens over the
median of all timed steps. Peak memory is the most the allocator ever reserved in a case; the process's own device
memory, which includes the CUDA context, is beside it. A budget holds for all of the process (bench/peers/memory.py).
The gate is bench/peers/gate.py. Systems that are not installed, cases that do not fit and runs that the gate refused
are listed with the reason. The results are written after every case.

Left out: several GPUs, evaluation, whole runs. `first_step_seconds` (process start to the end of the first step,
compilation included, waiting not) is one of several processes that compile on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import machine  # noqa: E402
from bench.peers import suite  # noqa: E402
from bench.peers.cases import CACHE, MAIN, MISSION, OTHERS, PRODUCTS, REFERENCE, Job, jobs_of, parse_case, settings  # noqa: E402
from bench.peers.entries import results_of  # noqa: E402
from bench.peers.process import Process  # noqa: E402
from bench.peers.run import Run, Task, call_material  # noqa: E402
from bench.peers.table import table  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth", "unsloth_zoo", "trl")


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
    parser.add_argument("--suite", default="", help="whole, packing, small-3b or small-8b, not --model to --only")
    parser.add_argument("--model", default="3b", help="a shape of bench/shapes.py")
    parser.add_argument("--layers", type=int, help="cut the models short")
    parser.add_argument("--cases", default="7x512,2x2048,7x2048")
    parser.add_argument("--systems", default=",".join(systems))
    parser.add_argument("--budgets", default="full", help="full, or GiB, or both: full,6")
    parser.add_argument(
        "--only", default="", help="a regular expression for labels; the mission's stack is timed if it matches"
    )
    parser.add_argument("--together", type=int, default=1, help="jobs of a group: they are proven side by side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed, in each round")
    parser.add_argument("--gate-case", help=f"default: {suite.GATE_CASE} of a suite, else the first case")
    parser.add_argument("--gate-steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="begin no further case after this time")
    parser.add_argument("--work", type=Path, default=Path("/tmp/drawplate-compare"))
    parser.add_argument("--list", action="store_true", help="name the jobs and stop")
    return parser.parse_args(arguments)


def groups_of(asked: argparse.Namespace) -> list[list[Job]]:
    """The jobs that were asked for."""
    if asked.suite:
        return suite.groups_of(asked.suite)
    budgets = [None if b == "full" else float(b) for b in asked.budgets.split(",")]
    chosen = [s for s in settings(asked.systems.split(","), budgets) if s == MISSION or re.search(asked.only, s.label)]
    cases = asked.cases.split(",")
    jobs = jobs_of(asked.model, [REFERENCE, *chosen], cases, asked.gate_case or cases[0])
    if not re.search(asked.only, MISSION.label):
        jobs = [Job(**{**vars(job), "timed": ()}) if job.setting == MISSION else job for job in jobs]
    return [jobs[start : start + asked.together] for start in range(0, len(jobs), asked.together)]


def main() -> int:
    """Run what was asked for; write the JSON after each case, print the table."""
    asked = parse_arguments(sys.argv[1:])
    groups = groups_of(asked)
    jobs = [job for group in groups for job in group]
    if asked.list:
        print("\n".join(f"{j.shape} {j.setting.label}: {', '.join(j.cases)}" for j in jobs))
        return 0
    for case in {case for job in jobs for case in job.cases}:
        parse_case(case)
    task = Task(
        work=asked.work,
        material={shape: material_of(asked, shape) for shape in dict.fromkeys(job.shape for job in jobs)},
        gate_case=asked.gate_case or (suite.GATE_CASE if asked.suite else asked.cases.split(",")[0]),
        gate_steps=asked.gate_steps,
        rounds=asked.rounds,
        steps=asked.steps,
        until=time.monotonic() + asked.seconds if asked.seconds else None,
    )
    print(table(measure(task, groups, asked.out, asked.layers)))
    return 0


def material_of(asked: argparse.Namespace, shape: str) -> Callable[[], None]:
    """Makes a model's folder."""
    call = f"make_material(Path({str(asked.work / shape)!r}), {shape!r}, {asked.layers!r})"

    def make() -> None:
        if call_material(asked.work, call).wait():
            raise RuntimeError(f"could not make a model of shape {shape}")

    return make


def measure(task: Task, groups: Sequence[Sequence[Job]], out: Path, layers: int | None = None) -> dict[str, Any]:
    """Run everything; the record, which is written after each case, so that a run cut short is not lost."""
    began, record = time.monotonic(), {}

    def told(everyone: list[Process], line: str) -> None:
        shapes = dict.fromkeys(process.job.shape for process in everyone)
        models = {shape: [process for process in everyone if process.job.shape == shape] for shape in shapes}
        record.update(
            command=" ".join(["python", *sys.argv]),
            commit=os.environ.get("DRAWPLATE_COMMIT", ""),
            layers=layers,
            gate={"case": task.gate_case, "steps": task.gate_steps},
            seconds=round(time.monotonic() - began, 1),
            machine=machine(),
            measured_device=measured_device(task.work),
            product_flops_per_second=measured_products(task.work),
            versions=versions(),
            results=[entry for processes in models.values() for entry in results_of(processes, task.yardstick)],
            logs={p.out.name: p.log() for p in everyone if p.out.is_dir()},
        )
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(out)
        print(f"{line}\n{time.monotonic() - began:.0f} s so far", flush=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    Run(task, groups, told, machine().get("gpu_bytes")).all_groups()
    return record


def measured_device(work: Path) -> dict[str, Any] | None:
    """What the planned settings were planned with; None where nobody plans."""
    found = sorted((work / CACHE / "speed").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else None


def measured_products(work: Path) -> float | None:
    """Of this card, in bf16, beside which a share of the ceiling is given; None where nobody plans."""
    found = work / CACHE / PRODUCTS
    return float(found.read_text()) if found.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
