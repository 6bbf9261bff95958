"""Everything that is known before the model is loaded: documents, split, tokens, anatomy and plan.

`prepare` is the first half of every run and all of `drawplate plan`: it reads config.json and the tokenizer but no
weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from drawplate.data.batches import Cutting
from drawplate.data.cautions import cautions, not_read
from drawplate.data.chat.template import ChatRenderer, chat_renderer, writes_a_date
from drawplate.data.documents import Corpus, read_documents
from drawplate.data.general import general_corpus, sample
from drawplate.data.split import Split, hold_out_given, split
from drawplate.data.steps import StepOrder
from drawplate.data.tokens import Tokenized, Tokenizer, load_tokenizer, tokenize
from drawplate.errors import DataError
from drawplate.machine.device import pick_device
from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.model.footprint.measure import Tell, unheard
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.planner.advise import Learner, advise
from drawplate.planner.situation import choose_max_length
from drawplate.recipe import Recipe
from drawplate.records import Plan, Sequence
from drawplate.run.planning import (
    choose_context_tokens,
    corpus_shape,
    left_out_of,
    max_positions,
    plan_for_lengths,
    with_disk,
    with_quantization_tax,
)
from drawplate.train.task import order_of

ALL_OF_THEM = "See intake.jsonl."
GENERAL_TOKENS = {"cpu": 3072, "cuda": 65_536}  # some seconds of each


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything known before the model is loaded; the recipe with what the adviser filled in.

    Attributes:
        general: windows of text that is not of the domain; none where forgetting is not measured.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    anatomy: Anatomy
    tokenizer: Tokenizer
    corpus: Corpus
    split: Split
    train: Tokenized
    heldout: Tokenized
    plan: Plan
    device: torch.device
    general: tuple[Sequence, ...] = ()

    @property
    def order(self) -> StepOrder:
        """Which sequences each optimizer step reads."""
        return order_of(self.train.sequences, self.plan.effective_batch_size, self.recipe.train)


def prepare(recipe: Recipe, tell: Tell = unheard) -> Prepared:
    """Read and split the documents, read the model's configuration, and plan. Loads no weights.

    Args:
        recipe: as the user wrote it.
        tell: told what takes long.
    """
    device = pick_device(recipe.model.device_map)
    checkpoint = open_checkpoint(recipe.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    recipe = with_template_date(recipe, tokenizer)
    corpus, sides = read_sides(recipe, renderer_of(tokenizer, recipe.data.template_date))
    max_length = choose_max_length(recipe, max_positions(checkpoint))
    training = tokenize(sides.train, tokenizer, max_length, append_eos=True)
    heldout = tokenize(sides.heldout, tokenizer, max_length, context_tokens=choose_context_tokens(recipe, max_length))
    require_predictable(training, "training")
    require_predictable(heldout, "held-out")
    general, general_said = _general_windows(recipe, tokenizer, max_length, device)
    anatomy = build_anatomy(checkpoint.config)
    shape = corpus_shape(training, heldout)
    learner = Learner(lengths=shape.lengths, target_tokens=shape.targets, hidden=anatomy.config.hidden_size)
    advised = advise(recipe, learner).recipe
    chosen = plan_for_lengths(recipe, checkpoint, anatomy, shape, max_length, tell)
    chosen = with_quantization_tax(chosen, recipe, checkpoint, anatomy)
    chosen = with_disk(chosen, recipe, checkpoint, anatomy)
    said = (*checkpoint.remarks, *(f"{line} {ALL_OF_THEM}" for line in corpus.left_out), *sides.warnings)
    said += cautions(sides.train, training, tokenizer, max_length)
    said += (*not_read(heldout.ledger, "held-out", max_length), *general_said)
    said += left_out_of(advised, anatomy)
    chosen = replace(chosen, warnings=said + chosen.warnings)
    return Prepared(
        recipe=advised,
        checkpoint=checkpoint,
        anatomy=anatomy,
        tokenizer=tokenizer,
        corpus=corpus,
        split=sides,
        train=training,
        heldout=heldout,
        plan=chosen,
        device=device,
        general=general,
    )


def read_sides(recipe: Recipe, render: ChatRenderer) -> tuple[Corpus, Split]:
    """The documents, and which of them are held out."""
    corpus = read_documents(recipe.data, recipe.data.files, render)
    if not recipe.data.heldout_files:
        return corpus, split(corpus.documents, recipe.data)
    given = read_documents(recipe.data, recipe.data.heldout_files, render)
    sides = hold_out_given(corpus.documents, given.documents, recipe.data)
    both = replace(corpus, intake=corpus.intake + given.intake, left_out=corpus.left_out + given.left_out)
    return both, sides


def _general_windows(
    recipe: Recipe, tokenizer: Tokenizer, max_length: int, device: torch.device
) -> tuple[tuple[Sequence, ...], tuple[str, ...]]:
    """The windows of text that is not of the domain, and what was left out of evaluation.general_files."""
    if not recipe.evaluation.forgetting:
        return (), ()
    section = recipe.evaluation
    corpus = general_corpus(
        section.general_files, recipe.data.text_field, renderer_of(tokenizer, recipe.data.template_date)
    )
    context = choose_context_tokens(recipe, max_length)
    tokens = tokenize(corpus.documents, tokenizer, max_length, context_tokens=context)
    require_predictable(tokens, "general")
    left_out = tuple(f"evaluation.general_files: {line}" for line in corpus.left_out)
    return sample(tokens.sequences, corpus.documents, GENERAL_TOKENS[device.type]), left_out


def require_predictable(tokens: Tokenized, name: str) -> None:
    """Refuse documents in which the loss would count nothing.

    Raises:
        DataError: there is not one token that another precedes.
    """
    if not tokens.sequences:
        raise DataError(
            f"The {name} documents are too short: no token in them can be predicted.",
            safe="Nothing was written.",
            next_step="Add longer documents.",
        )


def renderer_of(tokenizer: Tokenizer, now: datetime | None = None) -> ChatRenderer:
    """The tokenizer's chat template, looked for at the first conversation: a base model has none and needs none.

    `now` is the time that the template may write, if not the clock's.
    """
    make = functools.cache(lambda: chat_renderer(tokenizer, now))
    return lambda messages, tools=(), settings=None: make()(messages, tools, settings)


def with_template_date(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with today's date in it, where the chat template writes one: a run keeps that of its first day."""
    if recipe.data.template_date is not None or not writes_a_date(tokenizer):
        return recipe
    today = datetime.now().replace(microsecond=0)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template_date": today})})


def train_cutting(prepared: Prepared) -> Cutting:
    """How the training windows are cut into micro-batches."""
    chosen = prepared.plan
    return Cutting(
        packing=chosen.packing,
        tokens=chosen.micro_batch_tokens,
        sequences=chosen.micro_batch_sequences,
        pad_to_multiple_of=prepared.recipe.data.pad_to_multiple_of,
        pad_id=pad_id(prepared.tokenizer),
    )


def evaluation_cutting(prepared: Prepared) -> Cutting:
    """How the held-out windows are cut: packed as in training, unless a number of sequences was asked for."""
    chosen = prepared.plan
    asked = prepared.recipe.evaluation.per_device_eval_batch_size != "auto"
    return replace(train_cutting(prepared), packing=chosen.packing and not asked, sequences=chosen.eval_batch_sequences)


def pad_id(tokenizer: Tokenizer) -> int:
    """Any valid id: padding is neither attended to nor counted."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
