"""Held-out sums of nats, tokens and bytes, per document.

A perplexity is exp(sum of nats / sum of tokens): the same for every micro-batch, packing or device, because sums are
carried and divided once. Base and tuned model see identical tokens, so their difference is paired by document
(interval.py).

A document longer than a window is measured in windows that overlap (data/tokens.py), so that no token is predicted
without context; its windows are windows like any other here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch

from drawplate.data.batches import Batch
from drawplate.errors import NumericError
from drawplate.model.causal_lm import CausalLM
from drawplate.records import DocumentScore, Evaluation, Sequence


def score_documents(
    model: CausalLM,
    sequences: Seq[Sequence],
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> tuple[DocumentScore, ...]:
    """Each document's sums under the model as it is now, adapter included, dropout off; in order of first appearance.

    Args:
        model: what to measure.
        sequences: the windows, with distinct `index`.
        batches: the same windows, cut into micro-batches in any way.
        on_batch: called after each micro-batch.

    Raises:
        NumericError: a document's nats are not a finite number; it is named.
    """
    place = {sequence.index: i for i, sequence in enumerate(sequences)}
    nats = np.zeros(len(sequences))
    counted = np.zeros(len(sequences), dtype=np.int64)
    with torch.no_grad():
        for batch in batches:
            _, nats_N = model.sum_nats(batch)
            rows = np.array([place.get(int(i), -1) for i in batch.sequence_ids_BT.reshape(-1)])
            real = rows >= 0
            np.add.at(nats, rows[real], nats_N.double().cpu().numpy()[real])
            np.add.at(counted, rows[real], (batch.targets_BT.reshape(-1).numpy() >= 0)[real])
            if on_batch:
                on_batch(batch)
    scores = _by_document(sequences, nats, counted)
    broken = [score.document for score in scores if not math.isfinite(score.nats)]
    if broken:
        raise _not_a_number(model, broken)
    return scores


def _not_a_number(model: CausalLM, broken: Seq[str]) -> NumericError:
    """The error of documents whose loss is not a number, with the tensor that is at fault if there is one."""
    told = f"The loss on {len(broken)} held-out documents is not a number, the first {broken[0]}"
    tensor = model.not_finite()
    if tensor:
        return NumericError(
            f"{told}: {tensor} holds values that are not numbers.",
            safe="No adapter was changed by measuring.",
            next_step="Fetch or save that file again, or use another; no arithmetic mends such a value.",
        )
    return NumericError(
        f"{told}.",
        safe="No adapter was changed by measuring.",
        next_step="Try quantization.bnb_4bit_compute_dtype: bfloat16 or float32; float16 may overflow here."
        if model.placement.compute_dtype == torch.float16
        else "All weights are numbers, so the model itself overflows here: use another base model or adapter.",
    )


def _by_document(sequences: Seq[Sequence], nats: np.ndarray, counted: np.ndarray) -> tuple[DocumentScore, ...]:
    order: dict[str, list[int]] = {}
    for i, sequence in enumerate(sequences):
        order.setdefault(sequence.document, []).append(i)
    return tuple(
        DocumentScore(
            document=name,
            nats=float(nats[rows].sum()),
            tokens=int(counted[rows].sum()),
            bytes=sum(sequences[i].text_bytes for i in rows),
        )
        for name, rows in order.items()
    )


def total(scores: Iterable[DocumentScore]) -> Evaluation:
    """The sums over documents."""
    scores = tuple(scores)
    return Evaluation(
        nats=math.fsum(s.nats for s in scores), tokens=sum(s.tokens for s in scores), bytes=sum(s.bytes for s in scores)
    )
