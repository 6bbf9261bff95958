"""GPUs that are not there: published figures of common cards, with their sources, as a speed to plan with.

Rates are dense (no structured sparsity) and, for GeForce cards, with float32 accumulation, which training uses and
which those cards do at half the rate that is printed largest. A program reaches a share of a published peak; the shares
below were taken from one H100 (docs/plan.md) and are applied to every card, so a plan for a card that is not there is
good to a fifth of its time, not to a tenth. Its memory is what CUDA reports of the nominal size.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from drawplate.errors import UsageError
from drawplate.records import DeviceSpeed
from drawplate.records.overheads import CONTEXT_BYTES, CPU_RUNTIME_HOST_BYTES, LOADING_HOST_BYTES, RUNTIME_HOST_BYTES
from drawplate.units import GIB

PRODUCT_SHARE = 0.70
SMALL_PRODUCT_SHARE = 0.12
"""Of a card's dense peak: reached by products of a large layer with thousands of tokens, and by very small ones."""
ATTENTION_SHARE = 0.40
ROW_ATTENTION_SHARES = ((512.0, 0.19), (2048.0, 0.39))
"""The same of attention, by tokens of a document in a row of its own."""
FLASH_2_SHARES = ((512.0, 0.086), (2048.0, 0.22))
"""And of documents packed into a row, where the kernel that torch has for them is one for older cards."""
MEMORY_SHARE = 0.85
BUS_SHARE = 0.83
DEQUANTIZE_BYTES = 6.0
"""Bytes of memory bandwidth that dequantizing a 4-bit weight is worth: half a byte in, two out, and the arithmetic."""
LAUNCH_SECONDS = 6e-6
SMALL_FLOPS_OF_PEAK, LARGE_FLOPS_OF_PEAK = 2e-6, 2e-4
"""Seconds at the peak that a small and a large product stand for."""

REPORTED_SHARE, ECC_SHARE = 0.98, 15 / 16
"""Of the nominal memory: what CUDA reports as the device's; what is left where GDDR memory keeps its own check bits."""

_PCIE_BYTES = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
"""Bytes per second of sixteen lanes in one direction (PCI-SIG)."""

