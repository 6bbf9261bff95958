"""Whether the unquantized base model is measured, before training and after it with the adapter, and what that holds.

It runs alone, before the quantized model is loaded and after it is released, so it costs time and never adds to the
peak of training: on a GPU its layers are streamed from the host and only a ring of two is on the device; on a CPU they
are all in memory. Left to `auto` it is done where that takes no more of the device than the run does anyway, and no
more of the host than there is.

All held-out documents are measured where that is a matter of seconds, else a sample of whole ones: of as many tokens as
`MOST_WORK` allows for a model of that size, and of `SAMPLE_TOKENS` in any case.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.host import CONTEXT, CONTEXT_OF_KERNELS, OF_THE_PROCESS
from drawplate.planner.bytes.ledger import Ledger
from drawplate.planner.bytes.sketch import kept_bytes_per_token_and_layer
from drawplate.planner.shape import ModelShape
from drawplate.recipe import Auto
from drawplate.records import LedgerLine, PhaseLedger, Plan
from drawplate.units import MIB, format_bytes, format_count

PHASE = "unquantized baseline"
DEPLOYED_PHASE = "unquantized with adapter"
PLAIN_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SAMPLE_TOKENS = {"cpu": 4096, "cuda": 65_536}
MOST_WORK = {"cpu": 2e12, "cuda": 5e14}
"""Tokens x parameters of one measurement: some 20 s on two cores with bf16 or through a GPU's bus, a minute in fp32."""
CALIBRATION_TOKENS = {"cpu": 2048, "cuda": 16_384}
HEAD_ROWS = 8192
USUALLY_STORED = "bfloat16"
"""The type in which most base models are stored; into another one a tensor is turned while it is read."""
_SHARED = (CONTEXT, *CONTEXT_OF_KERNELS, *OF_THE_PROCESS)
_KEY, _START_KEY, _DEPLOYED_KEY = "quantization_tax", "starts_from_error", "measures_deployed"


def plan_quantization_tax(
    plan: Plan,
    model: ModelShape,
    *,
    asked: Literal[True, False] | Auto,
    stored_precision: str | None,
    host_room_bytes: int,
    starts_adapter: bool = False,
) -> Plan:
    """The plan, with the decision, its reason and, if it is yes, the phase's lines in the ledger.

    Args:
        plan: for the run without it.
        model: the base model's numbers.
        asked: evaluation.quantization_tax.
        stored_precision: what the checkpoint itself is quantized to, None where it is not.
        host_room_bytes: what the process may still take of the host.
        starts_adapter: the adapter's start is made of what quantization loses, while the weights are at hand.
    """
    if plan.precision in PLAIN_PRECISION.values():
        return plan
    starts, reasons = starts_adapter, dict(plan.reasons)
    phase = _before(plan, model, starts)
    why_not = _why_not(plan, phase, asked, stored_precision, host_room_bytes)
    if starts:
        reasons[_START_KEY] = f"from zero: {why_not}" if why_not else f"from what {plan.precision} loses of the weights"
    if why_not and starts:  # measuring alone may still fit
        starts, phase = False, _before(plan, model, False)
        why_not = _why_not(plan, phase, asked, stored_precision, host_room_bytes)
    if why_not:
        return replace(plan, reasons={**reasons, _KEY: f"not measured: {why_not}"})
    name, tokens = PLAIN_PRECISION[plan.compute_dtype], sample_tokens(plan.device, model.parameters)
    how = "streamed from the host" if plan.device == "cuda" else "before the quantized one is loaded"
    reasons[_KEY] = f"the base model in {name}, {how}, on up to {format_count(tokens)} held-out tokens"
    after = _after(plan, model, starts)
    why_not = _why_not(plan, after, asked, stored_precision, host_room_bytes)
    last = "at the end, with the adapter that is for it, on the same documents"
    reasons[_DEPLOYED_KEY] = f"not measured: {why_not}" if why_not else last
    phases = (*plan.phases, phase, *(() if why_not else (after,)))
    return replace(
        plan,
        quantization_tax=True,
        starts_from_error=starts,
        measures_deployed=not why_not,
        phases=phases,
        ledger=Ledger(phases=phases).lines if plan.phases else plan.ledger,
        reasons=reasons,
    )


def sample_tokens(device: str, parameters: int) -> int:
    """Tokens of held-out documents, at most, on which a model of this size is measured unquantized."""
    return max(SAMPLE_TOKENS[device], int(MOST_WORK[device] / parameters))


