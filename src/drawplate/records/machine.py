"""A machine, how fast its device is, and what it holds at a moment."""

from __future__ import annotations

from dataclasses import dataclass

from drawplate.units import MIB


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Bytes at one moment; machine/memory.py says what they mean. Device fields are 0 on a machine without a GPU.

    Attributes:
        process_bytes: host memory that this process holds and the system cannot take back.
        process_peak_bytes: the highest resident set since the process began.
        device_allocated_bytes, device_reserved_bytes: in tensors, and held by torch's allocator.
        device_peak_bytes: the most device memory since the last `PeakMeter` began, the context included.
        device_free_bytes, device_total_bytes: of the whole device, other programs included.
        resident_bytes: the resident set, pages of files included.
        device_context_bytes: of this process, outside torch's allocator.
    """

    process_bytes: int
    process_peak_bytes: int
    device_allocated_bytes: int = 0
    device_reserved_bytes: int = 0
    device_peak_bytes: int = 0
    device_free_bytes: int = 0
    device_total_bytes: int = 0
    resident_bytes: int = 0
    device_context_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """Device memory of this process; 0 without a GPU."""
        return self.device_reserved_bytes + self.device_context_bytes if self.device_reserved_bytes else 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has."""

    platform: str
    python: str
    cpu: str
    cores: int
    ram_bytes: int
    bf16_native: bool
    device: str = "cpu"
    device_name: str = ""
    device_bytes: int = 0
    driver: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """How fast a device is: what the plan's cost divides by. Measured by machine/speed.py, or published figures.

    Attributes:
        name: of the device.
        source: how the figures were come by.
        product_rates: (FLOPs of one matrix product, FLOP/s it ran at), by rising size, in the arithmetic's dtype.
        attention_rate: FLOP/s of causal attention, forward and backward together, the masked half not counted.
        row_attention: (tokens of a document, FLOP/s of the same), two of them, each document in a row of its own.
        packed_attention: the same with several documents in a row, which other kernels do.
        memory_rate: bytes per second read or written on the device.
        to_device_rate, to_host_rate: bytes per second between page-locked host memory and the device.
        both_ways_rate: bytes per second of both directions together while both copy; 0 where that is not known.
        dequantize_rate: 4-bit weights per second, double quantization included.
        launch_seconds: host time to start one small operation.
        context_bytes: device memory that CUDA takes outside torch's allocator, once compiled steps have run.
        l2_cache_bytes: of the device.
        loading_host_bytes: host memory that CUDA and its libraries take by the end of loading.
        runtime_host_bytes: the same by the end of the first step, without the compiler's share.
    """

    name: str
    source: str
    product_rates: tuple[tuple[float, float], ...]
    attention_rate: float
    memory_rate: float
    to_device_rate: float
    to_host_rate: float
    dequantize_rate: float
    launch_seconds: float
    context_bytes: int = 0
    l2_cache_bytes: int = 50 * MIB
    loading_host_bytes: int = 0
    runtime_host_bytes: int = 0
    row_attention: tuple[tuple[float, float], ...] = ()
    packed_attention: tuple[tuple[float, float], ...] = ()
    both_ways_rate: float = 0.0
