"""Run records as the report meets them: a whole run on a CPU, one on a GPU, and one that is nothing but a failure."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from drawplate.records import (
    AdapterFacts,
    DataFacts,
    DataLedger,
    DocumentChange,
    Evaluation,
    EvaluationFacts,
    EvaluationPoint,
    LeakReport,
    LedgerLine,
    Machine,
    MemoryFacts,
    MemoryPoint,
    MemorySample,
    ModelFacts,
    Plan,
    RunRecord,
    StepRecord,
    TimeFacts,
    TokenLedger,
    TrainingFacts,
)
from drawplate.units import GIB, MIB

HELDOUT_TOKENS, HELDOUT_BYTES = 13_700, 62_300
STEPS = 171


def make_evaluation(perplexity: float) -> Evaluation:
    return Evaluation(nats=math.log(perplexity) * HELDOUT_TOKENS, tokens=HELDOUT_TOKENS, bytes=HELDOUT_BYTES)


def make_plan() -> Plan:
    ledger = (
        ("frozen weights, nf4", 92 * MIB, "106,168,320 weights x 0.5159 B (nf4, double quantization)"),
        ("embedding, bf16", 54 * MIB, "49,152 x 576 x 2 B"),
        ("adapter, gradients and optimizer state", 75 * MIB, "4,884,480 x (4 + 4 + 8) B"),
        ("activations kept, 30 layers", 410 * MIB, "30 x 2,048 tokens x 7,008 B"),
        ("interpreter and libraries", 690 * MIB, "measured at start"),
    )
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
        micro_batch_sequences=4,
        micro_batch_tokens=2048,
        effective_batch_size=16,
        gradient_accumulation_steps=4,
        optimizer_steps=STEPS,
        epochs=3.0,
        learning_rate=5e-4,
        eval_batch_sequences=8,
        reasons={
            "compute_dtype": "this processor multiplies bfloat16 natively (AMX), 4.5 times as fast as float32",
            "effective_batch_size": "16 sequences leave 171 optimizer steps; more than 44 would leave fewer than 60",
            "learning_rate": "5e-4 is the usual peak for rank 16 on all linear layers at this batch",
            "heldout": "101 documents, 10 % by document; near-duplicates are kept on one side",
        },
        warnings=("The longest document is 4,812 tokens and was cut into 10 windows.",),
        ledger=tuple(LedgerLine(name=n, where="host", bytes=b, formula=f) for n, b, f in ledger),
    )


def make_steps() -> tuple[StepRecord, ...]:
    noise = random.Random(7)
    return tuple(
        StepRecord(
            step=n,
            epoch=3 * n / STEPS,
            loss=2.42 + 0.78 * math.exp(-n / 28) - 0.0013 * n + noise.gauss(0, 0.055),
            learning_rate=5e-4 * math.cos(n / STEPS * math.pi / 2),
            grad_norm=0.4,
            tokens=2166,
            counted_tokens=2150,
            seconds=1.43 + 0.05 * noise.random(),
        )
        for n in range(1, STEPS + 1)
    )


def make_memory_curve(device: bool = False) -> tuple[MemoryPoint, ...]:
    noise = random.Random(3)
    phases = [("load", 0, 14), ("baseline", 14, 33), ("train", 33, 285), ("final", 285, 304), ("save", 304, 308)]
    levels = {"load": 0.62, "baseline": 0.81, "train": 1.27, "final": 0.98, "save": 0.97}
    points = []
    for phase, start, end in phases:
        for second in range(start, end, 2):
            used = int((levels[phase] + noise.gauss(0, 0.012)) * GIB)
            sample = MemorySample(process_bytes=used, process_peak_bytes=used)
            if device:
                sample = dataclasses.replace(
                    sample,
                    device_allocated_bytes=int(used * 2.4),
                    device_reserved_bytes=int(used * 2.7),
                    device_peak_bytes=int(used * 2.8),
                    device_free_bytes=70 * GIB,
                    device_total_bytes=80 * GIB,
                )
            points.append(MemoryPoint(step=max(0, (second - 33) * 2 // 3), phase=phase, seconds=second, sample=sample))
    return tuple(points)


def make_documents() -> tuple[DocumentChange, ...]:
    noise = random.Random(11)
    topics = ("albedo", "aquifer", "blue carbon", "coral bleaching", "drought", "evapotranspiration", "food web")
    documents = []
    for n in range(101):
        tokens, loss = noise.randint(60, 260), noise.gauss(3.2, 0.25)
        gain = noise.gauss(0.57, 0.22)
        name = f"wg2.html#{n * 10 + 3} {topics[n % len(topics)]}"
        documents.append(
            DocumentChange(document=name, tokens=tokens, baseline_nats=loss * tokens, final_nats=(loss - gain) * tokens)
        )
    return tuple(documents)


def make_data_ledger() -> DataLedger:
    train = TokenLedger(
        documents=906,
        windows=948,
        tokens=124_404,
        counted_tokens=123_456,
        first_tokens=948,
        masked_tokens=0,
        dropped_tokens=0,
        cut_documents=12,
        text_bytes=560_000,
    )
    heldout = dataclasses.replace(
        train, documents=101, windows=103, tokens=13_801, counted_tokens=HELDOUT_TOKENS, first_tokens=101
    )
    return DataLedger(
        files=1,
        read_files=1,
        refused_files=0,
        skipped_files=0,
        texts=1048,
        refused_rows=0,
        empty_texts=0,
        short_texts=0,
        duplicate_texts=41,
        documents=1007,
        near_duplicate_documents=0,
        given_twice_documents=0,
        train=train,
        heldout=heldout,
        seen_tokens=370_386,
    )


def make_record() -> RunRecord:
    """A finished run with realistic curves: the demo's own scale."""
    points = {0: 24.48, 40: 17.9, 80: 15.31, 120: 14.2, STEPS: 13.76}
    return RunRecord(
        drawplate="0.1.0",
        status="finished",
        model=ModelFacts(
            name="HuggingFaceTB/SmolLM2-135M",
            revision=None,
            parameters=134_515_008,
            precision="nf4",
            sha256="5af571cb" * 8,
            architecture="LlamaForCausalLM",
            layers=30,
            trainable_parameters=4_884_480,
            frozen_bytes=146 * MIB,
        ),
        data=DataFacts(
            files=1,
            documents=1007,
            train_documents=906,
            heldout_documents=101,
            train_tokens=123_456,
            heldout_tokens=HELDOUT_TOKENS,
            heldout_bytes=HELDOUT_BYTES,
            dropped_tokens=0,
            duplicate_documents=41,
            cut_documents=12,
            windows=1049,
            sha256="9c1185a5" * 8,
            leaks=LeakReport(
                threshold=0.7,
                similar_pairs=3,
                set_aside_documents=2,
                clusters=5,
                clustered_documents=11,
                longest_shared_words=14,
                train_document="wg2.html#12",
                heldout_document="wg2.html#911",
            ),
            ledger=make_data_ledger(),
        ),
        evaluation=EvaluationFacts(
            baseline=make_evaluation(24.48),
            final=make_evaluation(13.76),
            unquantized_baseline=make_evaluation(19.69),
            perplexity_change_percent=-43.79,
            change_ci95_percent=(-45.61, -41.9),
            quantized_baseline=make_evaluation(24.48),
            quantization_tax_percent=24.33,
            quantization_tax_ci95_percent=(22.9, 25.8),
            quantization_tax_documents=31,
            general_text="general English prose",
            general_documents=19,
            general_baseline=make_evaluation(31.2),
            general_final=make_evaluation(31.45),
            general_change_percent=0.8,
            general_ci95_percent=(-0.6, 2.2),
        ),
        training=TrainingFacts(
            optimizer_steps=STEPS,
            epochs=3.0,
            tokens=370_386,
            tokens_per_optimizer_step=2166.0,
            seconds=251.8,
            tokens_per_second=1471.0,
            micro_batch_tokens=2048,
            gradient_accumulation_steps=4,
            first_loss=3.17,
            last_loss=2.21,
        ),
        memory=MemoryFacts(
            device_peak_predicted_bytes=0,
            device_peak_bytes=0,
            host_peak_predicted_bytes=int(1.33 * GIB),
            host_peak_bytes=int(1.31 * GIB),
        ),
        machine=Machine(
            platform="Linux-6.1-x86_64",
            python="3.11.2",
            cpu="Intel(R) Xeon(R) Platinum 8481C",
            cores=2,
            ram_bytes=8 * GIB,
            bf16_native=True,
        ),
        versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "bitsandbytes": "0.50.0"},
        seed=42,
        started="2026-11-22T14:05:00+0000",
        plan=make_plan(),
        recipe={
            "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M", "device_map": "auto"},
            "data": {"files": ["wg2.html"], "split_pattern": "^search term:", "heldout_fraction": 0.1},
            "output_dir": "runs/climate-demo",
            "quantization": {"precision": "nf4", "bnb_4bit_use_double_quant": True},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0},
            "train": {"num_train_epochs": 3.0, "effective_batch_size": 16, "learning_rate": 0.0005, "seed": 42},
        },
        steps=make_steps(),
        evaluations=tuple(EvaluationPoint(step=s, result=make_evaluation(p)) for s, p in points.items()),
        memory_curve=make_memory_curve(),
        documents=make_documents(),
        total_seconds=308.2,
        phase_seconds={"read": 0.9, "load": 13.4, "baseline": 19.2, "train": 251.8, "final": 19.1, "save": 3.8},
        warnings=("bitsandbytes: no CUDA device, its CPU kernels are used.",),
    )


