"""The errors a person may see: what happened, what is safe, what to do next.

Anything that goes wrong because of the outside world (input, disk, network, device) is raised as a `UserError`
subclass and printed by the command line as three lines, never as a traceback. A programmer's mistake stays an
ordinary exception. The exit codes are part of the contract with scripts that call Drawplate.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can act on.

    Args:
        what: what happened, in one sentence, naming the file, key or document concerned.
        safe: what is untouched or saved; empty where nothing was at risk.
        next_step: the command or the change that mends it.
    """

    exit_code = 1

    def __init__(self, what: str, *, next_step: str, safe: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.safe = safe
        self.next_step = next_step

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.safe, self.next_step) if part)


class UsageError(UserError):
    """A command or recipe that cannot be meant: an unknown key, a value out of range, two keys that disagree."""

    exit_code = 2


class EnvironmentProblem(UserError):
    """The machine lacks something: a driver, a library, a device that was asked for."""

    exit_code = 3


class DataError(UserError):
    """Documents that are missing, empty, unreadable, or too few to hold any out."""

    exit_code = 4


class DoesNotFit(UserError):
    """The plan, or the run itself, needs more memory than there is."""

    exit_code = 5


class NumericError(UserError):
    """A loss or gradient that is not a number, or a loss that is not the model's own."""

    exit_code = 6


class StorageError(UserError):
    """A folder in use, not empty, not writable, or a disk that is full."""

    exit_code = 7


class DiskFull(StorageError):
    """No room on the disk now; there may be some later."""


class IntegrityError(UserError):
    """A file that is not what it claims to be: a pickle, code to execute, a wrong hash, a missing tensor."""

    exit_code = 8


class NeedsNetwork(UserError):
    """A model or dataset that is not on this machine and could not be fetched."""

    exit_code = 9


class StoppedSafely(UserError):
    """The run was asked to stop, saved what it had, and can go on."""

    exit_code = 75


def disk_refusal(path: Path, error: Exception) -> StorageError:
    """The error of a disk that refuses to write `path`, as a person should read it."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has no errno
    full = (int(in_words[1]) if in_words else getattr(error, "errno", None)) in FULL
    return (DiskFull if full else StorageError)(
        f"{path} could not be written: {getattr(error, 'strerror', None) or error}.",
        safe="What was written before it is complete.",
        next_step="Free some space on that disk, then start again." if full else "Look after that disk.",
    )


def reason_of(error: Exception) -> str:
    """What a library says is wrong, as the end of a sentence: its first line, or an error's name."""
    lines = str(error).splitlines()
    return (lines[0].rstrip(" .:") if lines else "") or type(error).__name__
