"""What crosses floors: small frozen dataclasses, each with a JSON round trip through `to_json` / `from_json`.

Nothing here computes more than a ratio, and nothing imports torch, so that the report, the plan and other tools can
read a run without loading a framework. Field names of `RunRecord` are a contract (schema 1): add, never rename.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Document:
    """One unit of text that is either trained on or held out, never both.

    Attributes:
        name: where it came from, like `reports/ch1.html#12`; unique in a run and shown in messages.
        text: the whole text; for a conversation, the text rendered by the model's template.
        trained_spans: character ranges [start, end) of `text` that the loss counts; None means all of it.
        control_spans: character ranges of `text` that a chat template wrote as control tokens; None where no template
            was used. A control token's name anywhere else is text.
        sha256: of the text's UTF-8 bytes.
        group: documents of one group are never on both sides of the split; empty for a document by itself.
    """

    name: str
    text: str
    sha256: str
    trained_spans: tuple[tuple[int, int], ...] | None = None
    control_spans: tuple[tuple[int, int], ...] | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What became of one file: a line of intake.jsonl. `status` is read, skipped or refused.

    Every text that was met, a row, a file or a piece of one, is in one count: `texts` = documents + duplicates + empty
    + short + refused rows.
    """

    file: str
    status: Literal["read", "skipped", "refused"]
    bytes: int = 0
    documents: int = 0
    characters: int = 0
    duplicate_documents: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    refused_rows: int = 0
    reason: str = ""
    texts: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """One window of one document as token ids: what a micro-batch is made of.

    Attributes:
        index: position in the corpus; with the seed it decides order and dropout.
        document: name of the document it came from.
        input_ids: int32, shape (tokens,).
        counted: bool, shape (tokens,): whether the loss counts the prediction OF this token. The first is never
            counted: nothing precedes it.
        text_bytes: UTF-8 bytes of the text of the counted tokens, for bits per byte.
    """

    index: int
    document: str
    input_ids: np.ndarray
    counted: np.ndarray
    text_bytes: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class TokenLedger:
    """Where every token went; `tokens` of the documents = counted + first + masked + dropped, over all windows.

    `context_tokens` are read a second time, at the start of a window, and counted there in none of these; `text_bytes`
    are of all documents. `dropped_windows` are beside `windows`, and `dropped_documents` are left without any.
    """

    documents: int
    windows: int
    tokens: int
    counted_tokens: int
    first_tokens: int
    masked_tokens: int
    dropped_tokens: int
    cut_documents: int
    text_bytes: int
    context_tokens: int = 0
    dropped_windows: int = 0
    dropped_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over a set of documents; every ratio is derived from them, never averaged."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True, kw_only=True)
