"""Documents -> train | held-out, so that neither a document nor a near copy of one is on both sides.

Each document's side is decided by its own words alone: the three smallest of its shingle hashes make one number in
[0, 1), and what is below the held-out fraction is held out. The same text is held out on every machine, in every order,
and whatever lies beside it; and two documents of Jaccard J share the number, and so the side, with a chance of about
J**3 (three of a bottom sketch, Broder 1997), so most near-duplicates fall together by themselves. Those that do not are
found (`data/near_duplicates.py`), and the training one is set aside: it is neither trained on nor measured.

So adding a file moves no other document to the other side; all it can do to one is to set a training document aside,
because a near copy of it is now held out. (Letting a cluster follow one member would keep such documents, but every new
member could move the whole cluster, and the measurement with it.) What the rule costs:

- the held-out share is met on average, not exactly: of 1,000 different documents at 10 %, between 80 and 120;
- of documents in clusters, training loses those whose near copies are held out: about 0.2 * (1 - J**3) of pairs at
  10 %, most members of a cluster of dozens. They are counted. Where more than half of the training documents would
  go, the corpus is made from a template: all are kept, and a warning says that the measurement is flattered;
- where the fraction leaves a side empty, which happens below some twenty documents, the one with the smallest number
  is held out or the one with the largest trained on, and a new file may take its place.

Documents with a group (`data.group_by`) take the group's number: all of a group lie on one side. Conversations take
that of their whole text, since many share a long prompt and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from drawplate.data.leaks import longest_shared_run
from drawplate.data.near_duplicates import clusters, similar_across
from drawplate.data.readers.rows import words_sha256
from drawplate.data.words import shingles, word_hashes
from drawplate.errors import DataError
from drawplate.recipe import DataSection
from drawplate.records import Document, LeakReport
from drawplate.units import format_count

SMALLEST_HASHES = 3
MOST_SET_ASIDE = 0.5


@dataclass(frozen=True, kw_only=True)
class Split:
    """No document is on both sides.

    Attributes:
        train, heldout: in the order in which they were read.
        set_aside: training documents that nearly repeat a held-out one: used for nothing.
        removed_from_train: documents that were given on both sides.
        leaks: what the sides still share; None where it was not looked for.
        warnings: what a person should know of it.
    """

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    set_aside: tuple[Document, ...] = ()
    removed_from_train: int = 0
    leaks: LeakReport | None = None
    warnings: tuple[str, ...] = ()


def split(documents: Seq[Document], section: DataSection) -> Split:
    """Hold out the documents (or groups) whose number is below the section's fraction; at least one on each side.

    Raises:
        DataError: fewer than two documents, or all in one group.
    """
    words = dict(zip((d.name for d in documents), word_hashes(d.text for d in documents), strict=True))
    shares: dict[str, float] = {}
    units: dict[str, list[Document]] = {}
    for document in documents:
        unit = f"group {document.group}" if document.group else document.sha256
        units.setdefault(unit, []).append(document)
        shares.setdefault(unit, _share(document, words[document.name]))
    if len(units) < 2:
        raise _too_few(documents)
    ranked = sorted(units, key=lambda unit: (shares[unit], unit))
    cut = sum(share < section.heldout_fraction for share in shares.values())
    cut = min(max(cut, 1), len(ranked) - 1)
    held = {document.name for unit in ranked[:cut] for document in units[unit]}
    sides = Split(
        train=tuple(document for document in documents if document.name not in held),
        heldout=tuple(document for document in documents if document.name in held),
    )
    return _separated(sides, section, *([words[d.name] for d in side] for side in (sides.train, sides.heldout)))


def hold_out_given(documents: Seq[Document], heldout: Seq[Document], section: DataSection) -> Split:
    """Hold out the given documents; what is also among the training documents, or nearly, is taken out there.

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
    sides = Split(train=train, heldout=tuple(heldout), removed_from_train=len(documents) - len(train))
    sides = _separated(sides, section, *(word_hashes(d.text for d in side) for side in (sides.train, sides.heldout)))
    groups = {document.group for document in heldout} - {""}
    divided = sum(document.group in groups for document in sides.train)
    if not divided:
        return sides
    warning = (
        f"{format_count(divided)} training documents belong to a group (data.group_by: {section.group_by}) that "
        "data.heldout_files has too, and are trained on all the same: what is held out was given by hand."
    )
    return replace(sides, warnings=(*sides.warnings, warning))


def _share(document: Document, words: np.ndarray) -> float:
    """[0, 1), uniform over groups, or over documents that share few words."""
    if document.group:
        key = document.group.encode()
    elif document.trained_spans is not None:
        key = words_sha256(document.text).encode()
    else:
        key = shingles(words)[:SMALLEST_HASHES].astype("<u8").tobytes() or document.sha256.encode()
    return xxhash.xxh3_64_intdigest(key) / 2**64


def _too_few(documents: Seq[Document]) -> DataError:
    if len(documents) > 1:
        return DataError(
            f"All {len(documents)} documents are in one group, {documents[0].group}: none could be held out.",
            safe="Nothing was written.",
            next_step="Leave data.group_by out, or name documents of another group in data.heldout_files.",
        )
    return DataError(
        f"{len(documents)} document is too few: one has to be held out and one trained on.",
        safe="Nothing was written.",
        next_step="Add documents to data.files, cut the one there is with data.split_pattern, "
        "or name others in data.heldout_files.",
    )


def _separated(
    sides: Split, section: DataSection, train_words: Seq[np.ndarray], heldout_words: Seq[np.ndarray]
) -> Split:
    """Set aside what the section asks for, and say what the sides still share; words are in the documents' order."""
    if section.near_duplicates == "off":
        return sides
    threshold = section.near_duplicate_threshold
    train, heldout = [shingles(words) for words in train_words], [shingles(words) for words in heldout_words]
    similar = similar_across(train, heldout, threshold)
    groups = clusters([*train, *heldout], threshold)
    templated = len(similar) > MOST_SET_ASIDE * len(train)
    aside = similar if section.near_duplicates == "auto" and not templated else {}
    rest = [i for i in range(len(train)) if i not in aside]
    kept = tuple(sides.train[i] for i in rest)
    run = longest_shared_run([train_words[i] for i in rest], heldout_words)
    report = LeakReport(
        threshold=threshold,
        similar_pairs=len(similar),
        set_aside_documents=len(aside),
        clusters=len(groups),
        clustered_documents=sum(len(group) for group in groups),
        longest_shared_words=run.words if run else 0,
        train_document=kept[run.first].name if run else "",
        heldout_document=sides.heldout[run.second].name if run else "",
    )
    return replace(
        sides,
        train=kept,
        set_aside=tuple(sides.train[i] for i in sorted(aside)),
        leaks=report,
        warnings=_warnings(report, len(sides.train)),
    )


def _warnings(report: LeakReport, train_documents: int) -> tuple[str, ...]:
    left = report.similar_pairs - report.set_aside_documents
    if not left:
        return ()
    return (
        f"{format_count(left)} of {format_count(train_documents)} training documents nearly repeat a held-out one "
        f"(Jaccard {report.threshold:g} or more) and are trained on: held-out perplexity will look better than on new "
        "text. Hold out other text with data.heldout_files, keep kindred documents together with data.group_by, or "
        "raise data.near_duplicate_threshold if they only share a template.",
    )
