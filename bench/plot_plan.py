"""Predicted against measured peaks of device and host, from bench/results/plan-accuracy-*.json.

python bench/plot_plan.py docs/pictures/plan.png        (needs matplotlib)

The upper panels are the peaks themselves; the lower ones how far each prediction was off, the goals in grey.
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
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
from bench.plan_accuracy import device_peak, errors  # noqa: E402 - the repository is not installed

RESULTS = Path(__file__).resolve().parent / "results"
KNOWN, NEW = "H100, known while the ledger was made", "H200, new to it"
FILES = {
    "plan-accuracy-h100.json": KNOWN,
    "plan-accuracy-new-h100.json": KNOWN,
    "plan-accuracy-unseen-h100.json": KNOWN,
    "plan-accuracy-later-h100.json": KNOWN,
    "plan-accuracy-h200.json": NEW,
}
PLACES = {"device": (-1, 3), "host": (-5, 5)}
"""How far a prediction may be off, in percent."""
COLOURS = {KNOWN: "#2a6fb0", NEW: "#b8460e"}


def points(files: list[tuple[dict[str, Any], str]], place: str) -> dict[str, list[tuple[float, float, float]]]:
    """(measured GiB, predicted GiB, percent off) of each run, by whether the ledger was made with it at hand."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COLOURS}
    for stored, name, result in [(file, name, result) for file, name in files for result in file["results"]]:
        if result["error"]:
            continue
        measured = {
            "device": device_peak(result["measured"], stored["around"]),
            "host": result["measured"]["host_peak"],
        }
        off = dict(zip(("device", "host"), errors(result, stored["around"]), strict=True))
        found[name].append((measured[place] / 2**30, result["predicted"][place] / 2**30, off[place]))
    return found


def main() -> None:
    """Draw one picture with two panels for each place."""
    files = [(json.loads((RESULTS / file).read_text()), name) for file, name in FILES.items()]
    figure, panels = plt.subplots(2, 2, figsize=(9, 5.2), height_ratios=(3, 2), sharex="col")
    for (upper, lower), (place, (low, high)) in zip(panels.T, PLACES.items(), strict=True):
        for name, runs in points(files, place).items():
            measured, predicted, off = zip(*runs, strict=True) if runs else ((), (), ())
            upper.plot(measured, predicted, "o", color=COLOURS[name], markersize=4, label=name)
            lower.plot(measured, off, "o", color=COLOURS[name], markersize=4)
        ends = [max(upper.get_xlim()[0], 0.9), upper.get_xlim()[1]]
        upper.plot(ends, ends, color="#777777", linewidth=1, zorder=0)
        lower.axhspan(low, high, color="#dddddd", zorder=0)
        upper.set_title(f"{place}: predicted GiB", loc="left", fontsize=11)
        lower.set_title("predicted too high by, %", loc="left", fontsize=11)
        lower.set_xlabel("measured GiB")
        for axes in (upper, lower):
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        upper.set_yscale("log", base=2)
        for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "pictures" / "plan.png", dpi=130)


if __name__ == "__main__":
    main()
