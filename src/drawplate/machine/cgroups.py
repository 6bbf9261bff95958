"""What this process may use of the host: cores and bytes, with the limits of control groups (containers) counted.

Versions 1 and 2 of the kernel's interface, read from files; where they are missing only the machine itself counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """CPU cores, by affinity and by every control group's quota; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for text in _files("cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def usable_ram_bytes() -> int:
    """Memory in all: the machine's, or the smallest limit of a control group."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory.limit_in_bytes"):
        limits += [int(text) for text in _files("memory", name) if text.isdigit()]
    return min(limits)


def available_ram_bytes() -> int:
    """Bytes that this process may still take: the system's, and what is left in every control group above it.

    Files in the page cache count as free, since the kernel drops them at need; page-locked ones among them cannot be
    told apart, so the answer may be too large by what other processes have locked.
    """
    left = [psutil.virtual_memory().available]
    for folder in _folders("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                taken = int((folder / used).read_text()) - _file_cache_bytes(folder)
                left.append(int((folder / limit).read_text()) - max(0, taken))
    return max(0, min(left))


def _file_cache_bytes(group: Path) -> int:
    """Page cache of files in a control group and those below it."""
    with suppress(OSError, ValueError):
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_inactive_file" in counted else ""  # version 1 counts the groups below apart
        return sum(int(counted.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return 0


def _files(controller: str, name: str) -> Iterator[str]:
    """Contents of `name` in this process's control group and every group above it, in versions 1 and 2."""
    for folder in _folders(controller):
        with suppress(OSError):
            yield (folder / name).read_text().strip()


def _folders(controller: str) -> Iterator[Path]:
    """This process's control group and every group above it, in versions 1 and 2.

    Inside a container the path that /proc names may not be mounted; the mount's root is read then.
    """
    with suppress(OSError):
        for line in OF_THIS_PROCESS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = ROOT / controller if controllers else ROOT
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))
