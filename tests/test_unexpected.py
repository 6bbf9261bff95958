"""Whatever a library raises has an exit code and a next step."""

from __future__ import annotations

import errno
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from torch._dynamo.exc import BackendCompilerFailed

from drawplate.unexpected import LONGEST_REASON, raised_in, reason, unexpected


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "code", "step"),
    [
        (MemoryError(), 5, "memory.vram"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "memory.vram"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            5,
            "memory.ram",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 5, "memory.vram"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7, "Free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 7, "Free some space"),
        (OSError(errno.EIO, "Input/output error", "/x"), 7, "Check that disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 7, "read and write it"),
        (SafetensorError("Error while deserializing header"), 8, "Fetch the model"),
        (BackendCompilerFailed(lambda: None, RuntimeError("no C compiler"), None), 3, "model.compile=false"),
        (ImportError("libcudart.so.12: cannot open shared object file"), 3, "drawplate doctor"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), 3, "drawplate doctor"),
        (ConnectionResetError("peer"), 9, "Try again"),
        (RecursionError("maximum recursion depth exceeded"), 1, "report"),
        (KeyError("loss"), 1, "report"),
        (Panic("called `Option::unwrap()` on a `None` value"), 1, "report"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_exception_has_a_fitting_exit_code_and_a_next_step(error, code, step):
    told = unexpected(error)
    assert told.exit_code == code
    assert step in told.next_step
    assert reason(error) in told.what
    assert "\n" not in told.what


def test_what_a_library_says_at_length_is_cut():
    assert len(reason(ValueError("x" * 10_000))) < LONGEST_REASON + 10


def test_the_module_that_raised_is_found_behind_pythons_own():
    with pytest.raises(OSError) as raised:  # noqa: PT011 - which one is the system's business
        subprocess.run(["/no/such/program"], check=True)
    assert raised_in(raised.value) == __name__


def test_a_file_that_the_compiler_cannot_write_is_its_cache():
    namespace = {"__name__": "torch._inductor.codecache"}
    exec(compile("import os\ndef make(): os.makedirs('/dev/null/x')", "codecache.py", "exec"), namespace)
    with pytest.raises(NotADirectoryError) as raised:
        namespace["make"]()
    told = unexpected(raised.value)
    assert (told.exit_code, "TORCHINDUCTOR_CACHE_DIR" in told.next_step) == (3, True)
