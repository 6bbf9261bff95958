"""The ledger of the data: every file, text, document, window and token in one count, each level summing to the next."""

from __future__ import annotations

from drawplate.data.documents import Corpus
from drawplate.data.split import Split
from drawplate.records import DataLedger, TokenLedger


def data_ledger(
    corpus: Corpus, split: Split, train: TokenLedger, heldout: TokenLedger, *, seen_tokens: int = 0
) -> DataLedger:
    """What became of everything that was found.

    Args:
        corpus: its intake has the lines of all files, those of given held-out documents too.
        split: of its documents.
        train, heldout: of the two sides' tokens.
        seen_tokens: of all optimizer steps so far, from `steps.StepOrder.target_tokens_in`.
    """
    lines = corpus.intake
    status = [line.status for line in lines]
    return DataLedger(
        files=len(lines),
        read_files=status.count("read"),
        refused_files=status.count("refused"),
        skipped_files=status.count("skipped"),
        texts=sum(line.texts for line in lines),
        refused_rows=sum(line.refused_rows for line in lines),
        empty_texts=sum(line.empty_documents for line in lines),
        short_texts=sum(line.short_documents for line in lines),
        duplicate_texts=sum(line.duplicate_documents for line in lines),
        documents=sum(line.documents for line in lines),
        near_duplicate_documents=len(split.set_aside),
        given_twice_documents=split.removed_from_train,
        train=train,
        heldout=heldout,
        seen_tokens=seen_tokens,
    )
