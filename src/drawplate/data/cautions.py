"""What a person should know of the training windows before a run: prompts that do not fit, texts without targets, and
answers after which nothing teaches the model to stop.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from drawplate.data.tokens import Tokenized, Tokenizer
from drawplate.records import Document, TokenLedger
from drawplate.units import format_count


def cautions(documents: Seq[Document], training: Tokenized, tokenizer: Tokenizer, max_length: int) -> tuple[str, ...]:
    """A sentence for each; `training` are the windows of `documents`."""
    return (*no_end(documents, tokenizer), *not_read(training.ledger, "training", max_length))


def not_read(ledger: TokenLedger, side: str, max_length: int) -> tuple[str, ...]:
    """What of a side's tokens is in no window, and why."""
    said = []
    if ledger.cut_prompts:
        said.append(
            f"{format_count(ledger.cut_prompts)} of {format_count(ledger.documents)} {side} documents are longer than "
            f"data.max_length ({format_count(max_length)} tokens) and have answers that keep only the end of what "
            f"precedes them; {format_count(ledger.dropped_tokens)} tokens of prompts are read nowhere. Raise "
            "data.max_length, or shorten the prompts."
        )
    elif ledger.dropped_windows:
        said.append(
            f"{format_count(ledger.dropped_windows)} {side} windows hold nothing that the loss counts and are left "
            f"out, and with them all of {format_count(ledger.dropped_documents)} documents."
        )
    return tuple(said)


def no_end(documents: Seq[Document], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Whether the documents teach the model where an answer, or a text, ends."""
    rendered = [document for document in documents if document.control_spans is not None]
    plain = len(documents) - len(rendered)
    unclosed = sum(not _closed(document) for document in rendered)
    said = []
    if unclosed:
        said.append(
            f"The chat template closes the last answer of {format_count(unclosed)} of {format_count(len(rendered))} "
            "conversations with no control token: the model will not learn to stop. Use a template that ends each "
            "answer with the tokenizer's end-of-sequence token."
        )
    if plain and tokenizer.eos_token_id is None:
        said.append(
            f"The tokenizer has no end-of-sequence token, so nothing ends {format_count(plain)} of "
            f"{format_count(len(documents))} training documents: the model will not learn to stop. Set eos_token in "
            "tokenizer_config.json."
        )
    return tuple(said)


def _closed(document: Document) -> bool:
    """Whether the last learnt span ends with a control token."""
    ends = {end for _, end in document.control_spans or ()}
    return bool(document.trained_spans) and document.trained_spans[-1][1] in ends  # type: ignore[index]