class ModelScore(Evaluation):
    """One of several models or adapters on the same documents; changes are paired, against the first of them.

    Attributes:
        perplexity_change_percent: None for the first, and where the tokenizers cut the documents differently.
        verdict: in words, by perplexity where it can be compared, else by bits per byte; empty for the first.
    """

    model: str = ""
    adapter: str | None = None
    precision: str = ""
    documents: int = 0
    perplexity_change_percent: float | None = None
    perplexity_ci95_percent: tuple[float, float] | None = None
    bits_per_byte_change_percent: float | None = None
    bits_per_byte_ci95_percent: tuple[float, float] | None = None
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One held-out document's sums, the unit of the paired bootstrap."""

    document: str
    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Bytes at one moment. Device fields are 0 on a machine without a GPU."""

    process_bytes: int
    process_peak_bytes: int
    device_allocated_bytes: int = 0
    device_reserved_bytes: int = 0
    device_peak_bytes: int = 0
    device_free_bytes: int = 0
    device_total_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has."""

    platform: str
    python: str
    cpu: str
    cores: int
    ram_bytes: int
    bf16_native: bool
    device: str = "cpu"
    device_name: str = ""
    device_bytes: int = 0
    driver: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """How fast a device is: what the plan's cost divides by. Measured by drawplate/speed.py, or published figures.

    Attributes:
        name: of the device.
        source: how the figures were come by.
        product_rates: (FLOPs of one matrix product, FLOP/s it ran at), by rising size, in the arithmetic's dtype.
        attention_rate: FLOP/s of causal attention, forward and backward together, the masked half not counted.
        memory_rate: bytes per second read or written on the device.
        to_device_rate, to_host_rate: bytes per second between page-locked host memory and the device.
        dequantize_rate: 4-bit weights per second, double quantization included.
        launch_seconds: host time to start one small operation.
        context_bytes: device memory that CUDA takes outside torch's allocator.
    """

    name: str
    source: str
    product_rates: tuple[tuple[float, float], ...]
    attention_rate: float
    memory_rate: float
    to_device_rate: float
    to_host_rate: float
    dequantize_rate: float
    launch_seconds: float
    context_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """One named number of seconds of an optimizer step, with the formula that gave it."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True, kw_only=True)
class LedgerLine:
    """One named number of bytes, with the formula that gave it. `where` is device, host or disk."""

    name: str
    where: Literal["device", "host", "disk"]
    bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class PhaseLedger:
    """What a phase holds at the moment when it holds most; `moment` says which that is."""

    phase: str
    lines: tuple[LedgerLine, ...]
    moment: str = ""

    def bytes(self, where: str) -> int:
        """The phase's sum for one place."""
        return sum(line.bytes for line in self.lines if line.where == where)


@dataclass(frozen=True, kw_only=True)
class PlanTimes:
    """Predicted seconds.

    Attributes:
        step_seconds: of an optimizer step; `lines` sum to it.
        tokens_per_second: that are not padding.
        epoch_seconds, training_seconds: of all steps of an epoch, and of the run.
        evaluation_seconds: of one measurement of the held-out documents.
        evaluations: how many there are.
        speed: whose figures these are, and how they were come by.
    """

    step_seconds: float
    tokens_per_second: float
    epoch_seconds: float
    training_seconds: float
    evaluation_seconds: float = 0.0
    evaluations: int = 2
    lines: tuple[CostLine, ...] = ()
    speed: str = ""

    @property
    def total_seconds(self) -> float:
        """Training and measuring; not reading, loading and compiling."""
        return self.training_seconds + self.evaluations * self.evaluation_seconds


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What a budget of device memory would buy."""

    vram_bytes: int
    device_bytes: int
    tokens_per_second: float
    precision: str
    weights: str
    activations: str
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the run will be carried out: what was left `auto`, decided, each with its reason.

    `weights` and `activations` are words for people. Of the layers, the first `dequantized_layers` are dequantized on
    the device; `host_layers` are streamed, spread evenly over the others; the rest are on the device as stored. The
    last `kept_layers` keep their activations and the others follow `policy`. Plans of version 0.1.0 have words alone.

    Attributes:
        slots: of the ring for streamed layers.
        head_rows: rows of a slot of the streamed head; 0 keeps embedding and head on the device.
        adapter: where trained tensors, their gradients and the optimizer live: device or host.
        assumptions: what was not known and is assumed.
    """

    device: str
    precision: str
    double_quant: bool
    compute_dtype: str
    weights: str
    activations: str
    compiled: bool
    packing: bool
    max_length: int
    micro_batch_sequences: int
    micro_batch_tokens: int
    effective_batch_size: int
    gradient_accumulation_steps: int
    optimizer_steps: int
    epochs: float
    learning_rate: float
    eval_batch_sequences: int
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.05
    dequantize: str = "product"
    quantization_tax: bool = False
    graphs: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()
    phases: tuple[PhaseLedger, ...] = ()
    dequantized_layers: int = 0
    device_layers: int = 0
    host_layers: int = 0
    kept_layers: int = 0
    policy: str = "recompute"
    slots: int = 2
    head_rows: int = 0
    adapter: str = "device"
    times: PlanTimes | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Decoder layers, where the plan counts them."""
        return self.dequantized_layers + self.device_layers + self.host_layers

    def predicted_bytes(self, where: str) -> int:
        """The ledger's sum for one place."""
        return sum(line.bytes for line in self.ledger if line.where == where)


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
class ModelFacts:
    """Which base model it was."""

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
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """What training and held-out documents have in common, over runs of five words.

    Attributes:
        threshold: Jaccard from which two documents are near-duplicates.
        similar_pairs: training documents that nearly repeated a held-out one, before any was set aside.
        set_aside_documents: those of them that are not trained on.
        clusters, clustered_documents: groups of near-duplicates in the whole corpus, and the documents in them.
        longest_shared_words: the longest run of words that a document left in training shares with a held-out one.
        train_document, heldout_document: the two that share it.
    """

    threshold: float
    similar_pairs: int
    set_aside_documents: int
    clusters: int
    clustered_documents: int
    longest_shared_words: int
    train_document: str = ""
    heldout_document: str = ""


