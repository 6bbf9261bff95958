"""A recipe, a machine and a corpus -> a Plan: every `auto` decided, each with its reason, nothing the user set changed.

Rules of thumb with their sources in the reasons; a search over measured costs can replace them behind the same call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drawplate.errors import UsageError
from drawplate.plan.ledger import (
    DTYPE_BYTES,
    Choice,
    ModelShape,
    Surroundings,
    kept_bytes_per_token_and_layer,
    ledger,
    stored_bits,
)
from drawplate.recipe import Recipe
from drawplate.records import Machine, Plan
from drawplate.units import GIB, format_bytes, format_count

DEFAULT_BATCH_SEQUENCES = 16
FEWEST_USEFUL_STEPS = 50
LONGEST_DEFAULT_WINDOW = 2048
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
SMALL_MODEL_PARAMETERS = 10**9
USABLE_SHARE = 0.85
LARGEST_WHOLE_LAYER_BYTES = GIB


@dataclass(frozen=True, kw_only=True)
class CorpusShape:
    """Lengths of the training windows in tokens."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a choice rests on."""

    recipe: Recipe
    machine: Machine
    model: ModelShape
    base_bytes: int = 0
    stored_precision: str | None = None
    stored_double_quant: bool | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def room_bytes(self) -> int:
        """Bytes that the run may use where it computes."""
        if self.machine.device == "cuda":
            return self.recipe.memory.vram or int(self.machine.device_bytes * 0.95)
        return int((self.recipe.memory.ram or self.machine.ram_bytes) * USABLE_SHARE) - self.base_bytes

    @property
    def double_quant(self) -> bool:
        """Whether 4-bit scales are quantized too: as asked, else as the checkpoint has it, else yes."""
        asked = self.recipe.quantization.bnb_4bit_use_double_quant
        if asked != "auto":
            return asked
        return True if self.stored_double_quant is None else self.stored_double_quant


def choose_max_length(recipe: Recipe, max_positions: int) -> int:
    """Tokens in a window.

    Raises:
        UsageError: more are asked for than the model was made for.
    """
    if recipe.data.max_length != "auto" and recipe.data.max_length > max_positions:
        raise UsageError(
            f"data.max_length: {recipe.data.max_length} exceeds the {max_positions} tokens the model was made for.",
            safe="Nothing was loaded or written.",
            next_step=f"Set data.max_length to {max_positions} or less; longer documents become several windows.",
        )
    if recipe.data.max_length != "auto":
        return recipe.data.max_length
    return min(LONGEST_DEFAULT_WINDOW, max_positions)


