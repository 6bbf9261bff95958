"""Tokens per second against peak GiB, every system, from results of bench/compare.py; and docs/benchmark.md's tables.

python bench/plot_compare.py docs/pictures/compare.png          (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from bench.peers.goals import DOCUMENT, GPU_RESULTS, blocks, filled  # noqa: E402
from bench.peers.table import GIB, is_fp8  # noqa: E402

LOOKS = {
    "drawplate": ("#2a6fb0", "o", "Drawplate"),
    "drawplate fp8": ("#2a6fb0", "*", "Drawplate, fp8"),
    "unsloth": ("#b8460e", "s", "Unsloth"),
    "liger": ("#6b8e23", "^", "transformers + PEFT + Liger"),
    "trl": ("#8a63a8", "v", "TRL SFTTrainer + Liger"),
    "mission": ("#777777", "D", "transformers + PEFT"),
}


def look_of(result: dict[str, Any]) -> str:
    """The key of LOOKS."""
    return "drawplate fp8" if is_fp8(result) else str(result["system"])


def panel(axes: Any, results: list[dict[str, Any]], title: str) -> None:
    """One model and case; hollow markers are runs without dropout."""
    for look, (colour, marker, _) in LOOKS.items():
        for r in results:
            if look_of(r) != look or "tokens_per_second" not in r:
                continue
            axes.plot(
                r["peak_reserved_bytes"] / GIB,
                r["tokens_per_second"],
                marker,
                color=colour,
                markerfacecolor=colour if r["dropout"] else "white",
                markersize=11 if marker == "*" else 7,
            )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_xlim(3, 96)
    axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axes.set_ylim(0, 1.1 * max(r["tokens_per_second"] for r in results if "tokens_per_second" in r))
    axes.set_xlabel("peak reserved, GiB")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def systems_in(results: list[dict[str, Any]], case: str) -> int:
    """How many systems have a speed in a case."""
    return len({r["system"] for r in results if r["case"] == case and "tokens_per_second" in r})


def by_model(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Model -> all its results."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in (r for record in records for r in record["results"]):
        found.setdefault(result["model"], []).append(result)
    return found


def main() -> None:
    """Draw one picture, and write the tables into the document."""
    picture, records = Path(sys.argv[1]), [json.loads(path.read_text(encoding="utf-8")) for path in GPU_RESULTS]
    models = by_model(records)
    panels = [(model, case) for model, results in models.items() for case in dict.fromkeys(r["case"] for r in results)]
    panels = [(model, case) for model, case in panels if "x" in case and systems_in(models[model], case) > 1]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 2, 3.5 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (model, case) in zip(grid.flat, panels, strict=False):
        panel(axes, [r for r in models[model] if r["case"] == case], f"{model}, {case.replace('x', ' x ')} tokens")
    for axes in grid[:, 0]:
        axes.set_ylabel("tokens per second")
    shown = {look_of(r) for model, case in panels for r in models[model] if r["case"] == case}
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=colour, label=name)
        for look, (colour, marker, name) in LOOKS.items()
        if look in shown
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(picture, dpi=120)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), blocks(records)), encoding="utf-8")


if __name__ == "__main__":
    main()
