"""What a run measures: held-out documents, the unquantized base model, general text; and the record's words for it.

Each measurement is a tuple of documents' sums, kept under a name (`Measured`), so that every change can be paired by
document. The unquantized model is loaded, measured and released before the run's own model is loaded, and again after
that is released, with the adapter as it was written: the memory is used one after the other and not together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from peft import LoraConfig

from drawplate.data.batches import Cutting
from drawplate.data.general import SHIPPED_NAME, sample
from drawplate.errors import DoesNotFit, EnvironmentProblem, UserError
from drawplate.evaluation.interval import Change, perplexity_change
from drawplate.evaluation.score import score_documents, total
from drawplate.machine import device
from drawplate.model.base.precision import Storage
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import read_adapter
from drawplate.model.load.assemble import assemble
from drawplate.model.load.lora_init import Start, quantization_error_start
from drawplate.model.placement import Placement, placement_of
from drawplate.model.support.targets import lora_config
from drawplate.planner.tax import CALIBRATION_TOKENS, HEAD_ROWS, PLAIN_PRECISION, sample_tokens, window_tokens
from drawplate.recipe import LoraSection, Recipe
from drawplate.records import DocumentScore, EvaluationFacts, Sequence
from drawplate.run.journal import Journal
from drawplate.run.planning import choose_context_tokens
from drawplate.run.prepare import Prepared, evaluation_cutting, pad_id

Scores = tuple[DocumentScore, ...]
Measured = dict[str, Scores]
"""baseline, final, unquantized, deployed, general baseline, general final -> documents' sums.

What was not measured is absent. `unquantized` is the base model before quantization, and `deployed` that with the
adapter that is for it, on the same documents."""


def score(
    model: CausalLM,
    sequences: Seq[Sequence],
    cutting: Cutting,
    journal: Journal | None = None,
    *,
    look: Callable[[], None] = lambda: None,
) -> Scores:
    """Documents' sums under the model as it is now; progress is shown, and `look` called, after each micro-batch."""
    batches = cutting(sequences)
    done = 0

    def show(_: object) -> None:
        nonlocal done
        done += 1
        look()
        if journal:
            journal.show(done, len(batches), "micro-batches")

    return score_documents(model, sequences, batches, on_batch=show)


def score_general(prepared: Prepared, model: CausalLM, journal: Journal, *, look: Callable[[], None]) -> Scores:
    """General text under the model as it is now; nothing where forgetting is not measured."""
    if not prepared.general:
        return ()
    return score(model, prepared.general, evaluation_cutting(prepared), journal, look=look)


def score_unquantized(prepared: Prepared, journal: Journal) -> tuple[Scores, Start]:
    """The held-out documents, or a sample of them, under the unquantized base model, and what the adapter starts from.

    Nothing where the plan leaves it out, and no start where the recipe wants the default one. What goes wrong here
    costs a warning and not the run: the measurement is a help, not a need.
    """
    plan = prepared.plan
    if not plan.starts_from_error and "starts_from_error" in plan.reasons:
        journal.message(f"The adapter starts {plan.reasons['starts_from_error']}.")
    if not plan.quantization_tax:
        reason = plan.reasons.get("quantization_tax")
        if reason:
            journal.message(f"What quantization costs is {reason}.")
        return (), {}
    scores: Scores = ()
    start: Start = {}
    problem = ""
    with journal.in_phase("unquantized"):
        try:
            model = _unquantized(prepared, journal)
            cutting = _window_cutting(prepared)
            most = sample_tokens(plan.device, prepared.anatomy.parameters)
            chosen = sample(prepared.heldout.sequences, prepared.split.heldout, most)
            scores = score(model, chosen, cutting, journal)
            start = _error_start(prepared, model, cutting) if plan.starts_from_error else {}
            del model
        except (DoesNotFit, EnvironmentProblem, torch.OutOfMemoryError) as error:
            problem = str(error).partition("\n")[0]
    give_back_memory()
    if problem:
        lost = "The adapter starts from zero" if scores else "What quantization costs was not measured"
        journal.on_warning(f"{lost}: {problem}")
    return scores, start


