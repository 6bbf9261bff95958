"""What every test shares: no GPU, no GPU tests; and nothing of the machine's own settings."""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
from pathlib import Path

import hypothesis
import pytest

import drawplate.quiet

drawplate.quiet.hush_libraries()
os.environ["HF_HUB_OFFLINE"] = "1"

SECONDS_TO_END = 60

# A shared machine that stands still for two seconds is no property of what is tested.
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors, and two test processes to two cores
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; kernels then run on a CPU


def pytest_sessionfinish() -> None:
    """A process that does not end after its last test says what it waits for; one of several waits for the others."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        faulthandler.dump_traceback_later(SECONDS_TO_END, file=sys.__stderr__)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For fixtures that several tests share; never the user's own."""
    os.environ["DRAWPLATE_CACHE"] = str(_cache_with_speeds(tmp_path_factory))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that no test depends on what an earlier run left in the user's."""
    folder = _cache_with_speeds(tmp_path_factory)
    monkeypatch.setenv("DRAWPLATE_CACHE", str(folder))
    return folder


def _cache_with_speeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A typical device's speed lies in it, so that no test waits for a probe or plans by how busy the machine is."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "speed").mkdir()
    for name, text in _typical_speeds().items():
        (folder / "speed" / name).write_text(text)
    return folder


@functools.cache
def _typical_speeds() -> dict[str, str]:
    import torch

    from drawplate.machine.device import machine
    from drawplate.machine.speed import speed_path
    from drawplate.planner.seconds.gpus import typical_speed
    from drawplate.records import to_json

    here, text = machine(torch.device("cpu")), json.dumps(to_json(typical_speed("cpu")))
    return {speed_path(here, dtype).name: text for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer; not to be written to."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small texts; not to be written to."""
    from tests.tiny import write_texts

    return write_texts(tmp_path_factory.mktemp("corpus"))
