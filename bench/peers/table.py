"""Results of bench/compare.py as Markdown tables. Formats, never computes more than a ratio. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

GIB = 2**30


def table(record: dict[str, Any]) -> str:
    """Every result of a record: a table for each model, refusals beneath it."""
    parts = []
    for model in dict.fromkeys(r["model"] for r in record["results"]):
        layers = f", {record['layers']} layers" if record.get("layers") else ""
        results = [r for r in record["results"] if r["model"] == model]
        parts.append(f"### {model}{layers}, {record['machine'].get('gpu') or 'CPU'}\n\n{_rows(results)}")
        refused = [f"- {_label(r)}, {r['case']}: {_one_line(r['refused'])}" for r in results if "refused" in r]
        if refused:
            parts.append("\n".join(refused))
    return "\n\n".join(parts)


def _rows(results: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| system | setting | dropout | case | tokens/s | GiB (process) | first step s | loss | nats off (allowed) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        if "refused" in r:
            continue
        process = r.get("process_device_bytes")
        cells = [
            r["system"],
            _setting(r),
            f"{r['dropout']:g}",
            r["case"],
            f"{r['tokens_per_second']:,.0f}",
            f"{r['peak_reserved_bytes'] / GIB:.2f} ({process / GIB:.2f})"
            if process
            else f"{r['peak_reserved_bytes'] / GIB:.2f}",
            f"{r['first_step_seconds']:.0f}" if r["first_step_seconds"] else "-",
            f"{r['first_loss']:.3f} -> {r['last_loss']:.3f}",
            f"{r['gate']['difference']:.4f} ({r['gate']['allowed']:.4f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_within(results: Iterable[dict[str, Any]], case: str, budget_gib: float | None) -> dict[str, dict[str, Any]]:
    """Each system's fastest result of a case whose process held no more than the budget (None: any)."""
    best: dict[str, dict[str, Any]] = {}
    for r in results:
        held = r.get("process_device_bytes") or r.get("peak_reserved_bytes", 0)
        fits = budget_gib is None or held <= budget_gib * GIB
        if r["case"] != case or "tokens_per_second" not in r or not fits:
            continue
        if r["system"] not in best or r["tokens_per_second"] > best[r["system"]]["tokens_per_second"]:
            best[r["system"]] = r
    return best


def is_fp8(result: dict[str, Any]) -> bool:
    """Whether Drawplate multiplied in fp8."""
    return result["system"] == "drawplate" and "fp8" in result["setting"]


def _setting(result: dict[str, Any]) -> str:
    budget = f", {result['budget_gib']:g} GiB cap" if result["budget_gib"] else ""
    decided = result.get("decided", {})
    kept = f", {decided['kept_layers']} layers kept" if "kept_layers" in decided else ""
    on_host = f", {decided['host_kept_layers']} on the host" if decided.get("host_kept_layers") else ""
    return result["setting"] + budget + kept + on_host


def _label(result: dict[str, Any]) -> str:
    return f"{result['system']}: {_setting(result)}, dropout {result['dropout']:g}"


def _one_line(text: str) -> str:
    return " ".join(str(text).split())[:300]
