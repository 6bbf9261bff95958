"""General English prose that is not of anyone's domain, on which forgetting is measured.

general_english.jsonl ships with the package: 120 excerpts of 550 to 1,000 characters, about 20,000 tokens. Half are of
Lewis Carroll, Alice's Adventures in Wonderland (1865); half of the Library of Congress's proceedings, Workshop on
Electronic Texts (1992), a work of the United States' government. Both are in the public domain; both come from the test
files of the Brotli source archive (alice29.txt and lcet10.txt of the Canterbury corpus), cut by bench/general_text.py.

Left out: other languages, code, and what a user cares to keep. Name files of your own in evaluation.general_files for
that. Models have read Alice in pretraining, which does not disturb a difference of two measurements.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from drawplate.data.chat.template import ChatRenderer
from drawplate.data.documents import Corpus, read_documents
from drawplate.recipe import DataSection
from drawplate.records import Document, Sequence

SHIPPED = Path(__file__).with_name("general_english.jsonl")
SHIPPED_NAME = "general English prose"


def general_corpus(files: Seq[str], text_field: str, render: ChatRenderer) -> Corpus:
    """The documents of `files`, or the shipped ones where there are none, and what was left out of them.

    Raises:
        DataError: a file does not exist, or there is no document in all of them.
    """
    if files:
        return read_documents(DataSection(files=list(files), text_field=text_field), files, render)
    return read_documents(DataSection(files=[str(SHIPPED)]), [str(SHIPPED)])


def general_documents(files: Seq[str], text_field: str, render: ChatRenderer) -> tuple[Document, ...]:
    """The documents of `general_corpus` alone."""
    return general_corpus(files, text_field, render).documents


def sample(sequences: Seq[Sequence], documents: Seq[Document], most_tokens: int) -> tuple[Sequence, ...]:
    """The windows of as many whole documents as have `most_tokens` tokens together, at least one document.

    Which documents depends on their content alone (the end of their hash, whose beginning decides the split), so that
    it is the same on every machine and whatever lies beside them. The windows keep their order and index.
    """
    tokens: dict[str, int] = {}
    for sequence in sequences:
        tokens[sequence.document] = tokens.get(sequence.document, 0) + len(sequence)
    ranked = sorted((d for d in documents if d.name in tokens), key=lambda d: d.sha256[::-1])
    chosen: set[str] = set()
    left = most_tokens
    for document in ranked:
        left -= tokens[document.name]
        if left < 0 and chosen:
            break
        chosen.add(document.name)
    return tuple(sequence for sequence in sequences if sequence.document in chosen)
