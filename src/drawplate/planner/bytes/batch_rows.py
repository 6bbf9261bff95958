"""Micro-batches in the few numbers that memory depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from drawplate.layout.widths import FEWEST_BORDERS, power_of_two, roomier
from drawplate.planner.shape import Choice, ModelShape


@dataclass(frozen=True)
class Rows:
    """Micro-batches as attention and loss see them."""

    tokens: int
    rows: int
    documents: int
    packing: bool
    roomy: bool = False

    @property
    def borders(self) -> int:
        """Of a packed row, rounded up as model/device_batch.py does; without the first."""
        return max(FEWEST_BORDERS, power_of_two(self.documents + 2)) - 1 if self.packing else 0

    @property
    def counted(self) -> int:
        """Tokens that the loss counts, at most: none counts the first of a document. Where micro-steps are captured
        they are rounded up to an eighth (model/device_batch.py)."""
        counted = max(1, self.tokens - (self.documents if self.packing else self.rows))
        return roomier(counted, self.tokens) if self.roomy else min(self.tokens, counted)


def train_rows_of(choice: Choice, model: ModelShape) -> Rows:
    """Training micro-batches."""
    rows = Rows(choice.micro_batch_tokens, choice.rows, choice.documents, choice.packing)
    return replace(rows, roomy=choice.captured(model))


def eval_rows_of(choice: Choice) -> Rows:
    """Evaluation micro-batches."""
    tokens, rows = choice.eval_tokens or choice.micro_batch_tokens, choice.eval_rows or choice.rows
    return Rows(tokens, rows, choice.documents, choice.packing)
