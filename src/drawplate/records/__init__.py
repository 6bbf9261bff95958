"""What crosses floors: small frozen dataclasses, each with a JSON round trip through `to_json` / `from_json`.

Nothing here computes more than a ratio, and nothing imports torch, so that the report, the plan and other tools can
read a run without loading a framework. Field names of `RunRecord` are a contract (schema 1): add, never rename.
A record is imported from this package; which of its files holds it is nobody's concern.
"""

from drawplate.records.documents import (
    DataLedger,
    Document,
    Intake,
    LeakReport,
    Sequence,
    TokenLedger,
)
from drawplate.records.machine import (
    DeviceSpeed,
    Machine,
    MemorySample,
)
from drawplate.records.plan import (
    CostLine,
    FrontierPoint,
    LedgerLine,
    PhaseLedger,
    Plan,
    PlanTimes,
)
from drawplate.records.round_trip import (
    from_json,
    json_text,
    to_json,
)
from drawplate.records.run import (
    SCHEMA,
    AdapterFacts,
    DataFacts,
    EvaluationFacts,
    EvaluationPoint,
    MemoryFacts,
    MemoryPoint,
    ModelFacts,
    Progress,
    RehearsedPhase,
    RunRecord,
    SelfCheck,
    StepRecord,
    TimeFacts,
    TrainingFacts,
)
from drawplate.records.scores import (
    DocumentChange,
    DocumentScore,
    Evaluation,
    ModelScore,
)

__all__ = [
    "SCHEMA",
    "AdapterFacts",
    "CostLine",
    "DataFacts",
    "DataLedger",
    "DeviceSpeed",
    "Document",
    "DocumentChange",
    "DocumentScore",
    "Evaluation",
    "EvaluationFacts",
    "EvaluationPoint",
    "FrontierPoint",
    "Intake",
    "LeakReport",
    "LedgerLine",
    "Machine",
    "MemoryFacts",
    "MemoryPoint",
    "MemorySample",
    "ModelFacts",
    "ModelScore",
    "PhaseLedger",
    "Plan",
    "PlanTimes",
    "Progress",
    "RehearsedPhase",
    "RunRecord",
    "SelfCheck",
    "Sequence",
    "StepRecord",
    "TimeFacts",
    "TokenLedger",
    "TrainingFacts",
    "from_json",
    "json_text",
    "to_json",
]
