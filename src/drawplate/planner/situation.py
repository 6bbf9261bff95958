"""What a choice rests on: recipe, machine, model and corpus in numbers, and what follows from them without a search."""

from __future__ import annotations

from dataclasses import dataclass

from drawplate.errors import UsageError
from drawplate.planner.budget import Budget
from drawplate.planner.seconds.gpus import typical_speed
from drawplate.planner.shape import ModelShape
from drawplate.recipe import Recipe
from drawplate.records import DeviceSpeed, Machine

LONGEST_DEFAULT_WINDOW = 2048
USABLE_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class CorpusShape:
    """Lengths of the training sequences in tokens, how many of them the loss counts, and lengths of the held-out ones
    where they are known. Without `target_tokens` the loss counts every token but a sequence's first."""

    lengths: tuple[int, ...]
    target_tokens: tuple[int, ...] = ()
    heldout_lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)

    @property
    def targets(self) -> tuple[int, ...]:
        """Target tokens of each training sequence."""
        return self.target_tokens or tuple(length - 1 for length in self.lengths)


@dataclass(frozen=True, kw_only=True)
class Obstacles:
    """Why an architecture cannot take several documents in a row, or have its layers streamed and recomputed; empty
    where it can."""

    packing: str = ""
    streaming: str = ""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a choice rests on. With `frontier`, other budgets are looked at too; `launched` where somebody else's
    loop takes the steps, so that none is captured."""

    recipe: Recipe
    machine: Machine
    model: ModelShape
    base_bytes: int = 0
    stored_precision: str | None = None
    stored_double_quant: bool | None = None
    speed: DeviceSpeed | None = None
    assumptions: tuple[str, ...] = ()
    frontier: bool = False
    obstacles: Obstacles = Obstacles()
    launched: bool = False

    @property
    def budget(self) -> Budget:
        """What the run may use: as asked, else what the device has, and most of the machine's memory."""
        asked = self.recipe.memory
        ram = asked.ram or int(self.machine.ram_bytes * USABLE_SHARE)
        return Budget(device_bytes=asked.vram or self.machine.device_bytes, host_bytes=ram)

    @property
    def known_speed(self) -> DeviceSpeed:
        """As measured or published, else a typical device's."""
        return self.speed or typical_speed(self.machine.device)

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
    if recipe.quantization.chosen == "fp32":
        return "float32", "quantization.precision: fp32"
    if machine.bf16_native:
        return "bfloat16", "this device multiplies bf16 natively"
    if machine.device == "cuda":
        return "float16", "this GPU has no bf16"
    return "float32", "this CPU has no native bf16; fp32 is faster than emulation"


def precisions_of(situation: Situation, compute_dtype: str) -> tuple[str, ...]:
    """Those to choose from, the best first.

    Raises:
        UsageError: the recipe asks for another than the checkpoint is quantized to.
    """
    asked, stored = situation.recipe.quantization.chosen, situation.stored_precision
    if stored and asked not in ("auto", stored):
        raise UsageError(
            f"quantization.precision: the checkpoint is already quantized to {stored}, and {asked} is asked for.",
            safe="Nothing was loaded or written.",
            next_step=f"Set quantization.precision: {stored} or auto, or start from the unquantized model.",
        )
    if asked != "auto" or stored:
        return (asked if asked != "auto" else str(stored),)
    return ({"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[compute_dtype], "int8", "nf4")


def attends_one_by_one(situation: Situation) -> bool:
    """Whether the device would attend to the documents of a packed row one by one (model/layer/attention.py)."""
    compute_dtype, _ = choose_compute_dtype(situation.recipe, situation.machine)
    return situation.machine.device == "cuda" and (situation.model.one_by_one or compute_dtype == "float32")
