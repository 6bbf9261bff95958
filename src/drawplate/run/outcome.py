"""What a run measured, put into the words of record.json. Counts and divides; measures nothing itself.

`kept` is what a checkpoint holds of it beside the training state, and `take_up` puts that back in a later process, so
that the record of a run that was interrupted is the record of one run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from drawplate.data.accounts import data_ledger
from drawplate.data.tokens import Tokenized
from drawplate.machine.device import machine
from drawplate.machine.memory import PeakMeter, known_context, measure_context
from drawplate.model.base.gguf import only_gguf
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load.lora_init import Start
from drawplate.planner.tax import PLAIN_PRECISION
from drawplate.recipe import ModelSection, expand
from drawplate.records import (
    AdapterFacts,
    DataFacts,
    DocumentChange,
    DocumentScore,
    EvaluationFacts,
    Machine,
    MemoryFacts,
    ModelFacts,
    RehearsedPhase,
    RunRecord,
    SelfCheck,
    TimeFacts,
    TrainingFacts,
    from_json,
    to_json,
)
from drawplate.run.folder import ADAPTER_NAME, UNQUANTIZED_NAME
from drawplate.run.heldout import Measured, evaluation_facts
from drawplate.run.journal import Journal
from drawplate.run.prepare import Prepared
from drawplate.train.guards import Clock, StopSignals
from drawplate.train.task import TrainState

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers")


@dataclass
class Outcome:
    """All that a run has come to so far; `record` may be asked for at any moment after loading.

    Attributes:
        scores: each measurement's documents (heldout.py).
        machine: what it runs on; asked once, because a device that was lost does not answer.
        stop: whether somebody asked the run to stop.
        clock: of the training's seconds.
        earlier_peaks: device, host and resident bytes of the processes that ran before this one.
        start: what the adapter started from, where that is not the default (model/load/lora_init.py).
        resumed: where this and earlier processes took the run up, in words.
        released: of the model, once it is not needed any more; the adapter is written by then.
    """

    prepared: Prepared
    journal: Journal
    peak: PeakMeter
    started: str
    model: CausalLM | None = None
    state: TrainState = field(default_factory=TrainState)
    self_check: SelfCheck | None = None
    self_check_bytes: int = 0
    scores: Measured = field(default_factory=dict)
    stop: StopSignals = field(default_factory=StopSignals)
    clock: Clock = field(default_factory=Clock)
    earlier_peaks: tuple[int, int, int] = (0, 0, 0)
    start: Start = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)
    released: ModelFacts | None = None
    rehearsal: tuple[RehearsedPhase, ...] = ()
    machine: Machine = field(init=False)
    fingerprints: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.machine = machine(self.prepared.device)
        self.fingerprints = fingerprints(self.prepared)

    @property
    def loaded(self) -> bool:
        """Whether the run came as far as having a model."""
        return self.model is not None or self.released is not None

    @property
    def deployed_adapter(self) -> str:
        """The folder of the adapter that is for the base model before quantization."""
        return UNQUANTIZED_NAME if self.start else ADAPTER_NAME

    def release_model(self) -> None:
        """Let go of the model, whose memory something else needs; what the record says of it is kept."""
        self.released = self._model_facts()
        if self.model is not None:
            self.model.forget_graphs()
        self.model = None

    @property
    def peaks(self) -> tuple[int, int, int]:
        """Highest device, host and resident bytes of all processes of the run."""
        measure_context(self.prepared.device)
        peak, (device_bytes, host_bytes, resident_bytes) = self.peak, self.earlier_peaks
        return (
            max(device_bytes, peak.device_peak_bytes),
            max(host_bytes, peak.host_peak_bytes),
            max(resident_bytes, peak.resident_peak_bytes),
        )

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of the run beside the training state, as plain JSON values."""
        return {
            "recipe": self.prepared.recipe.model_dump(mode="json"),
            "plan": to_json(self.prepared.plan),
            "fingerprints": self.fingerprints,
            "machine": to_json(self.machine),
            "versions": versions(),
            "started": self.started,
            "self_check": to_json(self.self_check) if self.self_check else None,
            "scores": to_json(self.scores),
            "rehearsal": to_json(self.rehearsal),
            "peaks": self.peaks,
            "resumed": self.resumed,
            "journal": self.journal.kept(),
        }

    def take_up(self, kept: dict[str, Any], *, measured: bool) -> None:
        """Go on where `kept` left off; without `measured` what was measured before training is not believed."""
        self.started, self.resumed = kept["started"], list(kept["resumed"])
        device_bytes, host_bytes, *resident = kept["peaks"]  # a checkpoint of before 2026-12 has two
        self.earlier_peaks = (device_bytes, host_bytes, resident[0] if resident else host_bytes)
        self.journal.take_up(kept["journal"])
        if measured:
            self.self_check = from_json(SelfCheck, kept["self_check"]) if kept.get("self_check") else None
            self.rehearsal = tuple(from_json(RehearsedPhase, phase) for phase in kept["rehearsal"])
            self.scores = {
                name: tuple(from_json(DocumentScore, score) for score in scores)
                for name, scores in kept["scores"].items()
            }

    def record(self, status: str, error: str = "") -> RunRecord:
        """All that was measured, as record.json holds it."""
        prepared, journal, recipe = self.prepared, self.journal, self.prepared.recipe
        return RunRecord(
            drawplate=_version("drawplate"),
            status=status,  # type: ignore[arg-type]
            model=self._model_facts(),
            data=data_facts(prepared, self.state.step),
            evaluation=self._evaluation_facts(),
            training=self._training_facts(),
            memory=self._memory_facts(),
            machine=self.machine,
            versions=versions(),
            seed=recipe.train.seed,
            started=self.started,
            plan=prepared.plan,
            recipe=recipe.model_dump(mode="json"),
            steps=tuple(journal.steps),
            evaluations=tuple(journal.evaluations),
            memory_curve=tuple(journal.memory),
            documents=self._document_changes(),
            total_seconds=journal.seconds,
            phase_seconds=dict(journal.phase_seconds),
            warnings=tuple(journal.warnings),
            error=error,
            fingerprints=self.fingerprints,
            resumed=tuple(self.resumed),
            times=self._time_facts(),
            rehearsal=self.rehearsal,
            adapters=self._adapters(),
        )

    def _evaluation_facts(self) -> EvaluationFacts:
        plan_ = self.prepared.plan
        facts = evaluation_facts(self.prepared.recipe, plan_.max_length, self.scores)
        if facts.unquantized_baseline is None:
            return facts
        adapter = self.deployed_adapter if facts.unquantized_final else ""
        return replace(facts, unquantized_precision=PLAIN_PRECISION[plan_.compute_dtype], deployed_adapter=adapter)

    def _adapters(self) -> tuple[AdapterFacts, ...]:
        """What is in the run's folder, once anything was trained."""
        if not self.state.step:
            return ()
        plan_, rank = self.prepared.plan, cast(int, self.prepared.recipe.lora.filled().r)
        adapter = AdapterFacts(folder=ADAPTER_NAME, base_precision=plan_.precision, r=rank, deployed=not self.start)
        if not self.start:
            return (adapter,)
        plain = PLAIN_PRECISION[plan_.compute_dtype]
        return adapter, AdapterFacts(folder=UNQUANTIZED_NAME, base_precision=plain, r=2 * rank, deployed=True)

    def _model_facts(self) -> ModelFacts:
        if self.released is not None:
            return self.released
        checkpoint, plan_ = self.prepared.checkpoint, self.prepared.plan
        adapter = self.model.adapter if self.model else None
        return ModelFacts(
            name=checkpoint.name,
            revision=checkpoint.revision,
            parameters=self.prepared.anatomy.parameters,
            precision=plan_.precision,
            sha256=checkpoint.sha256(),
            architecture=(checkpoint.config.architectures or [""])[0],
            layers=len(self.prepared.anatomy.layers),
            trainable_parameters=adapter.parameter_count if adapter else 0,
            frozen_bytes=(self.model.residency.device_bytes + self.model.residency.host_bytes) if self.model else 0,
            self_check_difference=self.self_check.loss_difference if self.self_check else None,
            self_check=self.self_check,
            licence=licence_of(checkpoint.folder),
            stored_precision=checkpoint.quantized_precision or "",
            gguf_file=gguf_file_of(self.prepared.recipe.model),
        )

    def _memory_facts(self) -> MemoryFacts:
        plan_ = self.prepared.plan
        device_bytes, host_bytes, resident_bytes = self.peaks
        return MemoryFacts(
            device_peak_predicted_bytes=plan_.predicted_bytes("device"),
            device_peak_bytes=device_bytes,
            host_peak_predicted_bytes=plan_.predicted_bytes("host"),
            host_peak_bytes=host_bytes,
            host_resident_peak_bytes=resident_bytes,
            self_check_device_peak_bytes=self.self_check_bytes,
            device_context_bytes=known_context().bytes if device_bytes else 0,
            device_context_source=known_context().source if device_bytes else "",
        )

    def _training_facts(self) -> TrainingFacts:
        state, plan_ = self.state, self.prepared.plan
        return TrainingFacts(
            optimizer_steps=state.step - state.skipped_steps,
            epochs=state.step / self.prepared.order.steps_per_epoch,
            tokens=state.tokens,
            tokens_per_optimizer_step=state.tokens / state.step if state.step else 0.0,
            seconds=state.step_seconds,
            tokens_per_second=state.tokens / state.step_seconds if state.step_seconds else 0.0,
            micro_batch_tokens=plan_.micro_batch_tokens,
            gradient_accumulation_steps=plan_.gradient_accumulation_steps,
            first_loss=state.first_loss,
            last_loss=state.last_loss,
            skipped_steps=state.skipped_steps,
            stopped_because=state.stopped_because,
            best_step=state.best_step,
            corrections=tuple(state.corrections),
            checkpoint_seconds=state.saving_seconds,
            init_lora_weights="quantization_error" if self.start else "default",
        )

    def _time_facts(self) -> TimeFacts:
        """Of the median step, in which nothing is compiled or captured; of two, the faster."""
        steps = [step for step in self.journal.steps if step.seconds > 0]
        return TimeFacts(
            step_seconds=statistics.median_low(step.seconds for step in steps) if steps else 0.0,
            tokens_per_second=statistics.median_high(step.tokens_per_second for step in steps) if steps else 0.0,
            training_seconds=self.state.step_seconds,
            evaluation_seconds=self.journal.phase_seconds.get("final", 0.0),
            first_step_seconds=self.journal.first_step_seconds,
        )

    def _document_changes(self) -> tuple[DocumentChange, ...]:
        pairs = zip(self.scores.get("baseline", ()), self.scores.get("final", ()), strict=False)
        plain, deployed = (
            {score.document: score.nats for score in self.scores.get(name, ())} for name in ("unquantized", "deployed")
        )
        return tuple(
            DocumentChange(
                document=a.document,
                tokens=a.tokens,
                baseline_nats=a.nats,
                final_nats=b.nats,
                unquantized_nats=plain.get(a.document),
                deployed_nats=deployed.get(a.document),
            )
            for a, b in pairs
        )


