"""How often the 95 % interval of a change covers the truth, in simulated sets of documents; beside the percentile way.

    python bench/interval_coverage.py bench/results/interval-coverage.json [CASES]

A simulated document has a log-normal length, and a change of nats a token that depends on its length and varies from
document to document, less so for long ones. The true change of perplexity is known: exp(E[change of nats] / E[tokens]).
The settings named `measured` are those of the demo's own 89 held-out documents (bench/results/demo-cpu-bf16.json). The
interval was chosen among a dozen in the first four worlds; the last two were not looked at before.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import numpy as np  # noqa: E402

from drawplate.evaluation.interval import perplexity_change  # noqa: E402
from drawplate.records import DocumentScore  # noqa: E402


@dataclass(frozen=True)
class World:
    """Where documents come from.

    Attributes:
        log_sigma: standard deviation of log length.
        gain: mean change of nats a token.
        slope: more of it for each standard deviation of log length.
        document_sd: spread between documents, however long.
        token_sd: spread of one token's change; a document's is less by sqrt(tokens).
    """

    log_sigma: float
    gain: float
    slope: float
    document_sd: float
    token_sd: float
    median_tokens: float = 120.0

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, change of nats) of each document."""
        z = rng.normal(size=count)
        tokens = np.maximum(np.round(self.median_tokens * np.exp(self.log_sigma * z)), 2)
        between = self.document_sd * rng.standard_t(5, size=count) / math.sqrt(5 / 3)
        within = self.token_sd * rng.normal(size=count) / np.sqrt(tokens)
        return tokens, tokens * (self.gain + self.slope * z + between + within)

    @property
    def truth_percent(self) -> float:
        """E[tokens z] / E[tokens] is log_sigma for a log-normal length."""
        return 100 * math.expm1(self.gain + self.slope * self.log_sigma)


WORLDS = {
    "measured": World(0.45, -0.454, 0.081, 0.0, 1.77),
    "no gain": World(0.45, 0.0, 0.0, 0.05, 1.77),
    "lengths over two orders of magnitude": World(1.0, -0.4, 0.05, 0.12, 1.5),
    "long documents gain far less": World(1.0, -0.4, 0.10, 0.12, 1.5),
    "long documents gain far more": World(1.0, -0.4, -0.10, 0.12, 1.5),
    "documents differ much": World(0.8, -0.3, 0.06, 0.30, 2.0),
}
COUNTS = (8, 20, 50, 100, 300)


def scores(tokens: np.ndarray, nats: np.ndarray) -> list[DocumentScore]:
    """Documents as they are measured."""
    return [
        DocumentScore(document=str(i), nats=float(x), tokens=int(t), bytes=4 * int(t))
        for i, (t, x) in enumerate(zip(tokens, nats, strict=True))
    ]


def percentile_interval(tokens: np.ndarray, change: np.ndarray, seed: int) -> tuple[float, float]:
    """The plain percentile bootstrap, for comparison."""
    draws = np.random.default_rng(seed).integers(0, len(tokens), (1000, len(tokens)))
    low, high = np.percentile(change[draws].sum(axis=1) / tokens[draws].sum(axis=1), [2.5, 97.5])
    return 100 * math.expm1(low), 100 * math.expm1(high)


def coverage(world: World, count: int, cases: int, *, percentile: bool = False) -> dict[str, Any]:
    """Shares of cases in percent in which the interval covers the truth, lies below it, lies above it."""
    rng, below, above, widths = np.random.default_rng(count), 0, 0, []
    old = 0
    for case in range(cases):
        tokens, change = world.draw(count, rng)
        after = 3.0 * tokens + change
        low, high = perplexity_change(scores(tokens, 3.0 * tokens), scores(tokens, after), seed=case).ci95_percent or (
            -math.inf,
            math.inf,
        )
        below += high < world.truth_percent
        above += low > world.truth_percent
        widths.append(high - low)
        if percentile:
            old_low, old_high = percentile_interval(tokens, change, case)
            old += old_low <= world.truth_percent <= old_high
    result = {
        "documents": count,
        "covered_percent": round(100 * (cases - below - above) / cases, 2),
        "below_percent": round(100 * below / cases, 2),
        "above_percent": round(100 * above / cases, 2),
        "median_width_percent_points": round(float(np.median(widths)), 3),
    }
    return result | ({"percentile_covered_percent": round(100 * old / cases, 2)} if percentile else {})


def main() -> None:
    """Every world with every number of documents; the file grows with each."""
    out, cases = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    results: list[dict[str, Any]] = []
    record = {
        "command": " ".join(["python", "bench/interval_coverage.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"platform": platform.platform()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cases": cases,
        "standard_error_of_a_share_percent_points": round(100 * math.sqrt(0.95 * 0.05 / cases), 2),
        "worlds": {name: asdict(world) | {"truth_percent": world.truth_percent} for name, world in WORLDS.items()},
        "results": results,
    }
    for name, world in WORLDS.items():
        for count in COUNTS:
            results.append({"world": name, **coverage(world, count, cases, percentile=True)})
            print(results[-1], flush=True)
            out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
