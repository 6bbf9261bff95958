"""Host memory of a run on the CPU goes back to the system as soon as it is freed.

glibc takes blocks below a threshold from one heap, where torch's aligned blocks leave gaps that no block of the same
size fits into again, and it raises that threshold to 32 MiB while a run frees larger blocks. A process then holds much
more than its tensors. With a fixed threshold each large block is a mapping of its own, and goes when it is freed. Its
pages are touched anew each time; torch asks for huge ones (quiet.py sets its variable), so that this costs little.

Left out: C libraries other than glibc, which keep their own rules.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

from drawplate.units import MIB

MAPPED_FROM_BYTES = MIB
_M_MMAP_THRESHOLD = -3
"""Its number in glibc's malloc.h."""


def map_large_blocks() -> None:
    """From now on, blocks of `MAPPED_FROM_BYTES` and more are mapped one by one in this process."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def give_back_freed() -> None:
    """What this process has freed and still holds goes back to the system, as far as whole pages of it are free."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
