"""What the caches may take of the disk, and how a person looks at them, empties and limits them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import drawplate.machine.caches as caches
from drawplate.cli import app
from drawplate.errors import UsageError
from drawplate.recipe import cache_folder
from drawplate.units import GIB

KIB = 1024


def keep(name: str, size: int, used: int) -> Path:
    """An arena, or a converted model, of that size."""
    if name.endswith(".arena"):
        path = caches.arenas_folder() / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    else:
        path = caches.converted_folder() / name
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def three() -> list[Path]:
    return [keep("old.arena", 4 * KIB, 1), keep("gguf-1", 4 * KIB, 2), keep("new.arena", 4 * KIB, 3)]


def disk(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    usage = type("Usage", (), {"total": total, "free": free})
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda folder: usage)


def there(paths: list[Path]) -> list[bool]:
    return [path.exists() for path in paths]


def drawplate(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_they_take_half_of_what_would_be_free_and_64_gib_at_most(monkeypatch, three):
    disk(monkeypatch, 10**9, 88 * KIB)
    assert caches.allowed_bytes() == (88 + 12) // 2 * KIB
    disk(monkeypatch, 10**15, 10**14)
    assert caches.allowed_bytes() == 64 * GIB


@pytest.mark.parametrize(("needed", "left"), [(1, [True] * 3), (2, [False, True, True]), (6, [False, False, True])])
def test_what_was_used_longest_ago_goes_first_and_a_tenth_of_the_disk_stays(monkeypatch, three, needed, left):
    disk(monkeypatch, 1000 * KIB, 101 * KIB)
    monkeypatch.setenv("DRAWPLATE_CACHE_LIMIT", "1GiB")
    caches.require_room(needed * KIB)
    assert there(three) == left


def test_nothing_is_removed_for_what_would_not_fit_even_then(monkeypatch, three):
    disk(monkeypatch, 1000 * KIB, 101 * KIB)
    with pytest.raises(OSError, match="a tenth of the disk"):
        caches.require_room(14 * KIB)
    assert there(three) == [True] * 3


def test_a_converted_model_in_use_stays(three):
    caches.hold_until_exit(three[1])
    assert caches.release() == 8 * KIB
    assert there(three) == [False, True, False]
    os.close(caches._held_until_exit.pop())
    assert caches.release() == 4 * KIB


def test_a_cache_on_another_disk_is_not_released(monkeypatch, three, tmp_path):
    devices = {cache_folder(): 1, tmp_path: 2}
    monkeypatch.setattr(caches, "_device_of", devices.__getitem__)
    assert caches.release(beside=tmp_path) == 0
    assert there(three) == [True] * 3
    devices[tmp_path] = 1
    assert caches.release(beside=tmp_path) == 12 * KIB


def test_a_limit_lasts_and_holds_at_once(three):
    drawplate("cache", "--limit", "9KiB")
    assert there(three) == [False, True, True]
    assert caches.limit_bytes() == 9 * KIB
    assert "9 KiB together (the limit that was set)" in drawplate("cache")
    drawplate("cache", "--limit", "auto")
    assert caches.limit_bytes() is None


def test_the_variable_goes_before_the_setting_and_nonsense_is_an_error(monkeypatch):
    drawplate("cache", "--limit", "9KiB")
    monkeypatch.setenv("DRAWPLATE_CACHE_LIMIT", "1MiB")
    assert caches.limit_bytes() == 2**20
    monkeypatch.setenv("DRAWPLATE_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="DRAWPLATE_CACHE_LIMIT: 'much' is not a size"):
        caches.limit_bytes()


def test_clearing_removes_all_that_is_kept_but_the_limit(three):
    (cache_folder() / "hashes.json").write_text("{}")
    for name in ("speed", "footprints"):
        (cache_folder() / name).mkdir(exist_ok=True)
        (cache_folder() / name / "a.json").write_text("{}")
    assert "measured layers" in drawplate("cache")
    drawplate("cache", "--limit", "1GiB")
    assert "removed" in drawplate("cache", "--clear")
    assert sorted(path.name for path in cache_folder().rglob("*") if path.is_file()) == ["settings.json"]


def test_every_cache_is_listed_with_its_size_and_what_empties_it(monkeypatch, tmp_path, three):
    for name in ("hub", "inductor"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "b").write_bytes(bytes(3 * KIB))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    found = {each["name"]: each for each in json.loads(drawplate("cache", "--json"))["caches"]}
    assert found["prepared weights"]["bytes"] == 8 * KIB
    assert found["converted models"]["bytes"] == 4 * KIB
    assert found["hub cache"]["bytes"] == found["compiler cache (torch)"]["bytes"] == 3 * KIB
    assert "hf cache rm" in found["hub cache"]["cleared_by"]
    assert f"{tmp_path / 'inductor'}  (empty it: rm -r {tmp_path / 'inductor'})\n" in drawplate("cache")


def test_a_cache_folder_that_cannot_be_made_is_three_sentences(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(app, ["cache", "--limit", "1GiB"])
    assert result.exit_code == 7
    assert "could not be written: Not a directory." in result.output
