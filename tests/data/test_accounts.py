"""Every file, text, document, window and token is in one count, over random corpora."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drawplate.data.accounts import data_ledger
from drawplate.data.documents import read_documents
from drawplate.data.split import hold_out_given, split
from drawplate.data.steps import StepOrder, target_tokens_of
from drawplate.data.tokens import tokenize
from drawplate.errors import DataError
from drawplate.recipe import DataSection
from drawplate.records import DataLedger, TokenLedger

WORDS = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "sea", "climate", "of", "rises", "while"]), max_size=30
).map(" ".join)
PART = st.sampled_from(["", " ", "cat", "the sea rises while the cat sat on a mat of climate"])
ROWS = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(WORDS, PART)}),
    st.fixed_dictionaries({"prompt": WORDS, "completion": st.one_of(WORDS, PART)}),
    st.just({"other": 1}),
    st.just({"text": 5}),
)
FILES = st.lists(
    st.one_of(
        st.tuples(st.just(".jsonl"), st.lists(st.one_of(ROWS.map(json.dumps), st.just("{broken")), max_size=12)),
        st.tuples(st.just(".txt"), st.lists(st.one_of(WORDS, st.just("# part")), max_size=6)),
        st.tuples(st.just(".png"), st.just(["no text"])),
    ),
    min_size=1,
    max_size=4,
)


def write(folder: Path, files) -> list[str]:
    for i, (ending, lines) in enumerate(files):
        (folder / f"{i}{ending}").write_text("\n".join(lines))
    return [str(folder)]


def assert_sums(ledger: DataLedger) -> None:
    assert ledger.files == ledger.read_files + ledger.refused_files + ledger.skipped_files
    left_out = ledger.refused_rows + ledger.empty_texts + ledger.short_texts + ledger.duplicate_texts
    assert ledger.texts == ledger.documents + left_out
    sides = ledger.train.documents + ledger.heldout.documents
    assert ledger.documents == sides + ledger.near_duplicate_documents + ledger.given_twice_documents
    for side in (ledger.train, ledger.heldout):
        assert side.tokens == side.counted_tokens + side.first_tokens + side.masked_tokens + side.dropped_tokens
        assert side.dropped_documents <= side.documents
        assert side.windows + side.dropped_windows >= side.documents - side.dropped_documents


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, given_files=st.one_of(st.none(), FILES), length=st.integers(2, 40), minimum=st.integers(1, 12))
def test_every_level_sums_to_the_one_above(tmp_path_factory, tokenizer, files, given_files, length, minimum):
    folder = tmp_path_factory.mktemp("corpus")
    section = DataSection(files=write(folder, files), min_characters=minimum, split_pattern="^# ", heldout_fraction=0.3)
    try:
        corpus = read_documents(section, section.files)
        if given_files is None:
            sides = split(corpus.documents, section)
        else:
            heldout = read_documents(section, write(tmp_path_factory.mktemp("heldout"), given_files))
            sides = hold_out_given(corpus.documents, heldout.documents, section)
            corpus = dataclasses.replace(corpus, intake=corpus.intake + heldout.intake)
    except DataError:
        return
    train = tokenize(sides.train, tokenizer, length, append_eos=True)
    held = tokenize(sides.heldout, tokenizer, length, context_tokens=length // 2)
    ledger = data_ledger(corpus, sides, train.ledger, held.ledger)
    assert_sums(ledger)
    whole = sum(len(tokenizer(document.text)["input_ids"]) + 1 for document in sides.train)
    assert ledger.train.tokens == whole
    assert ledger.train.counted_tokens == sum(int(s.counted.sum()) for s in train.sequences)
    if train.sequences:
        order = StepOrder(target_tokens=target_tokens_of(train.sequences), effective_batch=3, seed=1)
        seen = sum(int(train.sequences[i].counted.sum()) for step in range(7) for i in order.indices(step))
        assert order.target_tokens_in(7) == seen


def test_a_text_that_is_counted_nowhere_is_noticed(tmp_path, tokenizer):
    """The negative control: the sums do not hold by construction."""
    section = DataSection(files=write(tmp_path, [(".jsonl", [json.dumps({"text": f"the cat {i}"}) for i in range(9)])]))
    corpus = read_documents(section, section.files)
    lost = dataclasses.replace(corpus.intake[0], duplicate_documents=1)
    tokens = tokenize(corpus.documents, tokenizer, 16).ledger
    nothing = TokenLedger(**dict.fromkeys((f.name for f in dataclasses.fields(TokenLedger)), 0))
    sides = split(corpus.documents, section)
    with pytest.raises(AssertionError):
        assert_sums(data_ledger(dataclasses.replace(corpus, intake=(lost,)), sides, tokens, nothing))
    with pytest.raises(AssertionError):
        assert_sums(data_ledger(corpus, dataclasses.replace(sides, removed_from_train=1), tokens, nothing))
    with pytest.raises(AssertionError):
        assert_sums(data_ledger(corpus, sides, dataclasses.replace(tokens, masked_tokens=1), nothing))
