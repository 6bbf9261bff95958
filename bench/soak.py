"""Many optimizer steps with faults at random: the same adapter as a clean run, and memory that does not grow.

    python bench/soak.py OUT.json [--steps 1000] [--device cpu|cuda] [--chance 0.02]

Two runs beside a clean one. The first meets faults that promise equality (SIGKILL, SIGTERM, a full disk, a tracker that
is down) and is resumed as often as it ends; its adapter is the clean run's, byte for byte. The second meets those that
do not (steps that are not numbers, out of memory) and a full disk; resident memory from step 100 on is compared with
its largest, and on a GPU allocated memory too. There every process is a new one, since none can be forked, and equality
is no promise but a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from tests.faults.conftest import Server, same_adapter, write_recipe  # noqa: E402
from tests.tiny import write_base, write_texts  # noqa: E402

ENDS_THAT_GO_ON = (75, 6, 5, -9)
STEADY_FROM_STEP = 100


class NewProcesses:
    """Runs each command in a new process, as tests.faults.conftest.Server does in forked ones."""

    def run(self, out: Path, *argv: object, faults: list[Any] | None = None) -> int:
        """The exit code; minus the signal's number if one killed it."""
        request = {"argv": [str(a) for a in argv], "faults": faults or [], "out": str(out)}
        command = [sys.executable, "-m", "tests.faults.server", "--one", json.dumps(request)]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": paths, "DRAWPLATE_CACHE": str(out.parent / "cache"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False).returncode


def soak(
    server: Server | NewProcesses, folder: Path, steps: int, device: str = "cpu", chance: float = 0.02
) -> dict[str, Any]:
    """Run all three; the figures."""
    write_base(folder / "base", num_hidden_layers=1)
    write_texts(folder / "texts", 12)
    every = max(2, steps // 50)
    sections = {
        "train": {"effective_batch_size": 2, "max_steps": steps, "num_train_epochs": 10_000, "save_steps": every},
        "evaluation": {"eval_steps": None},
        "model": {"device_map": device, "compile": False},
        "tracking": {"report_to": []},
    }
    clean, exact, rough = (folder / name for name in ("clean", "exact", "rough"))
    began = time.monotonic()
    assert server.run(folder / "clean.txt", "tune", write_recipe(folder, clean, **sections)) == 0
    clean_seconds = time.monotonic() - began
    promising = ["sigterm", "sigkill", "disk", "tracker"]
    others = ["nan", "nan", "nan", "disk", "disk", "oom", "tracker"]  # memory can run out only so often
    exact_ends = _until_done(server, exact, write_recipe(folder, exact, **sections), promising, chance)
    rough_ends = _until_done(server, rough, write_recipe(folder, rough, **sections), others, chance * 0.4)
    record = json.loads((rough / "record.json").read_text())
    return {
        "steps": steps,
        "clean_seconds": clean_seconds,
        "ends": {"exact": exact_ends, "rough": rough_ends},
        "faults": {"exact": _faults(exact), "rough": _faults(rough)},
        "equal": same_adapter(exact, clean),
        "skipped_steps": record["training"]["skipped_steps"],
        "corrections": record["training"]["corrections"],
        "finished_steps": record["steps"][-1]["step"],
        **_growth(json.loads((clean / "record.json").read_text()), "clean"),
        **_growth(record, "rough"),
    }


def _faults(run: Path) -> dict[str, int]:
    """How many of each kind there were; the tracker was down all the time."""
    found = re.findall(r"^fault: (\w+)$", run.with_suffix(".txt").read_text(), re.MULTILINE)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def _until_done(server: Server | NewProcesses, run: Path, recipe: Path, kinds: list[str], chance: float) -> list[int]:
    """Exit codes of the processes that it took."""
    ends: list[int] = []
    while not ends or ends[-1] != 0:
        begun, out = (run / "recipe.yaml").is_file(), run.with_suffix(".txt")
        faults = [["random_faults", {"seed": 100 + len(ends), "kinds": kinds, "chance": chance}]]
        ends.append(server.run(out, *(["resume", str(run)] if begun else ["tune", str(recipe)]), faults=faults))
        assert ends[-1] in (0, *ENDS_THAT_GO_ON), out.read_text()[-2000:]
        assert len(ends) < 1000
    return ends


def _growth(record: dict[str, Any], name: str) -> dict[str, float]:
    """Percent by which memory grew from STEADY_FROM_STEP to its largest after that."""
    points = [p["sample"] for p in record["memory_curve"] if p["phase"] == "train" and p["step"] >= STEADY_FROM_STEP]
    grown = {}
    for key in ("process_bytes", "device_allocated_bytes"):
        values = [point[key] for point in points]
        if values and values[0]:
            grown[f"{name}_{key}_growth_percent"] = 100 * (max(values) / values[0] - 1)
    return grown


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chance", type=float, default=0.02, help="of a fault, at each step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "cache") if options.device == "cpu" else NewProcesses()
        result = soak(server, folder, options.steps, options.device, options.chance)
        if isinstance(server, Server):
            server.close()
    options.out.write_text(json.dumps({**about(), "device": options.device, **result}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
