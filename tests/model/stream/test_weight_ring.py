"""The ring between micro-steps: what its slots hold, and what they are made to hold before a replay."""

from __future__ import annotations

import pytest
import torch

from drawplate.model.base.layer_layout import LayerLayout
from drawplate.model.stream.weight_ring import Residency

LAYERS = 6


@pytest.fixture
def ring() -> Residency:
    layout = LayerLayout.of({"weight": ((64,), torch.float32)})
    buffers = {i: torch.full((64,), float(i)).view(torch.uint8) for i in range(1, LAYERS)}
    on_device = [True] + [False] * (LAYERS - 1)
    return Residency([layout] * LAYERS, on_device, torch.device("cpu"), buffers, slots=2, poison=True)


def walk(ring: Residency) -> None:
    """Forward and back, as training does."""
    for backward, layers in ((False, range(LAYERS)), (True, reversed(range(LAYERS)))):
        for layer in layers:
            views = ring.acquire(layer, backward=backward, training=not backward)
            assert layer == 0 or (views["weight"] == layer).all()
            ring.release(layer)


def test_a_training_walk_ends_with_the_first_layers_in_the_ring(ring: Residency) -> None:
    assert ring.holds() == (None, None)
    walk(ring)
    assert sorted(ring.holds()) == [1, 2]


def test_layers_are_brought_back_to_their_slots_and_only_where_they_are_not_there(ring: Residency) -> None:
    walk(ring)
    before, copies = ring.holds(), ring.copies
    ring.hold(before)
    assert ring.copies == copies, "they are there"
    for layer in range(1, 4):
        ring.acquire(layer)
        ring.release(layer)
    copies, moved = ring.copies, sum(a != b for a, b in zip(ring.holds(), before, strict=True))
    assert moved
    ring.hold(before)
    assert (ring.holds(), ring.copies) == (before, copies + moved)
    walk(ring)
    ring.hold((None, None))
    assert ring.holds() == before, "a slot that was empty may hold anything"


def test_what_a_replay_has_left_is_used_without_a_copy(ring: Residency) -> None:
    walk(ring)
    copies = ring.copies
    for slot, layer in zip(ring._slots, (4, 5), strict=True):
        slot.buffer.copy_(ring._host[layer])  # as a replay does
    ring.believe((4, 5))
    assert (ring.acquire(5, backward=True)["weight"] == 5).all()
    assert ring.copies == copies
    assert ring.holds() == (4, 5)


def test_slots_of_unknown_content_are_filled_anew(ring: Residency) -> None:
    walk(ring)
    ring.believe((None, None))
    for slot in ring._slots:
        slot.buffer.fill_(0xFF)
    walk(ring)


def test_a_wrong_belief_is_noticed(ring: Residency) -> None:
    """Negative control: were the layers not those that the slots hold, the walk would read others."""
    walk(ring)
    ring.believe(ring.holds()[::-1])
    with pytest.raises(AssertionError):
        walk(ring)


def test_settling_keeps_what_is_there(ring: Residency) -> None:
    walk(ring)
    before, copies = ring.holds(), ring.copies
    ring.settle()
    assert ring.holds() == before
    assert (ring.acquire(1)["weight"] == 1).all()
    assert ring.copies == copies
