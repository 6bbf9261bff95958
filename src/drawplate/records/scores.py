"""Sums of nats over documents, from which every ratio is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over a set of documents; every ratio is derived from them, never averaged."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True, kw_only=True)
class ModelScore(Evaluation):
    """One of several models or adapters on the same documents; changes are paired, against the first of them.

    Attributes:
        perplexity_change_percent: None for the first, and where the tokenizers cut the documents differently.
        verdict: in words, by perplexity where it can be compared, else by bits per byte; empty for the first.
    """

    model: str = ""
    adapter: str | None = None
    precision: str = ""
    documents: int = 0
    perplexity_change_percent: float | None = None
    perplexity_ci95_percent: tuple[float, float] | None = None
    bits_per_byte_change_percent: float | None = None
    bits_per_byte_ci95_percent: tuple[float, float] | None = None
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One held-out document's sums, the unit of the paired bootstrap."""

    document: str
    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DocumentChange:
    """One held-out document before and after: shown best and worst first.

    Attributes:
        baseline_nats, final_nats: under the base model in the precision of training.
        unquantized_nats, deployed_nats: under the base model before quantization; None where it was not measured.
    """

    document: str
    tokens: int
    baseline_nats: float
    final_nats: float
    unquantized_nats: float | None = None
    deployed_nats: float | None = None
