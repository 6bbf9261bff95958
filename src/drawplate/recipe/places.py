"""Where things are kept, and what a path in a recipe means."""

from __future__ import annotations

import os
from pathlib import Path

from drawplate.errors import UsageError


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: $DRAWPLATE_CACHE, or drawplate/ in the user's cache folder."""
    given = os.environ.get("DRAWPLATE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drawplate"


def expand(path: str) -> Path:
    """A path of the recipe with `~` and `${DRAWPLATE_CACHE}` filled in; no other variable is, so none can leak.

    Raises:
        UsageError: it is empty, which Python would take for the current folder, or the home of somebody unknown.
    """
    if not path:
        raise UsageError(
            "A path is empty.",
            safe="Nothing was read or written.",
            next_step="Name a file or folder; `.` is the current folder. Is a variable of the shell not set?",
        )
    try:
        return Path(path.replace("${DRAWPLATE_CACHE}", str(cache_folder()))).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{path}: this system knows no user of that name.",
            safe="Nothing was read or written.",
            next_step="Write the path from the root, or ./~NAME for a folder that is called so.",
        ) from None


def located(path: str) -> str:
    """A path as it is read from any folder: one that begins in the current folder is written whole."""
    return path if path.startswith(("/", "~", "$")) else str(expand(path).absolute())