def score_deployed(
    prepared: Prepared,
    adapter: Path,
    documents: Collection[str],
    journal: Journal,
    *,
    look: Callable[[], None] = lambda: None,
) -> Scores:
    """The unquantized base model with the adapter in a folder, read back from there; nothing where that goes wrong.

    The adapter is safe by now, so that whatever goes wrong costs a warning and not the run.

    Args:
        prepared: of the run, whose own model is released.
        adapter: a folder in PEFT's format.
        documents: those that were measured without the adapter.
        journal: told the progress.
        look: called after each micro-batch.
    """

    def measured() -> Scores:
        config, state = read_adapter(adapter)
        model = _unquantized(prepared, journal, config)
        model.adapter.load_state(state, str(adapter))
        chosen = [sequence for sequence in prepared.heldout.sequences if sequence.document in documents]
        return score(model, chosen, _window_cutting(prepared), journal, look=look)

    scores: Scores = ()
    problem = ""
    with journal.in_phase("deployed"):
        try:
            scores = measured()
        except (UserError, RuntimeError, OSError) as error:
            if isinstance(error, torch.AcceleratorError):
                device.lost()
            problem = str(error).partition("\n")[0]
    give_back_memory()
    if problem:
        journal.on_warning(f"The unquantized base model was not measured with {adapter.name}: {problem}")
    return scores


