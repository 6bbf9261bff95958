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

    machine = {"cpu": platform.processor(), "platform": platform.platform()}
    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}) | machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
