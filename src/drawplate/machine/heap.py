"""Host memory of a run on the CPU goes back to the system as soon as it is freed.

glibc takes blocks below a threshold from one heap, where torch's aligned blocks leave gaps that no block of the same
size fits into again, and it raises that threshold to 32 MiB while a run frees larger blocks. A step of the demo that
holds 3.4 GiB then takes 4.5. With a fixed threshold each large block is a mapping of its own, and what the process
holds is what its tensors hold. The pages of each block are then touched anew; torch asks for huge ones (quiet.py sets
its variable), so that this takes a few percent of a step.

Left out: C libraries other than glibc, which keep their own rules.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

from drawplate.units import MIB

MAPPED_FROM_BYTES = MIB
_M_MMAP_THRESHOLD = -3
"""Its number in glibc's malloc.h."""


def map_large_blocks() -> None:
    """From now on, blocks of `MAPPED_FROM_BYTES` and more are mapped one by one in this process."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
