"""Memory in use: what "device memory" and "host memory" mean here. With cgroups.py the only reader of memory counters.

**Device memory** is what the driver counts for this process: what torch's allocator has reserved, and what lies outside
of it (CUDA's context, loaded kernels, workspaces of libraries). The second part grows when kernels are first used. It
is measured after loading, after the rehearsal, and at the end, and not at every sample. The plan, a cap
(`memory.vram`), the rehearsal, the record, the report, callbacks and the live line all mean this sum.

**Host memory** is what this process holds and the system cannot take back: anonymous and shared pages (swapped ones
included), page-locked buffers, and weights that are mapped from a file and read in every step. Pages of other files are
resident too while nobody else needs the room: libraries' code, a checkpoint that was read once, prepared weights of
layers that live on the device. They are dropped at need, so they are counted apart (`resident_bytes`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import psutil
import pynvml
import torch

from drawplate.machine.device import is_lost
from drawplate.machine.heap import give_back_freed
from drawplate.records import MemorySample
from drawplate.records.overheads import CONTEXT_BYTES, STEP_CONTEXT_BYTES
from drawplate.units import GIB, KIB

HOST_SAMPLE_SECONDS = 0.05
STATUS = Path("/proc/self/status")
LARGEST_CONTEXT_BYTES = 4 * GIB
"""More than this beside the allocator, by the count of a whole device, is another program's."""

_weights_in_use: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def count_mapped(owner: Any, size: int) -> None:
    """Count `size` bytes of a mapped file as needed for as long as `owner` (the mapping) lives; 0 stops that."""
    _weights_in_use[owner] = size


@dataclass(frozen=True, kw_only=True)
class DeviceContext:
    """Device memory of this process outside torch's allocator.

    Attributes:
        bytes: how much; 0 without CUDA.
        source: who says so: `driver` (its count of this process), `device` (all that is in use on it, less the
            allocator's, where the driver does not tell processes apart), `assumed` (other programs use the device too,
            so that a typical figure takes its place), or empty before the first measurement.
    """

    bytes: int = 0
    source: str = ""


_context: list[DeviceContext] = [DeviceContext()]


def measure_context(device: torch.device) -> DeviceContext:
    """Measure what lies outside torch's allocator now; from here on it is part of every sample and peak.

    Args:
        device: where the run computes. Its queue is waited for.
    """
    if device.type != "cuda" or not _cuda_answers():
        return _context[0]
    torch.cuda.synchronize(device)
    reserved, own = torch.cuda.memory_reserved(device), own_device_bytes(device)
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - reserved
    if own:
        found = DeviceContext(bytes=max(0, own - reserved), source="driver")
    elif 0 <= beside <= LARGEST_CONTEXT_BYTES:
        found = DeviceContext(bytes=beside, source="device")
    else:
        found = DeviceContext(bytes=CONTEXT_BYTES + STEP_CONTEXT_BYTES, source="assumed")
    _context[0] = found
    return found


def known_context() -> DeviceContext:
    """What the last measurement found."""
    return _context[0]