@dataclass(frozen=True, kw_only=True)
class DataLedger:
    """Files -> documents -> windows -> tokens that the loss saw; each level sums to the one above it.

    files = read + refused + skipped
    texts = documents + refused_rows + empty_texts + short_texts + duplicate_texts
    documents = train.documents + heldout.documents + near_duplicate_documents + given_twice_documents
    and within `train` and `heldout` as TokenLedger says; `seen_tokens` are the counted tokens of all optimizer
    steps together, a token as often as it was read.
    """

    files: int
    read_files: int
    refused_files: int
    skipped_files: int
    texts: int
    refused_rows: int
    empty_texts: int
    short_texts: int
    duplicate_texts: int
    documents: int
    near_duplicate_documents: int
    given_twice_documents: int
    train: TokenLedger
    heldout: TokenLedger
    seen_tokens: int = 0


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
        baseline, final: the held-out documents under the model as trained, before and after.
        context_tokens: that each window of a long document, but its first, reads again and does not count.
        unquantized_baseline: the base model before quantization, on the held-out documents or a sample of them.
        quantized_baseline: the base model as quantized, on the same `quantization_tax_documents` documents.
        quantization_tax_percent: change of perplexity from the one to the other.
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


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the loop did.

    Attributes:
        corrections: what running out of memory forced, in words; micro_batch_tokens is the plan's.
        checkpoint_seconds: spent writing and verifying checkpoints; not part of `seconds`.
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


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Predicted and measured peaks."""

    device_peak_predicted_bytes: int
    device_peak_bytes: int
    host_peak_predicted_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class TimeFacts:
    """Measured seconds, in the words of `PlanTimes`; 0 where nothing was measured.

    `step_seconds` is the median optimizer step, so that compiling in the first does not count.
    """

    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0


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
class DocumentChange:
    """One held-out document before and after: shown best and worst first."""

    document: str
    tokens: int
    baseline_nats: float
    final_nats: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run tells whoever watches it, often; `figures` are shown beside the bar as they are.

    Attributes:
        phase: read, unquantized, load, baseline, train, evaluate, final or save.
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
    schema: int = SCHEMA


_DERIVED = {
    Evaluation: ("loss", "perplexity", "bits_per_byte"),
    ModelScore: ("loss", "perplexity", "bits_per_byte"),
    StepRecord: ("tokens_per_second",),
}


def to_json(record: Any) -> Any:
    """A record as plain JSON values; ratios (perplexity, tokens_per_second) are written out beside their sums."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
        values.update({name: to_json(getattr(record, name)) for name in _DERIVED.get(type(record), ())})
        return values
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(value) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        return str(record)
    return record


Record = TypeVar("Record")


def from_json(kind: type[Record], values: dict[str, Any]) -> Record:
    """The record that `to_json` wrote; derived values and fields of a newer version are left out.

    Raises:
        TypeError: a field without a default is missing.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: _parse(hints[f.name], values[f.name]) for f in dataclasses.fields(kind) if f.name in values}  # type: ignore[arg-type]
    return kind(**known)


def _parse(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _parse(next(a for a in arguments if a is not type(None)), value)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        return tuple(_parse(inner or arguments[i], item) for i, item in enumerate(value))
    return float(value) if hint is float else value
