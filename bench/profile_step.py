"""Where the time of a training micro-step goes: kernels on the GPU, idle gaps between them, Python on the host.

    python bench/profile_step.py OUT.json SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:ROWSxLENGTH[,...][:FLAG...] ...

The cases are those of bench/streaming.py, with one flag more: `packed` puts the rows into one, a document each. All
run in this process, and the sizes of one share a loaded model. Each gives

- the median seconds of a micro-step (forward, loss, backward; no optimizer) without the profiler, each waited for, and
  the mean of some that are not, as training issues them (`looped_seconds`);
- of as many under the profiler, all as means of a micro-step: seconds by kind of kernel and by kernel (of all streams
  together), and when nothing computed (bench/idle.py);
- the host's functions by own time.

The profiler makes launches, and the nodes of a replayed graph, a little slower. So idle time is an upper bound, to be
read beside `looped_seconds`. The first micro-step in a profile begins with the host not ahead, as after a checkpoint.
"""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.idle import TO_DEVICE, TO_HOST, Activity, idle_report, table  # noqa: E402

KINDS = {
    "product": ("gemm", "nvjet", "cutlass_80", "cutlass_90", "xmma", "splitk"),
    "attention": ("flash", "fmha", "attention", "dot_do_o", "convert_dq"),
    "transposes for fp8": ("_transposed",),
    "loss": ("absorb_tile", "scale_moved_rows", "copy_target_rows"),
    "fused by the compiler": ("triton_",),
    "dequantizing": ("_dequantize",),
    "adapter's dropped products": ("_down", "_up", "_grad_a"),
    "copy": ("memcpy", "memset"),
}
RUNS = 5
LOOPED = 4  # micro-steps issued without waiting
LONG = ("kernels", "host", "idle", "idle_between", "largest_gaps")  # in the file only
MARKER = "spin_kernel"  # what torch.cuda._sleep launches; no step has one


def main() -> None:
    """Profile every case and write one JSON file."""
    from bench.streaming import load_case, record, train_batch

    out, results = Path(sys.argv[1]), []
    for case in sys.argv[2:]:
        model, sizes = load_case(case)
        for size in sizes:
            batch = packed_batch(model, size) if "packed" in case else train_batch(model, size)
            results.append({"case": case, "size": size, **profile_micro_step(model, batch)})
            brief = {key: value for key, value in results[-1].items() if key not in LONG}
            print(json.dumps(brief) + "\n" + table(results[-1]), flush=True)
            out.write_text(json.dumps(record(results), indent=1))
        del model


def packed_batch(model: Any, size: str) -> Any:
    """DOCUMENTSxLENGTH random tokens in one row."""
    from bench.random_models import random_sequences
    from drawplate.data.batches import cut_packed

    documents, length = (int(n) for n in size.split("x"))
    sequences = random_sequences([length] * documents, model.anatomy.config.vocab_size)
    return cut_packed(sequences, documents * length, 16, 0)[0]


def profile_micro_step(model: Any, batch: Any) -> dict[str, Any]:
    """Time, then kernels, then Python, of micro-steps on one batch."""
    import torch

    def step(number: int = 0) -> None:
        model.add_gradients(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))

    torch._dynamo.reset()
    model.forget_graphs()
    model.adapter.zero_gradients()
    for _ in range(4):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds, host_seconds = zip(*(_timed(step) for _ in range(RUNS)), strict=True)
    looped_seconds = _looped(step)
    done = _watched(step)
    median = sorted(seconds)[RUNS // 2]
    return {
        "tokens": batch.tokens,
        "micro_step_seconds": round(median, 5),
        "looped_seconds": round(looped_seconds, 5),
        "tokens_per_second": round(batch.tokens / median),
        "host_seconds_to_issue": round(sorted(host_seconds)[RUNS // 2], 5),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        **_by_kernel(done),
        **idle_report(done, MARKER, _kind),
        "host": _host_functions(step),
    }


def _timed(step: Any) -> tuple[float, float]:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    issued = time.perf_counter() - began
    torch.cuda.synchronize()
    return time.perf_counter() - began, issued


def _looped(step: Any) -> float:
    """Seconds of a micro-step where the host does not wait between them."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(LOOPED):
        step(number)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / LOOPED


def _watched(step: Any) -> list[Activity]:
    """What the GPU does in as many micro-steps, none of them waited for, a marker before each."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as watched:  # without, 2.11 warns
        for number in range(LOOPED):
            torch.cuda._sleep(1)
            step(number)
        torch.cuda.synchronize()
    return activities_of(watched.events())


def activities_of(events: Any) -> list[Activity]:
    """The profiler's events on the device, their microseconds in seconds."""
    from torch.autograd import DeviceType

    return [
        Activity(
            name=event.name,
            stream=event.device_resource_id,
            start=event.time_range.start / 1e6,
            seconds=event.time_range.elapsed_us() / 1e6,
            is_copy=event.name.startswith((f"Memcpy {TO_DEVICE}", f"Memcpy {TO_HOST}")),
        )
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def _by_kernel(done: list[Activity]) -> dict[str, Any]:
    """Seconds and launches of a micro-step by kernel, copies among them; streams that run at once count one by one."""
    seconds: defaultdict[str, float] = defaultdict(float)
    kinds: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for activity in (a for a in done if MARKER not in a.name):
        seconds[activity.name] += activity.seconds / LOOPED
        kinds[_kind(activity.name)] += activity.seconds / LOOPED
        launches[activity.name] += 1
    longest = sorted(seconds, key=lambda name: -seconds[name])[:45]
    return {
        "gpu_busy_seconds": round(sum(seconds.values()), 5),
        "launches": round(launches.total() / LOOPED, 2),
        "seconds_by_kind": {kind: round(kinds[kind], 5) for kind in sorted(kinds, key=lambda kind: -kinds[kind])},
        "kernels": [[name[:120], round(launches[name] / LOOPED, 2), round(seconds[name], 6)] for name in longest],
    }


def _kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in lowered for mark in marks)), "other")


def _host_functions(step: Any) -> list[str]:
    """The Python functions by own time; backward's run in another thread and are not among them."""
    import torch

    watched = cProfile.Profile()
    watched.enable()
    step()
    watched.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(watched, stream=text).sort_stats("tottime").print_stats(35)
    return [line.replace(str(ROOT), "") for line in text.getvalue().splitlines() if line.strip()]


if __name__ == "__main__":
    main()
