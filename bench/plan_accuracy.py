"""Predicted against measured peaks of memory, on random weights of real shapes.

    python bench/plan_accuracy.py MEASURED.json [CASE ...] [context=BYTES] [needs=FILE] [device=GIB] [host=GIB] [most=N]
    python bench/plan_accuracy.py --again MEASURED.json OUT.json     predict them (no GPU), write both, print errors
    python bench/plan_accuracy.py --needs FILE [CASE ...]            predictions alone, to pack processes by
    python bench/plan_accuracy.py --trace OUT.json.gz CASE ...  all in this process, with every allocation

A case is SHAPE:PRECISION:TIERS:POLICY:SIZES:RANK:TARGETS:DROPOUT:PACKING[:option=value ...], like
`3b:nf4:streamed:offload:2x2048,1x1024:8:qv:0.1:padded:head=8192`. TIERS is resident, dequantized, streamed or partial
(the first half on the device); POLICY keep, recompute, offload or mixed (the last quarter keeps, the others recompute).
With --trace a size ROWSxLENGTH is measured after those before it on the same loaded model, the cache emptied between.
Each size runs one evaluation micro-batch, three optimizer steps, a save of the adapter and another evaluation, as a run
does: gradients in one run of memory, micro-steps captured where the placement allows it (not with :launched), layers
compiled (not with :eager). Without cases those of bench/plan_cases.txt are run, each in a process of its own, some at a
time.

What every prediction is given of the CUDA context and of the host memory of CUDA and the compiler is measured in one
small run before all others. Against it stands each process's own context where the driver counts by process, else the
same. Speeds are not measured here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

STEPS = 3
OUTSIDE = ("CUDA context", "allocator: rounding and gaps")


def parse(case: str) -> dict[str, Any]:
    """The case's parts by name."""
    names = ("shape", "precision", "tiers", "policy", "sizes", "rank", "targets", "dropout", "packing")
    parts = case.split(":")
    values: dict[str, Any] = dict(zip(names, parts, strict=False))
    values["options"] = dict(option.partition("=")[::2] for option in parts[len(names) :])
    return values