def data_facts(prepared: Prepared, steps: int) -> DataFacts:
    """What went in, and how much of it the loss saw in so many optimizer steps."""
    seen = prepared.order.target_tokens_in(steps)
    intake, train, heldout = prepared.corpus.intake, prepared.train.ledger, prepared.heldout.ledger
    fingerprints = sorted(d.sha256 for d in (*prepared.split.train, *prepared.split.heldout))
    return DataFacts(
        files=sum(line.status == "read" for line in intake),
        documents=len(prepared.split.train) + len(prepared.split.heldout),
        train_documents=len(prepared.split.train),
        heldout_documents=len(prepared.split.heldout),
        train_tokens=train.tokens,
        heldout_tokens=heldout.tokens,
        heldout_bytes=heldout.text_bytes,
        dropped_tokens=train.dropped_tokens + heldout.dropped_tokens,
        duplicate_documents=sum(line.duplicate_documents for line in intake) + prepared.split.removed_from_train,
        cut_documents=train.cut_documents + heldout.cut_documents,
        windows=train.windows + heldout.windows,
        refused_files=sum(line.status == "refused" for line in intake),
        skipped_files=sum(line.status == "skipped" for line in intake),
        sha256=hashlib.sha256("\n".join(fingerprints).encode()).hexdigest(),
        near_duplicate_documents=len(prepared.split.set_aside),
        leaks=prepared.split.leaks,
        ledger=data_ledger(prepared.corpus, prepared.split, train, heldout, seen_tokens=seen),
    )


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {name: _version(name) for name in VERSIONED}


