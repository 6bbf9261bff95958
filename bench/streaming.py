"""Tokens per second and peak memory of training steps, streamed against resident, on random weights of real shapes.

    python bench/streaming.py OUT.json SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:ROWSxLENGTH[:head] ...

Each case runs in a process of its own, so that its peak is its own. A case's peak is the most the allocator ever
reserved, loading included; `context_bytes` is what the CUDA context takes beside it. Every case is a whole optimizer
step: forward, loss over the full vocabulary, backward, AdamW.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def measure(case: str, steps: int = 4) -> dict[str, object]:
    """One case in this process."""
    import numpy as np
    import torch

    from bench.shapes import random_checkpoint
    from drawplate.data.batches import cut_padded
    from drawplate.model.adapter import lora_config
    from drawplate.model.causal_lm import Placement, assemble
    from drawplate.model.frozen import Storage
    from drawplate.recipe import LoraSection, TrainSection
    from drawplate.records import Sequence
    from drawplate.train import make_optimizer

    shape, precision, weights, activations, size, *options = case.split(":")
    rows, length = (int(n) for n in size.split("x"))
    flags = dict(o.partition("=")[::2] for o in options)
    torch.manual_seed(0)
    free_before = torch.cuda.mem_get_info()[0]
    began = time.monotonic()
    checkpoint = random_checkpoint(shape, layers=int(flags["layers"]) if "layers" in flags else None)
    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(precision),
        compute_dtype=torch.bfloat16,
        weights=weights,
        activations=activations,
        head_rows=int(flags.get("head", 0)),
        slots=int(flags.get("slots", 2)),
        compiled=flags.get("eager") is None,
    )
    section = LoraSection(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    load_seconds = time.monotonic() - began
    load_peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    vocab = checkpoint.config.vocab_size
    rng = np.random.default_rng(0)
    sequences = [
        Sequence(
            index=i,
            document=str(i),
            input_ids=rng.integers(0, vocab, length).astype(np.int32),
            counted=np.ones(length, bool),
            text_bytes=length,
        )
        for i in range(rows)
    ]
    batch = cut_padded(sequences, rows, 16, 0)[0]

    def step(number: int) -> float:
        loss, _ = model.sum_nats(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    began = time.monotonic()
    first = step(0)
    first_seconds = time.monotonic() - began
    step(1)
    seconds = []
    for i in range(steps):
        torch.cuda.synchronize()
        began = time.monotonic()
        last = step(2 + i)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    import torch._dynamo.utils as dynamo

    from drawplate.device import memory_sample

    median = sorted(seconds)[len(seconds) // 2]
    free, total = torch.cuda.mem_get_info()
    profile = _profile(step) if "profile" in flags else None
    return {
        "case": case,
        "tokens_per_second": round(batch.tokens / median, 1),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "load_peak_reserved_bytes": load_peak,
        "outside_allocator_bytes": total - free - torch.cuda.memory_reserved() - (total - free_before),
        "host_process_bytes": memory_sample().process_bytes,
        "arena_bytes": model.residency.host_bytes,
        "load_seconds": round(load_seconds, 2),
        "first_step_seconds": round(first_seconds, 2),
        "compilations": int(dynamo.counters["stats"]["unique_graphs"]),
        "first_loss": first,
        "last_loss": last,
        "gradient_norm": 0.0,
        **({"profile": profile} if profile else {}),
    }


def _profile(step) -> str:  # type: ignore[no-untyped-def]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        step(99)
    return str(watched.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))


def main() -> None:
    """Run every case in its own process and write one JSON file."""
    if sys.argv[1] == "--one":
        print("RESULT " + json.dumps(measure(sys.argv[2])))
        return
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    results = []
    for case in cases:
        ran = subprocess.run([sys.executable, __file__, "--one", case], capture_output=True, text=True, check=False)
        line = next((x for x in ran.stdout.splitlines() if x.startswith("RESULT ")), None)
        result = json.loads(line[7:]) if line else {"case": case, "error": (ran.stderr or ran.stdout)[-3000:]}
        results.append(result)
        peak = result.get("peak_reserved_bytes", 0) / 2**30
        if "profile" in result:
            table = str(result.pop("profile"))
            out.with_name(f"profile-{len(results)}.txt").write_text(case + "\n" + table)
            print("\n".join(table.splitlines()[-3:]))
        print(
            f"{case:48s} {result.get('tokens_per_second', 0):>9} tok/s  peak {peak:6.2f} GiB"
            f"  alloc {result.get('peak_allocated_bytes', 0) / 2**30:6.2f}  load {result.get('load_seconds', 0)} s"
            f"  first {result.get('first_step_seconds', 0)} s  graphs {result.get('compilations')}"
            f"  loss {result.get('first_loss')} {result.get('error', '')[-1500:]}",
            flush=True,
        )
        out.write_text(json.dumps(record(results), indent=1))


def record(results: list[dict[str, object]]) -> dict[str, object]:
    """Results with what they were measured on."""
    import torch
    import transformers

    return {
        "command": " ".join(["python", "bench/streaming.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"gpu": torch.cuda.get_device_name(), "cpu": platform.processor(), "platform": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }


if __name__ == "__main__":
    main()
