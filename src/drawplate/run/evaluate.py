"""Any number of models and adapters on the same documents: `drawplate eval`.

Each is loaded, measured and released before the next, so that together they need the memory of the largest. All read
windows of one length, that of the model with the shortest reach. Where two tokenizers cut the documents alike,
perplexities are compared; bits per byte are comparable always. Changes are paired by document, against the first.

Left out: tasks with answers to choose among. lm-evaluation-harness measures those on what Drawplate writes
(docs/evaluation.md says how).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from drawplate.data.batches import Cutting
from drawplate.data.cautions import not_read
from drawplate.data.documents import Corpus, read_documents
from drawplate.data.tokens import Tokenized, load_tokenizer, tokenize
from drawplate.errors import UsageError
from drawplate.evaluation.interval import Change, bits_per_byte_change, perplexity_change
from drawplate.evaluation.score import total
from drawplate.machine.device import pick_device
from drawplate.model.base.adapter_base import base_of, other_base, other_precision
from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.model.layer.adapter import read_adapter
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import placement_of
from drawplate.model.support.targets import lora_config, require_fit
from drawplate.planner.situation import choose_max_length
from drawplate.recipe import LoraSection, Recipe, expand, load_recipe
from drawplate.records import ModelScore
from drawplate.run.folder import UNQUANTIZED_NAME
from drawplate.run.heldout import Scores, give_back_memory, paired, score
from drawplate.run.journal import Journal
from drawplate.run.planning import choose_context_tokens, corpus_shape, max_positions, plan_for_lengths
from drawplate.run.prepare import pad_id, renderer_of, require_predictable
from drawplate.run.trained_on import trained_on


@dataclass(frozen=True, kw_only=True)
class _Contender:
    """One thing to measure: a base model, or an adapter on it."""

    name: str
    recipe: Recipe
    checkpoint: Checkpoint
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """What was found of one."""

    contender: _Contender
    tokens: Tokenized
    scores: Scores
    precision: str


def compare_models(
    models: Seq[str], adapters: Seq[str], files: Seq[str], journal: Journal, settings: Seq[str] = ()
) -> dict[str, ModelScore]:
    """Every base model and every adapter on all the documents of `files`; name -> score, in the order given.

    Args:
        models: folders or repository names.
        adapters: folders of PEFT LoRA adapters; with several models, each belongs to the one it was trained on.
        files: files or folders of documents.
        journal: told the progress.
        settings: `section.key=value`, as for a recipe: precision, window, context.

    Raises:
        UserError: whatever a person can act on.
    """
    with journal.in_phase("read"):
        contenders = _contenders(models, adapters, files, settings)
        for line in _remarks(contenders):
            journal.on_warning(line)
        first = contenders[0]
        max_length = min(choose_max_length(c.recipe, max_positions(c.checkpoint)) for c in contenders)
        section = first.recipe.data
        render = renderer_of(load_tokenizer(first.checkpoint.folder), section.template_date)
        corpus = read_documents(section, section.files, render)
        for line in (*corpus.left_out, *_seen(contenders, corpus)):
            journal.on_warning(line)
    measured = []
    for contender in contenders:
        measured.append(_measure(contender, corpus, max_length, journal))
        give_back_memory()
    return {each.contender.name: _score(measured[0], each) for each in measured}


def _contenders(models: Seq[str], adapters: Seq[str], files: Seq[str], settings: Seq[str]) -> list[_Contender]:
    if len(set(models)) < len(models) or len(set(adapters)) < len(adapters):
        raise UsageError("The same model or adapter is given twice.", next_step="Name each once.")
    alone = len(models) == 1 and len(adapters) <= 1
    bases = []
    for model in models:
        values: dict[str, Any] = {"model": {"name_or_path": model}, "data": {"files": list(files)}}
        recipe = load_recipe(values, list(settings))
        name = "base model" if alone else model
        bases.append(_Contender(name=name, recipe=recipe, checkpoint=open_checkpoint(recipe.model)))
    owners = {adapter: _base_of(adapter, bases) for adapter in adapters}
    for adapter, owner in owners.items():
        require_fit(*read_adapter(expand(adapter)), build_anatomy(owner.checkpoint.config), adapter)
    contenders = []
    for plain in bases:
        own = [adapter for adapter in adapters if owners[adapter] is plain]
        base = replace(plain, recipe=_in_their_precision(plain.recipe, own))
        contenders.append(base)
        for adapter in own:
            name = "with adapter" if alone else f"{base.name} + {adapter}"
            contenders.append(replace(base, name=name, adapter=adapter))
    return contenders


def _remarks(contenders: Seq[_Contender]) -> list[str]:
    """What to tell of how the models were opened, and of adapters on other weights than they were trained on."""
    said = [line for contender in contenders if not contender.adapter for line in contender.checkpoint.remarks]
    for contender in contenders:
        if contender.adapter:
            folder, checkpoint = expand(contender.adapter), contender.checkpoint
            named = read_adapter(folder)[0].base_model_name_or_path
            also = [contender.recipe.model.name_or_path]
            said.append(other_base(contender.adapter, base_of(folder), named, checkpoint, also))
    return [line for line in said if line]


def _seen(contenders: Seq[_Contender], corpus: Corpus) -> list[str]:
    adapters = [contender.adapter for contender in contenders if contender.adapter]
    return [said for each in adapters if (said := trained_on(each, expand(each), corpus.documents))]


def _in_their_precision(recipe: Recipe, adapters: Seq[str]) -> Recipe:
    """The recipe with the precision that its adapters belong to, where they belong to one and none was asked for.

    Raises:
        UsageError: an adapter belongs to another one than what was asked for, or than another adapter.
    """
    wanted = {adapter: precision for adapter in adapters if (precision := base_of(expand(adapter)).needed_precision)}
    asked = recipe.quantization.chosen
    for adapter, precision in wanted.items():
        if precision != (next(iter(wanted.values())) if asked == "auto" else asked):
            raise UsageError(
                f"The adapter {adapter} starts from what {precision} loses, so it belongs to weights in {precision}.",
                safe="Nothing was loaded.",
                next_step=f"Measure it with --set quantization.precision={precision}, or take {UNQUANTIZED_NAME} beside"
                " it for other weights.",
            )
    if not wanted or asked != "auto":
        return recipe
    section = recipe.quantization.model_copy(update={"precision": next(iter(wanted.values()))})
    return recipe.model_copy(update={"quantization": section})


def _base_of(adapter: str, bases: Seq[_Contender]) -> _Contender:
    """The only model there is, or the one that the adapter's configuration names.

    Raises:
        UsageError: none of several models is the one it was trained on.
    """
    config, _ = read_adapter(expand(adapter))
    if len(bases) == 1:
        return bases[0]
    trained_on = str(config.base_model_name_or_path or "")
    for base in bases:
        names = {base.recipe.model.name_or_path, base.checkpoint.name, base.checkpoint.loadable_name}
        if trained_on in names or Path(trained_on).resolve() == Path(base.checkpoint.folder).resolve():
            return base
    raise UsageError(
        f"The adapter {adapter} was trained on {trained_on or 'a model it does not name'}, which is none of the models "
        "given.",
        safe="Nothing was loaded.",
        next_step="Name its base with --model, or measure it alone with its base.",
    )


def _measure(contender: _Contender, corpus: Corpus, max_length: int, journal: Journal) -> _Measured:
    recipe, checkpoint = contender.recipe, contender.checkpoint
    config, state = read_adapter(expand(contender.adapter)) if contender.adapter else (None, {})
    with journal.in_phase("load"):
        tokenizer = load_tokenizer(checkpoint.folder)
        context = choose_context_tokens(recipe, max_length)
        tokens = tokenize(corpus.documents, tokenizer, max_length, context_tokens=context)
        require_predictable(tokens, "given")
        for line in not_read(tokens.ledger, "given", max_length):
            journal.on_warning(line)
        chosen = plan_for_lengths(
            recipe, checkpoint, build_anatomy(checkpoint.config), corpus_shape(tokens), max_length
        )
        model = assemble(
            checkpoint,
            replace(placement_of(chosen, pick_device(recipe.model.device_map)), read_once=True),
            config or (lambda anatomy: lora_config(LoraSection(r=1), anatomy, checkpoint.loadable_name, None)),
            seed=0,  # without an adapter B stays at zero and changes nothing
            progress=lambda done, count: journal.show(done, count, "layers"),
            tell=journal.on_warning,
        )
        if contender.adapter:
            model.adapter.load_state(state, contender.adapter)
            if remark := other_precision(contender.adapter, base_of(expand(contender.adapter)), chosen.precision):
                journal.on_warning(remark)
    cutting = Cutting(
        packing=chosen.packing,
        tokens=chosen.micro_batch_tokens,
        sequences=chosen.micro_batch_sequences,
        pad_id=pad_id(tokenizer),
    )
    with journal.in_phase("evaluate"):
        scores = score(model, tokens.sequences, cutting, journal)
    result = total(scores)
    journal.message(f"{contender.name}: perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    return _Measured(contender=contender, tokens=tokens, scores=scores, precision=chosen.precision)


def _score(first: _Measured, each: _Measured) -> ModelScore:
    sums = total(each.scores)
    result = ModelScore(
        nats=sums.nats,
        tokens=sums.tokens,
        bytes=sums.bytes,
        model=each.contender.checkpoint.name,
        adapter=each.contender.adapter,
        precision=each.precision,
        documents=len(each.scores),
    )
    if each is first:
        return result
    before, after = paired(first.scores, each.scores)
    bits = bits_per_byte_change(before, after)
    perplexity = perplexity_change(before, after) if _cut_alike(first.tokens, each.tokens) else None
    return replace(
        result,
        verdict=(perplexity or bits).in_words(),
        bits_per_byte_change_percent=bits.percent,
        bits_per_byte_ci95_percent=bits.ci95_percent,
        **_perplexity_fields(perplexity),
    )


def _perplexity_fields(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    return {"perplexity_change_percent": change.percent, "perplexity_ci95_percent": change.ci95_percent}


def _cut_alike(one: Tokenized, other: Tokenized) -> bool:
    """Whether both tokenizers gave the same ids in the same windows."""
    return len(one.sequences) == len(other.sequences) and all(
        a.document == b.document and np.array_equal(a.input_ids, b.input_ids)
        for a, b in zip(one.sequences, other.sequences, strict=True)
    )
