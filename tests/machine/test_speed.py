"""The probe: measured once, kept by device and dtype, and never in the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

import drawplate.machine.speed as speed
from drawplate.machine.attention_rates import SHAPE, AttentionRates
from drawplate.machine.device import machine
from drawplate.planner.seconds.gpus import typical_speed
from drawplate.recipe import cache_folder
from drawplate.records import DeviceSpeed

CPU = torch.device("cpu")


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take a moment, not a second."""
    monkeypatch.setattr(speed, "PRODUCT_ROWS", {"cpu": (8, 32)})
    monkeypatch.setattr(speed, "PRODUCT_WEIGHTS", {"cpu": ((64, 64), (128, 64))})
    monkeypatch.setattr(speed, "COPIED_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(speed, "DEQUANTIZED_SHAPE", {"cpu": (64, 64)})
    monkeypatch.setattr(speed, "TIMED_SECONDS", {"cpu": 1e-4})


@pytest.mark.usefixtures("_brief")
def test_every_figure_is_measured_and_sizes_rise() -> None:
    probed = speed.probe(CPU, torch.float32, machine(CPU))
    sizes = [size for size, _ in probed.product_rates]
    assert sizes == sorted(set(sizes))
    figures = [rate for _, rate in probed.product_rates]
    figures += [probed.attention_rate, probed.memory_rate, probed.dequantize_rate, probed.launch_seconds]
    assert all(figure > 0 for figure in figures)
    assert probed.context_bytes == 0
    assert "float32" in probed.source


def test_a_speed_is_measured_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (cache_folder() / "speed").iterdir():
        path.unlink()
    probed: list[torch.dtype] = []

    def probe(device: torch.device, dtype: torch.dtype, here: object) -> DeviceSpeed:
        probed.append(dtype)
        return typical_speed("cpu")

    monkeypatch.setattr(speed, "probe", probe)
    first = [speed.measured_speed(CPU, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert probed == [torch.float32, torch.bfloat16]
    assert first[0] == first[2]


@pytest.mark.parametrize("damage", ["", "{}", '{"name": 1}', "null"])
def test_a_damaged_cache_is_measured_again(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = speed.speed_path(machine(CPU), torch.float32)
    path.write_text(damage)
    monkeypatch.setattr(speed, "probe", lambda *_: typical_speed("cpu"))
    assert speed.measured_speed(CPU, torch.float32) == typical_speed("cpu")
    assert path.read_text() != damage


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    speed.keep_speed(tmp_path / "file" / "speed.json", typical_speed("cpu"))


def test_a_host_that_is_called_away_for_a_moment_is_not_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = time.perf_counter, count()

    def interrupted() -> float:
        return clock() + 10.0 * (next(calls) >= 5)  # in the middle of the third round

    monkeypatch.setattr(speed.time, "perf_counter", interrupted)
    assert speed._launch_seconds(CPU) < 1e-3


def test_attention_is_timed_there_and_back() -> None:
    timed: list[float] = []

    def seconds(call: Callable[[], object]) -> float:
        call()
        timed.append(2.0)
        return 2.0

    rates = AttentionRates(seconds, CPU, torch.float32)
    documents, heads, tokens, size = SHAPE["cpu"]
    assert rates.of_long_documents() == 3.5 * 4 * documents * heads * size * tokens**2 / 2 / 2.0
    assert rates.by_length(packed=True) == (), "on a CPU packed documents are attended to one by one"
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("predicted", "measured", "forgotten"), [(100, 151, True), (100, 149, False), (100, 20, False), (0, 9, False)]
)
def test_a_run_that_is_much_faster_than_its_plan_makes_the_probe_forgotten(
    predicted: float, measured: float, forgotten: bool
) -> None:
    path = speed.speed_path(machine(CPU), torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    speed.keep_speed(path, typical_speed("cpu"))
    assert speed.forget_if_disturbed(CPU, torch.float32, predicted=predicted, measured=measured) == forgotten
    assert path.exists() != forgotten


def test_what_a_run_has_shown_of_the_machine_counts_for_every_arithmetic(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        speed.keep_speed(speed.speed_path(machine(cpu), dtype), typical_speed("cpu"))
    speed.keep_overheads(cpu, context=0, runtime_host=123_456_789)
    assert speed.measured_speed(cpu, torch.bfloat16).runtime_host_bytes == 123_456_789
    assert speed.measured_speed(cpu, torch.float32).context_bytes == typical_speed("cpu").context_bytes
    speed.keep_overheads(cpu, context=7, runtime_host=23_456_789)
    assert speed.measured_speed(cpu, torch.float32).runtime_host_bytes == 73_456_789  # half way: runs differ
    assert speed.measured_speed(cpu, torch.float32).context_bytes == 7
