"""What every test shares: no GPU, no GPU tests; and nothing of the machine's own settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import drawplate.quiet

drawplate.quiet.hush_libraries()
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors, and two test processes to two cores
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; kernels then run on a CPU


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that no test depends on what an earlier run left in the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DRAWPLATE_CACHE", str(folder))
    return folder


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
