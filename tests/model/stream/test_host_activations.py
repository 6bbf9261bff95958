"""Activations in host memory: what leaves, when it is let go of, when it comes back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from drawplate.data.batches import cut_packed
from drawplate.model.base.weights import Checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.stream import host_activations
from drawplate.model.stream.host_activations import HostActivations
from tests.model.conftest import random_sequences, write_model
from tests.model.test_causal_lm import build, train_steps


@pytest.fixture(autouse=True)
def small_blocks_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_activations, "SENT_FROM_BYTES", 0)


class Watched:
    """Bytes of each layer on the host that are on the device, at every turn of a micro-batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward: list[dict[int, int]] = []
        self.backward: list[dict[int, int]] = []
        self._watch(monkeypatch, "end_forward", self.forward)
        self._watch(monkeypatch, "begin_backward", self.backward)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, turn: str, seen: list[dict[int, int]]) -> None:
        original = getattr(HostActivations, turn)

        def watched(store: HostActivations, layer: int) -> None:
            original(store, layer)
            layers = store._now.blocks.items()
            seen.append({i: sum(b.size for b in found.values() if b.device is not None) for i, found in layers})

        monkeypatch.setattr(HostActivations, turn, watched)


def micro_step(model: CausalLM, tokens: int = 48) -> None:
    batch = cut_packed(random_sequences([17, 5, 20]), tokens, 4, 0)[0]
    model.sum_nats(batch, scale=0.01, dropout_seed=(3, 0))[0].backward()


@pytest.fixture
def eight_layers(tmp_path: Path) -> Checkpoint:
    return write_model(tmp_path / "model", "llama", num_hidden_layers=8)


@pytest.mark.parametrize(("on_host", "kept"), [(4, 2), (2, 6), (6, 2), (1, 2)])
def test_blocks_leave_and_come_back_at_an_even_pace(on_host: int, kept: int, eight_layers, monkeypatch) -> None:
    watched = Watched(monkeypatch)
    model = build(
        eight_layers, activations=("host",) * on_host + ("recompute",) * (8 - on_host - kept) + ("keep",) * kept
    )
    micro_step(model)
    sizes = {
        i: sum(block.size for block in found.values()) for i, found in model.runner.activations._now.blocks.items()
    }
    largest = max(b.size for found in model.runner.activations._now.blocks.values() for b in found.values())
    whole = sum(sizes.values())
    gone = [sum(size - turn.get(i, 0) for i, size in sizes.items() if i in turn) for turn in watched.forward]
    steps = [after - before for before, after in pairwise(gone)]
    assert gone[-1] == whole, "nothing is held when the loss is computed"
    assert max(steps) <= 1.2 * whole / 7 + largest, "no layer has to wait for more than its share of the bus"
    returned = [sum(turn.values()) for turn in watched.backward]
    assert returned[0] == 0, "nothing has made room before the first layer's backward"
    for through, there in enumerate(returned[: 8 - on_host]):
        assert there <= max(sizes.values()) * min(through, kept), "what comes back fits where kept layers were"
        assert there <= whole * through / 6 + largest
    if kept > 1:
        for layer in range(on_host):
            assert watched.backward[7 - layer][layer] == sizes[layer], "all of it is back before backward is there"


def test_nothing_of_a_layer_that_left_is_read_before_it_comes_back(llama, sequences) -> None:
    """Poisoned where it was; to the bit what a model is that kept everything."""
    twin = train_steps(build(llama), sequences, steps=3)
    sent = train_steps(build(llama, activations=("host", "host", "host", "keep"), poison=True), sequences, steps=3)
    assert sent[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(sent[1], twin[1], strict=True))


@pytest.mark.parametrize("weights", ["device", "host"])
def test_a_compiled_layer_sends_what_it_saves(weights, llama, sequences) -> None:
    twin = train_steps(build(llama, compiled=True), sequences, steps=2)
    model = build(llama, activations="host", weights=weights, compiled=True, poison=True)
    mine = train_steps(model, sequences, steps=2)
    assert model.runner.activations.host_bytes > 0
    assert mine[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], twin[1], strict=True))


def test_what_layers_share_stays_where_it_is(llama, sequences, monkeypatch) -> None:
    """Negative control: were weights and rotary tables sent and poisoned too, the next layer would read NaN."""
    original = HostActivations.packing
    monkeypatch.setattr(HostActivations, "packing", lambda self, layer, given: original(self, layer, []))
    losses, _ = train_steps(build(llama, activations="host", poison=True), sequences, steps=2)
    assert any(loss != loss for loss in losses)


def test_small_blocks_stay_on_the_device(llama, monkeypatch) -> None:
    monkeypatch.setattr(host_activations, "SENT_FROM_BYTES", 2**30)
    model = build(llama, activations="host")
    micro_step(model)
    assert model.runner.activations.host_bytes == 0


def test_places_on_the_host_grow_with_the_largest_micro_batch_and_are_used_again(llama) -> None:
    model = build(llama, activations=("host", "host", "keep", "keep"), poison=True)
    micro_step(model, tokens=24)
    small = model.runner.activations.host_bytes
    micro_step(model, tokens=48)
    large = model.runner.activations.host_bytes
    micro_step(model, tokens=24)
    assert small < large == model.runner.activations.host_bytes


def test_backward_after_another_forward_is_refused(llama) -> None:
    model = build(llama, activations="host")
    batch = cut_packed(random_sequences([17]), 24, 4, 0)[0]
    first = model.sum_nats(batch, scale=0.01)[0]
    model.sum_nats(batch, scale=0.01)[0].backward()
    with pytest.raises(RuntimeError, match="activations are gone"):
        first.backward()
