"""What the processes of a comparison answered -> an entry for each setting and case; speeds behind the gate only."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.peers.cases import REFERENCE, Job, Setting, parse_case
from bench.peers.gate import Curve, Verdict, judge

CURVE = "curve"
"""In a case's place: the gate's steps without dropout."""


class Answered(Protocol):
    """A process's answers, as bench/peers/process.py collects them: by case where there is one for each."""

    job: Job
    out: Path
    loaded: dict[str, Any]
    curve: dict[str, Any]
    warm: dict[str, dict[str, Any]]
    timed: dict[str, list[dict[str, Any]]]


def failed(answer: dict[str, Any]) -> str:
    """Why an answer is none; empty where it is one."""
    return str(answer.get("memory") or answer.get("error") or ("" if answer else "not run"))


def results_of(everyone: Sequence[Answered], yardstick: Setting) -> list[dict[str, Any]]:
    """An entry for each process and case that it was to be timed on, speeds only behind the gate.

    Args:
        everyone: who trained one model, the reference and the yardstick among them.
        yardstick: whose distance to the reference is allowed to all.
    """
    found = []
    for process in everyone:
        for case in process.job.timed:
            setting = process.job.setting
            entry = {
                "model": process.job.shape,
                "system": setting.system,
                "setting": setting.name,
                "dropout": setting.dropout,
                "budget_gib": setting.budget_gib,
                "case": case,
                "tokens": parse_case(case).tokens,
                **process.loaded,
            }
            entry.pop("trace", None)
            found.append({**entry, **_case_entry(process, case, everyone, yardstick)})
    return found


def _case_entry(process: Answered, case: str, everyone: Sequence[Answered], yardstick: Setting) -> dict[str, Any]:
    warm, timed = process.warm.get(case, {}), process.timed.get(case, [])
    problem = failed(process.loaded) or failed(warm)
    problem = problem or next(filter(None, map(failed, timed)), "") or ("" if timed else "not timed")
    if problem:
        fits = not any("memory" in answer for answer in [process.loaded, process.curve, warm, *timed])
        return {"refused": problem if fits else "does not fit into memory", "detail": problem}
    verdicts = [_verdict([process, *everyone], process.job.setting, yardstick, what) for what in (CURVE, case)]
    if None in verdicts:
        return {"refused": "the fp32 reference or the gate's steps did not run"}
    numbers = {
        "first_step_seconds": warm.get("first_step_seconds"),
        "first_loss": timed[0]["losses"][0],
        "last_loss": timed[0]["losses"][-1],
        "gradient_norm": timed[0]["gradient_norms"][0],
        "peak_reserved_bytes": max(a.get("peak_reserved_bytes", 0) for a in [warm, *timed]),
        "peak_allocated_bytes": max(a.get("peak_allocated_bytes", 0) for a in [warm, *timed]),
        "process_device_bytes": max((a.get("process_device_bytes") or 0 for a in timed), default=0) or None,
        **({"decided": warm["decided"]} if "decided" in warm else {}),
    }
    reasons = [verdict.reason for verdict in verdicts if verdict and verdict.reason]
    gate = {name: v and dataclasses.asdict(v) for name, v in zip(("gate", "gate_of_case"), verdicts, strict=True)}
    if reason := next(iter(reasons), ""):
        return {"refused": f"gate: {reason}", **numbers, **gate}
    seconds = [s for answer in timed for s in answer["step_seconds"]]
    speed = parse_case(case).tokens / statistics.median(seconds)
    rounds = [[round(s, 5) for s in answer["step_seconds"]] for answer in timed]
    return {"tokens_per_second": round(speed, 1), "step_seconds": rounds, **numbers, **gate}


def _verdict(everyone: Sequence[Answered], setting: Setting, yardstick: Setting, what: str) -> Verdict | None:
    reference = _proof(everyone, REFERENCE, what)
    own = reference and _proof(everyone, setting, what, reference)
    if not (reference and own):
        return None
    allowed = _proof(everyone, yardstick, what, reference)
    return judge(own.curve, reference.curve, allowed and allowed.curve)


@dataclasses.dataclass(frozen=True)
class _Proof:
    """A setting's steps on something, and where its first gradient lies."""

    curve: Curve
    gradient: Path


def _proof(everyone: Sequence[Answered], setting: Setting, what: str, reference: _Proof | None = None) -> _Proof | None:
    """By the first process of a setting that took the gate's steps, or a first step of the case.

    A case may stand for another of the same documents, where a system cannot run that (packed against padded).
    """
    for process in (p for p in everyone if p.job.setting == setting):
        name = what if what == CURVE else next(iter(_same_documents(process, what)), what)
        answer, kept = (process.curve, None) if what == CURVE else (process.warm.get(name, {}), 1)
        if failed(answer):
            continue
        gradient = process.out / f"gradient-{name}.safetensors"
        error = gradient_error(gradient, reference.gradient) if reference else 0.0
        return _Proof(
            Curve(losses=answer["losses"][:kept], gradient_norms=answer["gradient_norms"][:kept], gradient_error=error),
            gradient,
        )
    return None


def _same_documents(process: Answered, case: str) -> list[str]:
    """The case itself, if the process ran it, then others of its documents."""

    def lengths(name: str) -> list[int]:
        return sorted(sum(parse_case(name).micro_batches, ()))

    same = [name for name, answer in process.warm.items() if not failed(answer) and lengths(name) == lengths(case)]
    return sorted(same, key=lambda name: name != case)


@functools.cache
def gradient_error(own_path: Path, true_path: Path) -> float | None:
    """|g - reference| / |reference| over all trained tensors; None where either was not written."""
    import numpy as np
    from safetensors.numpy import load_file

    if not (own_path.is_file() and true_path.is_file()):
        return None
    own, true = load_file(own_path), load_file(true_path)
    distance = sum(float(np.sum((own[key] - true[key]).astype(np.float64) ** 2)) for key in true)
    return float((distance / sum(float(np.sum(true[key].astype(np.float64) ** 2)) for key in true)) ** 0.5)
