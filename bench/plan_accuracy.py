"""Predicted against measured peaks of memory, on random weights of real shapes.

    python bench/plan_accuracy.py MEASURED.json [CASE ...] [context=BYTES] [needs=FILE] [device=GIB] [host=GIB] [most=N]
    python bench/plan_accuracy.py --again MEASURED.json OUT.json     predict them (no GPU), write both, print errors
    python bench/plan_accuracy.py --needs FILE [CASE ...]            predictions alone, to pack processes by

Cases are those of bench/plan_case.py. Without any those of bench/plan_cases.txt are run, each in a process of its own,
some at a time. bench/plan_trace.py shows a case's single allocations.

What every prediction is given of the CUDA context and of the host memory of CUDA and its libraries is measured in one
small run before all others. Against it stands each process's own context where the driver counts by process, else the
same. Speeds are not measured here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.plan_case import STEPS, load, parse, predict, resident_bytes, run_size  # noqa: E402 - not installed


def measure(case: str) -> dict[str, Any]:
    """The case in this process."""
    import torch

    import drawplate.run.tune  # noqa: F401 - what a run has imported before it loads

    torch._inductor.config.autotune_local_cache = False  # every case is a first run, whoever compiled before it
    base = resident_bytes("VmRSS")
    torch.cuda.init()
    model, loading = load(case)
    stages = run_size(model, parse(case)["sizes"], parse(case)["packing"])
    return {"base_bytes": base, "load": loading, **stages, **summary({"load": loading, **stages})}


def summary(stages: dict[str, dict[str, int]]) -> dict[str, int]:
    """Peaks over all stages."""
    found = {
        name: max(stage[f"{name}_bytes"] for stage in stages.values())
        for name in ("peak_reserved", "peak_allocated", "host_peak", "outside_allocator")
    }
    return {**found, "context": max(context_of(stage) for stage in stages.values())}


def context_of(stage: dict[str, int]) -> int:
    """This process's share of the device beside the allocator's, 0 where the driver does not count by process."""
    own = stage.get("own_device_bytes", 0)
    return own - stage["reserved_bytes"] if own else 0


def probe() -> tuple[dict[str, int], dict[str, Any]]:
    """What a process takes beside the ledger's other lines, from one small run alone on the device."""
    case = "1b:nf4:resident:recompute:1x1024:8:all:0.1:padded:layers=2"
    found = run_apart("--one", case)
    if "error" in found:
        raise SystemExit(found["error"])
    return around_of(found, run_apart("--predict", case, "{}")), {"case": case, "measured": found}


def around_of(found: dict[str, Any], predicted: dict[str, Any]) -> dict[str, int]:
    """What a small run with nothing on the host takes beside the ledger's lines."""
    base = found["base_bytes"]
    return {
        "context_bytes": found.get("context") or found["outside_allocator"],
        "loading_host_bytes": found["load"]["host_bytes"] - base,
        "runtime_host_bytes": found[f"step{STEPS - 1}"]["host_bytes"]
        - base
        - predicted["phases"]["baseline evaluation"]["host"],
    }


def run_apart(*arguments: str) -> dict[str, Any]:
    """This file in a process of its own; its last line is JSON."""
    import subprocess

    ran = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    line = next((x for x in reversed(ran.stdout.splitlines()) if x.startswith("RESULT ")), None)
    return dict(json.loads(line[7:])) if line else {"error": (ran.stderr or ran.stdout)[-3000:]}


class Room:
    """Lets processes start while their predicted peaks fit together on the device and the host."""

    def __init__(self, device: int, host: int, most: int) -> None:
        import threading

        self.left, self.running, self.most = [device, host], 0, most
        self.changed = threading.Condition()

    def _fits(self, needs: tuple[int, int]) -> bool:
        return self.running < self.most and all(n <= x for n, x in zip(needs, self.left, strict=True))

    def run(self, needs: tuple[int, int], task: Any) -> Any:
        """The task's result, once there is room for it."""
        with self.changed:
            self.changed.wait_for(lambda: self._fits(needs))
            self.running += 1
            self.left = [x - n for n, x in zip(needs, self.left, strict=True)]
        try:
            return task()
        finally:
            with self.changed:
                self.running -= 1
                self.left = [x + n for n, x in zip(needs, self.left, strict=True)]
                self.changed.notify_all()