def _version(package: str) -> str:
    """Of an installed package; `unknown` for a source tree that Python was merely pointed at."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def fingerprints(prepared: Prepared) -> dict[str, str]:
    """sha256 of what a run is made of: `recipe` (without its folder), `model`, and the windows of tokens in order."""
    recipe = {key: value for key, value in prepared.recipe.model_dump(mode="json").items() if key != "output_dir"}
    return {
        "recipe": hashlib.sha256(yaml.safe_dump(recipe, sort_keys=True).encode()).hexdigest(),
        "model": prepared.checkpoint.sha256(),
        "data.train": _tokens_sha256(prepared.train),
        "data.heldout": _tokens_sha256(prepared.heldout),
    }


def _tokens_sha256(tokens: Tokenized) -> str:
    digest = hashlib.sha256()
    for sequence in tokens.sequences:
        digest.update(f"{sequence.index} {len(sequence)} ".encode())
        digest.update(sequence.input_ids.tobytes())
        digest.update(sequence.counted.tobytes())
    return digest.hexdigest()


def gguf_file_of(section: ModelSection) -> str:
    """The GGUF file that a base model comes from, named or the only one of its folder; empty where it is none."""
    folder = expand(section.name_or_path)
    return section.gguf_file or (only_gguf(folder) if folder.is_dir() else None) or ""


def licence_of(folder: Path) -> str:
    """The licence that a model folder's card names; empty where it names none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        if text.startswith("---"):
            header = yaml.safe_load(text.split("---", 2)[1])
            return str(header.get("license_name") or header.get("license") or "")
    except (OSError, ValueError, AttributeError, IndexError, yaml.YAMLError):
        pass
    return ""
