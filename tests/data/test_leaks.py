from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.data.leaks import longest_shared_run
from drawplate.data.words import word_hashes

TEXTS = st.lists(st.text("ab ", max_size=40), max_size=4)


def longest_by_hand(first: list[str], second: list[str]) -> int:
    best = 0
    for one in (text.split() for text in first):
        for other in (text.split() for text in second):
            for i in range(len(one)):
                for j in range(len(other)):
                    run = 0
                    while i + run < len(one) and j + run < len(other) and one[i + run] == other[j + run]:
                        run += 1
                    best = max(best, run)
    return best


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_it_is_the_longest_run_of_words_by_exhaustive_search(first, second):
    found = longest_shared_run(word_hashes(first), word_hashes(second))
    assert (found.words if found else 0) == longest_by_hand(first, second)
    if found:
        assert longest_by_hand([first[found.first]], [second[found.second]]) == found.words


def test_a_run_never_spans_two_documents():
    found = longest_shared_run(word_hashes(["a b", "c d"]), word_hashes(["a b c d"]))
    assert (found.words, found.first, found.second) == (2, 0, 0)


def test_case_and_layout_do_not_hide_a_copy():
    found = longest_shared_run(
        word_hashes(["x The sea-level\nrises, slowly y"]), word_hashes(["the SEA level rises slowly."])
    )
    assert found.words == 5


def test_characters_of_scripts_without_spaces_are_words():
    found = longest_shared_run(word_hashes(["海平面上升"]), word_hashes(["他说海平面会上升"]))
    assert found.words == 3
