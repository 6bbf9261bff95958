"""How fast this machine is: a few seconds of measuring, once, kept in the cache folder.

What is timed is what a step is made of: matrix products from small to large, causal attention, plain reads and writes,
copies between page-locked host memory and the device, dequantization, and the launch of a small operation. Products run
for a moment before the clock starts, because a GPU that is kept busy settles at a lower clock than its first
milliseconds show.

Left out: reduced-precision products (int8, fp8), the disk, and other devices than the current one. A figure is good to
5 to 10 %, which is what the plan's times are good to.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from drawplate.durable import write_whole
from drawplate.kernels.four_bits import dequantize
from drawplate.machine.attention_rates import AttentionRates
from drawplate.machine.device import machine
from drawplate.machine.memory import let_go_of_page_locks, measure_context, memory_sample
from drawplate.recipe import cache_folder
from drawplate.records import DeviceSpeed, Machine, from_json, to_json
from drawplate.records.overheads import CPU_RUNTIME_HOST_BYTES, RUNTIME_HOST_BYTES, STEP_CONTEXT_BYTES
from drawplate.units import MIB

VERSION = 9
PRODUCT_ROWS = {"cuda": (256, 1024, 4096, 16384), "cpu": (64, 256, 1024)}
PRODUCT_WEIGHTS = {"cuda": ((1024, 4096), (4096, 4096), (14336, 4096)), "cpu": ((192, 576), (1536, 576), (2048, 2048))}
COPIED_BYTES = {"cuda": 512 * MIB, "cpu": 64 * MIB}
DEQUANTIZED_SHAPE = {"cuda": (16384, 8192), "cpu": (1024, 1024)}
"""Large enough on a GPU that it takes longer than launching it."""
WARM_UP_SECONDS = {"cuda": 0.3, "cpu": 0.02}
TIMED_SECONDS = {"cuda": 0.03, "cpu": 0.02}
FEWEST_CALLS = 6
ROUND_SECONDS, MOST_CALLS = 2e-3, 64
LAUNCHES, LAUNCH_ROUNDS = 300, 10
DISTURBED = 1.5
"""A run so many times as fast as predicted: no formula is that wrong, the probe was."""


def measured_speed(device: torch.device, dtype: torch.dtype) -> DeviceSpeed:
    """This device's speed with products in `dtype`: from the cache folder, else measured now and kept there."""
    here = machine(device)
    path = speed_path(here, dtype)
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _with_overheads(from_json(DeviceSpeed, _read(path)), here)
    speed = probe(device, dtype, here)
    keep_speed(path, speed)
    return _with_overheads(speed, here)


def speed_path(here: Machine, dtype: torch.dtype) -> Path:
    """Where a speed is kept; another device, driver, torch, dtype or number of threads is another file."""
    threads = torch.get_num_threads() if here.device == "cpu" else 0
    return _kept_path(here, str(dtype), threads)


def _kept_path(here: Machine, *more: object) -> Path:
    facts = (VERSION, here.device, here.device_name or here.cpu, here.driver, torch.__version__, *more)
    return cache_folder() / "speed" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object")
    return values


def keep_speed(path: Path, speed: DeviceSpeed) -> None:
    """Keep what was measured, as `measured_speed` reads it."""
    _keep(path, to_json(speed))


