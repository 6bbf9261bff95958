"""Every allocation and release of cases of the plan's accuracy, by address, with the code that asked for it.

    python bench/plan_trace.py OUT.json.gz CASE ...

Cases are those of bench/plan_case.py, all in this process. A size ROWSxLENGTH is measured after those before it on the
same loaded model, the cache emptied between.
"""

from __future__ import annotations

import gc
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.plan_case import load, parse, peaks, run_size  # noqa: E402 - the repository is not installed


class Trace:
    """Every allocation and release from now on, with the live blocks before."""

    def __init__(self) -> None:
        import torch

        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=2_000_000)
        self.before = torch.cuda.memory._snapshot()["segments"]
        self.marks: dict[str, int] = {}

    def mark(self, stage: str) -> None:
        """The events so far were those up to the stage's end."""
        import torch

        self.marks[stage] = len(torch.cuda.memory._snapshot()["device_traces"][0])

    def events(self) -> dict[str, Any]:
        """All of them, as plain JSON values."""
        import torch

        events = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(enabled=None)
        return {**_plain(self.before, events), "marks": self.marks}


def _plain(before: Any, events: Any) -> dict[str, Any]:
    places: dict[str, int] = {}
    kinds = {"alloc": "a", "free_completed": "f", "segment_map": "m", "segment_unmap": "u", "segment_alloc": "s"}
    lines = [
        [
            kinds[e["action"]],
            e["addr"],
            e["size"],
            e["stream"],
            places.setdefault(_place(e.get("frames", [])), len(places)),
        ]
        for e in events
        if e["action"] in kinds
    ]
    segments = [
        {
            "address": s["address"],
            "bytes": s["total_size"],
            "stream": s["stream"],
            "pool": s["segment_type"],
            "blocks": [[b["size"], b["requested_size"], b["state"]] for b in s["blocks"]],
        }
        for s in before
    ]
    return {"before": segments, "events": lines, "places": list(places)}


def _place(frames: list[dict[str, Any]]) -> str:
    """The innermost own or generated frame, and the innermost of all."""
    own = [f for f in frames if "drawplate" in f["filename"] or "torchinductor" in f["filename"]]
    names = [f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in [*own[:2], *frames[:1]]]
    return " < ".join(names)


def main() -> None:
    """Every case in this process, with all its allocations."""
    import torch

    out, cases = Path(sys.argv[1]), sys.argv[2:]
    results: list[dict[str, Any]] = []
    torch.cuda.init()
    start = peaks()
    for case in cases:
        began = time.monotonic()
        try:
            model, loading = load(case)
            sizes = {s: run_size(model, s, parse(case)["packing"], Trace) for s in parse(case)["sizes"].split(",")}
            results.append({"case": case, "load": loading, "sizes": sizes})
            del model
        except Exception as error:
            results.append({"case": case, "error": repr(error)[-2000:]})
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{case}  {time.monotonic() - began:.1f} s  {results[-1].get('error', '')}", flush=True)
        with gzip.open(out, "wt") as file:
            json.dump({"start": start, "results": results}, file)


if __name__ == "__main__":
    main()
