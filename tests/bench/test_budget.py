from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.peers import fit
from bench.peers.memory import TYPICAL_CONTEXT_BYTES, allocator_room
from bench.peers.process import environment_of

LAYERS, FIRST_BYTES, LAYER_BYTES = 10, 1000, 100


class Peer:
    """Needs so many bytes for each layer that keeps its activations."""

    layers = LAYERS

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes, self.kept = room_bytes, 0

    def keep(self, count: int) -> None:
        self.kept = count

    def steps(self) -> None:
        if FIRST_BYTES + LAYER_BYTES * self.kept > self.room_bytes:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize(("room", "kept"), [(3000, 10), (1600, 5), (1150, 0)])
def test_as_many_layers_are_kept_as_fit_beside_the_context(
    monkeypatch: pytest.MonkeyPatch, room: int, kept: int
) -> None:
    peer = Peer(room)
    fake: dict[str, Any] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: FIRST_BYTES + LAYER_BYTES * peer.kept,
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    asked = []
    found = fit.fit_kept_layers(peer, peer.steps, lambda: asked.append(peer.kept) or room)
    assert asked == [0]
    assert found == peer.kept == kept


def test_the_allocator_gets_what_the_context_leaves() -> None:
    assert allocator_room(6000, process_bytes=1700, reserved_bytes=1000) == 5300
    assert allocator_room(2 * TYPICAL_CONTEXT_BYTES, None, 1000) == TYPICAL_CONTEXT_BYTES


def test_whoever_plans_finds_what_was_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A cache folder of the caller's, with a speed measured at another time, must not come between."""
    monkeypatch.setenv("DRAWPLATE_CACHE", "/somewhere/else")
    assert environment_of(tmp_path)["DRAWPLATE_CACHE"] == str(tmp_path / "cache")