def _keep(path: Path, values: dict[str, Any]) -> None:
    """Write it, whole or not at all; a cache that cannot be written only costs measuring again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values, indent=1) + "\n")


def forget_if_disturbed(device: torch.device, dtype: torch.dtype, *, predicted: float, measured: float) -> bool:
    """Whether a run has shown that the kept speed was taken while something else had the machine; then it is forgotten.

    Only a run that is faster says so: a slower one may have been disturbed itself.

    Args:
        device, dtype: as for `measured_speed`.
        predicted, measured: tokens per second of the run.
    """
    if not 0 < DISTURBED * predicted < measured:
        return False
    with suppress(OSError):
        speed_path(machine(device), dtype).unlink(missing_ok=True)
    return True


def probe(device: torch.device, dtype: torch.dtype, here: Machine) -> DeviceSpeed:
    """Measure it now: about two seconds on a GPU, one on a CPU."""
    timer, before = _Timer(device), memory_sample().process_bytes
    with torch.no_grad():
        rates = _product_rates(timer, dtype)
        memory_rate = _memory_rate(timer)
        to_device, to_host, both = _bus_rates(timer) if device.type == "cuda" else [memory_rate / 2] * 3
        dequantize_rate = _dequantize_rate(timer, dtype)
        launch_seconds = _launch_seconds(device)
    attend = AttentionRates(timer.seconds, device, dtype)
    on_gpu = device.type == "cuda"
    taken = memory_sample().process_bytes - before
    return DeviceSpeed(
        name=here.device_name or here.cpu,
        source=f"measured with torch {torch.__version__} in {str(dtype).removeprefix('torch.')}",
        product_rates=rates,
        attention_rate=attend.of_long_documents(),
        memory_rate=memory_rate,
        to_device_rate=to_device,
        to_host_rate=to_host,
        both_ways_rate=both,
        dequantize_rate=dequantize_rate,
        launch_seconds=launch_seconds,
        context_bytes=measure_context(device).bytes + STEP_CONTEXT_BYTES if on_gpu else 0,
        l2_cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0,
        loading_host_bytes=max(0, taken) if on_gpu else 0,
        runtime_host_bytes=RUNTIME_HOST_BYTES if on_gpu else CPU_RUNTIME_HOST_BYTES,
        row_attention=attend.by_length(packed=False),
        packed_attention=attend.by_length(packed=True),
    )


def keep_overheads(device: torch.device, *, context: int, runtime_host: int) -> None:
    """What a compiled step has shown of this machine is what the next plan counts with, whatever its arithmetic.

    Args:
        device: as for `measured_speed`.
        context: bytes of the device outside torch's allocator.
        runtime_host: bytes of the host that libraries hold, the compiler not counted.
    """
    path, known = _kept_path(machine(device), "overheads"), dict[str, Any]()
    with suppress(OSError, ValueError):
        known = _read(path)
    found = {"context_bytes": context, "runtime_host_bytes": max(0, runtime_host)}
    _keep(path, known | {name: _between(known.get(name), count) for name, count in found.items() if count})


def _between(known: object, found: int) -> int:
    """Half way from what was known to what was found: runs differ by what they compile, and the last is no better."""
    return (known + found) // 2 if isinstance(known, int) and known > 0 else found


def _with_overheads(speed: DeviceSpeed, here: Machine) -> DeviceSpeed:
    """What an earlier run on this machine has shown takes the place of typical figures."""
    with suppress(OSError, ValueError, TypeError):
        kept = _read(_kept_path(here, "overheads"))
        return replace(
            speed,
            context_bytes=int(kept.get("context_bytes", speed.context_bytes)),
            runtime_host_bytes=int(kept.get("runtime_host_bytes", speed.runtime_host_bytes)),
        )
    return speed


class _Timer:
    """Seconds of one call, on the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kind = device, device.type

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self, call: Callable[[], object]) -> None:
        end = time.perf_counter() + WARM_UP_SECONDS[self.kind]
        while time.perf_counter() < end:
            call()
            self.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """The middle one of as many calls as fill a moment; on a CPU the fastest, which others disturb least.

        A GPU is waited for after some calls, so many that the wait and the first launch do not count."""
        call()
        calls = 1 if self.kind == "cpu" else min(MOST_CALLS, max(4, int(ROUND_SECONDS / self._round(call, 4))))
        times: list[float] = []
        while sum(times) * calls < TIMED_SECONDS[self.kind] or len(times) < FEWEST_CALLS:
            times.append(self._round(call, calls))
        return median(times) if self.kind == "cuda" else min(times)

    def _round(self, call: Callable[[], object], calls: int) -> float:
        self.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self.synchronize()
        return (time.perf_counter() - began) / calls


def _product_rates(timer: _Timer, dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    kind, device = timer.kind, timer.device
    rows, weights = PRODUCT_ROWS[kind], PRODUCT_WEIGHTS[kind]
    found: dict[float, list[float]] = {}
    for o, i in sorted(weights, reverse=True):
        weight_OI = torch.randn(o, i, device=device, dtype=dtype)
        x_MI = torch.randn(rows[-1], i, device=device, dtype=dtype)
        if not found:
            timer.warm_up(lambda x=x_MI, w=weight_OI: F.linear(x, w))  # type: ignore[misc]
        for m in rows:
            seconds = timer.seconds(lambda x=x_MI[:m], w=weight_OI: F.linear(x, w))  # type: ignore[misc]
            found.setdefault(2.0 * m * o * i, []).append(2.0 * m * o * i / seconds)
    return tuple((flops, sum(rates) / len(rates)) for flops, rates in sorted(found.items()))


def _memory_rate(timer: _Timer) -> float:
    size = COPIED_BYTES[timer.kind]
    source = torch.ones(size // 2, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timer.seconds(lambda: target.copy_(source))


def _bus_rates(timer: _Timer) -> list[float]:
    """Bytes a second to the device, to the host, and of both together while both copy."""
    size = COPIED_BYTES[timer.kind] // 2
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.uint8, device=timer.device) for _ in range(2)]
    streams = [torch.cuda.Stream(timer.device) for _ in range(2)]

    def there() -> None:
        with torch.cuda.stream(streams[0]):
            device[0].copy_(hosts[0], non_blocking=True)

    def back() -> None:
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(device[1], non_blocking=True)

    def both() -> None:
        there()
        back()

    rates = [size / timer.seconds(there), size / timer.seconds(back), 2 * size / timer.seconds(both)]
    hosts.clear()
    let_go_of_page_locks()
    return rates


def _dequantize_rate(timer: _Timer, dtype: torch.dtype) -> float:
    from bitsandbytes import functional as bnb  # here: it takes a second to import, and a cached speed needs it not

    shape = DEQUANTIZED_SHAPE[timer.kind]
    packed, state = bnb.quantize_4bit(
        torch.randn(shape, device=timer.device, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    stored = [packed, state.absmax, state.state2.absmax, state.offset]
    seconds = timer.seconds(lambda: dequantize(stored, "nf4", shape, dtype))
    return shape[0] * shape[1] / seconds


def _launch_seconds(device: torch.device) -> float:
    """Host time of a small operation, the device being ahead or not: what a walk of many small kernels is bound by.

    The least of some rounds: a round takes two milliseconds, and a host that is called away for longer is not slower
    for that (8 times too much was once measured so, and kept: bench/results/plan-choice-budgets-h100.json).
    """
    x, rounds = torch.zeros(16, device=device), []
    for _ in range(LAUNCH_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            x.add_(1)
        rounds.append((time.perf_counter() - began) / LAUNCHES)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return min(rounds)
