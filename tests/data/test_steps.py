from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawplate.data.steps import StepOrder, epoch_order, filling


def order_of(count: int, batch: int) -> StepOrder:
    return StepOrder(target_tokens=(9,) * count, effective_batch=batch, seed=5)


@given(st.integers(0, 500), st.integers(0, 2**70), st.integers(0, 100))
def test_an_epochs_order_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed, epoch).tolist()) == list(range(count))


def test_an_epochs_order_is_a_function_of_seed_and_epoch_alone():
    first = epoch_order(50, 1, 0).tolist()
    np.random.seed(7)
    epoch_order.cache_clear()
    assert epoch_order(50, 1, 0).tolist() == first
    assert epoch_order(50, 1, 1).tolist() != first
    assert epoch_order(50, 2, 0).tolist() != first


def test_an_epochs_order_never_changes_between_versions():
    """Runs resumed with a newer Drawplate, numpy or Python must see the order they started with."""
    assert epoch_order(8, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_order(8, 42, 3).tolist() == [1, 6, 3, 4, 5, 2, 0, 7]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (8, 4), (3, 100), (1, 1)])
def test_steps_of_an_epoch_see_every_sequence_once_and_the_last_may_be_shorter(count, batch):
    order = order_of(count, batch)
    steps = order.steps_per_epoch
    for epoch in range(3):
        parts = [order.indices(epoch * steps + i) for i in range(steps)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(count))
        assert all(len(part) == batch for part in parts[:-1])
        assert 1 <= len(parts[-1]) <= batch


def test_consecutive_epochs_are_ordered_differently():
    order = order_of(64, 64)
    assert order.indices(0).tolist() != order.indices(1).tolist()


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 41),
)
def test_a_short_sequence_joins_a_step_and_none_is_lost(target_tokens, batch, seed, least):
    order = StepOrder(target_tokens=tuple(target_tokens), effective_batch=batch, seed=seed, min_target_tokens=least)
    full = [i for i, tokens in enumerate(target_tokens) if tokens >= least] or list(range(len(target_tokens)))
    assert filling(target_tokens, least) == len(full)
    for epoch in range(2):
        parts = [order.indices(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert np.concatenate(parts).tolist() == epoch_order(len(target_tokens), seed, epoch).tolist()
        sizes = [len(set(part.tolist()) & set(full)) for part in parts]
        assert sizes == [batch] * (len(full) // batch) + [len(full) % batch] * (len(full) % batch > 0)
    assert order.target_tokens_in(2 * order.steps_per_epoch + 1) == 2 * sum(target_tokens) + sum(
        target_tokens[i] for i in order.indices(2 * order.steps_per_epoch)
    )


def test_a_document_of_two_characters_is_never_a_step_of_its_own():
    target_tokens = (300, 2, 280, 310, 1, 290)
    counted_by_sequences = StepOrder(target_tokens=target_tokens, effective_batch=1, seed=42)
    order = StepOrder(target_tokens=target_tokens, effective_batch=1, seed=42, min_target_tokens=32)
    steps = [sum(target_tokens[i] for i in order.indices(step)) for step in range(3 * order.steps_per_epoch)]
    assert order.steps_per_epoch == 4
    assert min(steps) >= 280
    assert min(sum(target_tokens[i] for i in counted_by_sequences.indices(step)) for step in range(6)) == 1
