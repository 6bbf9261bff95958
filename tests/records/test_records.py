from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.records import (
    DataFacts,
    Evaluation,
    EvaluationFacts,
    EvaluationPoint,
    LedgerLine,
    Machine,
    MemoryFacts,
    MemoryPoint,
    MemorySample,
    ModelFacts,
    Plan,
    RunRecord,
    StepRecord,
    TrainingFacts,
    from_json,
    to_json,
)

BEFORE = Evaluation(nats=3000.0, tokens=1000, bytes=4000)
AFTER = Evaluation(nats=2700.0, tokens=1000, bytes=4000)


def a_plan() -> Plan:
    return Plan(
        device="cpu",
        precision="nf4",
        double_quant=True,
        compute_dtype="bfloat16",
        weights="device",
        activations="keep",
        compiled=False,
        packing=True,
        max_length=512,
        micro_batch_sequences=1,
        micro_batch_tokens=512,
        effective_batch_size=16,
        gradient_accumulation_steps=16,
        optimizer_steps=7,
        epochs=1.0,
        learning_rate=5e-4,
        eval_batch_sequences=2,
        reasons={"precision": "fits"},
        warnings=("one", "two"),
        ledger=(
            LedgerLine(name="weights", where="device", bytes=100, formula="P / 2"),
            LedgerLine(name="adapter", where="device", bytes=7, formula="4 A"),
            LedgerLine(name="tokens", where="host", bytes=50, formula="4 T"),
        ),
    )


def a_record() -> RunRecord:
    return RunRecord(
        drawplate="0.1.0",
        status="finished",
        model=ModelFacts(name="m", revision=None, parameters=10, precision="nf4", sha256="ab"),
        data=DataFacts(
            files=1,
            documents=10,
            train_documents=9,
            heldout_documents=1,
            train_tokens=90,
            heldout_tokens=10,
            heldout_bytes=40,
            dropped_tokens=0,
            duplicate_documents=0,
        ),
        evaluation=EvaluationFacts(
            baseline=BEFORE, final=AFTER, perplexity_change_percent=-25.9, change_ci95_percent=(-30.0, -20.0)
        ),
        training=TrainingFacts(
            optimizer_steps=7,
            epochs=1.0,
            tokens=90,
            tokens_per_optimizer_step=12.9,
            seconds=2.0,
            tokens_per_second=45.0,
            micro_batch_tokens=512,
            gradient_accumulation_steps=16,
            first_loss=3.1,
            last_loss=None,
        ),
        memory=MemoryFacts(
            device_peak_predicted_bytes=1, device_peak_bytes=2, host_peak_predicted_bytes=3, host_peak_bytes=4
        ),
        machine=Machine(platform="p", python="3.11", cpu="c", cores=2, ram_bytes=5, bf16_native=False),
        versions={"torch": "2.13.0"},
        plan=a_plan(),
        recipe={"model": {"name_or_path": "m"}},
        steps=(
            StepRecord(
                step=1,
                epoch=0.1,
                loss=3.0,
                learning_rate=1e-4,
                grad_norm=1.0,
                tokens=20,
                counted_tokens=18,
                seconds=0.5,
            ),
        ),
        evaluations=(EvaluationPoint(step=0, result=BEFORE),),
        memory_curve=(
            MemoryPoint(step=1, phase="train", seconds=1.0, sample=MemorySample(process_bytes=1, process_peak_bytes=2)),
        ),
    )


def test_a_whole_run_survives_json():
    text = json.dumps(to_json(a_record()), allow_nan=False)
    assert from_json(RunRecord, json.loads(text)) == a_record()


def test_the_contracts_fields_are_all_written():
    values = to_json(a_record())
    assert values["schema"] == 1
    for section, keys in {
        "model": {"name", "revision", "parameters", "precision", "sha256"},
        "data": {
            "files",
            "documents",
            "train_documents",
            "heldout_documents",
            "train_tokens",
            "heldout_tokens",
            "heldout_bytes",
            "dropped_tokens",
            "duplicate_documents",
        },
        "evaluation": {
            "baseline",
            "final",
            "unquantized_baseline",
            "perplexity_change_percent",
            "change_ci95_percent",
        },
        "training": {
            "optimizer_steps",
            "epochs",
            "tokens",
            "tokens_per_optimizer_step",
            "seconds",
            "tokens_per_second",
            "micro_batch_tokens",
            "gradient_accumulation_steps",
            "first_loss",
            "last_loss",
        },
        "memory": {
            "device_peak_predicted_bytes",
            "device_peak_bytes",
            "host_peak_predicted_bytes",
            "host_peak_bytes",
        },
    }.items():
        assert keys <= values[section].keys()
    assert {"nats", "tokens", "bytes", "loss", "perplexity", "bits_per_byte"} == values["evaluation"]["final"].keys()


def test_what_a_newer_version_added_is_left_out():
    values = to_json(a_record()) | {"from_the_future": 1}
    assert from_json(RunRecord, values) == a_record()


def test_a_missing_field_is_refused():
    values = to_json(BEFORE)
    del values["tokens"]
    with pytest.raises(TypeError, match="tokens"):
        from_json(Evaluation, values)


def test_ratios_come_from_sums():
    assert BEFORE.loss == 3.0
    assert BEFORE.perplexity == pytest.approx(math.exp(3.0))
    assert BEFORE.bits_per_byte == pytest.approx(3000 / math.log(2) / 4000)


def test_a_hopeless_model_has_infinite_perplexity_and_still_valid_json():
    hopeless = Evaluation(nats=1e6, tokens=1, bytes=1)
    assert hopeless.perplexity == math.inf
    assert json.loads(json.dumps(to_json(hopeless), allow_nan=False))["perplexity"] == "inf"


def test_throughput_of_a_step_without_time_is_zero_not_an_error():
    step = StepRecord(step=1, epoch=0, loss=1, learning_rate=1, grad_norm=1, tokens=5, counted_tokens=5, seconds=0.0)
    assert step.tokens_per_second == 0.0


def test_a_ledger_is_summed_by_place():
    plan = a_plan()
    assert (plan.predicted_bytes("device"), plan.predicted_bytes("host"), plan.predicted_bytes("disk")) == (107, 50, 0)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e9), st.integers(1, 10**9))
def test_any_evaluation_survives_json_exactly(nats, tokens):
    result = Evaluation(nats=nats, tokens=tokens, bytes=tokens * 4)
    assert from_json(Evaluation, json.loads(json.dumps(to_json(result)))) == result
