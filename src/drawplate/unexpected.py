"""An exception that is not ours -> what happened, what to do, and the exit code, in a person's words.

Told apart by the names of types, by the error number and by the library that raised it, so that nothing slow is
imported here. What is not recognised is a fault of Drawplate and says so.
"""

from __future__ import annotations

import errno
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from drawplate.errors import (
    FULL,
    DiskFull,
    DoesNotFit,
    EnvironmentProblem,
    IntegrityError,
    NeedsNetwork,
    StorageError,
    UsageError,
    UserError,
)

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
)
NO_SPACE = ("no space left on device", "disk quota exceeded", "file too large")
COMPILERS = ("torch._inductor", "torch._dynamo", "triton")
NETWORKS = ("httpx", "httpcore", "requests", "urllib3", "urllib", "http", "ssl", "aiohttp", "huggingface_hub")
LONGEST_REASON = 300


def unexpected(error: BaseException) -> UserError:
    """What a person is told of an exception of Python or of a library, without what is safe and where the log is."""
    kind, what, next_step = _told(error)
    return kind(f"{what} ({reason(error)}).", next_step=next_step)


def reason(error: BaseException) -> str:
    """The exception's name and the first line of what it says."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0].rstrip(' .:')}" if lines else type(error).__name__
    return said if len(said) <= LONGEST_REASON else said[:LONGEST_REASON] + " ..."


def _told(error: BaseException) -> tuple[type[UserError], str, str]:
    chain, said = list(_chain(error)), str(error).lower()
    libraries = [_module(one).partition(".")[0] for one in chain]
    if any(isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" for one in chain) or _has(
        said, OUT_OF_MEMORY
    ):
        return (
            DoesNotFit,
            "Memory ran out where the plan did not expect it",
            "Set memory.vram or memory.ram below what is free, or data.max_length lower, then start again.",
        )
    if getattr(error, "errno", None) in FULL or _has(said, NO_SPACE):
        return DiskFull, "The disk is full", "Free some space on it (`df -h`), then start again."
    if any(_module(one).startswith(COMPILERS) for one in chain) or raised_in(error).startswith(COMPILERS):
        return EnvironmentProblem, *_compiler(error)
    if isinstance(error, (ImportError, NotImplementedError)) or "shared object file" in said:
        return EnvironmentProblem, "A library is missing or does not fit", "Run `drawplate doctor`; it names the cure."
    if type(error).__name__ == "AcceleratorError" or "cuda error" in said or "cuda driver" in said:
        return EnvironmentProblem, "The GPU failed", "Run `drawplate doctor` and `nvidia-smi`, then start again."
    if isinstance(error, (ConnectionError, TimeoutError)) or libraries[0] in NETWORKS:
        return NeedsNetwork, "The network or the hub did not answer as it should", "Try again when it does."
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError, "A path or name is longer than this system allows", "Name one that is shorter, and exists."
    if isinstance(error, OSError):
        return StorageError, "A file could not be read or written", _look_at(error)
    if "safetensor" in type(error).__name__.lower():
        return IntegrityError, "A file of weights cannot be read", "Fetch the model or copy the adapter again."
    return UserError, "Drawplate failed unexpectedly", "Please report it with that log."


def _compiler(error: BaseException) -> tuple[str, str]:
    if isinstance(error, OSError):
        variables = "TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR"
        return (
            "The cache of torch's compiler cannot be written",
            f"Set {variables} to folders that you may write to, or free their disk, then start again.",
        )
    return "torch's compiler failed", "Start again with --set model.compile=false, or see `drawplate doctor`."


def _look_at(error: OSError) -> str:
    if error.errno in (errno.EIO, errno.EROFS):
        return "Check that disk: it may be failing or read-only (`dmesg`, `df -h`)."
    return "Check that the path exists and that you may read and write it, then start again."


def _has(said: str, words: tuple[str, ...]) -> bool:
    return any(word in said for word in words)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it came from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _module(error: BaseException) -> str:
    return str(type(error).__module__)


def raised_in(error: BaseException) -> str:
    """The module that raised it; where that is Python's own library, the module that called it."""
    standard = sysconfig.get_path("stdlib")
    modules, trace = [], error.__traceback__
    while trace is not None:
        code, module = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__", ""))
        path = str(Path(code.co_filename))
        if not path.startswith((standard, "<frozen")) or "site-packages" in path:
            modules.append(module)
        trace = trace.tb_next
    return modules[-1] if modules else ""
