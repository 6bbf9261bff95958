"""A compiled layer is measured where it runs: by the blocks that its allocator hands out, kept for the next plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from drawplate.layout.footprint import TRIAL, Footprint, Line, Mode, Trace
from drawplate.model.base.precision import Storage
from drawplate.model.footprint import compiled, measure
from drawplate.model.footprint.allocator_events import RealWatch
from drawplate.model.footprint.passes import inference_pass, training_pass, uncompiled_footprint
from drawplate.model.footprint.recorder import TRACED_TOKENS, Recorder, Sizes
from drawplate.model.footprint.trial import Trial, frozen_layer
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.layer.functions import functions
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from tests.model.conftest import ARCHITECTURES, COMMON

CPU = torch.device("cpu")
MIDDLE = Mode("cpu", "float32", False, "", False, False, True, "kept")


@pytest.fixture(autouse=True)
def _quiet_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def trial_of(mode: Mode, fake: FakeTensorMode | None = None) -> Trial:
    attention.register()
    anatomy = build_anatomy(AutoConfig.for_model("llama", **{**COMMON, **ARCHITECTURES["llama"]}))
    section = LoraSection(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1 * mode.dropout)
    lora, storage = lora_config(section, anatomy, "x", None), Storage(mode.stored or "fp32")
    storage.decode(list(storage.encode(torch.zeros(64, 64)).values()), (64, 64), torch.float32)
    layer = frozen_layer(anatomy, 0, lora, storage, again=mode.use == "again")
    with fake or nullcontext():
        return Trial.of(layer, anatomy, 0, lora, mode, CPU)


def without_data(mode: Mode) -> Footprint:
    """Of the layer as transformers wrote it."""
    trial = trial_of(mode, fake := FakeTensorMode(allow_non_fake_inputs=True))
    with fake:
        return uncompiled_footprint(trial)


def in_lines(trace: Trace) -> list[int]:
    """Bytes held after each event, but for those that change little: small blocks come and go in another order."""
    held, sizes, found = 0, dict[str, int](), [0]
    for name, line in trace:
        if line is not None:
            sizes[name] = line.bytes(TRACED_TOKENS)
        held += sizes[name] if line is not None else -sizes.pop(name, 0)
        if abs(held - found[-1]) > 2**16:
            found.append(held)
    return found


@pytest.mark.parametrize(
    "mode",
    [
        MIDDLE,
        MIDDLE._replace(use="inference"),
        MIDDLE._replace(use="again", packing=False),
        MIDDLE._replace(stored="nf4"),
    ],
    ids=["kept", "inference", "again, padded", "nf4"],
)
def test_an_allocators_own_events_are_what_is_seen_without_data(mode: Mode) -> None:
    """Of a layer as transformers wrote it, which both ways of measuring can run."""
    expected = without_data(mode)
    trial, watch = trial_of(mode), RealWatch(Recorder(), CPU, Sizes())
    (function,) = functions([trial.layer])
    if mode.use == "inference":
        assert max(in_lines(inference_pass(trial, function, watch))) == max(in_lines(expected.inference))
        return
    found = training_pass(trial, function, watch)
    assert found.keeps_input == expected.keeps_input
    assert len(found.saved) == len(expected.saved)
    assert max(in_lines(found.forward)) == pytest.approx(max(in_lines(expected.forward)), rel=1e-3)
    whole = [max(in_lines((*each.forward, *each.backward))) for each in (found, expected)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-3)


def test_a_compiled_layer_keeps_less_than_as_transformers_wrote_it() -> None:
    mode = MIDDLE._replace(compiled=True)
    found = compiled.compiled_footprint(trial_of(mode), CPU)
    eager = without_data(mode._replace(compiled=False))
    assert 0.3 < in_lines(found.forward)[-1] / in_lines(eager.forward)[-1] < 0.95
    assert {"out"} <= {name for name, _ in found.forward}
    assert {"grad_in", "grad:0", "grad:13"} <= {name for name, _ in found.backward}


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (TRACED_TOKENS * 6144, Line(0, 6144)),
        (131_936_256, Line(0, 12_288, 128 * 12_288)),  # as FlashAttention's backward takes it on an H200
        (53_316_448, Line(256, 24_672)),  # as cuDNN's does
        (3072 * 3072 * 2, Line(3072 * 3072 * 2, 0)),
        (TRACED_TOKENS * 4, Line(TRACED_TOKENS * 4, 0)),
    ],
    ids=["a tensor", "packed attention", "padded attention", "a weight", "a weight that looks like a tensor"],
)
def test_how_a_block_grows_is_read_off_one_size(size: int, line: Line) -> None:
    sizes = Sizes(frozenset({TRACED_TOKENS * 4}))
    assert sizes.line_of(size) == line
    if size == 131_936_256:
        assert line.bytes(TRACED_TOKENS, 67) == size


def test_what_a_first_run_holds_beyond_later_ones_is_at_the_highest_moment() -> None:
    later: Trace = (("a", Line(100, 0)), ("b", Line(50, 0)), ("a", None), ("c", Line(20, 0)))
    first: Trace = (("x", Line(400, 0)), ("x", None), *later)
    found = compiled.with_trial(later, first, CPU)
    assert [name for name, _ in found] == ["a", "b", TRIAL, TRIAL, "a", "c"]
    assert found[2][1] is not None
    assert found[2][1].bytes(TRACED_TOKENS) == 400 - 150
    assert compiled.with_trial(later, later, CPU) == later


def test_a_layer_that_is_dequantized_first_holds_its_weights_too() -> None:
    layer = Footprint(inference=(("out", Line(1, 0)),))
    assert compiled.highest(compiled.with_whole_weights(layer, [10, 20]).inference) == (2, 31)
    training = Footprint(forward=(("out", Line(1, 0)),), backward=(("grad_in", Line(1, 0)),))
    both = compiled.with_whole_weights(training, [10, 20])
    assert compiled.highest((*both.forward, *both.backward)) == (3, 32)
    assert [name for name, line in both.backward if line is None] == ["w0", "w1"]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Asks for a footprint; returns how often it was measured so far."""
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    measured: list[Footprint] = []
    layer = trial_of(MIDDLE).layer
    made = Footprint(forward=(("out", Line(1, 2.5, 0.5)), ("a", None)), saved=("in",), keys=3)

    def ask() -> int:
        def measure() -> Footprint:
            measured.append(made)
            return made

        assert compiled.remembered(layer, MIDDLE, torch.device("cuda"), measure) == made
        return len(measured)

    return ask


