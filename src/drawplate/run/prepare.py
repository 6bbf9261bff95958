"""Everything that is known before the model is loaded: documents, split, tokens, anatomy and plan.

`prepare` is the first half of every run and all of `drawplate plan`: it reads config.json and the tokenizer but no
weights.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from drawplate.data.cautions import cautions, not_read
from drawplate.data.chat.template import ChatRenderer, chat_renderer, writes_a_date
from drawplate.data.documents import Corpus, read_documents
from drawplate.data.general import general_corpus, sample
from drawplate.data.split import Split, hold_out_given, split
from drawplate.data.steps import StepOrder, target_tokens_of
from drawplate.data.tokens import Tokenized, Tokenizer, load_tokenizer, tokenize
from drawplate.errors import DataError, UsageError
from drawplate.machine.caches import standing
from drawplate.machine.cgroups import available_ram_bytes
from drawplate.machine.device import machine, pick_device
from drawplate.machine.memory import memory_sample
from drawplate.machine.speed import measured_speed
from drawplate.model.base.foreign import refusing
from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.model.footprint.measure import layer_shapes, outer_footprints
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.model.support.targets import left_out, lora_config, target_names
from drawplate.model.support.walk import require_practical, walk
from drawplate.planner.advise import Learner, advise, advised_adapter
from drawplate.planner.choose import choose
from drawplate.planner.disk import RunFiles, disk_warning, with_disk_lines
from drawplate.planner.shape import ModelShape
from drawplate.planner.situation import CorpusShape, Obstacles, Situation, choose_compute_dtype, choose_max_length
from drawplate.planner.tax import plan_quantization_tax
from drawplate.recipe import FOUR_BITS, Recipe, expand
from drawplate.records import Plan, Sequence
from drawplate.train.task import Cutting, order_of

HOST_SHARE = 0.85  # of what the host can still give, the most that a measurement beside the run takes
ALL_OF_THEM = "See intake.jsonl."
GENERAL_TOKENS = {"cpu": 3072, "cuda": 65_536}  # some seconds of each
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*")


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


def prepare(recipe: Recipe) -> Prepared:
    """Read and split the documents, read the model's configuration, and plan. Loads no weights."""
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
    chosen = plan_for_lengths(recipe, checkpoint, anatomy, shape, max_length)
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


def left_out_of(recipe: Recipe, anatomy: Anatomy) -> tuple[str, ...]:
    """A warning where all-linear does not mean every linear layer of this architecture."""
    if recipe.lora.filled().target_modules != "all-linear":
        return ()
    names = left_out(lora_config(recipe.lora, anatomy, recipe.model.name_or_path, None), anatomy)
    if not names:
        return ()
    why = "the model never calls them as layers, or PEFT takes no adapter for them"
    return (f"lora.target_modules: all-linear leaves out {', '.join(names)} of {anatomy.architecture}: {why}.",)


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


def with_quantization_tax(
    chosen: Plan, recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy, *, host_bytes: int | None = None
) -> Plan:
    """The plan with the decision on measuring the unquantized base model, within what the host can still give.

    `host_bytes` are those of a host that is not this one.
    """
    available = host_bytes or available_ram_bytes()
    if recipe.memory.ram is not None:
        available = min(available, recipe.memory.ram - memory_sample().process_bytes)
    return plan_quantization_tax(
        chosen,
        model_shape(anatomy, recipe),
        asked=recipe.evaluation.quantization_tax,
        stored_precision=checkpoint.quantized_precision,
        host_room_bytes=int(HOST_SHARE * available),
        starts_adapter=recipe.lora.filled().init_lora_weights == "quantization_error" and chosen.precision in FOUR_BITS,
    )


def with_disk(chosen: Plan, recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy) -> Plan:
    """The plan with what the run will have of the disk, and a warning where that has less room."""
    files = RunFiles(
        trained_parameters=model_shape(anatomy, recipe).trained_parameters,
        tokenizer_bytes=sum(
            path.stat().st_size for pattern in TOKENIZER_FILES for path in checkpoint.folder.glob(pattern)
        ),
    )
    counted = with_disk_lines(chosen, recipe, files)
    warning = disk_warning(counted, shutil.disk_usage(standing(expand(recipe.output_dir))).free, recipe.output_dir)
    return replace(counted, warnings=(*counted.warnings, warning)) if warning else counted


