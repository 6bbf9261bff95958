"""Layers that keep their activations in host memory: which blocks leave, when, and when they are back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drawplate.layout.footprint import INPUT, SENT_FROM_BYTES, Footprint, Line
from drawplate.layout.stored_linear import DTYPE_BYTES
from drawplate.planner.bytes.batch_rows import Rows, train_rows_of
from drawplate.planner.bytes.host_kept import LINE, HostKept, leaving, most_back, sent_blocks
from drawplate.planner.bytes.ledger import ledger
from drawplate.planner.bytes.micro_batch import MicroBatch
from drawplate.planner.bytes.sketch import kept_bytes_per_token_and_layer, sketched
from drawplate.planner.bytes.stage import Stage
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from tests.planner.bytes.test_ledger import AROUND, shape

CHOICE = Choice(
    precision="bf16",
    double_quant=True,
    compute_dtype="bfloat16",
    device="cuda",
    dequantized_layers=0,
    device_layers=28,
    kept_layers=8,
    host_kept_layers=8,
    policy="recompute",
    micro_batch_tokens=4096,
)
LARGE, SMALL = Line(0, SENT_FROM_BYTES / 16), Line(SENT_FROM_BYTES - 1, 0)


def line(choice: Choice, where: str, name: str) -> int:
    training = next(p for p in ledger(shape(), choice, AROUND).phases if p.phase == "training")
    return next((x.bytes for x in training.lines if (x.where, x.name) == (where, name)), 0)


def test_only_what_is_saved_and_large_is_sent() -> None:
    forward = (("work", LARGE), ("kept", LARGE), ("few", SMALL), ("out", LARGE), ("work", None))
    part = Footprint(inference=(), forward=forward, backward=())
    assert sent_blocks(part, 16) == {"kept": SENT_FROM_BYTES}
    assert sent_blocks(part, 15) == {}


def test_it_is_sent_in_the_order_in_which_it_is_saved() -> None:
    forward = (("late", LARGE), ("early", LARGE), ("out", LARGE))
    part = Footprint(inference=(), forward=forward, backward=(), saved=(INPUT, "early", "late"))
    assert list(sent_blocks(part, 16, 0, SENT_FROM_BYTES)) == [INPUT, "early", "late"]
    assert list(sent_blocks(part, 16)) == ["early", "late"], "the first layer's input is the body's caller's"
    assert list(sent_blocks(replace(part, keeps_input=False), 16, 0, SENT_FROM_BYTES)) == ["early", "late"]


@pytest.mark.parametrize(("kept", "on_host"), [(0, 20), (8, 20), (15, 13), (28, 0)])
def test_a_layer_that_keeps_its_activations_on_the_device_keeps_none_on_the_host(kept: int, on_host: int) -> None:
    assert replace(CHOICE, kept_layers=kept, host_kept_layers=20).on_host(28) == on_host


def test_the_most_that_is_on_its_way_at_once() -> None:
    eight = (10,) * 8
    assert (leaving(28, 0, eight), most_back(28, 0, 8, eight)) == ((0, 0, 0), 0)
    assert leaving(28, 26, eight)[0] == 160, "the two before are leaving while a layer runs"
    assert 160 < leaving(28, 4, eight)[0] < leaving(28, 4, eight)[1] < 320
    assert leaving(28, 4, eight)[2] == 10, "of 320 bytes nearly all have left by then"
    assert most_back(28, 4, 2, eight) == 160, "no more than kept layers have made room for"
    assert most_back(28, 4, 24, eight) < 320, "and no earlier than it is due"
    assert most_back(28, 4, 0, eight) == 80


class Watched(HostKept):
    """Writes down how many layers' blocks are there when a layer's forward ends and its backward begins."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.forward: list[int] = []
        self.backward: list[int] = []

    def _there(self) -> int:
        return sum(self.device.has(("layer", i, "kept")) for i in range(8))

    def end_forward(self, layer: int, rows: Rows) -> None:
        super().end_forward(layer, rows)
        self.forward.append(self._there())

    def begin_backward(self, layer: int) -> None:
        super().begin_backward(layer)
        self.backward.append(self._there())


def micro_batch_of(model: ModelShape, choice: Choice) -> MicroBatch:
    micro_batch = MicroBatch(Stage(model, choice, Surroundings()))
    micro_batch._host_kept = Watched(micro_batch.stage)
    return micro_batch


def test_blocks_leave_when_they_are_due_and_come_back_as_layers_are_through() -> None:
    model = sketched(shape())
    choice = replace(CHOICE, kept_layers=3)
    micro_batch = micro_batch_of(model, choice)
    micro_batch.train(train_rows_of(choice, model))
    watched = micro_batch._host_kept
    assert isinstance(watched, Watched)
    assert watched.forward[-1] == 0, "nothing is held when the loss is computed"
    assert 4 <= max(watched.forward) <= 8
    assert watched.backward[:2] == [0, 1], "room first, then what takes it"
    assert max(watched.backward) == 3, "no more than kept layers have made room for"
    assert all(watched.backward[20:]), "its own blocks are there whenever a layer's backward begins"
    assert not watched.device.totals[LINE], "and in the end nothing is held"


def test_a_layer_that_nothing_makes_room_for_comes_back_when_backward_reaches_it() -> None:
    model = sketched(shape())
    choice = replace(CHOICE, kept_layers=0)
    micro_batch = micro_batch_of(model, choice)
    micro_batch.train(train_rows_of(choice, model))
    watched = micro_batch._host_kept
    assert isinstance(watched, Watched)
    assert watched.backward == [0] * 20 + [1] * 8


def test_host_memory_holds_all_that_is_sent_and_the_device_next_to_nothing() -> None:
    a_layer = 4096 * kept_bytes_per_token_and_layer(shape(), DTYPE_BYTES["bfloat16"])
    inputs = 4096 * 3072 * 2
    assert line(CHOICE, "host", "activations kept in host memory") == 8 * a_layer + 7 * inputs
    assert line(replace(CHOICE, host_kept_layers=0), "host", "activations kept in host memory") == 0
    on_device = replace(CHOICE, kept_layers=16, host_kept_layers=0)
    saved = ledger(shape(), on_device, AROUND).peak("device") - ledger(shape(), CHOICE, AROUND).peak("device")
    assert saved > 6 * a_layer


def test_offloaded_inputs_are_those_of_layers_that_are_computed_again() -> None:
    offloaded = replace(CHOICE, policy="offload")
    assert line(offloaded, "host", "offloaded layer inputs") == 12 * 4096 * 3072 * 2
    assert line(replace(offloaded, host_kept_layers=20), "host", "offloaded layer inputs") == 0
