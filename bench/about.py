"""What a result was measured on: the same keys in every file of bench/results."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any


def about() -> dict[str, Any]:
    """Command, commit ($DRAWPLATE_COMMIT), machine and versions."""
    import torch
    import transformers

    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def machine() -> dict[str, Any]:
    """What figures are taken on; cores are those that this process may use."""
    from drawplate.machine.device import machine

    facts = machine()
    gpu = {"gpu": facts.device_name, "gpu_bytes": facts.device_bytes} if facts.device == "cuda" else {}
    return {**gpu, "cpu": facts.cpu, "cores": facts.cores, "platform": facts.platform}
