"""A model that is not on this machine, and cannot be fetched. (A download that is cut: tests/faults/test_inputs.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "no answer"],
)
def test_a_hub_name_without_network_says_how_to_fetch_it_within_seconds(environment: dict, tmp_path: Path) -> None:
    code = (
        "import time, drawplate.quiet; drawplate.quiet.hush_libraries()\n"
        "from drawplate.model.base.weights import open_checkpoint\n"
        "from drawplate.recipe import ModelSection\n"
        "from drawplate.errors import NeedsNetwork\n"
        "import huggingface_hub\n"
        "began = time.monotonic()\n"
        "try: open_checkpoint(ModelSection(name_or_path='no-such-owner/no-such-model', revision='v2'))\n"
        "except NeedsNetwork as error: print(time.monotonic() - began, error.next_step)\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), **environment}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    seconds, _, next_step = done.stdout.partition(" ")
    assert seconds, done.stderr
    assert float(seconds) < 5, time.monotonic() - began
    assert "hf download no-such-owner/no-such-model --revision v2" in next_step