def make_deployed_record() -> RunRecord:
    """The same run, whose base was measured as released with the adapter for it too."""
    record = make_record()
    facts = dataclasses.replace(
        record.evaluation,
        quantization_tax_documents=101,
        unquantized_final=make_evaluation(12.97),
        unquantized_precision="bf16",
        deployed_adapter="adapter_unquantized",
        deployed_documents=101,
        deployed_change_percent=-34.13,
        deployed_ci95_percent=(-35.9, -32.3),
    )
    adapters = (
        AdapterFacts(folder="adapter", base_precision="nf4", r=16),
        AdapterFacts(folder="adapter_unquantized", base_precision="bf16", r=32, deployed=True),
    )
    documents = tuple(
        dataclasses.replace(d, unquantized_nats=d.baseline_nats - 0.2 * d.tokens, deployed_nats=d.final_nats - 0.05)
        for d in record.documents
    )
    training = dataclasses.replace(record.training, init_lora_weights="quantization_error")
    times = TimeFacts(step_seconds=1.45, tokens_per_second=1712.0, training_seconds=251.8, first_step_seconds=41.3)
    return dataclasses.replace(
        record, evaluation=facts, adapters=adapters, documents=documents, training=training, times=times
    )


def make_gpu_record() -> RunRecord:
    """The same run with a device: its curves, its predicted and measured peaks."""
    memory = MemoryFacts(
        device_peak_predicted_bytes=int(3.62 * GIB),
        device_peak_bytes=int(3.58 * GIB),
        host_peak_predicted_bytes=int(1.33 * GIB),
        host_peak_bytes=int(1.31 * GIB),
    )
    machine = dataclasses.replace(
        make_record().machine, device="cuda", device_name="NVIDIA H100 80GB HBM3", device_bytes=80 * GIB, driver="570.1"
    )
    return dataclasses.replace(
        make_record(), memory=memory, machine=machine, memory_curve=make_memory_curve(device=True)
    )


