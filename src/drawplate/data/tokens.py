"""Documents -> windows of token ids, with a ledger in which every token has its line.

A document longer than a window becomes several windows; nothing is truncated. For training they do not overlap, so the
first token of each is read but never predicted (at most one token in `max_length`). For measuring they overlap: each
window after the first begins with `context_tokens` that are read again and not counted, so that every token but the
document's first is counted once, with at least so much text before it; the price is reading them twice.

Documents of which the loss counts parts alone (answers) are cut otherwise (data/windows.py): each answer keeps as much
of its prompt as fits, and what no window reads is counted as dropped.

A control token's name inside a document, like `<|im_end|>` in a page about chat models, is tokenised as the text it is:
only a chat template writes control tokens. Tokenizers without character offsets (the slow ones) are refused, because
spans and bytes cannot be counted through them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drawplate.data.windows import Window, answer_windows, text_windows
from drawplate.errors import DataError, IntegrityError, reason_of
from drawplate.records import Document, Sequence, TokenLedger

Tokenizer = Any
DOCUMENTS_AT_ONCE = 256
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")
"""What a folder with a tokenizer, of whatever kind, has at least one of."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """All windows of a set of documents, in the documents' order, and where every token went."""

    sequences: tuple[Sequence, ...]
    ledger: TokenLedger


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tokens:
    """One document's tokens: `ids`, the UTF-8 bytes of text that each stands for, and whether the loss counts each."""

    ids: np.ndarray
    bytes: np.ndarray
    counted: np.ndarray


