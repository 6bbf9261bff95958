from __future__ import annotations

import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drawplate.data.tokens import load_tokenizer, tokenize
from drawplate.errors import DataError, IntegrityError
from drawplate.records import Document

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
SESSION_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def document(text: str, name: str = "d", **spans) -> Document:
    return Document(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest(), **spans)


def words(tokenizer, sequence) -> list[str]:
    return tokenizer.convert_ids_to_tokens(sequence.input_ids.tolist())


@st.composite
def documents(draw):
    found = []
    for i, text in enumerate(draw(st.lists(TEXT, max_size=6))):
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
        found.append(document(text, f"d{i}", trained_spans=(tuple(cuts),) if draw(st.booleans()) else None))
    return found


@SESSION_FIXTURE
@given(documents(), st.integers(2, 20), st.booleans())
def test_the_ledger_accounts_for_every_token(tokenizer, given_documents, max_length, append_eos):
    result = tokenize(given_documents, tokenizer, max_length, append_eos=append_eos)
    ledger = result.ledger
    texts = (
        tokenizer([d.text for d in given_documents], split_special_tokens=True)["input_ids"] if given_documents else []
    )
    assert ledger.tokens == sum(map(len, texts)) + append_eos * len(given_documents)
    parts = ledger.counted_tokens + ledger.first_tokens + ledger.masked_tokens + ledger.dropped_tokens
    assert ledger.tokens == parts
    assert ledger.tokens == sum(map(len, result.sequences)) - ledger.context_tokens + ledger.dropped_tokens
    assert ledger.counted_tokens == sum(int(s.counted.sum()) for s in result.sequences)
    assert ledger.first_tokens <= ledger.windows == len(result.sequences)
    assert ledger.text_bytes == sum(len(d.text.encode()) for d in given_documents if d.text)
    assert [s.index for s in result.sequences] == list(range(ledger.windows))
    assert all(len(s) <= max_length and not s.counted[0] and s.counted.any() for s in result.sequences)


@SESSION_FIXTURE
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=20, max_size=60), st.integers(3, 20))
def test_a_long_document_is_cut_into_consecutive_windows_that_lose_nothing(tokenizer, text, max_length):
    result = tokenize([document(text)], tokenizer, max_length)
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert np.concatenate([s.input_ids for s in result.sequences]).tolist() == whole
    assert result.ledger.text_bytes == len(text.encode())
    assert result.ledger.dropped_tokens == 0
    assert result.ledger.cut_documents == (len(whole) > max_length)


def test_a_tail_of_one_token_takes_a_second_from_the_window_before(tokenizer):
    text = "zqxzqxzqx"  # nine tokens: no merge was learned for these letters
    result = tokenize([document(text)], tokenizer, 4)
    assert [len(s) for s in result.sequences] == [4, 3, 2]


def test_bytes_of_a_character_cut_in_two_are_counted_once(tokenizer):
    text = "a😀bé😀c"  # a byte-level token for each byte
    assert len(tokenizer(text)["input_ids"]) == len(text.encode()) == 13
    result = tokenize([document(text)], tokenizer, 3, context_tokens=2)
    assert sum(s.text_bytes for s in result.sequences) == 12, "all but the first token's"
    assert result.ledger.text_bytes == 13


def test_only_the_bytes_of_counted_tokens_are_divided_by(tokenizer):
    text = "the cat é sat on a mat"
    span = (text.index(" é"), text.index(" on"))
    [sequence] = tokenize([document(text, trained_spans=(span,))], tokenizer, 64).sequences
    assert sequence.text_bytes == len(" é sat".encode())


