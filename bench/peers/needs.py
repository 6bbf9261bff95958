"""What a job will hold of the card, roughly: so that processes which prove themselves side by side find room.

Fitted to what was measured on the H100, 5 to 10 % on the safe side. An estimate that is too small costs a second try
alone; one that is too large costs waiting. No figure of a result depends on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.peers.cases import REFERENCE, Setting, parse_case
from bench.peers.ceiling import product_parameters
from bench.shapes import SHAPES

GIB = 2**30
CONTEXT_BYTES = GIB
SPARE_BYTES = 4 * GIB
"""Of the card: for the contexts of processes that have only imported yet."""
KEPT_BYTES = 6.5
"""A token and layer's kept activations, over the hidden and the intermediate width."""
LOGIT_BYTES = 20
"""A token's logits and their gradients in fp32, over the vocabulary, where they are materialized."""


def needed_bytes(shape: dict[str, Any], setting: Setting, case: str = "") -> int:
    """What a setting's process holds while it trains a case; without a case, what it holds when idle."""
    if setting.budget_gib:
        return int(setting.budget_gib * GIB)
    micro_batches = parse_case(case).micro_batches if case else ()
    tokens = max((len(lengths) * max(lengths) for lengths in micro_batches), default=0)
    if case and parse_case(case).packed_tokens:
        tokens = sum(micro_batches[0])
    embedding = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
    parameters, layers = product_parameters(shape) + embedding, shape["num_hidden_layers"]
    width = shape["hidden_size"] + shape["intermediate_size"]
    if setting == REFERENCE:  # fp32, one layer recomputed at a time, the loss in slices
        activations = tokens * (4 * layers * shape["hidden_size"] + 24 * width)
        return CONTEXT_BYTES + 4 * parameters + activations
    if setting.options.get("precision") or setting.options.get("bits") == 16:
        return CONTEXT_BYTES + 2 * parameters + int(KEPT_BYTES * layers * width * tokens)
    logits = 0 if setting.system == "unsloth" else LOGIT_BYTES * shape["vocab_size"] * tokens
    return CONTEXT_BYTES + int(0.75 * parameters) + logits + tokens * 2 * layers * shape["hidden_size"]


def needed(shape: str, setting: Setting, case: str = "") -> int:
    """As `needed_bytes`, of a shape's name; 0 for a model that is none of bench/shapes.py."""
    return needed_bytes(SHAPES[shape], setting, case) if shape in SHAPES else 0


class Room:
    """The card's memory, shared out: whoever wants more than is left waits until others hold less.

    Args:
        size_bytes: of the card; None where there is none, and everybody finds room.
    """

    def __init__(self, size_bytes: int | None) -> None:
        self.size_bytes = size_bytes
        self._held: dict[int, int] = {}
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    @contextmanager
    def work(self, owner: object, peak_bytes: int, idle_bytes: int) -> Iterator[None]:
        """`owner` holds its peak within, and afterwards what it holds when idle.

        Waits for room while others work; when nobody does, waiting would not help, and the card itself will tell.
        """
        me = id(owner)
        with self._changed:
            self._changed.wait_for(lambda: not self._busy or self._fits(me, peak_bytes))
            self._held[me] = peak_bytes
            self._busy.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._held[me] = idle_bytes
                self._busy.discard(me)
                self._changed.notify_all()

    def leave(self, owner: object) -> None:
        """Its memory is free again."""
        with self._changed:
            self._held.pop(id(owner), None)
            self._changed.notify_all()

    def _fits(self, owner: int, count: int) -> bool:
        others = sum(held for key, held in self._held.items() if key != owner)
        return self.size_bytes is None or others + count <= self.size_bytes - SPARE_BYTES
