from __future__ import annotations

import gc
import sys
import time

import psutil
import pynvml
import pytest
import torch

from drawplate import device
from drawplate.device import NvidiaDriver, PeakMeter, memory_sample, pick_device
from drawplate.errors import EnvironmentProblem, UsageError
from drawplate.units import MIB

CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_driver(monkeypatch, driver):
    monkeypatch.setattr(device, "nvidia_driver", lambda: driver)


def test_the_cpu_can_always_be_asked_for():
    assert pick_device("cpu") == CPU


def test_auto_falls_back_to_the_cpu(no_cuda):
    assert pick_device("auto") == CPU


def test_another_word_is_refused():
    with pytest.raises(UsageError, match="tpu"):
        pick_device("tpu")


@pytest.mark.parametrize(
    ("driver", "built_for", "visible", "cause", "gpu_present"),
    [
        (None, "13.0", None, "no NVIDIA driver", False),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=0), "13.0", None, "sees no GPU", False),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), None, None, "build without CUDA", True),
        (NvidiaDriver(version="470.2", cuda_major=11, gpus=1), "13.0", None, "470.2 knows CUDA 11", True),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), "13.0", "-1", "CUDA_VISIBLE_DEVICES='-1'", True),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), "13.0", None, "cannot reach the GPU", True),
    ],
)
def test_cuda_asked_for_and_missing_names_cause_and_cure(
    no_cuda, monkeypatch, driver, built_for, visible, cause, gpu_present
):
    with_driver(monkeypatch, driver)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(EnvironmentProblem) as error:
        pick_device("cuda")
    assert error.value.exit_code == 3
    assert cause in error.value.what
    assert "cpu" in error.value.next_step
    assert device.cuda_problem().gpu_present is gpu_present


def test_a_driver_that_does_not_answer_is_none(monkeypatch):
    def refuse():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert device.nvidia_driver() is None


def test_the_machine_says_what_this_process_may_use():
    machine = device.machine(CPU)
    assert machine.device == "cpu"
    assert machine.device_bytes == 0
    assert 1 <= machine.cores <= psutil.cpu_count()
    assert 0 < machine.ram_bytes <= psutil.virtual_memory().total
    assert machine.cpu


@pytest.mark.parametrize(
    ("features", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_is_native_only_where_the_cpu_multiplies_it(monkeypatch, features, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert device.bf16_native(CPU) is native
    assert device.default_compute_dtype(CPU) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_a_gpu_computes_in_bf16_from_capability_8_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.default_compute_dtype(torch.device("cuda", 0)) == dtype


def test_a_sample_sees_a_large_allocation_and_asks_nothing_of_cuda():
    before = memory_sample()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    during = memory_sample()
    assert during.process_bytes - before.process_bytes == pytest.approx(64 * MIB, rel=0.1)
    assert during.process_peak_bytes >= during.process_bytes
    assert during.device_total_bytes == 0 or torch.cuda.is_initialized()
    del block


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def allocate_for_a_while(count: int) -> None:
    block = torch.ones(count, dtype=torch.uint8)
    time.sleep(4 * device.HOST_SAMPLE_SECONDS)
    del block


def test_the_meter_sees_what_was_freed_before_the_phase_ended():
    before = resident_bytes()
    with PeakMeter() as meter:
        allocate_for_a_while(128 * MIB)
    assert meter.host_peak_bytes - before == pytest.approx(128 * MIB, rel=0.15)


def test_the_meter_forgets_a_higher_peak_before_the_phase():
    allocate_for_a_while(512 * MIB)
    before = resident_bytes()
    with PeakMeter() as meter:
        allocate_for_a_while(128 * MIB)
    assert meter.host_peak_bytes - before == pytest.approx(128 * MIB, rel=0.15)


def test_a_short_spike_that_raises_the_processs_own_mark_is_exact(monkeypatch):
    marks = iter([100, 100, 7_000_000_000_000])
    monkeypatch.setattr(device, "_lifetime_peak_bytes", lambda: next(marks, 7_000_000_000_000))
    monkeypatch.setattr(device, "HOST_SAMPLE_SECONDS", 3600.0)
    with PeakMeter() as meter:
        pass
    assert meter.host_peak_bytes == 7_000_000_000_000


def test_meters_may_be_nested_and_read_while_they_run():
    with PeakMeter() as outer:
        allocate_for_a_while(128 * MIB)
        with PeakMeter() as inner:
            assert inner.host_peak_bytes > 0
        assert outer.host_peak_bytes - inner.host_peak_bytes > 64 * MIB


def test_a_meter_ends_with_the_phase_that_failed():
    with pytest.raises(ZeroDivisionError), PeakMeter() as meter:
        _ = 1 / 0
    assert meter.host_peak_bytes > 0
    assert PeakMeter._running == []


def test_a_meter_is_not_used_twice():
    with PeakMeter() as meter:
        pass
    with pytest.raises(RuntimeError, match="another"), meter:
        pass


@pytest.mark.parametrize(
    ("reserved", "given", "grows"), [(0, "", True), (2**20, "", False), (0, "max_split_size_mb:64", False)]
)
def test_segments_grow_from_the_first_allocation_on(monkeypatch, reserved, given, grows):
    """CUDA is initialized by then: importing bitsandbytes asks each device what it can do."""
    asked: list[str] = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert asked == (["expandable_segments:True"] if grows and sys.platform == "linux" else [])


class FakeAllocator:
    """torch.cuda's high-water mark: raised by `reserve`, lowered to what is held by a reset."""

    def __init__(self) -> None:
        self.held = self.mark = 0

    def reserve(self, count: int) -> None:
        self.held += count
        self.mark = max(self.mark, self.held)

    def reset(self) -> None:
        self.mark = self.held


@pytest.fixture
def allocator(monkeypatch):
    fake = FakeAllocator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: fake.mark)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.reset)
    return fake


def test_the_device_mark_is_of_the_phase_alone(allocator):
    allocator.reserve(900)
    allocator.reserve(-800)
    with PeakMeter() as meter:
        allocator.reserve(50)
        allocator.reserve(-50)
    assert meter.device_peak_bytes == 150


def test_an_inner_meter_does_not_take_the_outer_ones_device_mark(allocator):
    with PeakMeter() as outer:
        allocator.reserve(500)
        allocator.reserve(-400)
        with PeakMeter() as inner:
            allocator.reserve(10)
        allocator.reserve(20)
    assert (outer.device_peak_bytes, inner.device_peak_bytes) == (500, 110)


@pytest.mark.gpu
def test_on_a_gpu_machine_sample_and_meter_agree_with_torch():
    chosen = pick_device("cuda")
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved()
    block = torch.ones(256 * MIB, dtype=torch.uint8, device=chosen)
    has = device.machine(chosen)
    assert has.device == "cuda"
    assert has.device_name
    assert has.driver
    with PeakMeter() as meter:
        more = torch.ones(512 * MIB, dtype=torch.uint8, device=chosen)
        del more
        torch.cuda.empty_cache()
    sample = memory_sample()
    assert sample.device_allocated_bytes >= block.nbytes
    assert meter.device_peak_bytes >= before_bytes + 768 * MIB
    assert sample.device_reserved_bytes < before_bytes + 768 * MIB
    assert has.device_bytes == sample.device_total_bytes