_GEFORCE = "https://images.nvidia.com/aem-dam/Solutions/geforce"
_DATA_CENTER = "https://www.nvidia.com/en-us/data-center"
AMPERE = (
    "NVIDIA Ampere GA102 GPU Architecture whitepaper v2.1, appendices A and C, "
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
)
ADA = f"NVIDIA Ada GPU Architecture whitepaper, appendix A, {_GEFORCE}/ada/nvidia-ada-gpu-architecture.pdf"
BLACKWELL = (
    "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A, "
    f"{_GEFORCE}/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
TURING = (
    "NVIDIA Turing GPU Architecture whitepaper WP-09183-001, tables 1 and 4, https://images.nvidia.com/aem-dam/en-zz/"
    "Solutions/design-visualization/technologies/turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
T4 = f"NVIDIA T4 product page, {_DATA_CENTER}/tesla-t4/"
V100 = f"NVIDIA V100 product page (SXM2), {_DATA_CENTER}/v100/"
A10 = f"NVIDIA A10 product page, {_DATA_CENTER}/products/a10-gpu/"
A40 = f"NVIDIA A40 product page, {_DATA_CENTER}/a40/"
A100 = f"NVIDIA A100 product page (SXM), {_DATA_CENTER}/a100/"
L4 = f"NVIDIA L4 product page, rates given there with sparsity halved, {_DATA_CENTER}/l4/"
L40S = f"NVIDIA L40S product page, {_DATA_CENTER}/l40s/"
RTX_6000 = "NVIDIA RTX 6000 Ada product page, https://www.nvidia.com/en-us/design-visualization/rtx-6000/"
H100 = f"NVIDIA H100 product page, rates given there with sparsity halved, {_DATA_CENTER}/h100/"
H200 = f"NVIDIA H200 product page, rates given there with sparsity halved, {_DATA_CENTER}/h200/"
B200 = f"NVIDIA DGX B200 product page, an eighth of the system, {_DATA_CENTER}/dgx-b200/"


@dataclass(frozen=True)
class Gpu:
    """One card. Rates in TFLOP/s, dense; `bf16` 0 where the card has none; memory in nominal GiB, bandwidth in GB/s.
    `newer_than_flash_2`: what torch attends to packed documents with was made for the cards before it."""

    name: str
    memory_gib: int
    bf16: float
    fp16: float
    fp8: float
    bandwidth: float
    pcie: int
    source: str
    lanes: int = 16
    ecc: bool = False
    newer_than_flash_2: bool = False

    @property
    def bytes(self) -> int:
        """Memory that CUDA reports."""
        return int(self.memory_gib * GIB * REPORTED_SHARE * (ECC_SHARE if self.ecc else 1.0))

    def speed(self, compute_dtype: str) -> DeviceSpeed:
        """What a plan may count on, in bfloat16, float16 or float32 arithmetic."""
        tflops = {"bfloat16": self.bf16, "float16": self.fp16, "float32": self.fp16 / 4}[compute_dtype]
        peak = (tflops or self.fp16 / 8) * 1e12
        bus = _PCIE_BYTES[self.pcie] * self.lanes / 16 * BUS_SHARE
        memory = self.bandwidth * 1e9 * MEMORY_SHARE
        small, large = peak * SMALL_FLOPS_OF_PEAK, peak * LARGE_FLOPS_OF_PEAK
        packed = FLASH_2_SHARES if self.newer_than_flash_2 else ROW_ATTENTION_SHARES
        return DeviceSpeed(
            name=self.name,
            source=f"published figures ({self.source}), at {PRODUCT_SHARE:.0%} of the peak",
            product_rates=((small, peak * SMALL_PRODUCT_SHARE), (large, peak * PRODUCT_SHARE)),
            attention_rate=peak * ATTENTION_SHARE,
            memory_rate=memory,
            to_device_rate=bus,
            to_host_rate=bus,
            dequantize_rate=memory / DEQUANTIZE_BYTES,
            launch_seconds=LAUNCH_SECONDS,
            context_bytes=CONTEXT_BYTES,
            loading_host_bytes=LOADING_HOST_BYTES,
            runtime_host_bytes=RUNTIME_HOST_BYTES,
            row_attention=tuple((length, share * peak) for length, share in ROW_ATTENTION_SHARES),
            packed_attention=tuple((length, share * peak) for length, share in packed),
        )


GPUS = (
    Gpu("T4", 16, 0, 65, 0, 320, 3, T4, ecc=True),
    Gpu("V100 32GB", 32, 0, 125, 0, 900, 3, V100),
    Gpu("RTX 2080 Ti", 11, 0, 53.8, 0, 616, 3, TURING),
    Gpu("RTX 3060", 12, 25.5, 25.5, 0, 360, 4, f"{AMPERE}; 3584 cores at 1.78 GHz"),
    Gpu("RTX 3080", 10, 59.5, 59.5, 0, 760, 4, AMPERE),
    Gpu("RTX 3090", 24, 71, 71, 0, 936, 4, AMPERE),
    Gpu("A10", 24, 125, 125, 0, 600, 4, A10, ecc=True),
    Gpu("A40", 48, 149.7, 149.7, 0, 696, 4, A40, ecc=True),
    Gpu("RTX A6000", 48, 154.8, 154.8, 0, 768, 4, AMPERE, ecc=True),
    Gpu("A100 40GB", 40, 312, 312, 0, 1555, 4, A100),
    Gpu("A100 80GB", 80, 312, 312, 0, 2039, 4, A100),
    Gpu("L4", 24, 121, 121, 242, 300, 4, L4, ecc=True),
    Gpu("L40S", 48, 362, 362, 733, 864, 4, L40S, ecc=True),
    Gpu("RTX 4060 Ti 16GB", 16, 44.1, 44.1, 88.2, 288, 4, f"{ADA}; 4352 cores at 2.54 GHz", lanes=8),
    Gpu("RTX 4070 Ti Super", 16, 88.2, 88.2, 176, 672, 4, f"{ADA}; 8448 cores at 2.61 GHz"),
    Gpu("RTX 4080", 16, 97.5, 97.5, 195, 717, 4, ADA),
    Gpu("RTX 4090", 24, 165.2, 165.2, 330.3, 1008, 4, ADA),
    Gpu("RTX 6000 Ada", 48, 364, 364, 728, 960, 4, RTX_6000, ecc=True),
    Gpu("RTX 5080", 16, 112.6, 112.6, 225.1, 960, 5, BLACKWELL),
    Gpu("RTX 5090", 32, 209.5, 209.5, 419, 1792, 5, BLACKWELL),
    Gpu("H100 PCIe", 80, 756, 756, 1513, 2000, 5, f"{H100} (PCIe)", newer_than_flash_2=True),
    Gpu("H100", 80, 989, 989, 1979, 3350, 5, f"{H100} (SXM)", newer_than_flash_2=True),
    Gpu("H200", 141, 989, 989, 1979, 4800, 5, f"{H200} (SXM)", newer_than_flash_2=True),
    Gpu("B200", 180, 2250, 2250, 4500, 7700, 5, B200, newer_than_flash_2=True),
)


def gpu_named(name: str) -> Gpu:
    """The card of that name; case, spaces and words like NVIDIA and GeForce do not matter.

    Raises:
        UsageError: not in the table; the nearest names are given.
    """
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    wanted = _plain(name)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    names = ", ".join(known[key].name for key in near) or ", ".join(gpu.name for gpu in GPUS)
    raise UsageError(
        f"--gpu {name}: no figures are known for this card.",
        safe="Nothing was loaded or written.",
        next_step=f"Name one of {names}; or plan on the machine that has the card.",
    )


def typical_speed(device: str) -> DeviceSpeed:
    """What is assumed of a device that was neither measured nor named: an RTX 4090, or two cores of a server."""
    if device == "cuda":
        return gpu_named("RTX 4090").speed("bfloat16")
    return DeviceSpeed(
        name="a CPU",
        source="assumed: two cores of a server",
        product_rates=((1e6, 5e9), (1e8, 5e10), (1e9, 8e10)),
        attention_rate=4e10,
        memory_rate=1e10,
        to_device_rate=5e9,
        to_host_rate=5e9,
        dequantize_rate=5e8,
        launch_seconds=4e-6,
        runtime_host_bytes=CPU_RUNTIME_HOST_BYTES,
    )


def _plain(name: str) -> str:
    words = name.lower().replace("-", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))
