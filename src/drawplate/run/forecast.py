"""`drawplate plan`: what a run would do, need and take, from the least that must be known.

The model's config.json and the documents are needed; weights and a GPU are not. Where the model's folder has no
tokenizer, lengths are estimated from characters, and the plan says so. `gpu` plans for a card that is not there, from
published figures (planner/seconds/gpus.py), in a host with as much memory as memory.ram says, or as this machine has.

Left out: what only a run can find, such as memory that other programs hold on the device.
"""

from __future__ import annotations

from dataclasses import replace

from drawplate.data.cautions import cautions
from drawplate.data.tokens import NoTokenizer, load_tokenizer, tokenize
from drawplate.errors import DataError
from drawplate.machine.device import machine, pick_device
from drawplate.machine.memory import lasting_process_bytes
from drawplate.model.base.hub import complete
from drawplate.model.base.weights import Checkpoint, open_configuration
from drawplate.model.footprint.measure import Tell, unheard
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.planner.choose import choose
from drawplate.planner.seconds.gpus import gpu_named
from drawplate.planner.situation import CorpusShape, Situation, choose_compute_dtype, choose_max_length
from drawplate.recipe import Recipe
from drawplate.records import Plan
from drawplate.run.planning import (
    choose_context_tokens,
    corpus_shape,
    max_positions,
    model_shape,
    obstacles_of,
    situation_of,
    with_disk,
    with_quantization_tax,
)
from drawplate.run.prepare import read_sides, renderer_of, require_predictable
from drawplate.units import format_bytes

CHARACTERS_OF_A_TOKEN = 4
UNMEASURED_LAYERS = (
    "What a compiled layer holds is measured on the card itself. Planned for here is an uncompiled one, whose "
    "activations take up to 40 % more."
)
"""Of the layers of four models (Llama 3B and 8B, Qwen3 4B, Gemma 2 2B) 2 to 38 % with torch 2.11."""


def forecast(recipe: Recipe, gpu: str | None = None, tell: Tell = unheard) -> Plan:
    """The plan of a run on this machine, or on a card that is not in it; `tell` is told what takes long.

    Raises:
        UsageError: the recipe cannot be meant, the model has no configuration, or no figures are known for `gpu`.
        DataError: there are no documents, or none that can be used.
        NeedsNetwork: the configuration or the documents are not on this machine and cannot be fetched.
        DoesNotFit: nothing fits.
    """
    checkpoint = open_configuration(recipe.model)
    max_length = choose_max_length(recipe, max_positions(checkpoint))
    corpus, assumptions, warnings = _corpus_shape(recipe, checkpoint, max_length)
    anatomy = build_anatomy(checkpoint.config)
    situation = (
        _situation_on(gpu, recipe, checkpoint, anatomy) if gpu else situation_of(recipe, checkpoint, anatomy, tell)
    )
    if not complete(checkpoint.folder):
        assumptions += (f"{checkpoint.name} has no weights on this machine; a run needs them.",)
    chosen = choose(replace(situation, assumptions=situation.assumptions + assumptions), corpus, max_length)
    host_bytes = recipe.memory.ram if gpu else None
    chosen = with_quantization_tax(chosen, recipe, checkpoint, anatomy, host_bytes=host_bytes)
    chosen = with_disk(chosen, recipe, checkpoint, anatomy)
    return replace(chosen, warnings=(*checkpoint.remarks, *warnings, *chosen.warnings))


def _situation_on(gpu: str, recipe: Recipe, checkpoint: Checkpoint, anatomy: object) -> Situation:
    """As `situation_of`, on a card of the table."""
    card, here = gpu_named(gpu), machine(pick_device("cpu"))
    ram = recipe.memory.ram or here.ram_bytes
    there = replace(
        here,
        device="cuda",
        device_name=card.name,
        device_bytes=card.bytes,
        driver="",
        bf16_native=card.bf16 > 0,
        ram_bytes=ram,
    )
    host = f"The host is assumed to have {format_bytes(ram)} of memory"
    host += "." if recipe.memory.ram else ", as this machine has; `--ram SIZE` plans for another."
    speed = card.speed(choose_compute_dtype(recipe, there)[0])
    return Situation(
        recipe=recipe,
        machine=there,
        model=model_shape(anatomy, recipe),  # type: ignore[arg-type]
        base_bytes=lasting_process_bytes(),
        stored_precision=checkpoint.quantized_precision,
        stored_double_quant=checkpoint.quantized_doubly,
        speed=speed,
        assumptions=(
            f"{card.name} is not measured but planned for with {speed.source}.",
            *([] if recipe.model.compile is False else [UNMEASURED_LAYERS]),
            host,
        ),
        frontier=True,
        obstacles=obstacles_of(anatomy),  # type: ignore[arg-type]
    )


def _corpus_shape(
    recipe: Recipe, checkpoint: Checkpoint, max_length: int
) -> tuple[CorpusShape, tuple[str, ...], tuple[str, ...]]:
    """Lengths of the windows, what is assumed about them, and what a run would warn of."""
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
    except NoTokenizer as error:
        return *_without_tokenizer(recipe, max_length, error), ()
    read, sides = read_sides(recipe, renderer_of(tokenizer, recipe.data.template_date))
    training = tokenize(sides.train, tokenizer, max_length, append_eos=True)
    context = choose_context_tokens(recipe, max_length)
    heldout = tokenize(sides.heldout, tokenizer, max_length, context_tokens=context)
    require_predictable(training, "training")
    require_predictable(heldout, "held-out")
    said = (*read.left_out, *sides.warnings, *cautions(sides.train, training, tokenizer, max_length))
    return corpus_shape(training, heldout), (), said


def _without_tokenizer(recipe: Recipe, max_length: int, error: DataError) -> tuple[CorpusShape, tuple[str, ...]]:
    """Lengths from characters."""

    def no_template(*_: object) -> None:
        raise DataError(
            f"{error.what} A conversation needs its template.", safe="Nothing was written.", next_step=error.next_step
        )

    _, sides = read_sides(recipe, no_template)  # type: ignore[arg-type]
    train, held = (
        tuple(n for document in side for n in _windows(len(document.text) // CHARACTERS_OF_A_TOKEN + 1, max_length))
        for side in (sides.train, sides.heldout)
    )
    said = f"{error.what} A token is assumed to be {CHARACTERS_OF_A_TOKEN} characters."
    return CorpusShape(lengths=train, heldout_lengths=held), (said,)


def _windows(tokens: int, max_length: int) -> list[int]:
    whole, rest = divmod(tokens, max_length)
    return [max_length] * whole + ([rest] if rest else [])
