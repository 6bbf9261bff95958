from __future__ import annotations

import builtins
import shutil
from collections import namedtuple

import pytest
import torch

from drawplate.machine import device, doctor
from drawplate.machine.device import CudaProblem
from drawplate.recipe import cache_folder

Usage = namedtuple("Usage", "total used free")


def rows() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def test_a_healthy_machine_misses_nothing():
    found = rows()
    assert [check.name for check in found.values() if check.status == "missing"] == []
    assert {"python", "torch", "gpu", "driver", "bitsandbytes", "transformers", "peft", "memory", "cache"} <= set(found)
    assert "NF4 works on cpu" in found["bitsandbytes"].found


def test_every_row_that_is_not_ok_says_what_mends_it():
    assert [check.name for check in rows().values() if (check.status == "ok") == bool(check.mend)] == []


def test_the_caches_are_shown_with_their_sizes(monkeypatch, tmp_path):
    (tmp_path / "blobs").mkdir(parents=True)
    (tmp_path / "blobs" / "abc").write_bytes(bytes(4096))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = cache_folder() / "arenas"
    folder.mkdir()
    for name in ("nf4-a.arena", "int8-b.arena"):
        (folder / name).write_bytes(bytes(1024))
    monkeypatch.setenv("DRAWPLATE_CACHE_LIMIT", "7GiB")
    found = rows()
    assert found["caches"].found.startswith("prepared weights 2 KiB, speed probe ")
    assert found["caches"].found.endswith("limited to 7.00 GiB (drawplate cache)")
    assert "hub cache 4 KiB" in found["others' caches"].found


@pytest.mark.parametrize(("present", "status"), [(True, "missing"), (False, "absent")])
def test_a_gpu_that_lies_idle_is_missing_and_no_gpu_is_not(monkeypatch, present, status):
    problem = CudaProblem(cause="the driver is old", cure="Update the driver", gpu_present=present)
    monkeypatch.setattr(device, "cuda_problem", lambda: problem)
    row = rows()["gpu"]
    assert (row.status, row.found) == (status, "the driver is old")
    assert ("Update the driver" in row.mend) is present


@pytest.mark.parametrize("library", ["bitsandbytes", "transformers", "peft"])
def test_a_library_whose_import_fails_is_a_row_not_a_traceback(monkeypatch, library):
    real = builtins.__import__

    def broken(name, *arguments, **keywords):
        if name.split(".")[0] == library:
            raise OSError("libcudart.so.13: cannot open shared object file\nmore")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: broken(name))
    row = rows()[library]
    assert row.status == "missing"
    assert row.found == "OSError: libcudart.so.13: cannot open shared object file"
    assert row.mend


def test_bitsandbytes_that_gives_wrong_numbers_is_missing(monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64) + float("nan")
    )
    assert rows()["bitsandbytes"].status == "missing"


def test_a_library_below_its_floor_is_missing_with_the_line_that_mends_it(monkeypatch):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "4.40.0" if name == "transformers" else real(name)
    )
    found = rows()
    assert found["transformers"].status == "missing"
    mend = found["transformers"].mend
    assert mend.startswith('pip install "transformers<')
    assert ">=5.17" in mend
    assert mend.removeprefix('pip install "').rstrip('"') in found["other libraries"].found


def test_an_older_python_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 12))
    assert rows()["python"].status == "missing"


def test_little_disk_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 2**30))
    row = rows()["this folder"]
    assert row.status == "absent"
    assert "only 1.00 GiB" in row.found


def test_a_folder_that_cannot_be_written_is_missing(monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert rows()["this folder"].status == "missing"


def test_the_network_is_asked_only_when_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda *a, **k: asked.append(a))
    doctor.examine()
    assert asked == []


def test_a_hub_that_does_not_answer_is_absent_not_an_error(monkeypatch):
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise doctor.urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    row = {check.name: check for check in doctor.examine(network=True)}["network"]
    assert row.status == "absent"
    assert "Name or service not known" in row.found


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ("torch>=2.0,<99", "ok", ""),
        ("torch>=99", "missing", "too old"),
        ("torch>=2.0,<2.1", "absent", "newer than what was tested"),
    ],
)
def test_a_library_is_too_old_or_newer_than_what_was_tested(monkeypatch, asked, status, said):
    monkeypatch.setattr(doctor, "_floors", lambda: {"torch": asked})
    check = doctor._at_least_the_floor("torch", torch.__version__)
    assert check.status == status
    assert said in check.found
