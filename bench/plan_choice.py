"""What the plan predicts against what a GPU does: seconds of optimizer steps, on random weights of real shapes.

    python bench/plan_choice.py OUT.json probe
    python bench/plan_choice.py OUT.json time SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:TOKENS/LENGTH[:packed][:r=N][:all] ...

`time` loads each case, takes a few optimizer steps of one micro-batch each (TOKENS tokens in documents of LENGTH), and
writes the seconds of its parts on the GPU's clock beside the host's. Cases share a process, and nothing else.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

STEPS = 4


def sequences_of(lengths: list[int], vocab: int) -> list[Any]:
    """Random tokens, every one counted."""
    import numpy as np

    from drawplate.records import Sequence

    rng = np.random.default_rng(0)
    return [
        Sequence(
            index=i, document=str(i), input_ids=rng.integers(0, vocab, n).astype(np.int32), counted=np.ones(n, bool),
            text_bytes=n,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def build(shape: str, placement: Any, lora: dict[str, Any]) -> Any:
    """A random model of that shape in its placement."""
    from bench.shapes import random_checkpoint
    from drawplate.model.adapter import lora_config
    from drawplate.model.assemble import assemble
    from drawplate.recipe import LoraSection

    section = LoraSection(**lora)
    return assemble(
        random_checkpoint(shape),  # type: ignore[arg-type]
        placement,
        lambda a: lora_config(section, a, "random", None),
        seed=0,
    )


def timed_steps(model: Any, batch: Any, steps: int = STEPS) -> dict[str, Any]:
    """Seconds of whole optimizer steps of one micro-batch, split at the ends of body, head and backward."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train import make_optimizer

    torch._dynamo.reset()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    events: list[torch.cuda.Event] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    body = type(model).hidden_states

    def marked(*args: Any, **kwargs: Any) -> Any:
        out = body(model, *args, **kwargs)
        mark()
        return out

    model.hidden_states = marked

    def step(number: int) -> None:
        mark()
        loss, _ = model.sum_nats(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        mark()
        loss.backward()
        mark()
        optimizer.step()
        optimizer.zero_grad()
        mark()

    began = time.monotonic()
    step(0)
    torch.cuda.synchronize()
    first_seconds = time.monotonic() - began
    step(1)
    torch.cuda.synchronize()
    rows, issued = [], []
    torch.cuda.reset_peak_memory_stats()
    for i in range(steps):
        events.clear()
        began = time.monotonic()
        step(2 + i)
        issued.append(time.monotonic() - began)
        torch.cuda.synchronize()
        rows.append([time.monotonic() - began, *(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))])
    middle = sorted(rows)[len(rows) // 2]
    names = ("step", "body_forward", "head", "backward", "optimizer")
    return {
        "tokens": batch.tokens,
        "tokens_per_second": round(batch.tokens / middle[0], 1),
        "seconds": {name: round(value, 5) for name, value in zip(names, middle, strict=True)},
        "all_step_seconds": [round(r[0], 4) for r in rows],
        "issue_seconds": round(sorted(issued)[len(issued) // 2], 5),
        "first_step_seconds": round(first_seconds, 2),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def time_case(case: str) -> dict[str, Any]:
    """One case of `time`."""
    import torch

    from drawplate.data.batches import cut_packed, cut_padded
    from drawplate.model.causal_lm import Placement
    from drawplate.model.frozen import Storage

    shape, precision, weights, activations, size, *options = case.split(":")
    flags = dict(o.partition("=")[::2] for o in options)
    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(precision),
        compute_dtype=torch.bfloat16,
        weights=weights,
        activations=activations,
        head_rows=int(flags.get("head", 0)),
        compiled=True,
        dequantize=flags.get("dequantize", "layer"),
    )
    targets = "all-linear" if "all" in flags else ["q_proj", "v_proj"]
    lora = {"r": int(flags.get("r", 8)), "lora_alpha": 32, "target_modules": targets}
    lora["lora_dropout"] = float(flags.get("dropout", 0.0))
    began = time.monotonic()
    model = build(shape, placement, lora)
    torch.cuda.synchronize()
    loaded = time.monotonic() - began
    tokens, length = (int(n) for n in size.split("/"))
    sequences = sequences_of([length] * (tokens // length), model.anatomy.config.vocab_size)
    batch = (
        cut_packed(sequences, tokens, 16, 0)[0]
        if "packed" in flags
        else cut_padded(sequences, len(sequences), 16, 0)[0]
    )
    return {"case": case, "load_seconds": round(loaded, 2), **timed_steps(model, batch)}


def emptied(call: Any) -> dict[str, Any]:
    """A case's result, or how it failed; either way the GPU is empty again."""
    import torch

    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Run what was asked for; the file is written after every case."""
    import torch

    from drawplate.device import machine
    from drawplate.records import to_json
    from drawplate.speed import probe

    out, mode, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    device = torch.device("cuda", 0)
    began = time.monotonic()
    speeds = [to_json(probe(device, torch.bfloat16, machine(device))) for _ in range(2)]
    result = record()
    result |= {"probe_seconds": round((time.monotonic() - began) / 2, 2), "speed": speeds, "results": []}
    print(json.dumps(speeds), flush=True)
    for case in cases if mode == "time" else ():
        measured = {"case": case, **emptied(lambda case=case: time_case(case))}
        result["results"].append(measured)
        out.write_text(json.dumps(result, indent=1))
        print(json.dumps(measured), f"{time.monotonic() - began:.0f} s so far", flush=True)
    out.write_text(json.dumps(result, indent=1))


def record() -> dict[str, Any]:
    """What a result was measured on."""
    import torch
    import transformers

    return {
        "command": " ".join(["python", "bench/plan_choice.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"gpu": torch.cuda.get_device_name(), "cpu": platform.processor(), "platform": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
