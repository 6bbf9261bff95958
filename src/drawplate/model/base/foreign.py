"""What goes wrong inside transformers' or PEFT's own code, as a sentence that names the architecture."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from drawplate.errors import UsageError, UserError, reason_of

LIBRARIES = ("transformers", "peft")


@contextmanager
def refusing(architecture: str) -> Iterator[None]:
    """Nothing is loaded yet: an error that comes out of a library's code for an architecture refuses that architecture.

    An error of Drawplate's own code, and a lack of memory, stay what they are.

    Raises:
        UsageError: in place of what the library raised.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = _library_of(error)
        if not where:
            raise
        raise UsageError(
            f"{architecture} cannot be used: {where}'s own code for it fails before anything is loaded "
            f"({type(error).__name__}: {reason_of(error)[:200]}).",
            safe="Nothing was loaded or written.",
            next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        ) from error


def _library_of(error: Exception) -> str:
    parts = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    return next((name for name in LIBRARIES for part in parts if name in part[:-1]), "")
