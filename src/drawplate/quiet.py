"""What third-party libraries must not do in a Drawplate process: fetch code, call home, talk over the screen.

Both functions only set environment variables (a value the user set already wins, where it is about noise), block one
import, raise one logger's level and add one warning filter, so they cost microseconds; they work when they run before
the libraries are imported. A library imported earlier keeps the settings it has: the process was its owner's before it
was ours.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

_NO_CALLING_HOME = {
    "USE_HUB_KERNELS": "NO",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}

_QUIET_SCREEN = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""torch asks for huge pages for large blocks of host memory. Read at the first of them; see machine/heap.py."""


def forbid_hub_code() -> None:
    """No telemetry, and no kernels downloaded from a hub.

    bitsandbytes fetches and runs a CPU kernel from a hub the moment it is imported, if the `kernels` package is
    there; a None in `sys.modules` makes that import fail. A process that imported `kernels` itself keeps it.
    """
    os.environ.update(_NO_CALLING_HOME)
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def hush_libraries() -> None:
    """Keep the libraries' progress bars, start-up messages and advice off the screen; errors still show.

    Also sets TOKENIZERS_PARALLELISM, whose absence makes tokenizers warn at the first fork, and huge pages for torch.
    """
    for name, value in (_QUIET_SCREEN | _HUGE_PAGES).items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    # Libraries warning each other of what a later version will change; a filter that the user set comes first.
    warnings.filterwarnings("ignore", category=FutureWarning, append=True)
