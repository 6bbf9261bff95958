"""Tokens per second and peak memory of training steps, streamed against resident, on random weights of real shapes.

    python bench/streaming.py OUT.json SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:ROWSxLENGTH[,...][:OPTION...] ...

WEIGHTS is one tier for all layers, or counts, of which those on the host are spread evenly: 12device+20host.
ACTIVATIONS is one policy for all layers, or counts in their order: 8host+3recompute+17keep.
OPTIONS: head=ROWS streams the head, embedding=host keeps an untied one there, layers=N cuts the model short, eager
compiles nothing, alone computes every adapter by itself, launches captures no CUDA graphs, profile adds a table of
kernels, steps=N times that many steps, r=N is the adapter's rank, all targets all linear layers, adapter=host keeps it
there, cached keeps the prepared weights in $DRAWPLATE_CACHE. Each case runs in a process of its own, so that its peak
is its own. A case's peak is the most the allocator ever reserved, loading included (the CUDA context, some 0.3 to 0.5
GiB, lies outside of it). Every case is a whole optimizer step: forward, loss over the full vocabulary, backward,
AdamW. A case without sizes only loads, so the same cached one twice gives the cold start and the warm one; imports and
the CUDA context come before the clock. The file is written after every size, so that a run that is cut short keeps
what it had.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def policies_of(activations: str) -> str | tuple[str, ...]:
    """A case's activations, as in Placement."""
    counted = re.findall(r"(\d+)([a-z]+)", activations)
    return tuple(policy for count, policy in counted for _ in range(int(count))) if counted else activations


def weights_of(weights: str) -> str | tuple[str, ...]:
    """A case's tiers, as in Placement; `20host` of `12device+20host` are spread evenly, as a plan's."""
    from types import SimpleNamespace

    from drawplate.model.placement import tiers_of

    counts = {f"{tier}_layers": int(count) for count, tier in re.findall(r"(\d+)([a-z]+)", weights)}
    none = dict.fromkeys(("dequantized_layers", "device_layers", "host_layers"), 0)
    return tiers_of(SimpleNamespace(**none | counts)) if counts else weights  # type: ignore[arg-type]


def load_case(case: str) -> tuple[Any, list[str]]:
    """The model that a case describes, with random weights, and the case's sizes."""
    import torch

    from bench.shapes import random_checkpoint
    from drawplate.model.base.precision import Storage
    from drawplate.model.load.assemble import assemble
    from drawplate.model.placement import Placement
    from drawplate.model.support.targets import lora_config
    from drawplate.recipe import LoraSection

    shape, precision, weights, activations, sizes, *options = case.split(":")
    flags = dict(o.partition("=")[::2] for o in options)
    torch.manual_seed(0)
    checkpoint = random_checkpoint(shape, layers=int(flags["layers"]) if "layers" in flags else None)
    if "cached" in flags:  # the prepared weights are kept in $DRAWPLATE_CACHE, and found there by the next process
        checkpoint.fingerprint = f"random {shape} {precision}"
    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(precision),
        compute_dtype=torch.bfloat16,
        weights=weights_of(weights),
        activations=policies_of(activations),
        adapter=flags.get("adapter", "device"),
        head_rows=int(flags.get("head", 0)),
        embedding=flags.get("embedding", "device"),
        slots=int(flags.get("slots", 2)),
        compiled="eager" not in flags,
        dequantize=flags.get("dequantize", "layer"),
        graphs="launches" not in flags,
    )
    targets = "all-linear" if "all" in flags else ["q_proj", "v_proj"]
    section = LoraSection(r=int(flags.get("r", 8)), lora_alpha=32, target_modules=targets, lora_dropout=0.1)
    model = assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)  # type: ignore[arg-type]
    if "alone" in flags:
        for module in (m for template in model.runner.templates for m in template.modules()):
            if getattr(module, "group", None) is not None:
                module.group.dissolve()
    torch.cuda.synchronize()
    return model, sizes.split(",")


