"""How far bf16 gradients are from fp32: two runs of one resident twin, and streamed mixes beside them.

    python bench/twin_spread.py OUT.json

The GPU tests of streaming hold any mix to the resident twin's own error times a little slack; this measures how much
that error itself varies from run to run, so that the slack is not a guess.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]


def main() -> None:
    """Relative errors of all adapter gradients over five optimizer steps, padded and packed."""
    import torch

    from bench.shapes import random_checkpoint
    from bench.streaming import record
    from drawplate.data.batches import cut_packed, cut_padded
    from tests.model.conftest import random_sequences
    from tests.model.stream.test_streaming_gpu import build, error, gradients

    checkpoint, rng = random_checkpoint("1b", layers=5), random.Random(0)
    sequences, results = random_sequences([300, 120, 511, 77, 256, 400]), []
    for packed in (False, True):
        batches = cut_packed(sequences, 1024, 16, 0) if packed else cut_padded(sequences, 3, 16, 0)
        truth = gradients(build(checkpoint, compute_dtype=torch.float32), batches)
        twins = [gradients(build(checkpoint), batches) for _ in range(4)]
        mixes = []
        for _ in range(4):
            tiers = tuple(rng.choice(["device", "host"]) for _ in range(5))
            policies = tuple(rng.choice(["keep", "recompute", "offload"]) for _ in range(5))
            model = build(checkpoint, weights=tiers, activations=policies, slots=rng.randint(2, 4), poison=True)
            mixes.append({"tiers": tiers, "policies": policies, "error": error(gradients(model, batches), truth)})
        between = [error(twin, twins[0]) for twin in twins[1:]]
        results.append(
            {
                "packed": packed,
                "twin_errors": [error(t, truth) for t in twins],
                "between_twins": between,
                "mixes": mixes,
            }
        )
        print(json.dumps(results[-1]), flush=True)
    written = record(results)
    written["command"] = " ".join(["python", "bench/twin_spread.py", *sys.argv[1:]])
    Path(sys.argv[1]).write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
