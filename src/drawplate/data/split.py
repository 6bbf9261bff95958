"""Documents -> train | held-out, decided for each document by its own content alone.

The same text is held out on every machine, in every order, and whatever lies beside it: adding a file moves no other
document. The price is that the held-out share is met on average, not exactly: of 1,000 documents at 10 %, between 80
and 120. Near-duplicates are not yet kept on one side; that belongs in `split`, as a key shared by similar documents.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from drawplate.data.rows import words_sha256
from drawplate.errors import DataError
from drawplate.records import Document


@dataclass(frozen=True, kw_only=True)
class Split:
    """No document is on both sides; `removed_from_train` counts those that were given on both."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    removed_from_train: int = 0


def split(documents: Seq[Document], heldout_fraction: float) -> Split:
    """Hold out the documents whose hash, read as a number in [0, 1), is below the fraction.

    Where that leaves a side empty, the document with the smallest hash is held out, or the one with the largest trained
    on, so that each side has at least one.

    Raises:
        DataError: fewer than two documents.
    """
    if len(documents) < 2:
        raise DataError(
            f"{len(documents)} document is too few: one has to be held out and one trained on.",
            safe="Nothing was written.",
            next_step="Add documents to data.files, cut the one there is with data.split_pattern, "
            "or name others in data.heldout_files.",
        )
    ranked = sorted(documents, key=_share)
    cut = sum(_share(document) < heldout_fraction for document in ranked)
    cut = min(max(cut, 1), len(ranked) - 1)
    heldout = {document.name for document in ranked[:cut]}
    return Split(
        train=tuple(document for document in documents if document.name not in heldout),
        heldout=tuple(document for document in documents if document.name in heldout),
    )


def hold_out_given(documents: Seq[Document], heldout: Seq[Document]) -> Split:
    """Hold out the given documents; what is also among the training documents is taken out there and counted.

    Raises:
        DataError: there is nothing to hold out, or nothing is left to train on.
    """
    known = {words_sha256(document.text) for document in heldout}
    train = tuple(document for document in documents if words_sha256(document.text) not in known)
    if not heldout or not train:
        raise DataError(
            "data.heldout_files holds no document."
            if not heldout
            else f"All {len(documents)} training documents are also in data.heldout_files.",
            safe="Nothing was written.",
            next_step="Name other files in data.heldout_files, or leave it out to have a share held out.",
        )
    return Split(train=train, heldout=tuple(heldout), removed_from_train=len(documents) - len(train))


def _share(document: Document) -> float:
    """[0, 1), uniform over documents."""
    return int(document.sha256[:13], 16) / 16**13