def measure(case: str) -> Iterator[dict[str, object]]:
    """One case in this process; a size like 1x512,1x1024 measures several micro-batches of one loaded model in turn."""
    import torch

    import drawplate.model.load.assemble  # noqa: F401
    from drawplate.machine.memory import memory_sample

    torch.zeros(1, device="cuda")
    began = time.monotonic()
    model, sizes = load_case(case)
    loading = {
        "load_seconds": round(time.monotonic() - began, 2),
        "load_peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "arena_bytes": model.residency.host_bytes,
    }
    shape, precision, weights, activations, _, *options = case.split(":")
    flags = dict(o.partition("=")[::2] for o in options)
    if sizes == [""]:  # loading alone
        yield {"case": case, **loading, "host_process_bytes": memory_sample().process_bytes}
        return
    for size in sizes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        timed = _train_steps(model, size, int(flags.get("steps", 4)), profiled="profile" in flags)
        timed["peak_reserved_bytes"] = max(torch.cuda.max_memory_reserved(), loading["load_peak_reserved_bytes"])
        case_of_size = ":".join([shape, precision, weights, activations, size, *options])
        host = {"host_process_bytes": memory_sample().process_bytes}
        yield {"case": case_of_size, **timed, **loading, **host}


def train_batch(model: Any, size: str) -> Any:
    """ROWSxLENGTH random tokens without padding."""
    from bench.random_models import random_sequences
    from drawplate.data.batches import cut_padded

    rows, length = (int(n) for n in size.split("x"))
    sequences = random_sequences([length] * rows, model.anatomy.config.vocab_size)
    return cut_padded(sequences, rows, 16, 0)[0]


def _train_steps(model: Any, size: str, steps: int, *, profiled: bool) -> dict[str, Any]:
    import torch
    import torch._dynamo.utils as dynamo

    from drawplate.recipe import TrainSection
    from drawplate.train.loop import make_optimizer

    batch = train_batch(model, size)
    model.forget_graphs()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    torch._dynamo.reset()
    dynamo.counters.clear()

    def step(number: int) -> float:
        model.adapter.zero_gradients()
        nats = model.add_gradients(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        optimizer.step()
        return float(nats) / batch.counted_tokens

    began = time.monotonic()
    first = last = step(0)
    first_seconds = time.monotonic() - began
    for i in range(1, 4 if model.graphed else 1):  # captures, and then allocates what replays need beside
        step(i)
    seconds = []
    for i in range(steps):
        torch.cuda.synchronize()
        began = time.monotonic()
        last = step(4 + i)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    return {
        "tokens_per_second": round(batch.tokens / sorted(seconds)[len(seconds) // 2], 1),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "first_step_seconds": round(first_seconds, 2),
        "compilations": int(dynamo.counters["stats"]["unique_graphs"]),
        "first_loss": first,
        "last_loss": last,
        **({"profile": _profile(step)} if profiled else {}),
    }


def _profile(step) -> str:  # type: ignore[no-untyped-def]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        step(99)
    return str(watched.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))


def main() -> None:
    """Run every case in its own process and write one JSON file."""
    if sys.argv[1] == "--one":
        for result in measure(sys.argv[2]):
            print("RESULT " + json.dumps(result), flush=True)
        return
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    results: list[dict[str, Any]] = []
    for case in cases:
        for result in _in_a_process(case):
            results.append(result)
            table = str(result.pop("profile", ""))
            if table:
                out.with_name(f"profile-{len(results)}.txt").write_text(f"{case}\n{table}")
            print(_line(result) + "".join(f"  {line}" for line in table.splitlines()[-2:]), flush=True)
            out.write_text(json.dumps(record(results), indent=1))


def _in_a_process(case: str) -> Iterator[dict[str, Any]]:
    """A case's results as they come; one with `error` if the process ends badly."""
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, __file__, "--one", case]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            assert process.stdout is not None
            yield from (json.loads(line[7:]) for line in process.stdout if line.startswith("RESULT "))
        if process.returncode:
            said.seek(0)
            yield {"case": case, "error": said.read()[-3000:]}


def _line(result: dict[str, Any]) -> str:
    peak, allocated = (result.get(f"peak_{what}_bytes", 0) / 2**30 for what in ("reserved", "allocated"))
    return (
        f"{result['case']:46s} {result.get('tokens_per_second', 0):>9} tok/s  {peak:6.2f} GiB  ({allocated:.2f})"
        f"  load {result.get('load_seconds', 0)} s  first {result.get('first_step_seconds', 0)} s"
        f"  graphs {result.get('compilations')}  loss {result.get('first_loss', 0):.4f}"
        f"  {result.get('error', '')[-1500:]}"
    )


def record(results: list[dict[str, Any]]) -> dict[str, object]:
    """Results with what they were measured on."""
    from bench.about import about

    return {**about(), "results": results}


if __name__ == "__main__":
    main()