class NoTokenizer(DataError):
    """A model's folder holds no tokenizer at all."""


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder: from local files only, and never running code that lies in the folder.

    Raises:
        NoTokenizer: there is none.
        DataError: it cannot be read, or cannot give character offsets.
        IntegrityError: the tokenizer's configuration asks for code to be run.
    """
    folder = Path(folder)
    _refuse_code(folder)
    from transformers import AutoTokenizer  # here, because importing it takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to a Rust panic for a broken tokenizer.json
        there = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
        raise (DataError if there else NoTokenizer)(
            f"The tokenizer in {folder} cannot be read: {reason_of(error)}."
            if there
            else f"{folder} holds no tokenizer.",
            safe="Nothing was changed.",
            next_step="The folder needs tokenizer.json and tokenizer_config.json; copy them from the base model.",
        ) from None
    if _is_empty(tokenizer):
        raise NoTokenizer(
            f"{folder} holds no tokenizer's vocabulary (no tokenizer.json).",
            safe="Nothing was changed.",
            next_step="The folder needs tokenizer.json and tokenizer_config.json; copy them from the base model.",
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer in {folder} gives no character offsets, so what the loss counts cannot be placed.",
            next_step="Use a model whose folder holds a tokenizer.json.",
        )
    return tokenizer


def _is_empty(tokenizer: Tokenizer) -> bool:
    """Whether it has control tokens alone: transformers builds such a one where a folder of Qwen's or Gemma's kind
    has no tokenizer files."""
    words = tokenizer.get_vocab()
    return len(words) <= len(tokenizer.all_special_tokens) and set(words) <= set(tokenizer.all_special_tokens)


def _refuse_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or broken: AutoTokenizer says what is wrong
    if isinstance(values, dict) and "auto_map" in values:
        raise IntegrityError(
            f"{path} names code to be run (auto_map: {values['auto_map']}).",
            safe="None of it was imported.",
            next_step="Use a model that transformers supports by itself, or remove auto_map after reading the code.",
        )


def tokenize(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    append_eos: bool = False,
    context_tokens: int = 0,
) -> Tokenized:
    """Documents -> windows of at most `max_length` tokens.

    With `context_tokens` above 0, each window of a document but its first starts with so many tokens of the window
    before, which are fed and not counted: token p of a document is predicted once, from at least
    min(p, context_tokens) tokens before it.

    If the tokenizer is configured to put a token before every text (BOS), the first window of a document starts with
    it. `append_eos` puts the end-of-sequence token after the last token of every document that no chat template has
    rendered, and counts it; leave it off for held-out text, whose authors wrote no such token. A window in which the
    loss would count nothing (a single token, or a prompt alone) is dropped, and its tokens are counted as dropped.
    """
    if max_length < 2:
        raise ValueError(f"a window of {max_length} tokens predicts nothing")
    if not 0 <= context_tokens < max_length:
        raise ValueError(f"{context_tokens} tokens of context leave nothing new in a window of {max_length}")
    sequences: list[Sequence] = []
    names = ("documents", "tokens", "first_tokens", "masked_tokens", "dropped_tokens", "cut_documents")
    more = ("context_tokens", "text_bytes", "dropped_windows", "dropped_documents", "cut_prompts")
    totals = dict.fromkeys((*names, *more), 0)
    for document, tokens in _encode_all(documents, tokenizer, append_eos):
        totals["documents"] += 1
        totals["tokens"] += len(tokens.ids)
        totals["cut_documents"] += len(tokens.ids) > max_length
        totals["text_bytes"] += int(tokens.bytes.sum())
        windows_before, read, cut = len(sequences), 0, False
        for start, fresh, end in _windows_of(document, tokens, max_length, context_tokens):
            totals["dropped_tokens"] += max(start - read, 0)
            read, cut = end, cut or start > 0
            window = _sequence(len(sequences), document, tokens, (start, fresh, end))
            if not window.counted.any():
                totals["dropped_tokens"] += end - fresh
                totals["dropped_windows"] += 1
                continue
            first = int(start == fresh)
            totals["first_tokens"] += first
            totals["masked_tokens"] += int((~window.counted[fresh - start + first :]).sum())
            totals["context_tokens"] += fresh - start
            sequences.append(window)
        totals["dropped_tokens"] += len(tokens.ids) - read
        totals["dropped_documents"] += len(sequences) == windows_before
        totals["cut_prompts"] += cut and document.trained_spans is not None
    ledger = TokenLedger(
        **totals,
        windows=len(sequences),
        counted_tokens=sum(int(sequence.counted.sum()) for sequence in sequences),
    )
    return Tokenized(sequences=tuple(sequences), ledger=ledger)


def _windows_of(document: Document, tokens: _Tokens, max_length: int, context_tokens: int) -> Iterable[Window]:
    if document.trained_spans is None or len(tokens.ids) <= max_length:
        return text_windows(len(tokens.ids), max_length, context_tokens)
    return answer_windows(tokens.counted, max_length, context_tokens or max_length // 2)


def _sequence(index: int, document: Document, tokens: _Tokens, window: tuple[int, int, int]) -> Sequence:
    start, fresh, end = window
    counted = tokens.counted[start:end].copy()
    counted[: max(fresh - start, 1)] = False
    return Sequence(
        index=index,
        document=document.name,
        input_ids=tokens.ids[start:end].copy(),
        counted=counted,
        text_bytes=int(tokens.bytes[start:end][counted].sum()),
    )


def _encode_all(
    documents: Iterable[Document], tokenizer: Tokenizer, append_eos: bool
) -> Iterator[tuple[Document, _Tokens]]:
    """Plain documents go through the tokenizer in groups, which it spreads over the cores."""
    remaining = iter(documents)
    while group := list(itertools.islice(remaining, DOCUMENTS_AT_ONCE)):
        plain = [document for document in group if document.control_spans is None]
        encodings = iter(_encode(tokenizer, [document.text for document in plain], template=True))
        for document in group:
            if document.control_spans is None:
                ids, offsets = next(encodings)
                eos = tokenizer.eos_token_id if append_eos else None
            else:
                ids, offsets = _encode_rendered(document, tokenizer)
                eos = None
            yield document, _place(document, ids, offsets, eos)


def _encode(
    tokenizer: Tokenizer, texts: list[str], *, template: bool, parse_control_tokens: bool = False
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character offsets of each text; `template` keeps what the tokenizer itself puts BEFORE a text."""
    if not texts:
        return []
    result = tokenizer(
        texts,
        add_special_tokens=template,
        split_special_tokens=not parse_control_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    encodings = []
    for ids, offsets, added in zip(
        result["input_ids"], result["offset_mapping"], result["special_tokens_mask"], strict=True
    ):
        end = len(ids)
        while template and end and added[end - 1]:
            end -= 1
        encodings.append((ids[:end], offsets[:end]))
    return encodings


def _encode_rendered(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """A chat as its template rendered it: control tokens at `control_spans` and nowhere else.

    Where parsing finds control tokens elsewhere too, which somebody wrote into a message, the text between the
    template's own is tokenised piece by piece. That is what a tokenizer does itself, save that sentencepiece models may
    then begin a piece with one space more.
    """
    spans = document.control_spans or ()
    [(ids, offsets)] = _encode(tokenizer, [document.text], template=False, parse_control_tokens=True)
    control = set(control_tokens(tokenizer).values())
    found = tuple(tuple(offset) for token, offset in zip(ids, offsets, strict=True) if token in control)
    if found == spans:
        return ids, offsets
    ids, offsets = [], []
    borders = [0, *itertools.chain.from_iterable(spans), len(document.text)]
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        [(piece_ids, piece_offsets)] = _encode(
            tokenizer, [document.text[start:end]], template=False, parse_control_tokens=number % 2 == 1
        )
        ids += piece_ids
        offsets += [(start + a, start + b) for a, b in piece_offsets]
    return ids, offsets


def _place(document: Document, ids: list[int], offsets: Seq[tuple[int, int]], eos: int | None) -> _Tokens:
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = np.maximum.accumulate(places[:, 0]), places[:, 1]
    if document.trained_spans is None:
        counted = np.ones(len(ids), dtype=bool)
    else:
        counted = np.zeros(len(ids), dtype=bool)
        for start, end in document.trained_spans:
            counted |= (starts < end) & (ends > start)
    if eos is not None:
        ids, starts, counted = [*ids, eos], np.append(starts, len(document.text)), np.append(counted, True)
    return _Tokens(ids=np.asarray(ids, dtype=np.int32), bytes=_token_bytes(document.text, starts), counted=counted)


def _token_bytes(text: str, starts: np.ndarray) -> np.ndarray:
    """UTF-8 bytes from each token's first character to the next one's; int64, their sum is the text's.

    Spaces between tokens belong to the one before, the text's first characters to the first token, and a character
    whose bytes are spread over several tokens to the last of them.
    """
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])
    borders = np.concatenate([[0], before[starts[1:]], before[-1:]])
    return np.diff(borders)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of every token that a text cannot contain as text: the ones the tokenizer marks as special."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