def own_device_bytes(device: torch.device) -> int:
    """What the driver counts for this process; 0 where it does not say, as in some containers."""
    with suppress(pynvml.NVMLError, AttributeError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == psutil.Process().pid:
                return int(process.usedGpuMemory or 0)
    return 0


def let_go_of_page_locks() -> None:
    """Give the page-locked blocks that torch keeps for reuse back to the system, where this torch can do that."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and _cuda_answers():
        torch.cuda.synchronize()
        empty()


def lasting_process_bytes() -> int:
    """Host memory of this process that stays, in bytes: what it has freed is given back before it is counted."""
    give_back_freed()
    return memory_sample().process_bytes


def memory_sample() -> MemorySample:
    """Bytes in use now. Device fields stay 0 until CUDA was first used: asking must not create a context."""
    host = _host()
    resident_peak = max(host.resident, host.resident_peak)
    if not _cuda_answers():
        return MemorySample(process_bytes=host.needed, process_peak_bytes=resident_peak, resident_bytes=host.resident)
    free, total = torch.cuda.mem_get_info()
    context = _context[0].bytes
    return MemorySample(
        process_bytes=host.needed,
        process_peak_bytes=resident_peak,
        resident_bytes=host.resident,
        device_allocated_bytes=torch.cuda.memory_allocated(),
        device_reserved_bytes=torch.cuda.memory_reserved(),
        device_context_bytes=context,
        device_peak_bytes=torch.cuda.max_memory_reserved() + context,
        device_free_bytes=free,
        device_total_bytes=total,
    )


class PeakMeter:
    """The high-water marks of one phase: `with PeakMeter() as meter: ...`, then `meter.host_peak_bytes`.

    All marks can be read while the phase runs, and meters may be nested. The allocator's mark is torch's own and exact.
    The host's are sampled every `HOST_SAMPLE_SECONDS`, because the kernel keeps none of what is needed; they may miss a
    shorter spike.

    Attributes:
        host_peak_bytes: the most host memory that was needed.
        resident_peak_bytes: the most that was resident, files' pages included.
        device_peak_bytes: the most device memory, as measured so far; 0 without CUDA.
    """

    _running: ClassVar[list[PeakMeter]] = []

    def __init__(self) -> None:
        self._host_peak_bytes = 0
        self._resident_peak_bytes = 0
        self._reserved_peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMeter:
        if self._thread is not None:
            raise RuntimeError("a PeakMeter measures one phase; make another for the next")
        self._fold_device_peak()
        if _cuda_answers():
            torch.cuda.reset_peak_memory_stats()
        PeakMeter._running.append(self)
        self._sample_host()
        self._thread = threading.Thread(target=self._watch_host, name="drawplate-peak-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample_host()
        self._fold_device_peak()
        PeakMeter._running.remove(self)

    @classmethod
    @contextmanager
    def apart(cls) -> Iterator[PeakMeter]:
        """A meter whose device memory the ones that run count not: of what comes before a run and no plan counts."""
        cls._fold_device_peak()
        outer, cls._running = cls._running, []
        try:
            with cls() as meter:
                yield meter
        finally:
            cls._running = outer
            if _cuda_answers():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    @property
    def host_peak_bytes(self) -> int:
        """The most host memory that this process needed in the phase, so far."""
        if self in PeakMeter._running:
            self._sample_host()
        return self._host_peak_bytes

    @property
    def resident_peak_bytes(self) -> int:
        """The most of this process that was resident in the phase, so far."""
        if self in PeakMeter._running:
            self._sample_host()
        return self._resident_peak_bytes

    @property
    def device_peak_bytes(self) -> int:
        """The most device memory of the phase, so far, with what is known of the memory outside the allocator."""
        if self in PeakMeter._running:
            self._fold_device_peak()
        return self._reserved_peak_bytes + _context[0].bytes if self._reserved_peak_bytes else 0

    def _watch_host(self) -> None:
        while not self._stop.wait(HOST_SAMPLE_SECONDS):
            self._sample_host()

    def _sample_host(self) -> None:
        host = _host()
        self._host_peak_bytes = max(self._host_peak_bytes, host.needed)
        self._resident_peak_bytes = max(self._resident_peak_bytes, host.resident)

    @staticmethod
    def _fold_device_peak() -> None:
        """Give every running meter the mark reached so far, before somebody resets it."""
        if not _cuda_answers():
            return
        reserved = torch.cuda.max_memory_reserved()
        for meter in PeakMeter._running:
            meter._reserved_peak_bytes = max(meter._reserved_peak_bytes, reserved)


@dataclass(frozen=True)
class _Host:
    """The host's counts: what is needed, what is resident, and the highest that was resident since the start."""

    needed: int
    resident: int
    resident_peak: int


def _host() -> _Host:
    counts = _kernel_counts()
    resident = counts.get("VmRSS") or psutil.Process().memory_info().rss
    if "RssAnon" not in counts:  # not Linux: nobody tells the pages apart
        return _Host(resident, resident, resident)
    own = counts["RssAnon"] + counts.get("RssShmem", 0) + counts.get("VmSwap", 0)
    return _Host(own + sum(_weights_in_use.values()), resident, counts.get("VmHWM", resident))


def _kernel_counts() -> dict[str, int]:
    """What /proc says of this process, in bytes; empty where there is no /proc."""
    counts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in STATUS.read_bytes().splitlines():
            name, _, value = line.partition(b":")
            if value.endswith(b" kB"):
                counts[name.decode()] = int(value.split()[0]) * KIB
    return counts


def _cuda_answers() -> bool:
    return not is_lost() and torch.cuda.is_initialized()