@SESSION_FIXTURE
@given(documents(), st.integers(2, 20), st.data())
def test_with_context_every_token_but_a_documents_first_is_counted_once(tokenizer, given_documents, max_length, data):
    context = data.draw(st.integers(1, max_length - 1))
    result = tokenize(given_documents, tokenizer, max_length, context_tokens=context)
    ledger = result.ledger
    parts = ledger.counted_tokens + ledger.first_tokens + ledger.masked_tokens + ledger.dropped_tokens
    assert ledger.tokens == parts
    assert sum(map(len, result.sequences)) == ledger.tokens - ledger.dropped_tokens + ledger.context_tokens
    assert all(len(s) <= max_length and s.counted.any() and not s.counted[0] for s in result.sequences)
    for each in given_documents:
        ids = tokenizer(each.text, split_special_tokens=True)["input_ids"]
        whole = tokenize([each], tokenizer, max(len(ids), 2), context_tokens=1).sequences
        want = [token for s in whole for token, on in zip(s.input_ids, s.counted, strict=True) if on]
        windows = [s for s in result.sequences if s.document == each.name]
        got = [token for s in windows for token, on in zip(s.input_ids, s.counted, strict=True) if on]
        assert got == want
        assert sum(s.text_bytes for s in windows) == sum(s.text_bytes for s in whole)


def test_each_window_reads_the_stated_context_again(tokenizer):
    text = "zqxzqxzqxzqx"  # twelve tokens
    windows = tokenize([document(text)], tokenizer, 6, context_tokens=4).sequences
    whole = tokenizer(text)["input_ids"]
    assert [s.input_ids.tolist() for s in windows] == [whole[i : i + 6] for i in (0, 2, 4, 6)]
    assert [s.counted.sum() for s in windows] == [5, 2, 2, 2]
    assert [s.counted[:4].sum() for s in windows] == [3, 0, 0, 0]


@pytest.mark.parametrize("context", [-1, 8, 9])
def test_context_must_leave_something_new(tokenizer, context):
    with pytest.raises(ValueError, match="leave nothing new"):
        tokenize([document("zqx")], tokenizer, 8, context_tokens=context)


def test_a_document_too_short_to_predict_anything_is_counted_as_dropped(tokenizer):
    result = tokenize([document("z"), document("")], tokenizer, 8)
    assert result.sequences == ()
    assert (result.ledger.documents, result.ledger.tokens, result.ledger.dropped_tokens) == (2, 1, 1)


def test_control_tokens_inside_a_document_are_text(tokenizer):
    text = "the <|im_end|> of <|end|>"
    [sequence] = tokenize([document(text)], tokenizer, 64).sequences
    assert not set(sequence.input_ids.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(sequence.input_ids.tolist()) == text
    plain = tokenizer(text)["input_ids"]  # what would have happened otherwise
    assert set(plain) & set(tokenizer.all_special_ids)


def test_only_tokens_of_trained_spans_are_counted(tokenizer):
    text = "the cat sat on a mat"
    span = (text.index(" on"), len(text))
    [sequence] = tokenize([document(text, trained_spans=(span,))], tokenizer, 64).sequences
    counted = [word for word, on in zip(words(tokenizer, sequence), sequence.counted, strict=True) if on]
    assert "".join(counted).replace("Ġ", " ") == " on a mat"


def test_a_prompt_that_does_not_fit_is_dropped_but_for_its_end(tokenizer):
    text = "zq" * 10 + "xj"
    result = tokenize([document(text, trained_spans=((20, 22),))], tokenizer, 8)
    assert [len(s) for s in result.sequences] == [8]
    assert result.ledger.dropped_tokens == 14
    assert result.ledger.counted_tokens == 2


def test_eos_is_appended_only_when_asked_at_the_end_of_the_last_window(tokenizer):
    text = "zqxzqxzq"
    without = tokenize([document(text)], tokenizer, 4)
    with_eos = tokenize([document(text)], tokenizer, 4, append_eos=True)
    assert tokenizer.eos_token_id not in np.concatenate([s.input_ids for s in without.sequences])
    ids = np.concatenate([s.input_ids for s in with_eos.sequences])
    assert ids[-1] == tokenizer.eos_token_id
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert with_eos.sequences[-1].counted[-1]
    assert with_eos.ledger.tokens == without.ledger.tokens + 1
    assert with_eos.ledger.text_bytes == without.ledger.text_bytes == 8


def test_eos_counts_even_where_spans_mask_the_rest(tokenizer):
    [sequence] = tokenize([document("zq xj", trained_spans=((3, 5),))], tokenizer, 64, append_eos=True).sequences
    assert sequence.counted[-1]


def test_a_tokenizers_own_bos_is_kept_and_its_own_eos_is_not(bos_tokenizer):
    result = tokenize([document("zqxzqx")], bos_tokenizer, 4)
    ids = np.concatenate([s.input_ids for s in result.sequences]).tolist()
    assert ids[0] == bos_tokenizer.bos_token_id
    assert ids.count(bos_tokenizer.bos_token_id) == 1
    assert bos_tokenizer.eos_token_id not in ids
    assert result.sequences[0].counted.tolist() == [False, True, True, True]
    assert result.ledger.text_bytes == 6


def test_the_order_of_documents_does_not_change_their_windows(tokenizer):
    texts = ["the cat sat", "on a mat", "looked at the sea"]
    one = tokenize([document(t) for t in texts], tokenizer, 4)
    other = tokenize([document(t) for t in reversed(texts)], tokenizer, 4)
    assert one.ledger == other.ledger
    assert sorted(s.input_ids.tolist() for s in one.sequences) == sorted(s.input_ids.tolist() for s in other.sequences)


def test_a_saved_tokenizer_is_loaded(tokenizer, tokenizer_folder):
    loaded = load_tokenizer(tokenizer_folder)
    assert loaded("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("content", "said"), [(None, "holds no tokenizer"), ("{", "cannot"), ("{}", "cannot be read")])
def test_a_missing_or_broken_tokenizer_is_a_data_error(tmp_path, content, said):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert re.search(r"[^ .:]\.$", caught.value.what)  # a whole sentence, whatever transformers' message was cut from


def test_a_tokenizer_that_asks_for_code_is_refused_and_the_code_not_imported(tokenizer_folder):
    canary = tokenizer_folder / "canary"
    (tokenizer_folder / "code.py").write_text(f"open({str(canary)!r}, 'w').close()")
    path = tokenizer_folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "code.Canary"]}}
    path.write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match="auto_map"):
        load_tokenizer(tokenizer_folder)
    assert not canary.exists()


