"""Few shapes: what is added to a micro-batch is padding and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.data.batches import NOT_COUNTED, cut_packed, cut_padded
from drawplate.layout.widths import WIDTHS
from drawplate.model.device_batch import DeviceBatch, ShapeBounds
from tests.model.conftest import random_sequences


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), packed=st.booleans())
def test_real_positions_are_untouched_and_the_rest_is_padding(lengths: list[int], packed: bool) -> None:
    sequences, bounds = random_sequences(lengths), ShapeBounds()
    batches = cut_packed(sequences, 512, 16, 0) if packed else cut_padded(sequences, 3, 16, 0)
    for batch in batches:
        fitted, borders = bounds.fit(batch)
        width = batch.input_ids_BT.shape[1]
        for name in ("input_ids_BT", "targets_BT", "position_ids_BT", "sequence_ids_BT"):
            assert torch.equal(getattr(fitted, name)[:, :width], getattr(batch, name))
        assert (fitted.targets_BT[:, width:] == NOT_COUNTED).all()
        assert fitted.counted_tokens == batch.counted_tokens
        assert (borders is None) == (not packed)
        if borders is not None:
            kept = len(batch.cu_seqlens)
            assert torch.equal(borders[:kept], batch.cu_seqlens)
            assert (borders[kept:] == fitted.input_ids_BT.shape[1]).all()
            assert borders.diff().max() <= fitted.max_seqlen


def test_shapes_become_few_however_lengths_vary() -> None:
    bounds, shapes = ShapeBounds(), set()
    for seed in range(40):
        lengths = torch.randint(20, 400, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        for batch in cut_packed(random_sequences(lengths, seed), 2048, 16, 0):
            fitted, borders = bounds.fit(batch)
            assert borders is not None
            shapes.add((fitted.input_ids_BT.shape, len(borders), fitted.max_seqlen))
    assert len(shapes) <= WIDTHS + 4, "the widths, and what came before the bounds had grown"


@pytest.mark.parametrize("counted", [0, 1, 99, 100, 799, 800])
def test_room_for_counted_tokens_is_in_eighths(counted: int) -> None:
    empty = torch.empty(0)
    batch = DeviceBatch(
        ids_BT=empty,
        position_ids_BT=empty,
        targets_N=torch.empty(800),
        token_keys_BT=None,
        borders=None,
        longest=0,
        segments=(),
        counted=counted,
    )
    roomier = batch.roomier().counted
    assert counted <= roomier <= min(800, counted + 100)
    assert roomier % 100 == 0
