"""Whether measuring an 8B-shaped model takes more VRAM than training it did: one H100, random weights.

    python bench/evaluation_memory.py bench/results/evaluation-memory-h100.json [SHAPE]

First the NF4 model, streamed from the host: one optimizer step, then the held-out documents in packed rows of as many
tokens. Then, in a process of its own, what the quantization tax adds to a run: the same documents under the unquantized
layers, streamed, a window at a time. Each peak is the most that torch's allocator reserved in that phase, after what
the phase before had left over was given back; the model's own tensors are in every one of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

ROW_TOKENS, WINDOW_TOKENS, DOCUMENTS = 4096, 2048, 12


def sequences(vocab: int) -> Any:
    """Random documents of 300 to 2,048 tokens."""
    import numpy as np

    from drawplate.records import Sequence

    rng = np.random.default_rng(0)
    lengths = [WINDOW_TOKENS, WINDOW_TOKENS, *rng.integers(300, WINDOW_TOKENS, DOCUMENTS - 2)]
    return [
        Sequence(
            index=i,
            document=str(i),
            input_ids=rng.integers(0, vocab, n).astype(np.int32),
            counted=np.arange(n) > 0,
            text_bytes=4 * int(n),
        )
        for i, n in enumerate(lengths)
    ]


def build(shape: str, precision: str, r: int) -> Any:
    """The model, its layers and head streamed from the host."""
    import torch

    from bench.random_models import random_model
    from drawplate.model.base.precision import Storage
    from drawplate.model.placement import Placement

    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(precision),
        compute_dtype=torch.bfloat16,
        weights="host",
        activations="offload",
        head_rows=8192,
        compiled=precision == "nf4",
        dequantize="layer",
    )
    return random_model(shape, placement, {"r": r, "lora_alpha": 32})


class Peak:
    """Seconds and reserved bytes of a phase."""

    def __enter__(self) -> Peak:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.cuda.synchronize()
        self.figures = {
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "seconds": round(time.monotonic() - self.began, 2),
        }


def quantized(shape: str) -> dict[str, Any]:
    """One optimizer step, then a measurement."""
    from drawplate.data.batches import cut_packed
    from drawplate.evaluation.score import score_documents, total
    from drawplate.recipe import TrainSection
    from drawplate.train.loop import make_optimizer

    model = build(shape, "nf4", 16)
    windows = sequences(model.anatomy.config.vocab_size)
    batches = cut_packed(windows, ROW_TOKENS, 16, 0)
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    with Peak() as training:
        for step in range(2):
            loss, _ = model.sum_nats(batches[0], scale=1 / batches[0].counted_tokens, dropout_seed=(0, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    with Peak() as evaluation:
        result = total(score_documents(model, windows, batches))
    return {
        "training": training.figures,
        "evaluation": evaluation.figures | {"tokens": result.tokens, "loss": result.loss},
        "trained_parameters": model.adapter.parameter_count,
    }


def unquantized(shape: str) -> dict[str, Any]:
    """What the quantization tax runs before the quantized model is loaded."""
    from drawplate.data.batches import cut_packed
    from drawplate.evaluation.score import score_documents, total

    with Peak() as loading:
        model = build(shape, "bf16", 1)
    windows = sequences(model.anatomy.config.vocab_size)
    with Peak() as evaluation:
        result = total(score_documents(model, windows, cut_packed(windows, WINDOW_TOKENS, 16, 0)))
    figures = evaluation.figures | {"tokens": result.tokens, "loss": result.loss}
    return {"loading": loading.figures, "evaluation": figures, "host_bytes": model.residency.host_bytes}


def main() -> None:
    """Each part in its own process; one JSON file."""
    if sys.argv[1] == "--part":
        print("RESULT " + json.dumps({"quantized": quantized, "unquantized": unquantized}[sys.argv[2]](sys.argv[3])))
        return
    out, shape = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "8b"
    parts: dict[str, Any] = {}
    for part in ("quantized", "unquantized"):
        command = [sys.executable, __file__, "--part", part, shape]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((x for x in ran.stdout.splitlines() if x.startswith("RESULT ")), None)
        parts[part] = json.loads(line[7:]) if line else {"error": (ran.stderr or ran.stdout)[-3000:]}
        print(part, json.dumps(parts[part], indent=1), flush=True)
    import torch
    import transformers

    record = {
        "command": " ".join(["python", "bench/evaluation_memory.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"gpu": torch.cuda.get_device_name(), "platform": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "shape": shape,
        "row_tokens": ROW_TOKENS,
        "window_tokens": WINDOW_TOKENS,
        **parts,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
