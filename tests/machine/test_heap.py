"""Freed blocks of host memory leave the process, which is why the plan of a run on the CPU can count tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import psutil, torch
from drawplate.machine.device import pick_device
{prepare}
def held():
    return psutil.Process().memory_info().rss / 2**20
for _ in range(3):
    before = held()
    blocks = [torch.ones(size) for size in (1 << 20, 3 << 20, 5 << 20) for _ in range(8)]
    kept = [torch.ones(100_000) for _ in range(64)]
    del blocks
    print(held() - before)
    del kept
"""


def grown(prepare: str) -> list[float]:
    """MiB that a process still holds, after it has freed 288 and kept 24, three times."""
    program = PROGRAM.format(prepare=prepare)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [float(line) for line in answer.stdout.split()]


HUGE = """
from drawplate.quiet import hush_libraries
hush_libraries()
import torch
block = torch.ones(1 << 24)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's huge pages")
def test_large_blocks_lie_on_huge_pages_where_the_system_has_them() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system has none")
    answer = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    assert int(answer.stdout) * 1024 > 1 << 25


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_cpu_run_gives_freed_blocks_back_which_the_library_alone_does_not() -> None:
    assert max(grown("pick_device('cpu')")) < 60
    assert max(grown("")) > 100, "or this test shows nothing"


SMALL = """
import psutil, torch
from drawplate.machine.heap import give_back_freed
def held():
    return psutil.Process().memory_info().rss / 2**20
blocks = [torch.ones(20_000) for _ in range(4000)]
full = held()
del blocks[::2], blocks
freed = held()
give_back_freed()
print(full, freed, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_small_freed_blocks_go_back_when_that_is_asked_for() -> None:
    answer = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    full, _, after = map(float, answer.stdout.split())
    assert after < full - 250
