from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawplate.data.batches import (
    NOT_COUNTED,
    PADDING_SEQUENCE,
    cut_packed,
    cut_padded,
)
from drawplate.records import Sequence

PAD = 999


def sequence(index: int, length: int, rng: np.random.Generator, masked: float = 0.3) -> Sequence:
    counted = rng.random(length) >= masked
    counted[0] = False
    return Sequence(
        index=index,
        document=f"d{index // 2}",
        input_ids=rng.integers(0, 500, length, dtype=np.int32),
        counted=counted,
        text_bytes=length,
    )


@st.composite
def sequences(draw):
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=25))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    indices = rng.permutation(1000)[: len(lengths)].tolist()
    return [sequence(index, length, rng) for index, length in zip(indices, lengths, strict=True)]


@st.composite
def cuts(draw):
    """Sequences, and one way of cutting them."""
    multiple = draw(st.sampled_from([1, 3, 16]))
    given_sequences = draw(sequences())
    if draw(st.booleans()):
        return given_sequences, multiple, cut_padded(given_sequences, draw(st.integers(1, 9)), multiple, PAD)
    return given_sequences, multiple, cut_packed(given_sequences, draw(st.integers(1, 120)), multiple, PAD)


def segments(batch):
    """(sequence index, slice of columns, row) of every run of equal sequence ids."""
    for b, row in enumerate(batch.sequence_ids_BT.tolist()):
        start = 0
        for t in range(1, len(row) + 1):
            if t == len(row) or row[t] != row[start]:
                yield row[start], b, slice(start, t)
                start = t


@given(cuts())
def test_every_sequence_appears_exactly_once_and_whole(cut):
    given_sequences, _, batches = cut
    seen = {}
    for batch in batches:
        for index, b, columns in segments(batch):
            if index != PADDING_SEQUENCE:
                assert index not in seen
                seen[index] = batch.input_ids_BT[b, columns].tolist()
            else:
                assert (batch.input_ids_BT[b, columns] == PAD).all()
    assert seen == {s.index: s.input_ids.tolist() for s in given_sequences}


@given(cuts())
def test_tokens_and_counted_tokens_do_not_depend_on_the_cut(cut):
    given_sequences, _, batches = cut
    assert sum(batch.tokens for batch in batches) == sum(map(len, given_sequences))
    assert sum(batch.counted_tokens for batch in batches) == sum(int(s.counted[1:].sum()) for s in given_sequences)
    assert {name for batch in batches for name in batch.documents} == {s.document for s in given_sequences}


@given(cuts())
def test_targets_are_the_next_token_of_the_same_sequence(cut):
    given_sequences, _, batches = cut
    counted = {s.index: s.counted for s in given_sequences}
    for batch in batches:
        for index, b, columns in segments(batch):
            targets = batch.targets_BT[b, columns]
            if index == PADDING_SEQUENCE:
                assert (targets == NOT_COUNTED).all()
                continue
            ids = batch.input_ids_BT[b, columns]
            expected = torch.where(torch.from_numpy(counted[index][1:]), ids[1:], NOT_COUNTED)
            assert torch.equal(targets[:-1], expected)
            assert targets[-1] == NOT_COUNTED


@given(cuts())
def test_positions_restart_and_rows_are_padded_on_the_right_to_the_multiple(cut):
    _, multiple, batches = cut
    for batch in batches:
        width = batch.input_ids_BT.shape[1]
        assert width % multiple == 0
        longest_row = int((batch.sequence_ids_BT != PADDING_SEQUENCE).sum(dim=1).max())
        assert width - longest_row < multiple
        for index, b, columns in segments(batch):
            length = columns.stop - columns.start
            assert batch.position_ids_BT[b, columns].tolist() == list(range(length))
            assert index != PADDING_SEQUENCE or columns.stop == width


@given(sequences(), st.integers(1, 120), st.sampled_from([1, 3, 16]))
def test_packed_rows_keep_their_budget_and_borders(given_sequences, budget, multiple):
    for batch in cut_packed(given_sequences, budget, multiple, PAD):
        rows, width = batch.input_ids_BT.shape
        assert rows == 1
        runs = list(segments(batch))
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [0, *(columns.stop for _, _, columns in runs)]
        assert batch.cu_seqlens[-1] == width
        assert batch.max_seqlen == max(columns.stop - columns.start for _, _, columns in runs)
        alone = sum(index != PADDING_SEQUENCE for index, _, _ in runs) == 1
        assert width <= budget or alone


@given(sequences(), st.integers(1, 9))
def test_padded_batches_have_at_most_the_asked_rows_and_no_borders(given_sequences, rows):
    batches = cut_padded(given_sequences, rows, 16, PAD)
    assert [batch.input_ids_BT.shape[0] for batch in batches[:-1]] == [rows] * (len(batches) - 1)
    assert len(batches) == -(-len(given_sequences) // rows)
    assert all(batch.cu_seqlens is None and batch.max_seqlen == batch.input_ids_BT.shape[1] for batch in batches)
    widths = [batch.input_ids_BT.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)


@given(sequences(), st.randoms())
def test_the_same_sequences_in_any_order_give_the_same_batches(given_sequences, random):
    shuffled = list(given_sequences)
    random.shuffle(shuffled)
    for cut in (lambda s: cut_packed(s, 64, 16, PAD), lambda s: cut_padded(s, 4, 16, PAD)):
        for one, other in zip(cut(given_sequences), cut(shuffled), strict=True):
            for field in dataclasses.fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_packing_is_first_fit_decreasing():
    rng = np.random.default_rng(0)
    lengths = [4, 7, 3, 6, 5, 5]
    batches = cut_packed([sequence(i, n, rng) for i, n in enumerate(lengths)], 10, 1, PAD)
    assert [[columns.stop - columns.start for _, _, columns in segments(b)] for b in batches] == [
        [7, 3],
        [6, 4],
        [5, 5],
    ]


def test_an_index_type_of_64_bits_and_a_copy_to_a_device():
    [batch] = cut_packed([sequence(3, 5, np.random.default_rng(0))], 16, 16, PAD)
    moved = batch.to("cpu")
    for name in ("input_ids_BT", "targets_BT", "position_ids_BT", "sequence_ids_BT"):
        assert getattr(batch, name).dtype == torch.int64
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert moved.documents == ("d1",)
    assert batch.to("meta").input_ids_BT.device.type == "meta"
