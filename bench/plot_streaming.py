"""The law of T*: tokens per second and peak memory against micro-batch tokens, from bench/results/sweep-*.json.

python bench/plot_streaming.py docs/pictures/streaming.png        (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"sweep-3b-h100.json": "Llama-3.2 3B shape", "sweep-8b-h100.json": "Llama-3.1 8B shape"}


def micro_batch_tokens(case: str) -> int:
    """`3b:nf4:host:offload:2x2048:head=8192` -> 4096."""
    rows, length = case.split(":")[4].split("x")
    return int(rows) * int(length)


def main() -> None:
    """Draw one picture with two panels."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.6))
    for (file, name), colour in zip(NAMES.items(), ("#2a6fb0", "#b8460e"), strict=True):
        results = json.loads((RESULTS / file).read_text())["results"]
        tokens = [micro_batch_tokens(r["case"]) for r in results]
        speed.plot(tokens, [r["tokens_per_second"] for r in results], "o-", color=colour, label=name)
        memory.plot(tokens, [r["peak_reserved_bytes"] / 2**30 for r in results], "o-", color=colour, label=name)
    for axes, title in ((speed, "tokens per second"), (memory, "peak reserved, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([512, 1024, 2048, 4096, 8192, 16384], ["512", "1k", "2k", "4k", "8k", "16k"])
        axes.set_xlabel("tokens in a micro-batch")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=130)


if __name__ == "__main__":
    main()
