"""What the processes of a comparison answered -> an entry for each setting and case; speeds behind the gate only."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.peers.cases import Setting, parse_case
from bench.peers.gate import Curve, Verdict, judge


class Answered(Protocol):
    """A setting's answers, as bench/compare.py collects them: by case where there is one for each."""

    setting: Setting
    out: Path
    loaded: dict[str, Any]
    curve: dict[str, Any]
    warm: dict[str, dict[str, Any]]
    timed: dict[str, list[dict[str, Any]]]


def failed(answer: dict[str, Any]) -> str:
    """Why an answer is none; empty where it is one."""
    return str(answer.get("memory") or answer.get("error") or ("" if answer else "not run"))


def results_of(cases: Sequence[str], everyone: Sequence[Answered], yardstick: Setting) -> list[dict[str, Any]]:
    """An entry for each setting and case, speeds only behind the gate; the first of `everyone` is the reference."""
    reference = everyone[0]
    mission = next((p for p in everyone if p.setting == yardstick), None)
    found = []
    for process in everyone[1:]:
        for case in cases:
            entry = {
                "system": process.setting.system,
                "setting": process.setting.name,
                "dropout": process.setting.dropout,
                "budget_gib": process.setting.budget_gib,
                "case": case,
                "tokens": parse_case(case).tokens,
                **process.loaded,
            }
            entry.pop("trace", None)
            entry.update(_case_entry(process, case, reference, mission))
            found.append(entry)
    return found


def _case_entry(process: Answered, case: str, reference: Answered, mission: Answered | None) -> dict[str, Any]:
    warm, timed = process.warm.get(case, {}), process.timed.get(case, [])
    problem = failed(process.loaded) or failed(process.curve) or failed(warm)
    problem = problem or next(filter(None, map(failed, timed)), "") or ("" if timed else "not timed")
    if problem:
        fits = not any("memory" in answer for answer in [process.loaded, process.curve, warm, *timed])
        return {"refused": problem if fits else "does not fit into memory", "detail": problem}
    if not reference.curve.get("losses") or not reference.warm.get(case, {}).get("losses"):
        return {"refused": "the fp32 reference did not run", "detail": failed(reference.curve)}
    whole = _verdict(process, reference, mission, lambda p: p.curve, "curve")
    here = _verdict(process, reference, mission, lambda p: _first_step(p, case), case)
    gate = {"gate": dataclasses.asdict(whole), "gate_of_case": dataclasses.asdict(here)}
    numbers = {
        "first_step_seconds": process.curve.get("first_step_seconds"),
        "first_loss": timed[0]["losses"][0],
        "last_loss": timed[0]["losses"][-1],
        "gradient_norm": timed[0]["gradient_norms"][0],
        "peak_reserved_bytes": max(a.get("peak_reserved_bytes", 0) for a in [warm, *timed]),
        "peak_allocated_bytes": max(a.get("peak_allocated_bytes", 0) for a in [warm, *timed]),
        "process_device_bytes": max((a.get("process_device_bytes") or 0 for a in timed), default=0) or None,
        **({"decided": warm["decided"]} if "decided" in warm else {}),
    }
    reason = whole.reason or here.reason
    if reason:
        return {"refused": f"gate: {reason}", **numbers, **gate}
    seconds = [s for answer in timed for s in answer["step_seconds"]]
    speed = parse_case(case).tokens / statistics.median(seconds)
    rounds = [[round(s, 5) for s in answer["step_seconds"]] for answer in timed]
    return {"tokens_per_second": round(speed, 1), "step_seconds": rounds, **numbers, **gate}


def _first_step(process: Answered, case: str) -> dict[str, Any]:
    """Of a case; of another one with the same documents where the process cannot run this (packed against padded)."""
    same = sorted(n for lengths in parse_case(case).micro_batches for n in lengths)
    for other in sorted(process.warm, key=lambda name: name != case):
        answer = process.warm[other]
        if not failed(answer) and sorted(n for ns in parse_case(other).micro_batches for n in ns) == same:
            return {key: value[:1] for key, value in answer.items() if key in ("losses", "gradient_norms")}
    return {}


def _verdict(
    process: Answered,
    reference: Answered,
    mission: Answered | None,
    answer_of: Callable[[Answered], dict[str, Any]],
    gradient: str,
) -> Verdict:
    def curve_of(one: Answered) -> Curve:
        answer = answer_of(one)
        return Curve(
            losses=answer.get("losses", []),
            gradient_norms=answer.get("gradient_norms", []),
            gradient_error=gradient_error(one.out, reference.out, gradient),
        )

    yardstick = curve_of(mission) if mission is not None and answer_of(mission).get("losses") else None
    return judge(curve_of(process), curve_of(reference), yardstick)


def gradient_error(folder: Path, reference: Path, name: str) -> float | None:
    """|g - reference| / |reference| over all trained tensors; None where either was not written."""
    import numpy as np
    from safetensors.numpy import load_file

    paths = [at / f"gradient-{name}.safetensors" for at in (folder, reference)]
    if not all(path.is_file() for path in paths):
        return None
    own, true = map(load_file, paths)
    distance = sum(float(np.sum((own[key] - true[key]).astype(np.float64) ** 2)) for key in true)
    return float((distance / sum(float(np.sum(true[key].astype(np.float64) ** 2)) for key in true)) ** 0.5)
