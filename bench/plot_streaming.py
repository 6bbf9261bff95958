"""The law of T*: speed and peak memory against micro-batch tokens, from bench/results/sweep-*.json.

python bench/plot_streaming.py docs/pictures/streaming.png        (needs matplotlib)

Speed is drawn as a share of each shape's best, because the law says that it depends on the tokens alone. T* is computed
from the rates that the planner measured (bench/results/plan-choice-3b-h100.json). Hollow points dequantize weight by
weight, the others a layer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "sweep-3b*-h100.json": ("Llama-3.2 3B", "#2a6fb0"),
    "sweep-8b*-h100.json": ("Llama-3.1 8B", "#b8460e"),
    "sweep-70b*-h100.json": ("Llama-3 70B", "#3b7d3a"),
}
NF4_BYTES = 0.516
"""A weight with double quantization: 4 bits, a scale of 8 bits to 64 weights, one of 32 bits to 256 of those."""


def micro_batch_tokens(case: str) -> int:
    """`3b:nf4:host:offload:2x2048:head=8192` -> 4096."""
    rows, length = case.split(":")[4].split("x")
    return int(rows) * int(length)


def least_free_tokens() -> float:
    """T* = bytes per weight x FLOP/s / (2 x bytes per second of the bus)."""
    speed = json.loads((RESULTS / "plan-choice-3b-h100.json").read_text())["speed"]
    flops = max(rate for _, rate in speed["product_rates"])
    return float(NF4_BYTES * flops / (2 * speed["to_device_rate"]))


def main() -> None:
    """Draw one picture with two panels."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.6))
    for file, (name, colour) in NAMES.items():
        by_tokens: dict[int, dict[str, Any]] = {}
        for path in sorted(RESULTS.glob(file), reverse=True):  # a later file adds sizes that the first lacks
            for r in json.loads(path.read_text())["results"]:
                if "tokens_per_second" in r:
                    by_tokens.setdefault(micro_batch_tokens(r["case"]), r)
        tokens = sorted(by_tokens)
        rows = [by_tokens[count] for count in tokens]
        best = max(r["tokens_per_second"] for r in rows)
        label = f"{name}, best {best:,.0f} tokens/s"
        shares = [100 * r["tokens_per_second"] / best for r in rows]
        peaks = [r["peak_reserved_bytes"] / 2**30 for r in rows]
        by_weight = [i for i, r in enumerate(rows) if "dequantize=product" in r["case"]]
        for axes, values in ((speed, shares), (memory, peaks)):
            axes.plot(tokens, values, "o-", color=colour, label=label)
            hollow = [values[i] for i in by_weight]
            axes.plot([tokens[i] for i in by_weight], hollow, "o", color=colour, markerfacecolor="white")
    free = least_free_tokens()
    speed.axvline(free, color="#777777", linestyle="--", linewidth=1)
    speed.annotate(
        f"T* = {free:,.0f}", (free, 4), xytext=(4, 0), textcoords="offset points", color="#555555", fontsize=9
    )
    for axes, title in ((speed, "speed, % of the best"), (memory, "peak reserved, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([512, 1024, 2048, 4096, 8192, 16384], ["512", "1k", "2k", "4k", "8k", "16k"])
        axes.set_xlabel("tokens in a micro-batch")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*memory.get_legend_handles_labels(), frameon=False, fontsize=9, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(sys.argv[1], dpi=130)


if __name__ == "__main__":
    main()
