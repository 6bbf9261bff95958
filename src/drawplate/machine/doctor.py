"""What this machine has, what a run would miss, and the line that mends it.

Every check tries the thing itself where that is cheap: bitsandbytes packs a matrix and unpacks it, a folder is written
to. Caches are shown with their sizes. Left out: speed, and the hub, which is asked only when `network` is set. A
library is imported inside its check, because doctor is for the machine on which that import fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from drawplate.machine.caches import Cache, limit_bytes, other_caches, own_caches
from drawplate.recipe import cache_folder
from drawplate.units import GIB, format_bytes

OLDEST_PYTHON = (3, 11)
ENOUGH_DISK_BYTES = 5 * GIB
NETWORK_SECONDS = 5.0
QUANTIZED_DIFFERENCE = 0.25  # NF4's widest step is 0.3 of a block's largest value, so half of it and a little


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row: `missing` stops a run, `absent` narrows it. `mend` is the line that helps, empty where all is well."""

    name: str
    status: Literal["ok", "absent", "missing"]
    found: str
    mend: str = ""


def examine(network: bool = False) -> list[Check]:
    """Every row, in the order in which trouble is best mended. Never raises: a check that fails is a row."""
    checks: list[Callable[[], Check]] = [_python, _torch, _driver, _gpu, _bitsandbytes]
    checks += [_library("transformers"), _library("peft"), _other_libraries, _trackers]
    checks += [_memory, _folder("this folder", Path.cwd()), _folder("cache", cache_folder()), _own_caches]
    checks += [_hub_cache, _other_caches]
    if network:
        checks.append(_network)
    return [_tried(check) for check in checks]


