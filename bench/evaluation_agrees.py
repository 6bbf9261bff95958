"""Held-out nats of a real model against an independent computation, for every way to cut and place it.

    DRAWPLATE_CACHE=... python bench/evaluation_agrees.py bench/results/evaluation-agrees.json [DOCUMENTS]

Fetch the demo's model first (examples/fetch_demo.py). The independent side is transformers' own model in fp32 with its
eager attention, one document (or one window of it) at a time, log-softmax of the whole logits in fp64: no packing, no
padding, none of Drawplate's layers, attention or loss. Both sides read the same weights and token ids.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

TOLERANCE = 1e-4
WINDOW_TOKENS, CONTEXT_TOKENS = 96, 48


def reference_nats(model: Any, ids: np.ndarray, max_length: int, context_tokens: int) -> float:
    """-sum of log p(token) over all tokens of a document but its first, by a plain transformers model.

    Tokens up to `max_length` are predicted from all before them; then windows of `max_length` follow, in which the
    first `context_tokens` are only read.
    """
    nats, fresh = 0.0, 1
    while fresh < len(ids):
        start = 0 if fresh == 1 else fresh - context_tokens
        window = torch.from_numpy(ids[start : start + max_length].astype(np.int64))[None]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=window).logits[0].double(), dim=-1)
        for i in range(fresh - start, window.shape[1]):
            nats -= float(log_p[i - 1, window[0, i]])
        fresh = start + window.shape[1]
    return nats


def document_nats(model: Any, sequences: Any, batches: Any) -> dict[str, float]:
    """Drawplate's nats of each document."""
    from drawplate.evaluation.score import score_documents

    return {score.document: score.nats for score in score_documents(model, sequences, batches)}


def main() -> int:
    """Measure every way, print and write the largest differences; exit 1 where one is above the tolerance."""
    from transformers import AutoModelForCausalLM

    from drawplate.data.documents import read_documents
    from drawplate.data.tokens import load_tokenizer, tokenize
    from drawplate.model.base.weights import open_checkpoint
    from drawplate.recipe import load_recipe

    out, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 36
    recipe = load_recipe(ROOT / "examples" / "climate-demo.yaml")
    checkpoint = open_checkpoint(recipe.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    documents = list(read_documents(recipe.data, recipe.data.files).documents)
    chosen = documents[:: len(documents) // count][:count]
    torch.set_num_threads(os.cpu_count() or 1)
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    whole = tokenize(chosen, tokenizer, 2048, context_tokens=1024).sequences
    windows = tokenize(chosen, tokenizer, WINDOW_TOKENS, context_tokens=CONTEXT_TOKENS).sequences
    assert len(whole) == count
    ids = {s.document: s.input_ids for s in whole}
    truth = {
        "whole": {name: reference_nats(reference, row, 2048, 1024) for name, row in ids.items()},
        "windowed": {name: reference_nats(reference, row, WINDOW_TOKENS, CONTEXT_TOKENS) for name, row in ids.items()},
    }
    del reference
    results = [result for where in ("device", "host") for result in _ways(checkpoint, where, whole, windows, truth)]
    worst = max(result["largest_relative_difference"] for result in results)
    out.write_text(json.dumps(_record(results, worst, chosen, whole, windows), indent=1) + "\n")
    print(f"largest relative difference {worst:.2e}, tolerance {TOLERANCE:g}")
    return int(worst > TOLERANCE)


def _ways(checkpoint: Any, where: str, whole: Any, windows: Any, truth: dict[str, dict[str, float]]) -> Any:
    """Each way to cut, with the layers on the device or streamed through two slots."""
    from drawplate.data.batches import cut_packed, cut_padded
    from drawplate.model.base.precision import Storage
    from drawplate.model.load.assemble import assemble
    from drawplate.model.placement import Placement
    from drawplate.model.support.targets import lora_config
    from drawplate.recipe import LoraSection

    placement = Placement(
        storage=Storage("fp32"), compute_dtype=torch.float32, weights=where, head_rows=8192 if where == "host" else 0
    )
    model = assemble(checkpoint, placement, lambda anatomy: lora_config(LoraSection(r=1), anatomy, "", None), seed=0)
    cuts: dict[str, tuple[str, Any, Any]] = {"packed in 2048 tokens": ("whole", whole, cut_packed(whole, 2048, 16, 0))}
    cuts["windowed, packed"] = ("windowed", windows, cut_packed(windows, 1024, 16, 0))
    if where == "device":
        for size in (1, 2, 8, 32):
            cuts[f"padded, batch {size}"] = ("whole", whole, cut_padded(whole, size, 16, 0))
        cuts["windowed, padded, batch 8"] = ("windowed", windows, cut_padded(windows, 8, 16, 0))
    for name, (kind, sequences, batches) in cuts.items():
        began = time.monotonic()
        got = document_nats(model, sequences, batches)
        each = [abs(got[d] - nats) / nats for d, nats in truth[kind].items()]
        total = abs(sum(got.values()) / sum(truth[kind].values()) - 1)
        result = {
            "way": f"{name}, {'streamed' if where == 'host' else 'resident'}",
            "micro_batches": len(batches),
            "nats": sum(got.values()),
            "independent_nats": sum(truth[kind].values()),
            "relative_difference": total,
            "largest_relative_difference": max(each),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(f"{result['way']:40s} {total:.2e} in sum, {max(each):.2e} at worst for a document", flush=True)
        yield result


def _record(results: list[dict[str, Any]], worst: float, chosen: Any, whole: Any, windows: Any) -> dict[str, Any]:
    import transformers

    return {
        "command": " ".join(["python", "bench/evaluation_agrees.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"platform": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": "SmolLM2-135M, fp32",
        "documents": len(chosen),
        "tokens": sum(len(s) for s in whole),
        "windows": {"tokens": WINDOW_TOKENS, "context_tokens": CONTEXT_TOKENS, "count": len(windows)},
        "largest_relative_difference_of_a_document": worst,
        "tolerance": TOLERANCE,
        "results": results,
    }


if __name__ == "__main__":
    raise SystemExit(main())