def choose_context_tokens(recipe: Recipe, max_length: int) -> int:
    """Tokens that each window of a long held-out document reads again: as asked, else half a window.

    Raises:
        UsageError: so many are asked for that a window would hold nothing new.
    """
    asked = recipe.evaluation.context_tokens
    if asked == "auto":
        return max_length // 2
    if asked >= max_length:
        raise UsageError(
            f"evaluation.context_tokens: {asked} leave nothing new in a window of {max_length} tokens.",
            safe="Nothing was loaded or written.",
            next_step=f"Set it below {max_length}; half of that is usual.",
        )
    return asked


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


def max_positions(checkpoint: Checkpoint) -> int:
    """Longest input the model was made for; a generous guess where its configuration does not say."""
    return int(getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or 2**15)


def model_shape(anatomy: Anatomy, recipe: Recipe) -> ModelShape:
    """The numbers that memory and time depend on, read off the meta-device module, with the adapter that is advised."""
    require_practical(anatomy)
    section, _ = advised_adapter(recipe.lora, anatomy.config.hidden_size)
    config = lora_config(section, anatomy, recipe.model.name_or_path, None)
    targets = target_names(config, anatomy)
    linears = {
        f"{anatomy.layers_path}.{i}.{path}": module
        for i, layer in enumerate(anatomy.layers)
        for path, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linear_parameters = sum(module.weight.numel() for module in linears.values())
    attention = [
        m for name, m in linears.items() if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "qkv_proj")
    ]
    settings = anatomy.config
    kinds, kind_of_layer = layer_shapes(anatomy, config)
    opening, closing = outer_footprints(anatomy)
    return ModelShape(
        kinds=kinds,
        kind_of_layer=kind_of_layer,
        opening=opening,
        closing=closing,
        tied=anatomy.tied,
        softcap=anatomy.softcap is not None,
        one_by_one=anatomy.one_by_one,
        parameters=anatomy.parameters,
        layers=len(anatomy.layers),
        linear_parameters=linear_parameters,
        outside_parameters=anatomy.parameters - linear_parameters,
        hidden=settings.hidden_size,
        intermediate=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        vocab=settings.vocab_size,
        attention_width=sum(m.out_features for m in attention) // len(anatomy.layers) or 3 * settings.hidden_size,
        trained_parameters=sum(config.r * (linears[n].in_features + linears[n].out_features) for n in targets),
        max_positions=getattr(settings, "max_position_embeddings", None) or 2**15,
    )


def corpus_shape(training: Tokenized, heldout: Tokenized | None = None) -> CorpusShape:
    """Lengths of the sequences on both sides."""
    return CorpusShape(
        lengths=_lengths(training),
        target_tokens=target_tokens_of(training.sequences),
        heldout_lengths=_lengths(heldout) if heldout else (),
    )


def _lengths(tokens: Tokenized) -> tuple[int, ...]:
    return tuple(len(sequence) for sequence in tokens.sequences)


def plan_for_lengths(
    recipe: Recipe,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    corpus: CorpusShape,
    max_length: int,
    *,
    launched: bool = False,
) -> Plan:
    """The plan for windows of these lengths in tokens, on this machine; `launched` for somebody else's loop."""
    with refusing(anatomy.architecture):
        return choose(replace(situation_of(recipe, checkpoint, anatomy), launched=launched), corpus, max_length)


def obstacles_of(anatomy: Anatomy) -> Obstacles:
    """What the architecture cannot take part in."""
    found = walk(anatomy)
    return Obstacles(packing=found.unpackable, streaming=found.obstacle)


def situation_of(recipe: Recipe, checkpoint: Checkpoint, anatomy: Anatomy) -> Situation:
    """What a plan for this machine rests on; a device whose speed is not known yet is measured."""
    device = pick_device(recipe.model.device_map)
    here = machine(device)
    dtype, _ = choose_compute_dtype(recipe, here)
    return Situation(
        recipe=recipe,
        machine=here,
        model=model_shape(anatomy, recipe),
        base_bytes=memory_sample().process_bytes,
        stored_precision=checkpoint.quantized_precision,
        stored_double_quant=checkpoint.quantized_doubly,
        speed=measured_speed(device, getattr(torch, dtype)),
        frontier=True,
        obstacles=obstacles_of(anatomy),
    )
