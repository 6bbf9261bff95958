"""What is compared: cases (which documents make up an optimizer step) and settings (who trains them, and how).

No torch here: the driver and its tests read this file without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DISTINCT_TOKENS = 512
CLIMATE_LENGTHS = Path(__file__).resolve().parent.parent / "climate-lengths.json"
CORPUS, CACHE, PRODUCTS = "documents.json", "cache", "products.txt"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Micro-batches of one optimizer step, as lists of document lengths.

    Attributes:
        name: as the user wrote it.
        micro_batches: lengths of the documents of each micro-batch, in tokens.
        indices: of the same documents in the climate corpus; empty where lengths are made up.
        packed_tokens: positions of a packed row, 0 where each document has a row of its own.
    """

    name: str
    micro_batches: tuple[tuple[int, ...], ...]
    packed_tokens: int = 0
    indices: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a step that are not padding."""
        return sum(map(sum, self.micro_batches))


def parse_case(name: str) -> Case:
    """The case of a name.

    `7x512`: 7 documents of 512 tokens. `climate-padded-7-28`: 28 documents of the climate corpus in micro-batches of 7
    in the order they come, each padded to its longest. `climate-packed-4096-28`: the same documents in rows of at most
    4096 positions.

    Raises:
        ValueError: none of these.
    """
    kind, *numbers = name.split("-")[1:] if name.startswith("climate-") else [""]
    if kind in ("padded", "packed") and len(numbers) == 2 and all(n.isdigit() and int(n) > 0 for n in numbers):
        lengths = json.loads(CLIMATE_LENGTHS.read_text(encoding="utf-8"))["lengths"]
        return real_lengths(name, lengths, packed=kind == "packed", size=int(numbers[0]), count=int(numbers[1]))
    rows, x, length = name.partition("x")
    if not (x and rows.isdigit() and length.isdigit() and int(rows) > 0 and int(length) > 1):
        raise ValueError(f"{name!r} is no case: ROWSxLENGTH, climate-padded-ROWS-DOCUMENTS, climate-packed-TOKENS-...")
    return Case(name=name, micro_batches=((int(length),) * int(rows),))


def real_lengths(name: str, lengths: Sequence[int], *, packed: bool, size: int, count: int) -> Case:
    """Some documents of a corpus in a fixed random order: `size` a padded micro-batch, or all in rows of `size`."""
    chosen = [int(i) for i in np.random.default_rng(0).permutation(len(lengths))[:count]]
    groups = [chosen] if packed else [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return Case(
        name=name,
        micro_batches=tuple(tuple(lengths[i] for i in group) for group in groups),
        packed_tokens=size if packed else 0,
        indices=tuple(map(tuple, groups)),
    )


def documents(case: Case, step: int, vocab: int, corpus: Sequence[Sequence[int]] = ()) -> list[list[np.ndarray]]:
    """The token ids of a step's micro-batches; the same for every system.

    With a corpus (and a case of real lengths) its documents, the same at every step. Else words drawn from a few
    hundred ids with Zipf's frequencies, so that there is something to learn from them on random weights: a gradient
    that is wrong shows in the losses of the next steps.
    """
    if corpus and case.indices:
        return [[np.asarray(corpus[i], dtype=np.int64) for i in group] for group in case.indices]
    rng = np.random.default_rng([7, step])
    words = np.random.default_rng(3).choice(vocab, min(DISTINCT_TOKENS, vocab), replace=False)
    weights = 1 / np.arange(1, len(words) + 1)
    weights /= weights.sum()
    return [[rng.choice(words, size=n, p=weights).astype(np.int64) for n in lengths] for lengths in case.micro_batches]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of one system to train.

    Attributes:
        system: drawplate, mission, liger, unsloth or trl; `reference` is the fp32 yardstick.
        name: in the system's own words.
        dropout: of the adapter's input, while timing.
        budget_gib: the process may hold no more of the card, CUDA context included; None for all of it.
        options: what the system's adapter needs to know.
    """

    system: str
    name: str
    dropout: float = 0.1
    budget_gib: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Unique among the settings."""
        budget = f", {self.budget_gib:g} GiB" if self.budget_gib else ""
        return f"{self.system}: {self.name}, dropout {self.dropout:g}{budget}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: proves a setting of a model on some cases, then has its steps timed on some of them.

    Attributes:
        shape: of bench/shapes.py.
        setting: who trains, and how.
        cases: proven in this order.
        timed: those of them whose steps are timed.
        curve: takes the gate's steps for its setting; another process of the same setting needs none of its own.
    """

    shape: str
    setting: Setting
    cases: tuple[str, ...]
    timed: tuple[str, ...]
    curve: bool = True