def answered(tokenizer, *lengths):
    """A document of prompts and answers by turns, each of so many tokens (one letter each); the first is a prompt."""
    parts = ["xq"[i % 2] + "".join("zkvj"[j % 4] for j in range(n - 1)) for i, n in enumerate(lengths)]
    borders = list(itertools.accumulate(lengths, initial=0))
    spans = tuple((borders[i], borders[i + 1]) for i in range(1, len(parts), 2))
    assert len(tokenizer("".join(parts))["input_ids"]) == sum(lengths), "letters that the tokenizer never joins"
    return Document(name="d", text="".join(parts), sha256="", trained_spans=spans)


@pytest.mark.parametrize(
    ("lengths", "windows", "dropped"),
    [
        ((40, 4), [(28, 44)], 28),  # one answer: a whole window that ends with it
        ((4, 4, 4, 4), [(0, 16)], 0),  # all fits
        ((40, 4, 2, 2), [(32, 48)], 32),  # two answers, and half a window before the first
        ((40, 4, 4, 4), [(28, 44), (36, 52)], 28),  # together they would leave the first less than half a window
        ((3, 20), [(0, 16), (7, 23)], 0),  # an answer longer than a window, the rest with what precedes it
        ((10, 4, 30), [(0, 14)], 30),  # what lies behind the last answer
    ],
)
def test_an_answer_keeps_as_much_of_its_prompt_as_fits(tokenizer, lengths, windows, dropped):
    whole = answered(tokenizer, *lengths)
    ids = tokenizer(whole.text)["input_ids"]
    result = tokenize([whole], tokenizer, 16)
    assert [sequence.input_ids.tolist() for sequence in result.sequences] == [ids[a:b] for a, b in windows]
    assert result.ledger.counted_tokens == sum(lengths[1::2]), "each token of an answer is learnt once"
    assert result.ledger.dropped_tokens == dropped
    assert result.ledger.cut_prompts == any(start > 0 for start, _ in windows)


@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=8), length=st.integers(2, 24), held=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_of_an_answer_is_counted_once_and_the_ledger_sums(tokenizer, lengths, length, held):
    ledger = tokenize(
        [answered(tokenizer, *lengths)], tokenizer, length, context_tokens=length // 2 if held else 0
    ).ledger
    counted = ledger.counted_tokens + ledger.first_tokens + ledger.masked_tokens + ledger.dropped_tokens
    assert counted == ledger.tokens == sum(lengths)
    assert ledger.counted_tokens == sum(lengths[1::2])
