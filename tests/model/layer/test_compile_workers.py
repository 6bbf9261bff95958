"""The compiler's worker processes do not outlive the process that compiles, nor hold it up."""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.torch_version import TorchVersion

from drawplate.model.layer.compile_workers import end_with_this_process, end_workers

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


def test_a_pool_that_would_not_end_is_ended_with_its_workers() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as began:
        assert began.stdout is not None
        worker = psutil.Process(int(began.stdout.readline()))
        end_workers([SimpleNamespace(process=began), SimpleNamespace()])
        began.wait(10)  # torch's own handler waits here, for 300 s
        psutil.wait_procs([worker], timeout=10)
        assert not worker.is_running()
        end_workers([SimpleNamespace(process=began)])  # has ended already


@pytest.mark.parametrize(("version", "handlers"), [("2.11.0+cu128", 1), ("2.12.1", 1), ("2.13.0", 0)])
def test_it_is_left_to_a_torch_that_does_it_itself(
    monkeypatch: pytest.MonkeyPatch, version: str, handlers: int
) -> None:
    registered: list[Callable[..., Any]] = []
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(atexit, "register", lambda function, *_: registered.append(function))
    end_with_this_process.__wrapped__()
    assert registered.count(end_workers) == handlers
