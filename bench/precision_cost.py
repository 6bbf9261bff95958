"""What each precision of the frozen weights costs a real model before any training: perplexity on the same text.

    DRAWPLATE_CACHE=... python bench/precision_cost.py OUT.json [DOCUMENTS]

Fetch the demo's model first (examples/fetch_demo.py). Arithmetic is float32, so that what differs is what is stored;
fp8's products are rounded as the hardware rounds their operands. The change is paired by document, with its interval.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import torch  # noqa: E402

PRECISIONS = ("fp32", "bf16", "fp8", "int8", "nf4")
MICRO_BATCH_TOKENS = 2048


def main() -> None:
    """Measure every precision, print and write."""
    from drawplate.data.batches import cut_packed
    from drawplate.data.documents import read_documents
    from drawplate.data.tokens import load_tokenizer, tokenize
    from drawplate.evaluation.interval import perplexity_change
    from drawplate.evaluation.score import score_documents, total
    from drawplate.model.base.precision import Storage
    from drawplate.model.base.weights import open_checkpoint
    from drawplate.model.load.assemble import assemble
    from drawplate.model.placement import Placement
    from drawplate.model.support.targets import lora_config
    from drawplate.recipe import load_recipe

    out, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(ROOT / "examples" / "climate-demo.yaml")
    checkpoint = open_checkpoint(recipe.model)
    documents = list(read_documents(recipe.data, recipe.data.files).documents)
    chosen = documents[:: max(1, len(documents) // count)][:count]
    sequences = tokenize(chosen, load_tokenizer(checkpoint.folder), 2048).sequences
    batches = cut_packed(sequences, MICRO_BATCH_TOKENS, 16, 0)
    results: list[dict[str, Any]] = []
    baseline = None
    for precision in PRECISIONS:
        # float32 arithmetic needs more than fp8 units give: there the rounding is the measurement.
        dtype = torch.bfloat16 if precision == "fp8" and device.type == "cuda" else torch.float32
        placement = Placement(device=device, storage=Storage(precision), compute_dtype=dtype)
        model = assemble(
            checkpoint, placement, lambda a: lora_config(recipe.lora, a, checkpoint.name, checkpoint.revision), seed=0
        )
        scores = score_documents(model, sequences, batches)
        baseline = baseline or scores
        change = perplexity_change(baseline, scores)
        sums = total(scores)
        results.append(
            {
                "precision": precision,
                "perplexity": round(sums.perplexity, 4),
                "change": vars(change) if precision != PRECISIONS[0] else None,
                "tokens": sums.tokens,
                "documents": len(scores),
            }
        )
        print(results[-1], flush=True)
    facts = {
        "command": f"python bench/precision_cost.py {out} {count}",
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    out.write_text(json.dumps({**facts, "machine": where, "versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