def measure_all(cases: list[str], out: Path, options: dict[str, str]) -> None:
    """Measure every case, some at a time, and write it all; predictions beside them where there is time for both."""
    from concurrent.futures import ThreadPoolExecutor

    from bench.streaming import record

    began = time.monotonic()
    around, probed = probe()
    if "context" in options:  # measured before, alone: others share the device now
        around["context_bytes"] = int(options["context"])
    needs = json.loads(Path(options["needs"]).read_text()) if "needs" in options else {}
    results: list[dict[str, Any]] = []
    room = Room(
        int(options.get("device", 70)) * 2**30, int(options.get("host", 100)) * 2**30, most=int(options.get("most", 6))
    )

    def one(case: str) -> None:
        need = needs.get(case) or run_apart("--predict", case, json.dumps(around))
        found = room.run((need["device"], need["host"]), lambda: run_apart("--one", case))
        results.append({"case": case, "measured": found, "error": found.get("error", "")})
        out.write_text(json.dumps({**record(results), "around": around, "probe": probed}, indent=1))
        print(f"{time.monotonic() - began:6.0f} s  {case}  {results[-1]['error'][-500:]}", flush=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, cases))


def predict_all(measured: Path, out: Path) -> None:
    """Predict every case of a file of measurements, write both, print the errors."""
    stored = json.loads(measured.read_text())
    probed = stored["probe"]
    found = around_of(probed["measured"], predict(probed["case"], {}))
    around = stored["around"] = {**found, "context_bytes": stored["around"]["context_bytes"]}
    for result in stored["results"]:
        if not result["error"]:
            base = {"base_bytes": result["measured"]["base_bytes"]}
            result["predicted"] = predict(result["case"], {**around, **base})
        print(line_of(result, around), flush=True)
    out.write_text(json.dumps(stored, indent=1))
    print_summary(stored["results"], around)


def errors(result: dict[str, Any], around: dict[str, int]) -> tuple[float, float]:
    """Percent by which device and host peaks were predicted too high."""
    predicted, measured = result["predicted"], result["measured"]
    device = device_peak(measured, around)
    return 100 * (predicted["device"] / device - 1), 100 * (predicted["host"] / measured["host_peak"] - 1)


def device_peak(measured: dict[str, Any], around: dict[str, int]) -> int:
    """The most that the allocator reserved, and the context: the process's own, else the one measured before."""
    return int(measured["peak_reserved"] + (measured.get("context") or around["context_bytes"]))


def line_of(result: dict[str, Any], around: dict[str, int]) -> str:
    """One row of the table."""
    if result["error"]:
        return f"{result['case']:70s} {result['error'][-300:]}"
    predicted, measured = result["predicted"], result["measured"]
    device, host = errors(result, around)
    peak = device_peak(measured, around)
    return (
        f"{result['case']:72s} device {predicted['device'] / 2**20:8.0f} {peak / 2**20:8.0f} {device:+6.2f} %   "
        f"host {predicted['host'] / 2**20:8.0f} {measured['host_peak'] / 2**20:8.0f} {host:+6.2f} %"
    )


def print_summary(results: list[dict[str, Any]], around: dict[str, int]) -> None:
    """How large the errors are, over all cases."""
    from statistics import median

    good = [errors(r, around) for r in results if not r["error"]]
    for name, values in (("device", [e[0] for e in good]), ("host", [e[1] for e in good])):
        if values:
            sizes = sorted(abs(v) for v in values)
            found = f"median {median(sizes):.2f} %, worst {sizes[-1]:.2f} %, lowest {min(values):+.2f} %"
            print(f"{name}: {len(sizes)} runs, {found}")


CASES = Path(__file__).with_name("plan_cases.txt")


def main() -> None:
    """See the file's docstring."""
    if sys.argv[1] == "--one":
        print("RESULT " + json.dumps(measure(sys.argv[2])))
    elif sys.argv[1] == "--predict":
        print("RESULT " + json.dumps(predict(sys.argv[2], json.loads(sys.argv[3]))))
    elif sys.argv[1] == "--again":
        predict_all(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1] == "--needs":
        cases = sys.argv[3:] or CASES.read_text().split()
        Path(sys.argv[2]).write_text(json.dumps({case: predict(case, {}) for case in cases}))
    else:
        options = dict(x.partition("=")[::2] for x in sys.argv[2:] if ":" not in x)
        cases = [x for x in sys.argv[2:] if ":" in x] or CASES.read_text().split()
        measure_all(cases, Path(sys.argv[1]), options)


if __name__ == "__main__":
    main()
