"""The plan and its ledgers of bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drawplate.layout.decision import Decision


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
class Plan(Decision):
    """How the run will be carried out: what was left `auto`, decided, each with its reason.

    `weights` and `activations` are words for people. Streamed layers are spread evenly over those that are not
    dequantized.

    Attributes:
        host_layers: streamed.
        graphs: micro-steps are captured as CUDA graphs.
        assumptions: what was not known and is assumed.
        measures_deployed: the unquantized base model is measured again at the end, with the adapter that is for it.
    """

    weights: str
    activations: str
    max_length: int
    micro_batch_sequences: int
    effective_batch_size: int
    gradient_accumulation_steps: int
    optimizer_steps: int
    epochs: float
    learning_rate: float
    eval_batch_sequences: int
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.05
    quantization_tax: bool = False
    starts_from_error: bool = False
    measures_deployed: bool = False
    graphs: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()
    phases: tuple[PhaseLedger, ...] = ()
    host_layers: int = 0
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
