"""What a run does and was measured to do: the parts of record.json, and the record itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from drawplate.records.documents import DataLedger, LeakReport
from drawplate.records.machine import Machine, MemorySample
from drawplate.records.plan import Plan
from drawplate.records.scores import DocumentChange, Evaluation

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step: a line of metrics.jsonl with `event: step`."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    counted_tokens: int
    seconds: float
    skipped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding, over wall seconds."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Loss and gradient of short texts before training, against a reference (model/load/self_check.py).

    Attributes:
        loss_difference: relative, from transformers' own loss; None where that was not compared.
        gradient_difference: norm of the difference from transformers' own gradient over that gradient's norm.
        kept_difference: the same from the gradient of the same layers with their activations kept.
        tensor, tensor_difference: the trained tensor that is furthest off, in its own measure.
        missing: trained tensors that get no gradient where the reference has one.
        tokens: of the texts.
        packed: whether they shared a row.
        left_out: why something was not compared; empty where all was.
    """

    loss_difference: float | None = None
    gradient_difference: float | None = None
    kept_difference: float | None = None
    tensor: str = ""
    tensor_difference: float = 0.0
    missing: tuple[str, ...] = ()
    tokens: int = 0
    packed: bool = False
    left_out: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Which base model it was.

    Attributes:
        precision: of its frozen linear weights in training.
        stored_precision: what its files are quantized to themselves; empty where they are not.
        gguf_file: the file that it was converted from; empty where it came as safetensors.
    """

    name: str
    revision: str | None
    parameters: int
    precision: str
    sha256: str
    architecture: str = ""
    layers: int = 0
    trainable_parameters: int = 0
    frozen_bytes: int = 0
    self_check_difference: float | None = None
    self_check: SelfCheck | None = None
    licence: str = ""
    stored_precision: str = ""
    gguf_file: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """An adapter that the run left, and the weights of the base model that it is for.

    Attributes:
        folder: in the run's folder.
        base_precision: of those weights. `deployed` says which adapter is for the base model as released.
        r: its rank.
    """

    folder: str
    base_precision: str
    deployed: bool = False
    r: int = 0


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What went in, and how much of it the loss saw."""

    files: int
    documents: int
    train_documents: int
    heldout_documents: int
    train_tokens: int
    heldout_tokens: int
    heldout_bytes: int
    dropped_tokens: int
    duplicate_documents: int
    cut_documents: int = 0
    windows: int = 0
    refused_files: int = 0
    skipped_files: int = 0
    sha256: str = ""
    near_duplicate_documents: int = 0
    leaks: LeakReport | None = None
    ledger: DataLedger | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """Before and after, on the same documents; every change is paired and has its own 95 % interval.

    Attributes:
        baseline, final: the held-out documents under the base model in the precision of training, before and after.
        context_tokens: that each window of a long document, but its first, reads again and does not count.
        unquantized_baseline: the base model before quantization, on the held-out documents or a sample of them.
        quantized_baseline: the base model as quantized, on the same `quantization_tax_documents` documents.
        quantization_tax_percent: change of perplexity from the one to the other.
        unquantized_final: the base model before quantization with the adapter that is for it, read back from
            `deployed_adapter`, on the `deployed_documents` documents of `unquantized_baseline`.
        unquantized_precision: in which those two were computed.
        deployed_change_percent: change of perplexity from `unquantized_baseline` to `unquantized_final`.
        general_baseline, general_final: text that is not of the domain, before and after; what it was is in
            `general_text`.
    """

    baseline: Evaluation | None = None
    final: Evaluation | None = None
    unquantized_baseline: Evaluation | None = None
    perplexity_change_percent: float | None = None
    change_ci95_percent: tuple[float, float] | None = None
    context_tokens: int = 0
    quantized_baseline: Evaluation | None = None
    quantization_tax_percent: float | None = None
    quantization_tax_ci95_percent: tuple[float, float] | None = None
    quantization_tax_documents: int = 0
    general_text: str = ""
    general_documents: int = 0
    general_baseline: Evaluation | None = None
    general_final: Evaluation | None = None
    general_change_percent: float | None = None
    general_ci95_percent: tuple[float, float] | None = None
    unquantized_final: Evaluation | None = None
    unquantized_precision: str = ""
    deployed_adapter: str = ""
    deployed_documents: int = 0
    deployed_change_percent: float | None = None
    deployed_ci95_percent: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the loop did.

    Attributes:
        corrections: what running out of memory forced, in words; micro_batch_tokens is the plan's.
        checkpoint_seconds: spent writing and verifying checkpoints; not part of `seconds`.
        init_lora_weights: what the adapter started from: default (it changes nothing), or quantization_error.
    """

    optimizer_steps: int
    epochs: float
    tokens: int
    tokens_per_optimizer_step: float
    seconds: float
    tokens_per_second: float
    micro_batch_tokens: int
    gradient_accumulation_steps: int
    first_loss: float | None
    last_loss: float | None
    skipped_steps: int = 0
    stopped_because: str = ""
    best_step: int | None = None
    corrections: tuple[str, ...] = ()
    checkpoint_seconds: float = 0.0
    init_lora_weights: str = "default"


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Predicted and measured peaks, in the meaning that machine/memory.py gives the words.

    Attributes:
        device_peak_predicted_bytes, device_peak_bytes: what the driver counts for the process, CUDA's context included.
        host_peak_predicted_bytes, host_peak_bytes: what the process holds and the system cannot take back.
        host_resident_peak_bytes: the most that was resident, with pages of files that the system drops at need.
        self_check_device_peak_bytes: the most device memory during the self-check before training, which takes what is
            free and is no part of `device_peak_bytes`.
        device_context_bytes: the part of the device's peak that lies outside torch's allocator.
        device_context_source: who says so: `driver`, `device` (all that was in use on it, less the allocator's),
            `assumed` (other programs used the device too), or empty without a GPU.
    """

    device_peak_predicted_bytes: int
    device_peak_bytes: int
    host_peak_predicted_bytes: int
    host_peak_bytes: int
    host_resident_peak_bytes: int = 0
    self_check_device_peak_bytes: int = 0
    device_context_bytes: int = 0
    device_context_source: str = ""


