from __future__ import annotations

import sys

import psutil
import pynvml
import pytest
import torch

from drawplate.errors import EnvironmentProblem, UsageError
from drawplate.machine import device
from drawplate.machine.device import NvidiaDriver, pick_device

CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_driver(monkeypatch, driver):
    monkeypatch.setattr(device, "nvidia_driver", lambda: driver)


def test_the_cpu_can_always_be_asked_for():
    assert pick_device("cpu") == CPU


def test_auto_falls_back_to_the_cpu(no_cuda):
    assert pick_device("auto") == CPU


def test_another_word_is_refused():
    with pytest.raises(UsageError, match="tpu"):
        pick_device("tpu")


@pytest.mark.parametrize(
    ("driver", "built_for", "visible", "cause", "gpu_present"),
    [
        (None, "13.0", None, "no NVIDIA driver", False),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=0), "13.0", None, "sees no GPU", False),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), None, None, "build without CUDA", True),
        (NvidiaDriver(version="470.2", cuda_major=11, gpus=1), "13.0", None, "470.2 knows CUDA 11", True),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), "13.0", "-1", "CUDA_VISIBLE_DEVICES='-1'", True),
        (NvidiaDriver(version="580.1", cuda_major=13, gpus=1), "13.0", None, "cannot reach the GPU", True),
    ],
)
def test_cuda_asked_for_and_missing_names_cause_and_cure(
    no_cuda, monkeypatch, driver, built_for, visible, cause, gpu_present
):
    with_driver(monkeypatch, driver)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(EnvironmentProblem) as error:
        pick_device("cuda")
    assert error.value.exit_code == 3
    assert cause in error.value.what
    assert "cpu" in error.value.next_step
    assert device.cuda_problem().gpu_present is gpu_present


def test_a_driver_that_does_not_answer_is_none(monkeypatch):
    def refuse():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert device.nvidia_driver() is None


def test_the_machine_says_what_this_process_may_use():
    machine = device.machine(CPU)
    assert machine.device == "cpu"
    assert machine.device_bytes == 0
    assert 1 <= machine.cores <= psutil.cpu_count()
    assert 0 < machine.ram_bytes <= psutil.virtual_memory().total
    assert machine.cpu


@pytest.mark.parametrize(
    ("features", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_is_native_only_where_the_cpu_multiplies_it(monkeypatch, features, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert device.bf16_native(CPU) is native


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_computes_in_bf16_from_capability_8_on(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.bf16_native(torch.device("cuda", 0)) is native


@pytest.mark.parametrize(
    ("reserved", "given", "grows"), [(0, "", True), (2**20, "", False), (0, "max_split_size_mb:64", False)]
)
def test_segments_grow_from_the_first_allocation_on(monkeypatch, reserved, given, grows):
    """CUDA is initialized by then: importing bitsandbytes asks each device what it can do."""
    asked: list[str] = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert asked == (["expandable_segments:True"] if grows and sys.platform == "linux" else [])