REFERENCE = Setting(system="reference", name="fp32", dropout=0.0)
MISSION = Setting(system="mission", name="nf4, fp16, checkpointing", options={"compute": "float16"})
OWN_GC = {"bits": 4, "checkpointing": "unsloth"}
UNSLOTH_KEPT = {"bits": 16, "checkpointing": False}
MAIN = [
    MISSION,
    Setting(system="unsloth", name="nf4, its checkpointing", dropout=0.0, options=OWN_GC),
    Setting(system="drawplate", name="bf16, all kept", options={"precision": "bf16"}),
    Setting(system="unsloth", name="bf16, no checkpointing", dropout=0.0, options=UNSLOTH_KEPT),
    Setting(system="drawplate", name="fp8, all kept", options={"precision": "fp8", "weights": "dequantized"}),
]
OTHERS = [
    Setting(system="liger", name="bf16, no checkpointing", options={"bits": 16, "checkpointing": False}),
    Setting(system="liger", name="nf4, bf16, checkpointing"),
    Setting(system="trl", name="SFTTrainer, liger, nf4, bf16, checkpointing"),
    Setting(system="mission", name="nf4, bf16, checkpointing"),
    Setting(system="unsloth", name="bf16, no checkpointing", options=UNSLOTH_KEPT),
    Setting(system="drawplate", name="bf16, all kept", dropout=0.0, options={"precision": "bf16"}),
]


def settings(systems: Iterable[str], budgets_gib: Iterable[float | None]) -> list[Setting]:
    """The settings to run, the most telling first: for the whole card (None), and for each budget those made for one.

    Raises:
        ValueError: an unknown system.
    """
    wanted, budgets = list(systems), list(budgets_gib)
    unknown = set(wanted) - {s.system for s in MAIN + OTHERS}
    if unknown:
        raise ValueError(f"unknown systems: {', '.join(sorted(unknown))}")
    found = list(MAIN) if None in budgets else []
    for budget in budgets:
        found += within(budget) if budget is not None else []
    found += OTHERS if None in budgets else []
    chosen = [s for s in found if s.system in wanted]
    return chosen if MISSION in chosen else [MISSION, *chosen]  # the gate measures by it


def jobs_of(shape: str, chosen: Sequence[Setting], cases: Sequence[str], gate_case: str) -> list[Job]:
    """A job for each setting; a planned one has a process for each case, because a plan is made for one."""
    found = []
    for setting in chosen:
        if not setting.options.get("plan"):
            timed = () if setting == REFERENCE else tuple(cases)
            found.append(Job(shape=shape, setting=setting, cases=tuple(cases), timed=timed))
            continue
        proves = gate_case if gate_case in cases else cases[0]
        found += [
            Job(shape=shape, setting=setting, cases=(case,), timed=(case,), curve=case == proves) for case in cases
        ]
    return found


def within(budget_gib: float) -> list[Setting]:
    """What a system can do to use a small budget well; what fits by itself is in MAIN already.

    Drawplate's planner decides by itself. Unsloth can leave layers out of its checkpointing: `keep: fit` measures how
    many layers' activations fit, per case.
    """
    kept, nf4, fp8 = {**OWN_GC, "keep": "fit"}, {"plan": True, "precision": "nf4"}, {"plan": True, "precision": "fp8"}
    return [
        Setting(system="unsloth", name="nf4, as many kept as fit", dropout=0.0, budget_gib=budget_gib, options=kept),
        Setting(system="drawplate", name="planned", budget_gib=budget_gib, options={"plan": True}),
        Setting(system="drawplate", name="planned, fp8", budget_gib=budget_gib, options=fp8),
        Setting(system="drawplate", name="planned, nf4", budget_gib=budget_gib, options=nf4),
    ]