def load(case: str) -> tuple[Any, dict[str, Any]]:
    """The case's model in its placement, and what loading took."""
    import torch

    from bench.shapes import random_checkpoint, shape_config
    from drawplate.model.adapter import lora_config
    from drawplate.model.assemble import assemble
    from drawplate.model.causal_lm import Placement
    from drawplate.model.storage import Storage
    from drawplate.recipe import LoraSection

    facts = parse(case)
    options = facts["options"]
    layers = int(options.get("layers", 0)) or shape_config(facts["shape"]).num_hidden_layers
    half, quarter = layers // 2, layers // 4
    tiers = {
        "resident": ("device",) * layers,
        "dequantized": ("dequantized",) * layers,
        "streamed": ("host",) * layers,
        "partial": ("device",) * half + ("host",) * (layers - half),
    }[facts["tiers"]]
    policies = ("recompute",) * (layers - quarter) + ("keep",) * quarter
    torch.manual_seed(0)
    placement = Placement(
        device=torch.device("cuda", torch.cuda.current_device()),
        storage=Storage(facts["precision"]),
        compute_dtype=torch.bfloat16,
        weights=tiers,
        activations=policies if facts["policy"] == "mixed" else facts["policy"],
        head_rows=int(options.get("head", 0)),
        compiled="eager" not in options,
        dequantize=options.get("dequantize", "product" if facts["shape"] == "70b" else "layer"),
        graphs="launched" not in options,
        adapter=options.get("adapter", "device"),
    )
    section = LoraSection(
        r=int(facts["rank"]),
        lora_alpha=32,
        target_modules="all-linear" if facts["targets"] == "all" else ["q_proj", "v_proj"],
        lora_dropout=float(facts["dropout"]),
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    checkpoint = random_checkpoint(facts["shape"], layers=layers)
    model = assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return model, {"seconds": round(time.monotonic() - began, 2), **_peaks()}


def batch_of(model: Any, size: str, packing: str) -> Any:
    """Random tokens in rows of one length: a row each, or end to end in one row."""
    from bench.random_models import random_sequences
    from drawplate.data.batches import cut_packed, cut_padded

    rows, length = (int(n) for n in size.split("x"))
    sequences = random_sequences([length] * rows, model.anatomy.config.vocab_size)
    if packing == "packed":
        return cut_packed(sequences, rows * length, 16, 0)[0]
    return cut_padded(sequences, rows, 16, 0)[0]


def run_size(model: Any, size: str, packing: str, *, traced: bool) -> dict[str, Any]:
    """One evaluation, some optimizer steps, another evaluation; the peaks of each."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train import make_optimizer

    torch.cuda.empty_cache()
    torch._dynamo.reset()
    batch, found = batch_of(model, size, packing), {}
    parameters = model.adapter.parameters()
    optimizer = make_optimizer(parameters, TrainSection())

    def evaluate() -> float:
        with torch.no_grad():
            return float(model.sum_nats(batch)[0]) / batch.counted_tokens

    def step(number: int) -> float:
        model.adapter.zero_gradients()
        nats = model.add_gradients(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(nats) / batch.counted_tokens

    def evaluate_again() -> float:
        model.forget_graphs()
        return evaluate()

    def checkpoint() -> float:
        with tempfile.TemporaryDirectory() as folder:
            model.adapter.save(Path(folder))
        return 0.0

    steps = {f"step{i}": lambda i=i: step(i) for i in range(STEPS)}
    stages = {"baseline": evaluate} | steps | {"checkpoint": checkpoint, "final": evaluate_again}
    trace = _Trace() if traced else None
    for name, stage in stages.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        value = stage()
        torch.cuda.synchronize()
        found[name] = {"loss": value, "seconds": round(time.monotonic() - began, 4), **_peaks()}
        if trace:
            trace.mark(name)
    if trace:
        found["trace"] = trace.events()
    return found


class _Trace:
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


def _peaks() -> dict[str, int]:
    import torch

    from drawplate.speed import own_device_bytes

    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "outside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
        "own_device_bytes": own_device_bytes(torch.device("cuda", torch.cuda.current_device())),
        "host_bytes": _resident_bytes("VmRSS"),
        "host_peak_bytes": _resident_bytes("VmHWM"),
        "host_locked_bytes": _resident_bytes("VmPin"),
    }


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def trace(cases: list[str], out: Path) -> None:
    """Every case in this process, with one step's allocations."""
    import gc
    import gzip

    import torch

    results: list[dict[str, Any]] = []
    torch.cuda.init()
    start = _peaks()
    for case in cases:
        began = time.monotonic()
        try:
            model, loading = load(case)
            sizes = {
                s: run_size(model, s, parse(case)["packing"], traced=True) for s in parse(case)["sizes"].split(",")
            }
            results.append({"case": case, "load": loading, "sizes": sizes})
            del model
        except Exception as error:
            results.append({"case": case, "error": repr(error)[-2000:]})
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{case}  {time.monotonic() - began:.1f} s  {results[-1].get('error', '')}", flush=True)
        with gzip.open(out, "wt") as file:
            json.dump({"start": start, "results": results}, file)


def predict(case: str, around: dict[str, int]) -> dict[str, Any]:
    """The ledger of a case: peaks by phase and place, and the lines of the largest phase."""
    from dataclasses import replace

    from bench.shapes import shape_config
    from drawplate.model.adapter import lora_config
    from drawplate.model.anatomy import build_anatomy
    from drawplate.model.footprint import layer_shapes, outer_footprints
    from drawplate.plan.ledger import Choice, Surroundings, ledger
    from drawplate.prepare import model_shape
    from drawplate.recipe import load_recipe

    facts = parse(case)
    options = facts["options"]
    anatomy = build_anatomy(shape_config(facts["shape"], layers=int(options.get("layers", 0)) or None))
    targets = "all-linear" if facts["targets"] == "all" else ["q_proj", "v_proj"]
    lora = {"r": int(facts["rank"]), "lora_dropout": float(facts["dropout"]), "target_modules": targets}
    recipe = load_recipe({"model": {"name_or_path": "random"}, "data": {"files": ["none"]}, "lora": lora})
    kinds, kind_of_layer = layer_shapes(anatomy, lora_config(recipe.lora, anatomy, "random", None))
    opening, closing = outer_footprints(anatomy)
    shape = replace(
        model_shape(anatomy, recipe),
        kinds=kinds,
        kind_of_layer=kind_of_layer,
        opening=opening,
        closing=closing,
        tied=anatomy.tied,
    )
    rows, length = (int(n) for n in facts["sizes"].split("x"))
    packed, layers = facts["packing"] == "packed", shape.layers
    choice = Choice(
        precision=facts["precision"],
        double_quant=True,
        compute_dtype="bfloat16",
        device="cuda",
        dequantized_layers=layers if facts["tiers"] == "dequantized" else 0,
        device_layers={"resident": layers, "partial": layers // 2}.get(facts["tiers"], 0),
        kept_layers={"keep": layers, "mixed": layers // 4}.get(facts["policy"], 0),
        policy="offload" if facts["policy"] == "offload" else "recompute",
        micro_batch_tokens=rows * length,
        rows=1 if packed else rows,
        packing=packed,
        documents=rows if packed else 1,
        micro_batches=1,
        head_rows=int(options.get("head", 0)),
        compiled="eager" not in options,
        dequantize=options.get("dequantize", "product" if facts["shape"] == "70b" else "layer"),  # type: ignore[arg-type]
        dropout=float(facts["dropout"]),
        adapter=options.get("adapter", "device"),  # type: ignore[arg-type]
        launched="launched" in options,
    )
    made = ledger(shape, choice, Surroundings(self_check=False, **around))
    return {
        "phases": {
            p.phase: {
                "moment": p.moment,
                "device": p.bytes("device"),
                "alloc": sum(x.bytes for x in p.lines if x.where == "device" and x.name not in OUTSIDE),
                "host": p.bytes("host"),
            }
            for p in made.phases
        },
        "device": made.peak("device"),
        "host": made.peak("host"),
        "lines": {
            where: {line.name: line.bytes for line in made.largest(where).lines if line.where == where}
            for where in ("device", "host")
        },
    }


def measure(case: str) -> dict[str, Any]:
    """The case in this process."""
    import torch

    import drawplate.run  # noqa: F401 - what a run has imported before it loads

    torch._inductor.config.autotune_local_cache = False  # every case is a first run, whoever compiled before it
    base = _resident_bytes("VmRSS")
    torch.cuda.init()
    model, loading = load(case)
    stages = run_size(model, parse(case)["sizes"], parse(case)["packing"], traced=False)
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
    if sys.argv[1] == "--trace":
        trace(sys.argv[3:], Path(sys.argv[2]))
    elif sys.argv[1] == "--one":
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
