"""What documents become: texts, windows of tokens, and accounts of where every one of them went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Document:
    """One unit of text that is either trained on or held out, never both.

    Attributes:
        name: where it came from, like `reports/ch1.html#12`; unique in a run and shown in messages.
        text: the whole text; for a conversation, the text rendered by the model's template.
        trained_spans: character ranges [start, end) of `text` that the loss counts; None means all of it.
        control_spans: character ranges of `text` that a chat template wrote as control tokens; None where no template
            was used. A control token's name anywhere else is text.
        sha256: of the text's UTF-8 bytes.
        group: documents of one group are never on both sides of the split; empty for a document by itself.
    """

    name: str
    text: str
    sha256: str
    trained_spans: tuple[tuple[int, int], ...] | None = None
    control_spans: tuple[tuple[int, int], ...] | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What became of one file: a line of intake.jsonl. `status` is read, skipped or refused.

    Every text that was met, a row, a file or a piece of one, is in one count: `texts` = documents + duplicates + empty
    + short + refused rows.
    """

    file: str
    status: Literal["read", "skipped", "refused"]
    bytes: int = 0
    documents: int = 0
    characters: int = 0
    duplicate_documents: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    refused_rows: int = 0
    reason: str = ""
    texts: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """One window of one document as token ids: what a micro-batch is made of.

    Attributes:
        index: position in the corpus; with the seed it decides order and dropout.
        document: name of the document it came from.
        input_ids: int32, shape (tokens,).
        counted: bool, shape (tokens,): whether the loss counts the prediction OF this token. The first is never
            counted: nothing precedes it.
        text_bytes: UTF-8 bytes of the text of the counted tokens, for bits per byte.
    """

    index: int
    document: str
    input_ids: np.ndarray
    counted: np.ndarray
    text_bytes: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class TokenLedger:
    """Where every token went; `tokens` of the documents = counted + first + masked + dropped, over all windows.

    `context_tokens` are read a second time, at the start of a window, and counted there in none of these; `text_bytes`
    are of all documents. `dropped_windows` are beside `windows`, and `dropped_documents` are left without any.
    `cut_prompts` are documents with answers that are read without all that precedes them.
    """

    documents: int
    windows: int
    tokens: int
    counted_tokens: int
    first_tokens: int
    masked_tokens: int
    dropped_tokens: int
    cut_documents: int
    text_bytes: int
    context_tokens: int = 0
    dropped_windows: int = 0
    dropped_documents: int = 0
    cut_prompts: int = 0


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """What training and held-out documents have in common, over runs of five words.

    Attributes:
        threshold: Jaccard from which two documents are near-duplicates.
        similar_pairs: training documents that nearly repeated a held-out one, before any was set aside.
        set_aside_documents: those of them that are not trained on.
        clusters, clustered_documents: groups of near-duplicates in the whole corpus, and the documents in them.
        longest_shared_words: the longest run of words that a document left in training shares with a held-out one.
        train_document, heldout_document: the two that share it.
    """

    threshold: float
    similar_pairs: int
    set_aside_documents: int
    clusters: int
    clustered_documents: int
    longest_shared_words: int
    train_document: str = ""
    heldout_document: str = ""


@dataclass(frozen=True, kw_only=True)
class DataLedger:
    """Files -> documents -> windows -> tokens that the loss saw; each level sums to the one above it.

    files = read + refused + skipped
    texts = documents + refused_rows + empty_texts + short_texts + duplicate_texts
    documents = train.documents + heldout.documents + near_duplicate_documents + given_twice_documents
    and within `train` and `heldout` as TokenLedger says; `seen_tokens` are the counted tokens of all optimizer
    steps together, a token as often as it was read.
    """

    files: int
    read_files: int
    refused_files: int
    skipped_files: int
    texts: int
    refused_rows: int
    empty_texts: int
    short_texts: int
    duplicate_texts: int
    documents: int
    near_duplicate_documents: int
    given_twice_documents: int
    train: TokenLedger
    heldout: TokenLedger
    seen_tokens: int = 0
