"""Where things are kept, and what a path in a recipe means."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads and converted weights are kept: $DRAWPLATE_CACHE, or drawplate/ in the user's cache folder."""
    given = os.environ.get("DRAWPLATE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "drawplate"


def expand(path: str) -> Path:
    """A path of the recipe with `~` and `${DRAWPLATE_CACHE}` filled in; no other variable is, so none can leak."""
    return Path(path.replace("${DRAWPLATE_CACHE}", str(cache_folder()))).expanduser()