def _why_not(
    plan: Plan, phase: PhaseLedger, asked: bool | Auto, stored_precision: str | None, host_room_bytes: int
) -> str:
    if asked is False:
        return "evaluation.quantization_tax is off"
    if stored_precision:
        return "the checkpoint itself is quantized, so there are no unquantized weights"
    if asked is True:
        return ""
    on_device, planned = phase.bytes("device"), plan.predicted_bytes("device")
    if on_device > planned:
        return f"it would take {format_bytes(on_device)} of the device, more than the run's {format_bytes(planned)}"
    process = sum(line.bytes for line in phase.lines if line.name in _SHARED and line.where == "host")
    needed, room = phase.bytes("host") - process, host_room_bytes
    if plan.device == "cpu":
        room = min(room, plan.predicted_bytes("host") - process)
    if needed > room:
        return f"the unquantized model would take {format_bytes(needed)} of the host, where {format_bytes(room)} may go"
    return ""


_MOVING = (
    "layer being computed",
    "layer inputs kept",
    "loss",
    "the norm after the last layer",
    "batch and what layers share",
)


Bytes = tuple[str, str, int, str]
"""Name, place, bytes and formula of a line."""


def _before(plan: Plan, model: ModelShape, starts_adapter: bool) -> PhaseLedger:
    rows = _model_bytes(plan, model)
    if starts_adapter:
        one = model.hidden * max(model.intermediate, model.attention_width)
        rows.append(("error of one weight", "device", 8 * one, "8 bytes x hidden x widest"))
        rows.append(("adapter's start", "host", 4 * model.trained_parameters, "trained parameters x 4 bytes"))
    return _phase(PHASE, plan, rows)


def _after(plan: Plan, model: ModelShape, started: bool) -> PhaseLedger:
    """An adapter that started from the error is, without its start, one of twice the rank (model/load/lora_init.py)."""
    ranks = 2 if started else 1
    size, formula = 4 * ranks * model.trained_parameters, f"{ranks} x trained parameters x 4 bytes"
    rows = [*_model_bytes(plan, model), ("adapter", plan.adapter, size, formula)]
    return _phase(DEPLOYED_PHASE, plan, [*rows, ("adapter as read back", "host", size, formula)])


def _model_bytes(plan: Plan, model: ModelShape) -> list[Bytes]:
    size, on_cpu = DTYPE_BYTES[plan.compute_dtype], plan.device == "cpu"
    layers, layer = model.linear_parameters * size, model.linear_parameters // model.layers * size
    tokens = window_tokens(plan)
    rows: list[Bytes] = [
        ("unquantized layers", "host", layers, f"parameters x {size} bytes"),
        ("embedding, head and norms", "host", model.outside_parameters * size, f"parameters x {size} bytes"),
    ]
    if not on_cpu and plan.compute_dtype != USUALLY_STORED:  # else it is copied out of the file as it is
        rows.append(("a tensor on its way", "host", model.vocab * model.hidden * size, "vocabulary x hidden x bytes"))
    if not on_cpu:
        head = 2 * min(HEAD_ROWS, model.vocab) * model.hidden * size
        rows.append(("ring slots", "device", 2 * layer, "2 x largest layer"))
        rows.append(
            ("slots of the head", "device", head, f"2 x {format_count(HEAD_ROWS)} rows x hidden x {size} bytes")
        )
    baseline = next((phase for phase in plan.phases if phase.phase == "baseline evaluation"), None)
    if baseline is None:
        kept = kept_bytes_per_token_and_layer(model, size) * tokens
        workspace = (32 if on_cpu else 256) * MIB + tokens * model.hidden * 8
        rows.append(("one layer evaluated", "device", kept, "tokens x kept bytes"))
        rows.append(("loss workspace", "device", workspace, "a tile of logits and 8 bytes x tokens x hidden"))
    else:  # what comes and goes is that of the quantized model's own evaluation, or less
        moving = [line for line in baseline.lines if line.name in _MOVING]
        rows += [(line.name, "device", line.bytes, line.formula) for line in moving]
    return rows


def _phase(name: str, plan: Plan, rows: list[Bytes]) -> PhaseLedger:
    own = tuple(
        LedgerLine(name=n, where="host" if plan.device == "cpu" else where, bytes=count, formula=formula)  # type: ignore[arg-type]
        for n, where, count, formula in rows
    )
    when = "final evaluation" if name == DEPLOYED_PHASE else "baseline evaluation"
    held = next((phase.lines for phase in plan.phases if phase.phase == when), plan.ledger)  # its kernels have run
    return PhaseLedger(phase=name, lines=own + tuple(line for line in held if line.name in _SHARED))


def window_tokens(plan: Plan) -> int:
    """Tokens of its micro-batches: a window on a GPU, where memory is dear; a training micro-batch on a CPU."""
    return plan.micro_batch_tokens if plan.device == "cpu" else min(plan.max_length, plan.micro_batch_tokens)
