from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.data.split import hold_out_given, split
from drawplate.errors import DataError
from drawplate.records import Document


def documents(*texts: str) -> list[Document]:
    return [Document(name=f"{i}", text=t, sha256=hashlib.sha256(t.encode()).hexdigest()) for i, t in enumerate(texts)]


def texts(side) -> set[str]:
    return {document.text for document in side}


MANY = [f"text {i}" for i in range(1000)]


def test_about_the_asked_share_is_held_out_and_nothing_is_lost():
    result = split(documents(*MANY), 0.1)
    assert 70 <= len(result.heldout) <= 130
    assert texts(result.train) | texts(result.heldout) == set(MANY)
    assert not texts(result.train) & texts(result.heldout)


def test_order_and_names_do_not_matter():
    assert texts(split(documents(*MANY), 0.1).heldout) == texts(split(documents(*reversed(MANY)), 0.1).heldout)


def test_adding_documents_moves_no_other():
    before = split(documents(*MANY), 0.1)
    after = split(documents(*(f"new {i}" for i in range(500)), *MANY), 0.1)
    assert texts(before.heldout) == texts(after.heldout) & set(MANY)
    assert texts(before.train) == texts(after.train) & set(MANY)


def test_a_larger_share_holds_out_the_same_documents_and_more():
    assert texts(split(documents(*MANY), 0.1).heldout) < texts(split(documents(*MANY), 0.3).heldout)


@given(st.sets(st.text(max_size=8), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_each_side_has_a_document(given_texts, fraction):
    result = split(documents(*given_texts), fraction)
    assert result.train
    assert result.heldout
    assert len(result.train) + len(result.heldout) == len(given_texts)


@pytest.mark.parametrize("given_texts", [[], ["only"]])
def test_fewer_than_two_documents_are_a_data_error(given_texts):
    with pytest.raises(DataError, match="too few") as caught:
        split(documents(*given_texts), 0.1)
    assert caught.value.exit_code == 4
    assert "data.split_pattern" in caught.value.next_step


def test_documents_given_on_both_sides_are_taken_out_of_train_and_counted():
    result = hold_out_given(documents("a b", "c", "d"), documents("a  b\n", "e"))
    assert texts(result.train) == {"c", "d"}
    assert texts(result.heldout) == {"a  b\n", "e"}
    assert result.removed_from_train == 1


def test_nothing_left_on_a_side_is_a_data_error():
    with pytest.raises(DataError, match="also in data"):
        hold_out_given(documents("a"), documents("a"))
    with pytest.raises(DataError, match="no document"):
        hold_out_given(documents("a"), [])