def choose_compute_dtype(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    """(float16, bfloat16 or float32, reason)."""
    asked = recipe.quantization.bnb_4bit_compute_dtype
    if recipe.train.fp16:
        return "float16", "train.fp16"
    if recipe.train.bf16:
        return "bfloat16", "train.bf16"
    if asked != "auto":
        return asked, "quantization.bnb_4bit_compute_dtype"
    if machine.bf16_native:
        return "bfloat16", "this device multiplies bf16 natively"
    if machine.device == "cuda":
        return "float16", "this GPU has no bf16"
    return "float32", "this CPU has no native bf16; fp32 is faster than emulation"


def choose(situation: Situation, corpus: CorpusShape, max_length: int) -> Plan:
    """Decide everything the recipe left open.

    Args:
        situation: recipe, machine and model.
        corpus: lengths of the training windows.
        max_length: of a window, from `choose_max_length`.

    Raises:
        UsageError: the recipe asks for another precision than the checkpoint is quantized to.
    """
    recipe, machine, model = situation.recipe, situation.machine, situation.model
    reasons: dict[str, str] = {}
    compute_dtype, reasons["compute_dtype"] = choose_compute_dtype(recipe, machine)
    precision = _precision(situation, compute_dtype, reasons)
    batch = _batch(recipe, machine.device, corpus, reasons)
    packing = batch.packing
    if recipe.data.packing == "auto":
        reasons["packing"] = (
            "several documents share a row, so almost nothing is padding"
            if packing
            else "train.per_device_train_batch_size counts sequences, so each has a row of its own"
        )
    tokens = batch.micro_tokens
    weights = _weights(situation, precision, compute_dtype, reasons)
    activations = _activations(situation, precision, compute_dtype, weights, tokens, reasons)
    steps_an_epoch = math.ceil(len(corpus.lengths) / batch.effective)
    steps = max(1, math.ceil(steps_an_epoch * recipe.train.num_train_epochs))
    steps = min(steps, recipe.train.max_steps or steps)
    compiled = _compiled(situation, precision, weights, reasons)
    predicted = ledger(
        model,
        Choice.in_words(
            model.layers,
            weights=weights,
            activations=activations,
            precision=precision,
            double_quant=situation.double_quant,
            compute_dtype=compute_dtype,
            micro_batch_tokens=tokens,
            packing=packing,
            rows=1 if packing else batch.micro,
            compiled=compiled,
            dequantize=_dequantize(situation, compute_dtype),
            device=machine.device,
        ),
        Surroundings(base_bytes=situation.base_bytes),
    )
    return Plan(
        device=machine.device,
        precision=precision,
        double_quant=situation.double_quant,
        compute_dtype=compute_dtype,
        weights=weights,
        activations=activations,
        compiled=compiled,
        dequantize=_dequantize(situation, compute_dtype),
        packing=packing,
        max_length=max_length,
        micro_batch_sequences=batch.micro,
        micro_batch_tokens=tokens,
        effective_batch_size=batch.effective,
        gradient_accumulation_steps=_accumulation(recipe, batch, corpus, reasons),
        optimizer_steps=steps,
        epochs=recipe.train.num_train_epochs,
        learning_rate=_learning_rate(recipe, model, reasons),
        eval_batch_sequences=_given(recipe.evaluation.per_device_eval_batch_size) or batch.micro,
        reasons=reasons,
        warnings=_warnings(recipe, corpus, batch, steps),
        ledger=predicted.lines,
        phases=predicted.phases,
    )


@dataclass(frozen=True)
class _Batch:
    effective: int
    micro: int
    packing: bool
    micro_tokens: int


def _given(value: Any) -> Any:
    return None if value == "auto" else value


def _batch(recipe: Recipe, device: str, corpus: CorpusShape, reasons: dict[str, str]) -> _Batch:
    micro, accumulation = (
        _given(recipe.train.per_device_train_batch_size),
        _given(recipe.train.gradient_accumulation_steps),
    )
    effective = _given(recipe.train.effective_batch_size)
    if micro and accumulation:
        effective = micro * accumulation
    if effective is None:
        useful = max(1, int(len(corpus.lengths) * recipe.train.num_train_epochs) // FEWEST_USEFUL_STEPS)
        effective = max(micro or 1, min(DEFAULT_BATCH_SEQUENCES, useful)) * (accumulation or 1)
        reasons["effective_batch_size"] = (
            f"{DEFAULT_BATCH_SEQUENCES} sequences a step learn well on small corpora, and a corpus of "
            f"{format_count(len(corpus.lengths))} still gets {FEWEST_USEFUL_STEPS} steps or more where it can"
        )
    multiple = recipe.data.pad_to_multiple_of
    row_tokens = -(-max(corpus.lengths) // multiple) * multiple
    packing = recipe.data.packing if recipe.data.packing != "auto" else micro is None
    if micro is not None:
        return _Batch(effective, micro, packing, micro * row_tokens)
    if packing:
        reasons["micro_batch"] = (
            f"packed rows of {format_count(MICRO_BATCH_TOKENS[device])} tokens keep the device busy"
        )
        return _Batch(effective, effective, packing, max(row_tokens, MICRO_BATCH_TOKENS[device]))
    if accumulation:
        micro = math.ceil(effective / accumulation)
        reasons["micro_batch"] = "the step's sequences over train.gradient_accumulation_steps"
    else:
        micro = max(1, min(effective, MICRO_BATCH_TOKENS[device] // row_tokens))
        reasons["micro_batch"] = f"as many sequences as make {format_count(MICRO_BATCH_TOKENS[device])} tokens"
    return _Batch(effective, micro, packing, micro * row_tokens)


def _dequantize(situation: Situation, compute_dtype: str) -> str:
    """A whole layer at once on a GPU, where launches cost time, unless a dequantized layer is very large."""
    layer_bytes = situation.model.linear_parameters // situation.model.layers * DTYPE_BYTES[compute_dtype]
    return "layer" if situation.machine.device == "cuda" and layer_bytes <= LARGEST_WHOLE_LAYER_BYTES else "product"


def _compiled(situation: Situation, precision: str, weights: str, reasons: dict[str, str]) -> bool:
    asked = situation.recipe.model.compile
    if asked != "auto":
        return asked
    if situation.machine.device == "cuda" and precision == "int8" and weights != "dequantized":
        reasons["compiled"] = "the compiler of torch 2.11 fails on int8 layers"
        return False
    return situation.machine.device == "cuda"


def _accumulation(recipe: Recipe, batch: _Batch, corpus: CorpusShape, reasons: dict[str, str]) -> int:
    """Micro-batches in an optimizer step; packed, the expected number."""
    if not batch.packing:
        return math.ceil(batch.effective / batch.micro)
    expected = min(batch.effective, len(corpus.lengths)) * corpus.tokens / len(corpus.lengths)
    count = max(1, math.ceil(expected / batch.micro_tokens))
    if recipe.train.gradient_accumulation_steps not in ("auto", count):
        reasons["gradient_accumulation_steps"] = (
            f"the step keeps its {format_count(batch.effective)} sequences, which packed make {format_count(count)} "
            "rows; with data.packing: false it keeps the number of micro-batches too"
        )
    return count


def _precision(situation: Situation, compute_dtype: str, reasons: dict[str, str]) -> str:
    asked, stored = situation.recipe.quantization.chosen, situation.stored_precision
    if stored and asked not in ("auto", stored):
        raise UsageError(
            f"quantization.precision: the checkpoint is already quantized to {stored}, and {asked} is asked for.",
            safe="Nothing was loaded or written.",
            next_step=f"Set quantization.precision: {stored} or auto, or start from the unquantized model.",
        )
    if asked != "auto":
        return asked
    if stored:
        reasons["precision"] = "the checkpoint is already quantized so"
        return stored
    plain = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[compute_dtype]
    need = situation.model.parameters * stored_bits(plain, False) / 8
    if need < 0.5 * situation.room_bytes:
        reasons["precision"] = f"{format_bytes(need)} of unquantized weights fit, and quantizing costs perplexity"
        return plain
    reasons["precision"] = f"{format_bytes(need)} of {plain} weights would take over half of the memory"
    return "nf4"


def _weights(situation: Situation, precision: str, compute_dtype: str, reasons: dict[str, str]) -> Any:
    asked = situation.recipe.memory.weights
    if asked != "auto":
        return asked
    quantized = precision in ("nf4", "fp4", "int8")
    plain_bytes = situation.model.linear_parameters * (4 if compute_dtype == "float32" else 2)
    if quantized and plain_bytes < 0.15 * situation.room_bytes:
        reasons["weights"] = (
            f"quantized, then kept dequantized: {format_bytes(plain_bytes)} fit, and no step has to dequantize again"
        )
        return "dequantized"
    frozen = situation.model.linear_parameters * stored_bits(precision, True) / 8
    if situation.machine.device == "cuda" and frozen > 0.6 * situation.room_bytes:
        reasons["weights"] = f"{format_bytes(frozen)} of frozen weights leave too little room: streamed from the host"
        return "host"
    reasons["weights"] = f"{format_bytes(frozen)} of frozen weights fit"
    return "device"


def _activations(
    situation: Situation, precision: str, compute_dtype: str, weights: str, tokens: int, reasons: dict[str, str]
) -> Any:
    recipe, model = situation.recipe, situation.model
    if recipe.memory.activations != "auto":
        return recipe.memory.activations
    if recipe.train.gradient_checkpointing is not None and recipe.train.gradient_checkpointing != "auto":
        return "recompute" if recipe.train.gradient_checkpointing else "keep"
    size = 4 if compute_dtype == "float32" else 2
    bits = stored_bits(precision, True) if weights == "device" else 8.0 * size
    frozen = 0 if weights == "host" else model.linear_parameters * bits / 8
    kept = kept_bytes_per_token_and_layer(model, size) * tokens * model.layers
    room = situation.room_bytes - frozen - model.outside_parameters * size - model.trained_parameters * 16
    if kept < 0.8 * room:
        reasons["activations"] = f"{format_bytes(kept)} of activations fit, so nothing is computed twice"
        return "keep"
    reasons["activations"] = f"{format_bytes(kept)} of activations do not fit: only each layer's input is kept"
    return "recompute"


def _learning_rate(recipe: Recipe, model: ModelShape, reasons: dict[str, str]) -> float:
    if recipe.train.learning_rate != "auto":
        return recipe.train.learning_rate
    small = model.parameters < SMALL_MODEL_PARAMETERS
    reasons["learning_rate"] = "5e-4 for models under a billion parameters, 2e-4 above"
    return 5e-4 if small else 2e-4


def _warnings(recipe: Recipe, corpus: CorpusShape, batch: _Batch, steps: int) -> tuple[str, ...]:
    return _too_few_steps(recipe, corpus, batch, steps) + _idle_patience(recipe, steps)


def _idle_patience(recipe: Recipe, steps: int) -> tuple[str, ...]:
    section = recipe.evaluation
    if section.early_stopping_patience is None or (section.eval_steps or steps) < steps:
        return ()
    return (
        "evaluation.early_stopping_patience does nothing here: the held-out documents are not measured before the end. "
        f"Set evaluation.eval_steps, for example to {max(1, steps // 10)}.",
    )


def _too_few_steps(recipe: Recipe, corpus: CorpusShape, batch: _Batch, steps: int) -> tuple[str, ...]:
    sequences: Sequence[int] = corpus.lengths
    if steps >= FEWEST_USEFUL_STEPS or batch.effective <= 1 or recipe.train.max_steps:
        return ()
    epochs = recipe.train.num_train_epochs
    better = max(1, min(DEFAULT_BATCH_SEQUENCES, int(len(sequences) * epochs) // FEWEST_USEFUL_STEPS))
    if better >= batch.effective:
        return ()
    better_steps = math.ceil(math.ceil(len(sequences) / better) * epochs)
    if better_steps <= steps:
        return ()
    share = batch.effective / len(sequences)
    size = f"{share:.0f} times the training corpus" if share >= 2 else f"{100 * share:.0f} % of the training corpus"
    return (
        f"An effective batch of {format_count(batch.effective)} sequences is {size} "
        f"({format_count(len(sequences))} sequences): it leaves {steps} optimizer step{'s' if steps > 1 else ''}, "
        f"which teach next to nothing. Set train.effective_batch_size={better} (with per_device_train_batch_size and "
        f"gradient_accumulation_steps on auto) for {format_count(better_steps)} steps.",
    )
