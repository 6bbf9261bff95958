"""What this machine has, and which device a run computes on.

Left out: how fast the machine is (speed.py), how much memory is in use (memory.py), and more than one GPU: the current
CUDA device is the device.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml
import torch

from drawplate.errors import EnvironmentProblem, UsageError
from drawplate.machine.cgroups import usable_cores, usable_ram_bytes
from drawplate.machine.heap import map_large_blocks
from drawplate.records import Machine

KEPT_PRODUCTS = 64
BF16_CAPABILITY = (8, 0)
_NATIVE_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def pick_device(device_map: str = "auto") -> torch.device:
    """`auto` (CUDA if there is one that works, else CPU), `cuda` or `cpu` -> the device to run on.

    Raises:
        EnvironmentProblem: `cuda` was asked for and does not work; the message names cause and cure.
        UsageError: any other word.
    """
    if device_map not in ("auto", "cuda", "cpu"):
        raise UsageError(f"model.device_map {device_map!r} is not known.", next_step="Use auto, cuda or cpu.")
    if device_map == "cpu":
        _prepare_cpu()
        return torch.device("cpu")
    problem = cuda_problem()
    if problem is None:
        _let_segments_grow()
        return torch.device("cuda", torch.cuda.current_device())
    if device_map == "cuda":
        raise EnvironmentProblem(
            f"model.device_map asks for cuda, but {problem.cause}.",
            safe="Nothing was loaded or written.",
            next_step=f"{problem.cure}; or set model.device_map to cpu.",
        )
    _prepare_cpu()
    return torch.device("cpu")


def _prepare_cpu() -> None:
    """What this process must have set before a run on the CPU takes memory."""
    map_large_blocks()
    _let_few_products_stay()


def _let_few_products_stay() -> None:
    """oneDNN compiles a product for each shape and keeps 1,024 of them, a megabyte or two each: with rows of ever new
    widths a CPU run would grow by hundreds of MiB. A step's own shapes stay. Not against what the user has set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def _let_segments_grow() -> None:
    """torch's allocator keeps one segment that grows instead of many: fewer gaps, which planner/bytes counts.

    Only before the first allocation, and not against what the user has set. CUDA may be initialized already: importing
    bitsandbytes does that.
    """
    chosen = "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ
    if sys.platform == "linux" and not chosen and not torch.cuda.memory_reserved():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


@dataclass(frozen=True, kw_only=True)
class CudaProblem:
    """Why CUDA cannot be used, without a full stop; `gpu_present` says that a GPU lies idle because of it."""

    cause: str
    cure: str
    gpu_present: bool


def cuda_problem() -> CudaProblem | None:
    """What keeps torch from using CUDA, with its cure; None where nothing does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about an old driver; the answer below says it in full
        if torch.cuda.is_available():
            return None
    driver = nvidia_driver()
    cause, cure = _cause_and_cure(driver)
    return CudaProblem(cause=cause, cure=cure, gpu_present=driver is not None and driver.gpus > 0)


def _cause_and_cure(driver: NvidiaDriver | None) -> tuple[str, str]:
    if driver is None:
        return "no NVIDIA driver answers on this machine", "Install the NVIDIA driver until `nvidia-smi` lists the GPU"
    if driver.gpus == 0:
        return (
            f"the NVIDIA driver {driver.version} sees no GPU",
            "Check `nvidia-smi` and how the GPU is passed to this machine",
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA", "Install a CUDA build of torch"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU", "Unset CUDA_VISIBLE_DEVICES"
    if driver.cuda_major < int(torch.version.cuda.split(".")[0]):
        return (
            f"the NVIDIA driver {driver.version} knows CUDA {driver.cuda_major} and torch is built for CUDA "
            f"{torch.version.cuda}",
            f"Update the driver, or install a torch built for CUDA {driver.cuda_major}",
        )
    return f"torch {torch.__version__} cannot reach the GPU", "Check that `nvidia-smi` works and no other job holds it"


@dataclass(frozen=True, kw_only=True)
class NvidiaDriver:
    """What the driver says of itself: its version, the newest CUDA it knows, and how many GPUs it sees."""

    version: str
    cuda_major: int
    gpus: int


def nvidia_driver() -> NvidiaDriver | None:
    """The NVIDIA driver of this machine; None where none answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return NvidiaDriver(
            version=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda_major=int(pynvml.nvmlSystemGetCudaDriverVersion()) // 1000,
            gpus=int(pynvml.nvmlDeviceGetCount()),
        )
    except pynvml.NVMLError:
        return None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def machine(device: torch.device | None = None) -> Machine:
    """What this machine has; `device` None means the one `pick_device("auto")` would give.

    `cores` and `ram_bytes` are what this process may use: CPU affinity and control-group limits count.
    """
    device = device or pick_device()
    common = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "ram_bytes": usable_ram_bytes(),
        "bf16_native": bf16_native(device),
    }
    if device.type != "cuda":
        return Machine(**common)  # type: ignore[arg-type]
    properties, driver = torch.cuda.get_device_properties(device), nvidia_driver()
    return Machine(
        **common,  # type: ignore[arg-type]
        device="cuda",
        device_name=properties.name,
        device_bytes=properties.total_memory,
        driver=driver.version if driver else "",
    )


def bf16_native(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware, not through fp32.

    On a CPU that is AVX512-BF16, AMX or ARM's bf16. `torch.ops.mkldnn._is_mkldnn_bf16_supported` would not do: it is
    true on any AVX512, where bf16 is emulated and several times slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in _NATIVE_BF16_FEATURES)


_LOST: list[bool] = []


def lost() -> None:
    """The device raised an error after which every call to it fails, or hangs: from now on nobody asks it anything."""
    _LOST.append(True)


def is_lost() -> bool:
    """Whether `lost` was called in this process."""
    return bool(_LOST)


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