@dataclass(frozen=True, kw_only=True)
class TimeFacts:
    """Measured seconds, in the words of `PlanTimes`; 0 where nothing was measured.

    Attributes:
        step_seconds: of the median optimizer step, in which nothing is compiled or captured.
        tokens_per_second: of the median optimizer step: the speed once warm. `training.tokens_per_second` is that of
            all steps, compiling and capturing included.
        first_step_seconds: from the start of the run to the end of its first optimizer step.
    """

    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    first_step_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RehearsedPhase:
    """What a phase of the rehearsal needed at most, beside what the plan said; 0 for a place that was not used."""

    phase: str
    device_predicted_bytes: int
    device_bytes: int
    host_predicted_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvaluationPoint:
    """A held-out measurement during the run; step 0 is the baseline."""

    step: int
    result: Evaluation


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """A memory sample and when it was taken."""

    step: int
    phase: str
    seconds: float
    sample: MemorySample


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run tells whoever watches it, often; `figures` are shown beside the bar as they are.

    Attributes:
        phase: read, unquantized, load, rehearse, baseline, train, evaluate, final, save or deployed.
        done, total: in `unit`s; total 0 where it is not known.
        figures: short name -> text, like {"loss": "2.31", "tokens/s": "812"}.
        message: a line worth keeping on the screen, such as a warning; empty most of the time.
    """

    phase: str
    done: float = 0
    total: float = 0
    unit: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """record.json: all that was measured. The report is made from it alone; curves are thinned to 2,000 points.

    Attributes:
        fingerprints: sha256 of the recipe, the base model's weights, and the training and held-out tokens in order.
        resumed: where later processes took the run up, in words.
        adapters: what was written, and for which weights each is.
    """

    drawplate: str
    status: Literal["finished", "stopped", "failed"]
    model: ModelFacts
    data: DataFacts
    evaluation: EvaluationFacts
    training: TrainingFacts
    memory: MemoryFacts
    machine: Machine
    versions: dict[str, str]
    seed: int = 0
    started: str = ""
    plan: Plan | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvaluationPoint, ...] = ()
    memory_curve: tuple[MemoryPoint, ...] = ()
    documents: tuple[DocumentChange, ...] = ()
    total_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)
    resumed: tuple[str, ...] = ()
    times: TimeFacts = field(default_factory=TimeFacts)
    rehearsal: tuple[RehearsedPhase, ...] = ()
    adapters: tuple[AdapterFacts, ...] = ()
    schema: int = SCHEMA
