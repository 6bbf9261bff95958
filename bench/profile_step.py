"""Where the time of a training micro-step goes: kernels on the GPU, idle gaps between them, Python on the host.

    python bench/profile_step.py OUT.json SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:ROWSxLENGTH[,...][:FLAG...] ...

The cases are those of bench/streaming.py, with one flag more: `packed` puts the rows into one, a document each. All
run in this process, and the sizes of one share a loaded model. Each gives the median seconds of a micro-step (forward,
loss, backward; no optimizer) without the profiler, the seconds in which the GPU ran anything, seconds by kind of kernel
and by kernel, and the host's functions by own time.
"""

from __future__ import annotations

import cProfile
import io
import json
import pstats
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

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


def main() -> None:
    """Profile every case and write one JSON file."""
    from bench.streaming import load_case, record, train_batch

    out, results = Path(sys.argv[1]), []
    for case in sys.argv[2:]:
        model, sizes = load_case(case)
        for size in sizes:
            batch = packed_batch(model, size) if "packed" in case else train_batch(model, size)
            results.append({"case": case, "size": size, **profile_micro_step(model, batch)})
            brief = {key: value for key, value in results[-1].items() if key not in ("kernels", "host")}
            print(json.dumps(brief), flush=True)
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
    from torch.profiler import ProfilerActivity, profile

    def step(number: int = 0) -> None:
        model.add_gradients(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))

    torch._dynamo.reset()
    model.forget_graphs()
    model.adapter.zero_gradients()
    for _ in range(4):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds, host_seconds = zip(*(_timed(step) for _ in range(RUNS)), strict=True)
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        step()
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in watched.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.device_time_total / 1e6
            launches[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, spent in kernels.items():
        kinds[_kind(name)] += spent
    median = sorted(seconds)[RUNS // 2]
    return {
        "tokens": batch.tokens,
        "micro_step_seconds": round(median, 5),
        "tokens_per_second": round(batch.tokens / median),
        "host_seconds_to_issue": round(sorted(host_seconds)[RUNS // 2], 5),
        "gpu_busy_seconds": round(sum(kernels.values()), 5),
        "launches": sum(launches.values()),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "seconds_by_kind": {kind: round(spent, 5) for kind, spent in kinds.most_common()},
        "kernels": [[name[:120], launches[name], round(spent, 6)] for name, spent in kernels.most_common(45)],
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
