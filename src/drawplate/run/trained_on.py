"""Which documents a run trained on, by hash, beside its adapters: so that `eval` can say when it measures those."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from drawplate.records import Document
from drawplate.run.folder import RunFolder
from drawplate.units import format_count

TRAINED_ON_NAME = "trained_on.txt"
DIGITS = 16
"""Of each document's sha256: two of a billion documents share them with a chance of three in a hundred."""


def write_trained_on(folder: RunFolder, documents: Iterable[Document]) -> None:
    """A line for each document of the training side."""
    folder.write_text(TRAINED_ON_NAME, "".join(f"{key}\n" for key in sorted(_keys(documents))))


def trained_on(adapter: str, folder: Path, documents: Iterable[Document]) -> str:
    """What to tell where an adapter was trained on documents that it is measured on; empty where nobody knows.

    Args:
        adapter: what it is called.
        folder: its own, in the folder of the run that trained it.
        documents: to be measured on.
    """
    try:
        known = set((folder.parent / TRAINED_ON_NAME).read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return ""
    keys = list(_keys(documents))
    seen = sum(key in known for key in keys)
    if not seen:
        return ""
    return (
        f"{format_count(seen)} of the {format_count(len(keys))} documents were among those that {adapter} was trained "
        "on. What it gains on them says nothing of other documents."
    )


def _keys(documents: Iterable[Document]) -> Iterable[str]:
    return (document.sha256[:DIGITS] for document in documents)
