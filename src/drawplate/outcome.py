"""What a run measured, put into the words of record.json. Counts and divides; measures nothing itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass, field, replace

from drawplate.compare import perplexity_change
from drawplate.data.accounts import data_ledger
from drawplate.data.batches import counted_in_steps, steps_per_epoch
from drawplate.device import PeakMeter, machine
from drawplate.evaluate import total
from drawplate.journal import Journal
from drawplate.model.causal_lm import CausalLM
from drawplate.prepare import Prepared, choose_context_tokens
from drawplate.records import (
    DataFacts,
    DocumentChange,
    DocumentScore,
    EvaluationFacts,
    MemoryFacts,
    ModelFacts,
    RunRecord,
    TrainingFacts,
)
from drawplate.train import TrainState

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers")


@dataclass
class Outcome:
    """All that a run has come to so far; `record` may be asked for at any moment after loading.

    Attributes:
        scores: baseline and final, each document's sums.
    """

    prepared: Prepared
    journal: Journal
    peak: PeakMeter
    started: str
    model: CausalLM | None = None
    state: TrainState = field(default_factory=TrainState)
    self_check_difference: float | None = None
    scores: dict[str, tuple[DocumentScore, ...]] = field(default_factory=dict)

    def record(self, status: str, error: str = "") -> RunRecord:
        """All that was measured, as record.json holds it."""
        prepared, journal, recipe = self.prepared, self.journal, self.prepared.recipe
        return RunRecord(
            drawplate=importlib.metadata.version("drawplate"),
            status=status,  # type: ignore[arg-type]
            model=self._model_facts(),
            data=data_facts(prepared, self.state.step),
            evaluation=self._evaluation_facts(),
            training=self._training_facts(),
            memory=MemoryFacts(
                device_peak_predicted_bytes=prepared.plan.predicted_bytes("device"),
                device_peak_bytes=self.peak.device_peak_bytes,
                host_peak_predicted_bytes=prepared.plan.predicted_bytes("host"),
                host_peak_bytes=self.peak.host_peak_bytes,
            ),
            machine=machine(prepared.device),
            versions={name: importlib.metadata.version(name) for name in VERSIONED},
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
        )

    def _model_facts(self) -> ModelFacts:
        checkpoint, plan_ = self.prepared.checkpoint, self.prepared.plan
        adapter = self.model.adapter if self.model else None
        return ModelFacts(
            name=checkpoint.name,
            revision=checkpoint.revision,
            parameters=self.prepared.anatomy.parameters,
            precision=plan_.precision,
            sha256=checkpoint.sha256(),
            architecture=(checkpoint.config.architectures or [""])[0],
            layers=checkpoint.config.num_hidden_layers,
            trainable_parameters=adapter.parameter_count if adapter else 0,
            frozen_bytes=(self.model.residency.device_bytes + self.model.residency.host_bytes) if self.model else 0,
            self_check_difference=self.self_check_difference,
        )

    def _evaluation_facts(self) -> EvaluationFacts:
        baseline, final = self.scores.get("baseline"), self.scores.get("final")
        facts = EvaluationFacts(
            baseline=total(baseline) if baseline else None,
            final=total(final) if final else None,
            context_tokens=choose_context_tokens(self.prepared.recipe, self.prepared.plan.max_length),
        )
        if not baseline or not final:
            return facts
        change = perplexity_change(baseline, final, seed=self.prepared.recipe.train.seed)
        return replace(facts, perplexity_change_percent=change.percent, change_ci95_percent=change.ci95_percent)

    def _training_facts(self) -> TrainingFacts:
        state, plan_ = self.state, self.prepared.plan
        per_epoch = steps_per_epoch(len(self.prepared.train.sequences), plan_.effective_batch_size)
        return TrainingFacts(
            optimizer_steps=state.step - state.skipped_steps,
            epochs=state.step / per_epoch,
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
        )

    def _document_changes(self) -> tuple[DocumentChange, ...]:
        pairs = zip(self.scores.get("baseline", ()), self.scores.get("final", ()), strict=False)
        return tuple(
            DocumentChange(document=a.document, tokens=a.tokens, baseline_nats=a.nats, final_nats=b.nats)
            for a, b in pairs
        )


def data_facts(prepared: Prepared, steps: int) -> DataFacts:
    """What went in, and how much of it the loss saw in so many optimizer steps."""
    seen = counted_in_steps(
        prepared.train.sequences, steps, prepared.plan.effective_batch_size, prepared.recipe.train.seed
    )
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