def make_failure() -> RunRecord:
    """A run that failed before anything was read."""
    return RunRecord(
        drawplate="0.1.0",
        status="failed",
        model=ModelFacts(name="org/absent", revision=None, parameters=0, precision="", sha256=""),
        data=DataFacts(
            files=0,
            documents=0,
            train_documents=0,
            heldout_documents=0,
            train_tokens=0,
            heldout_tokens=0,
            heldout_bytes=0,
            dropped_tokens=0,
            duplicate_documents=0,
        ),
        evaluation=EvaluationFacts(),
        training=TrainingFacts(
            optimizer_steps=0,
            epochs=0,
            tokens=0,
            tokens_per_optimizer_step=0,
            seconds=0,
            tokens_per_second=0,
            micro_batch_tokens=0,
            gradient_accumulation_steps=0,
            first_loss=None,
            last_loss=None,
        ),
        memory=MemoryFacts(
            device_peak_predicted_bytes=0, device_peak_bytes=0, host_peak_predicted_bytes=0, host_peak_bytes=0
        ),
        machine=Machine(platform="", python="3.11", cpu="", cores=1, ram_bytes=0, bf16_native=False),
        versions={},
        error="The model org/absent is not on this machine.\nNothing was written.\nFetch it: hf download org/absent",
    )


@pytest.fixture
def record() -> RunRecord:
    return make_record()


@pytest.fixture
def deployed_record() -> RunRecord:
    return make_deployed_record()


@pytest.fixture
def gpu_record() -> RunRecord:
    return make_gpu_record()


@pytest.fixture
def failure() -> RunRecord:
    return make_failure()
