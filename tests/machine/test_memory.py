"""What "device memory" and "host memory" mean, and that every place that shows them means the same."""

from __future__ import annotations

import gc
import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from drawplate.integrations.callbacks import MemoryUsageCallback
from drawplate.machine import device, memory
from drawplate.machine.device import pick_device
from drawplate.machine.memory import PeakMeter, count_mapped, measure_context, memory_sample
from drawplate.records import LedgerLine, PhaseLedger
from drawplate.run.journal import Journal
from drawplate.run.outcome import Outcome
from drawplate.run.rehearse import _phase
from drawplate.units import GIB, MIB

CUDA = torch.device("cuda", 0)


def test_a_sample_sees_a_large_allocation_and_asks_nothing_of_cuda():
    before = memory_sample()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    during = memory_sample()
    assert during.process_bytes - before.process_bytes == pytest.approx(64 * MIB, rel=0.1)
    assert during.process_peak_bytes >= during.process_bytes
    assert during.device_total_bytes == 0 or torch.cuda.is_initialized()
    del block


def needed_bytes() -> int:
    gc.collect()
    return memory_sample().process_bytes


def allocate_for_a_while(count: int) -> None:
    block = torch.ones(count, dtype=torch.uint8)
    time.sleep(4 * memory.HOST_SAMPLE_SECONDS)
    del block


def test_the_meter_sees_what_was_freed_before_the_phase_ended():
    before = needed_bytes()
    with PeakMeter() as meter:
        allocate_for_a_while(128 * MIB)
    assert meter.host_peak_bytes - before == pytest.approx(128 * MIB, rel=0.15)


def test_the_meter_forgets_a_higher_peak_before_the_phase():
    allocate_for_a_while(512 * MIB)
    before = needed_bytes()
    with PeakMeter() as meter:
        allocate_for_a_while(128 * MIB)
    assert meter.host_peak_bytes - before == pytest.approx(128 * MIB, rel=0.15)


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


def test_pages_of_a_file_are_resident_and_not_needed_until_they_are_weights_in_use(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * MIB))
    before = memory_sample()
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 64 * MIB, prot=mmap.PROT_READ)
    assert mapping.find(b"x") < 0  # every page is read
    read = memory_sample()
    assert read.resident_bytes - before.resident_bytes > 60 * MIB
    assert read.process_bytes - before.process_bytes < 8 * MIB
    owner = SimpleOwner()
    count_mapped(owner, 64 * MIB)
    assert memory_sample().process_bytes - read.process_bytes > 60 * MIB
    del owner
    gc.collect()
    assert memory_sample().process_bytes - before.process_bytes < 8 * MIB


class SimpleOwner:
    pass


@pytest.fixture
def card(monkeypatch, allocator):
    """A device of 80 GiB on which torch's allocator holds 5 GiB and the driver counts 6 for this process."""
    monkeypatch.setattr(memory, "_context", [memory.DeviceContext()])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: allocator.held)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: allocator.held)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (80 * GIB - allocator.held - GIB, 80 * GIB))
    monkeypatch.setattr(memory, "own_device_bytes", lambda _: allocator.held + GIB)
    allocator.reserve(5 * GIB)
    return allocator


def test_device_memory_is_one_thing_in_rehearsal_record_sample_callback_and_live_line(card):
    with PeakMeter() as meter:
        rehearsed = _phase(prepared_for(6 * GIB), "training", meter)
        outcome = Outcome.__new__(Outcome)
        outcome.prepared, outcome.peak, outcome.earlier_peaks = prepared_for(6 * GIB), meter, (0, 0, 0)
        facts = outcome._memory_facts()
    assert rehearsed.device_bytes == facts.device_peak_bytes == 6 * GIB
    assert rehearsed.device_predicted_bytes == facts.device_peak_predicted_bytes == 6 * GIB
    assert (facts.device_context_bytes, facts.device_context_source) == (GIB, "driver")
    sample = memory_sample()
    assert sample.device_bytes == sample.device_peak_bytes == 6 * GIB
    journal = Journal()
    journal.sample_memory()
    assert journal._bytes_in_use() == 6 * GIB
    state = SimpleNamespace(global_step=1, epoch=0.5, log_history=[])
    MemoryUsageCallback()._sample(state, "train")
    assert state.log_history[0]["memory_device_peak"] == 6 * GIB


def prepared_for(predicted: int) -> SimpleNamespace:
    context = LedgerLine(name="CUDA context", where="device", bytes=GIB, formula="measured")
    layers = LedgerLine(name="layers", where="device", bytes=predicted - GIB, formula="")
    phase = PhaseLedger(phase="training", lines=(context, layers))
    plan = SimpleNamespace(phases=(phase,), predicted_bytes=lambda where: phase.bytes(where))
    return SimpleNamespace(plan=plan, device=CUDA)


def test_a_driver_that_tells_no_processes_apart_leaves_the_whole_device_and_says_so(card, monkeypatch):
    monkeypatch.setattr(memory, "own_device_bytes", lambda _: 0)
    assert measure_context(CUDA) == memory.DeviceContext(bytes=GIB, source="device")


def test_another_programs_memory_is_not_taken_for_the_context(card, monkeypatch):
    monkeypatch.setattr(memory, "own_device_bytes", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (40 * GIB, 80 * GIB))
    found = measure_context(CUDA)
    assert found.source == "assumed"
    assert found.bytes < 2 * GIB


@pytest.mark.gpu
def test_page_locked_blocks_of_torch_are_needed_and_counted_once():
    pick_device("cuda")
    torch.zeros(1, device="cuda")
    before = memory_sample().process_bytes
    block = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    assert memory_sample().process_bytes - before == pytest.approx(256 * MIB, rel=0.1)
    del block


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
    assert meter.device_peak_bytes >= before_bytes + 768 * MIB + memory.known_context().bytes
    assert sample.device_reserved_bytes < before_bytes + 768 * MIB
    assert has.device_bytes == sample.device_total_bytes


def test_what_is_metered_apart_is_no_part_of_the_peaks_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-check takes what is free; the run's peak is set beside a plan that does not count it."""
    mark = [GIB]

    def reset() -> None:
        mark[0] = GIB

    monkeypatch.setattr(memory, "_cuda_answers", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: mark[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setitem(memory.__dict__, "_context", [memory.DeviceContext()])
    with memory.PeakMeter() as outer:
        mark[0] = 2 * GIB
        with memory.PeakMeter.apart() as check:
            mark[0] = 9 * GIB
        assert check.device_peak_bytes == 9 * GIB
        with memory.PeakMeter() as inner:
            mark[0] = 3 * GIB
        assert inner.device_peak_bytes == 3 * GIB
    assert outer.device_peak_bytes == 3 * GIB