def _tried(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a broken library may raise anything, and the row is there to say so
        name = check.__name__.strip("_").replace("_", " ")
        lines = str(error).strip().splitlines() or [type(error).__name__]
        mend = f"pip install --force-reinstall {name}" if name in ("torch", "bitsandbytes") else "Mend what it names."
        return Check(name=name, status="missing", found=f"{type(error).__name__}: {lines[0]}", mend=mend)


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info >= OLDEST_PYTHON:
        return Check(name="python", status="ok", found=found)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Check(name="python", status="missing", found=found, mend=f"Install Python {wanted} or newer.")


def _torch() -> Check:
    import torch

    found = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    return _at_least_the_floor("torch", found)


def _driver() -> Check:
    from drawplate.machine.device import nvidia_driver

    driver = nvidia_driver()
    if driver is None:
        mend = "For a GPU: install the NVIDIA driver until `nvidia-smi` lists it."
        return Check(name="driver", status="absent", found="no NVIDIA driver answers", mend=mend)
    return Check(name="driver", status="ok", found=f"NVIDIA {driver.version}, knows CUDA {driver.cuda_major}")


def _gpu() -> Check:
    import torch

    from drawplate.machine.device import cuda_problem, machine, pick_device

    problem = cuda_problem()
    if problem is not None:
        status: Literal["absent", "missing"] = "missing" if problem.gpu_present else "absent"
        mend = f"{problem.cure}." if problem.gpu_present else "Runs use the CPU; small models only."
        return Check(name="gpu", status=status, found=problem.cause, mend=mend)
    device = pick_device("cuda")
    has = machine(device)
    major, minor = torch.cuda.get_device_capability(device)
    found = f"{has.device_name}, {format_bytes(has.device_bytes)}, compute capability {major}.{minor}"
    (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()
    return Check(name="gpu", status="ok", found=found)


def _bitsandbytes() -> Check:
    import bitsandbytes
    import torch

    from drawplate.machine.device import pick_device

    devices = {"cpu", pick_device().type}
    for device in sorted(devices):
        wanted = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = bitsandbytes.functional.quantize_4bit(wanted, quant_type="nf4", compress_statistics=True)
        got = bitsandbytes.functional.dequantize_4bit(packed, state)
        if not (got - wanted).abs().max().item() < QUANTIZED_DIFFERENCE:
            found = f"{bitsandbytes.__version__} gives wrong numbers on {device}"
            mend = "pip install --force-reinstall bitsandbytes"
            return Check(name="bitsandbytes", status="missing", found=found, mend=mend)
    return _at_least_the_floor(
        "bitsandbytes", f"{bitsandbytes.__version__}, NF4 works on {' and '.join(sorted(devices))}"
    )


def _library(name: str) -> Callable[[], Check]:
    def check() -> Check:
        importlib.import_module(name)
        return _at_least_the_floor(name, importlib.metadata.version(name))

    check.__name__ = name
    return check


def _floors() -> dict[str, str]:
    """Name of each library that Drawplate needs -> its requirement, like `torch>=2.11`; extras left out."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in importlib.metadata.requires("drawplate") or ()]
    return {need.name: f"{need.name}{need.specifier}" for need in listed if need.marker is None}


def _is_met(requirement: str) -> bool:
    from packaging.requirements import Requirement

    need = Requirement(requirement)
    try:
        return need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _at_least_the_floor(name: str, found: str) -> Check:
    requirement = _floors().get(name, name)
    if _is_met(requirement):
        return Check(name=name, status="ok", found=found)
    mend = f'pip install "{requirement}"'
    if _is_met(_floor_of(requirement)):
        return Check(name=name, status="absent", found=f"{found}, newer than what was tested", mend=mend)
    return Check(name=name, status="missing", found=f"{found}, too old", mend=mend)


def _floor_of(requirement: str) -> str:
    """`torch>=2.11,<2.14` -> `torch>=2.11`: beyond the other bound nothing is known to be wrong."""
    from packaging.requirements import Requirement

    need = Requirement(requirement)
    return need.name + ",".join(str(part) for part in need.specifier if part.operator == ">=")


def _other_libraries() -> Check:
    floors = _floors()
    unmet = [need for name, need in floors.items() if not _is_met(_floor_of(need))]
    if not unmet:
        return Check(name="other libraries", status="ok", found=f"all {len(floors)} requirements are met")
    mend = "pip install " + " ".join(f'"{need}"' for need in unmet)
    return Check(name="other libraries", status="missing", found=f"unmet: {', '.join(unmet)}", mend=mend)


def _trackers() -> Check:
    installed = [name for name in ("tensorboard", "trackio", "wandb", "mlflow") if importlib.util.find_spec(name)]
    if installed:
        return Check(name="trackers", status="ok", found=", ".join(installed))
    mend = 'For one: pip install "drawplate[tensorboard]" (or trackio, wandb, mlflow).'
    return Check(name="trackers", status="absent", found="none; metrics.jsonl is always written", mend=mend)


def _memory() -> Check:
    from drawplate.machine.device import machine, pick_device

    available, total = psutil.virtual_memory().available, machine(pick_device("cpu")).ram_bytes
    found = f"{format_bytes(min(available, total))} free of {format_bytes(total)}"
    return Check(name="memory", status="ok", found=found)


def _folder(name: str, folder: Path) -> Callable[[], Check]:
    def check() -> Check:
        standing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not standing.is_dir():
            found = f"{folder} cannot be made: {standing} is no folder"
            return Check(name=name, status="missing", found=found, mend="Choose a folder that you may write to.")
        try:
            with tempfile.TemporaryFile(dir=standing):
                pass
        except OSError as error:
            found = f"{folder}: {error.strerror}"
            return Check(name=name, status="missing", found=found, mend="Choose a folder that you may write to.")
        free = shutil.disk_usage(standing).free
        if free >= ENOUGH_DISK_BYTES:
            return Check(name=name, status="ok", found=f"{format_bytes(free)} free in {folder}")
        found, mend = f"only {format_bytes(free)} free in {folder}", f"Make room: {format_bytes(ENOUGH_DISK_BYTES)}."
        return Check(name=name, status="absent", found=found, mend=mend)

    check.__name__ = name
    return check


def _own_caches() -> Check:
    limit = limit_bytes()
    sizes = _sizes(own_caches()) or "nothing kept yet"
    said = "" if limit is None else f"; limited to {format_bytes(limit)}"
    return Check(name="caches", status="ok", found=f"{sizes}{said} (drawplate cache)")


def _hub_cache() -> Check:
    from huggingface_hub import constants

    return _folder("hub cache", Path(constants.HF_HUB_CACHE))()


def _other_caches() -> Check:
    return Check(name="others' caches", status="ok", found=_sizes(other_caches()) or "none")


def _sizes(caches: list[Cache]) -> str:
    return ", ".join(f"{cache.name} {format_bytes(cache.bytes)}" for cache in caches if cache.bytes)


def _network() -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        found = f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')} forbids it"
        return Check(name="network", status="absent", found=found, mend="Unset HF_HUB_OFFLINE.")
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=NETWORK_SECONDS) as answer:
            return Check(name="network", status="ok", found=f"the hub answered {answer.status}")
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        mend = "Only models and datasets already on this machine can be used; name them by folder."
        return Check(name="network", status="absent", found=f"the hub does not answer: {reason}", mend=mend)