def _window_cutting(prepared: Prepared) -> Cutting:
    """Micro-batches of the size that the plan counted with, packed where the model's documents may share a row."""
    plan = prepared.plan
    tokens = window_tokens(plan)
    rows = max(1, tokens // plan.max_length)
    return Cutting(packing=plan.packing, tokens=tokens, sequences=rows, pad_id=pad_id(prepared.tokenizer))


def _error_start(prepared: Prepared, model: CausalLM, cutting: Cutting) -> Start:
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    chosen = list(within_tokens(prepared.train.sequences, CALIBRATION_TOKENS[prepared.plan.device]))
    return quantization_error_start(
        model,
        placement_of(prepared.plan, prepared.device).storage,
        cutting(chosen),
        lora_config(recipe.lora, prepared.anatomy, checkpoint.loadable_name, checkpoint.revision),
        seed=recipe.train.seed,
    )


def within_tokens(sequences: Seq[Sequence], tokens: int) -> Iterator[Sequence]:
    """The first windows that have at most so many tokens together; one at least."""
    total = 0
    for sequence in sequences:
        if total and total + len(sequence) > tokens:
            return
        total += len(sequence)
        yield sequence


def give_back_memory() -> None:
    """What a model that is no longer needed held is free for the next one: models have reference cycles."""
    gc.collect()
    if torch.cuda.is_available() and not device.is_lost():
        torch.cuda.empty_cache()


def _unquantized(prepared: Prepared, journal: Journal, adapter: LoraConfig | None = None) -> CausalLM:
    """The base model as released, in the compute dtype; without an adapter there is one that changes nothing."""
    plan, recipe, checkpoint = prepared.plan, prepared.recipe, prepared.checkpoint
    on_gpu = prepared.device.type == "cuda"
    placement = Placement(
        device=prepared.device,
        storage=Storage(PLAIN_PRECISION[plan.compute_dtype]),
        compute_dtype=getattr(torch, plan.compute_dtype),
        weights="host" if on_gpu else "device",
        head_rows=HEAD_ROWS if on_gpu else 0,
        read_once=True,
        adapter=plan.adapter if adapter else "device",
    )
    idle = LoraSection(r=1, target_modules=recipe.lora.target_modules)  # B starts at zero: it changes nothing
    return assemble(
        checkpoint,
        placement,
        adapter or (lambda anatomy: lora_config(idle, anatomy, checkpoint.loadable_name, checkpoint.revision)),
        seed=recipe.train.seed,
        progress=lambda done, count: journal.show(done, count, "layers"),
        tell=journal.on_warning,
    )


def evaluation_facts(recipe: Recipe, max_length: int, measured: Measured) -> EvaluationFacts:
    """The record's evaluation part: sums, changes and intervals of whatever was measured."""
    facts: dict[str, object] = {"context_tokens": choose_context_tokens(recipe, max_length)}
    for name in ("baseline", "final"):
        if scores := measured.get(name):
            facts[name] = total(scores)
    if change := change_between(measured, "baseline", "final", recipe.train.seed):
        facts |= {"perplexity_change_percent": change.percent, "change_ci95_percent": change.ci95_percent}
    facts |= _tax_facts(recipe, measured) | _deployed_facts(recipe, measured) | _general_facts(recipe, measured)
    return EvaluationFacts(**facts)  # type: ignore[arg-type]


def change_between(measured: Measured, before: str, after: str, seed: int) -> Change | None:
    """Paired change of perplexity over the documents that both hold; None where there are none.

    Every measurement scores the same tokens of a document, so that documents are all that has to be matched.
    """
    if not measured.get(before) or not measured.get(after):
        return None
    return perplexity_change(*paired(measured[before], measured[after]), seed=seed)


def paired(before: Scores, after: Scores) -> tuple[Scores, Scores]:
    """The documents that both scored, in the order of the first."""
    later = {score.document: score for score in after}
    common = tuple(score for score in before if score.document in later)
    return common, tuple(later[score.document] for score in common)


def _tax_facts(recipe: Recipe, measured: Measured) -> dict[str, object]:
    change = change_between(measured, "unquantized", "baseline", recipe.train.seed)
    if change is None:
        return {}
    unquantized = measured["unquantized"]
    names = {score.document for score in unquantized}
    return {
        "unquantized_baseline": total(unquantized),
        "quantized_baseline": total(score for score in measured["baseline"] if score.document in names),
        "quantization_tax_percent": change.percent,
        "quantization_tax_ci95_percent": change.ci95_percent,
        "quantization_tax_documents": len(unquantized),
    }


def _deployed_facts(recipe: Recipe, measured: Measured) -> dict[str, object]:
    change = change_between(measured, "unquantized", "deployed", recipe.train.seed)
    if change is None:
        return {}
    return {
        "unquantized_final": total(measured["deployed"]),
        "deployed_change_percent": change.percent,
        "deployed_ci95_percent": change.ci95_percent,
        "deployed_documents": len(measured["deployed"]),
    }


def _general_facts(recipe: Recipe, measured: Measured) -> dict[str, object]:
    before, after = measured.get("general baseline"), measured.get("general final")
    if not before:
        return {}
    facts: dict[str, object] = {
        "general_text": ", ".join(recipe.evaluation.general_files) or SHIPPED_NAME,
        "general_documents": len(before),
        "general_baseline": total(before),
    }
    if change := change_between(measured, "general baseline", "general final", recipe.train.seed):
        assert after is not None
        facts |= {
            "general_final": total(after),
            "general_change_percent": change.percent,
            "general_ci95_percent": change.ci95_percent,
        }
    return facts


def forgetting_warning(recipe: Recipe, measured: Measured) -> str:
    """What to say, and to try, where general text became harder by more than the recipe accepts; empty otherwise."""
    change = change_between(measured, "general baseline", "general final", recipe.train.seed)
    limit = recipe.evaluation.forgetting_warn_percent
    if change is None or change.percent <= limit or change.word == "same":
        return ""
    return (
        f"The model forgets: perplexity of {', '.join(recipe.evaluation.general_files) or SHIPPED_NAME} went up, "
        f"{change.in_figures()}, and evaluation.forgetting_warn_percent is {limit:g}. Less of it is forgotten with a "
        "lower train.learning_rate, fewer train.num_train_epochs, a smaller lora.r, or some general text among "
        "data.files."
    )
