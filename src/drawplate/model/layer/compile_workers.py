"""The processes that torch's compiler works in end with this one, at once.

At the end of a process torch 2.11 and 2.12 ask them to end and wait for up to five minutes: their pool can stand still
after a first compilation (pytorch#162199; mended in 2.13). A finished run would print its table and then not end. They
hold nothing that is worth waiting for: kernels reach the compiler's cache under a temporary name and are renamed.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
import torch

ENDS_THEM_ITSELF = "2.13"
"""The first torch that does."""


@functools.cache
def end_with_this_process() -> None:
    """Called before the first compilation of a process."""
    if torch.__version__ >= ENDS_THEM_ITSELF:
        return
    from torch._inductor import async_compile  # late: only compiled runs need it; its handler must be registered first

    atexit.register(end_workers, async_compile._pool_set)


def end_workers(pools: Iterable[Any]) -> None:
    """Kill the process that each pool of torch's compiler began, and those below it."""
    for pool in pools:
        if (began := getattr(pool, "process", None)) is None:
            continue  # workers of this process itself, which torch ends well
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(began.pid)
            for process in (*first.children(recursive=True), first):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