def test_a_layer_is_measured_once(kept: Callable[[], int]) -> None:
    assert (kept(), kept()) == (1, 1)


@pytest.mark.parametrize("what", ["torch", "transformers", "sources", "card"])
def test_with_other_versions_it_is_measured_anew(
    kept: Callable[[], int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A plan never rests on what another torch's compiler made."""
    kept()
    changes: dict[str, tuple[Any, str, Any]] = {
        "torch": (torch, "__version__", "2.99.0"),
        "transformers": (compiled.transformers, "__version__", "9.0"),
        "sources": (compiled, "_sources", lambda: "others"),
        "card": (torch.cuda, "get_device_name", lambda device: "another card"),
    }
    monkeypatch.setattr(*changes[what])
    assert kept() == 2
    assert kept() == 2


def test_a_footprint_that_cannot_be_read_is_measured_anew(kept: Callable[[], int], tmp_path: Path) -> None:
    kept()
    (file,) = (tmp_path / compiled.FOOTPRINTS_NAME).iterdir()
    file.write_text("{", encoding="utf-8")
    assert kept() == 2


def without_the_gpu(measured: measure.Measured, layer: Any, mode: Mode, device: torch.device) -> Trial:
    return Trial.of(layer, measured.anatomy, measured.index, measured.lora, mode, torch.device("meta"))


def test_whoever_waits_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of all layers and uses together; what is measured on a GPU waits for its compiler."""
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(measure, "compiled_footprint", lambda trial, device: Footprint())
    monkeypatch.setattr(measure, "bounded", lambda device, most: nullcontext())
    monkeypatch.setattr(measure.Measured, "trial", without_the_gpu)
    anatomy = build_anatomy(AutoConfig.for_model("gemma2", **{**COMMON, **ARCHITECTURES["gemma2"]}))
    told: list[str] = []
    lora = lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None)
    kinds, _ = measure.layer_shapes(anatomy, lora, torch.device("cuda"), told.append)
    mode = MIDDLE._replace(device="cuda", compiled=True, packing=False)
    for kind in kinds:
        assert kind.unmeasured().footprints[mode].forward, "what stands in is not measured"
    assert not told
    for kind in kinds:
        for use in ("inference", "kept"):
            kind.footprints[mode._replace(use=use)]
    assert len(kinds) == 2
    assert told == [measure.TRYING]


def test_where_a_layer_has_no_room_an_uncompiled_one_stands_in_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(trial: Trial, device: torch.device) -> Footprint:
        raise torch.OutOfMemoryError("CUDA out of memory")

    asked: list[int | None] = []
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small card")
    monkeypatch.setattr(measure, "compiled_footprint", full)
    monkeypatch.setattr(measure, "bounded", lambda device, most: asked.append(most) or nullcontext())
    monkeypatch.setattr(measure.Measured, "trial", without_the_gpu)
    anatomy = build_anatomy(AutoConfig.for_model("llama", **{**COMMON, **ARCHITECTURES["llama"]}))
    lora, told = lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None), list[str]()
    kinds, _ = measure.layer_shapes(anatomy, lora, torch.device("cuda"), told.append, 3 * 2**30)
    assert kinds[0].footprints[MIDDLE._replace(device="cuda", compiled=True)].forward
    assert told == [measure.TRYING, measure.NO_ROOM]
    assert asked == [3 * 2**30]
    assert not list(tmp_path.rglob("*.json"))
