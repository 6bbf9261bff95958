"""Prepared weights in the cache: a second start reads them, every damage is found, processes share them."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import drawplate.machine.caches as caches
import drawplate.model.load.assemble as assemble_module
from drawplate.data.batches import cut_packed
from drawplate.errors import DoesNotFit, EnvironmentProblem
from drawplate.model.base import arena, arena_file
from drawplate.model.base.arena import Arena, HostMemory, is_worth_keeping, kept_arena, private_memory
from drawplate.model.base.arena_file import ArenaFile, ArenaKey
from drawplate.model.base.layer_layout import LayerLayout
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection, cache_folder
from drawplate.units import MIB
from tests.model.conftest import random_sequences

KEY = ArenaKey(
    weights_sha256="ab" * 32, precision="nf4", double_quant=True, compute_dtype="torch.bfloat16", quantizer="none"
)
LAYOUTS = [LayerLayout.of({"a": ((1000,), torch.int32), "b": ((3 + i,), torch.bfloat16)}) for i in range(5)]
Usage = namedtuple("Usage", "total used free")
HELPER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
from tests.model.base import test_arena as t
"""


def fill(i: int, stored: dict[str, Tensor]) -> None:
    stored["a"].copy_(torch.arange(1000, dtype=torch.int32) + i)
    stored["b"].fill_(i + 0.5)


def never(i: int, stored: dict[str, Tensor]) -> None:
    raise AssertionError("the weights were prepared again")


def kept(
    fill: Callable[[int, dict[str, Tensor]], None], told: list[str] | None = None, key: ArenaKey = KEY
) -> Arena | None:
    return kept_arena(key, LAYOUTS, fill, progress=None, tell=[].append if told is None else told.append)


def assert_right(found: Arena | None) -> None:
    assert found is not None
    for i in range(len(LAYOUTS)):
        assert torch.equal(found.views(i)["a"], torch.arange(1000, dtype=torch.int32) + i)
        assert (found.views(i)["b"] == i + 0.5).all()


def files() -> list[str]:
    """Everything in the arenas' folder but the empty lock files."""
    return sorted(path.name for path in (cache_folder() / "arenas").glob("*") if path.suffix != ".lock")


def the_file() -> Path:
    (path,) = (cache_folder() / "arenas").glob("*.arena")
    return path


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HELPER + code])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of this machine is."""
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda folder: Usage(2**40, 2**39, 2**39))


# The file


def test_what_was_kept_is_read_back_and_not_prepared_again():
    told: list[str] = []
    assert_right(kept(fill, told))
    assert_right(kept(never, told))
    assert told == []
    assert len(files()) == 1


def test_progress_counts_layers_whether_prepared_or_read():
    for source in (fill, never):
        seen: list[tuple[int, int]] = []
        kept_arena(KEY, LAYOUTS, source, progress=lambda *at, seen=seen: seen.append(at), tell=print)
        assert seen == [(i + 1, 5) for i in range(5)]


def test_layers_begin_on_pages_and_nothing_uninitialised_is_written():
    found = kept(fill)
    assert found is not None
    assert all(buffer.data_ptr() % 4096 == 0 for buffer in found.buffers)
    content, used = the_file().read_bytes(), bytearray(found.file.file_bytes)
    for start, size in found.file.spans:
        used[start : start + size] = b"\1" * size
    header = 24 + int.from_bytes(content[8:16], "little")
    assert not any(byte for byte, mine in zip(content[header:], used[header:], strict=True) if not mine)


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "cd" * 32},
        {"precision": "int8"},
        {"double_quant": False},
        {"compute_dtype": "torch.float16"},
        {"quantizer": "bitsandbytes 0.51.0 on cuda"},
        {"format": arena_file.FORMAT + 1},
    ],
)
def test_other_weights_have_another_file(change):
    path = ArenaFile(Path("x"), KEY, tuple(LAYOUTS)).path
    assert ArenaFile(Path("x"), replace(KEY, **change), tuple(LAYOUTS)).path != path
    assert ArenaFile(Path("x"), KEY, tuple(LAYOUTS[:4])).path != path


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10  # one bit
    path.write_bytes(content)


def other_key(path: Path) -> None:
    kept(fill, key=replace(KEY, weights_sha256="cd" * 32))
    (other,) = (p for p in path.parent.glob("*.arena") if p != path)
    os.replace(other, path)


def other_version(path: Path) -> None:
    kept(fill, key=replace(KEY, format=arena_file.FORMAT - 1))
    (other,) = (p for p in path.parent.glob("*.arena") if p != path)
    os.replace(other, path)


def layer_byte(layer: int, last: bool) -> int:
    start, size = ArenaFile(Path("x"), KEY, tuple(LAYOUTS)).spans[layer]
    return start + (size - 1 if last else 0)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "emptied": lambda path: truncate(path, 0),
    "cut in the preamble": lambda path: truncate(path, 10),
    "cut in the header": lambda path: truncate(path, 100),
    "cut in a layer": lambda path: truncate(path, layer_byte(3, last=False) + 5),
    "one byte short": lambda path: truncate(path, -1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "flipped magic": lambda path: flip(path, 3),
    "flipped length of the header": lambda path: flip(path, 14),
    "flipped checksum of the header": lambda path: flip(path, 20),
    "flipped header": lambda path: flip(path, 40),
    "flipped checksum of a layer": lambda path: flip(path, path.read_bytes().index(b'"xxh3_64": "') + 15),
    "flipped first byte of the first layer": lambda path: flip(path, layer_byte(0, last=False)),
    "flipped byte in the middle": lambda path: flip(path, layer_byte(2, last=False) + 777),
    "flipped last byte of the last layer": lambda path: flip(path, layer_byte(4, last=True)),
    "other weights": other_key,
    "other version": other_version,
    "a text file": lambda path: path.write_text("hello " * 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_told_once_and_mended(damage):
    kept(fill)
    path, told = the_file(), []
    DAMAGE[damage](path)
    assert_right(kept(fill, told))
    assert len(told) == 1
    assert path.name in told[0]
    assert_right(kept(never, told))
    assert len(told) == 1


def test_without_verification_a_flipped_bit_would_be_trusted(monkeypatch):
    kept(fill)
    flip(the_file(), layer_byte(2, last=False) + 40)
    monkeypatch.setattr(ArenaFile, "verify", lambda *arguments: None)
    found = kept(never)
    with pytest.raises(AssertionError):
        assert_right(found)


# Processes


def build_slowly(signs: Path) -> None:
    """In a process of its own: prepare the weights, wait in the middle until told to go on."""

    def slow(i: int, stored: dict[str, Tensor]) -> None:
        if i == 3:
            (signs / "begun").touch()
            wait_for(signs / "go")
        fill(i, stored)

    assert_right(kept(slow))


def test_of_two_that_begin_at_once_one_prepares_and_the_other_waits(tmp_path):
    other = python(f"t.build_slowly(Path({str(tmp_path)!r}))")
    wait_for(tmp_path / "begun")
    told: list[str] = []

    def tell(message: str) -> None:
        told.append(message)
        (tmp_path / "go").touch()

    assert_right(kept_arena(KEY, LAYOUTS, never, progress=None, tell=tell))
    assert other.wait(60) == 0
    assert told == ["Waiting for another process, which is preparing the same weights."]


def test_a_killed_builder_leaves_nothing_that_is_trusted_and_no_lock(tmp_path):
    other = python(f"t.build_slowly(Path({str(tmp_path)!r}))")
    wait_for(tmp_path / "begun")
    os.kill(other.pid, signal.SIGKILL)
    other.wait(60)
    assert [name for name in files() if name.endswith(".arena")] == []
    assert len(files()) == 1, "the test must see what a crash leaves"
    told: list[str] = []
    assert_right(kept(fill, told))
    assert told == []
    assert files() == [the_file().name]


def map_and_measure(signs: Path) -> None:
    """In a process of its own: the kilobytes of the arena's mapping that are shared, and those that are private."""
    found = kept(never)
    assert found is not None
    assert sum(int(buffer.sum()) for buffer in found.buffers) > 0
    shared = private = 0
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(".arena")
        elif mine and line.startswith("Shared_"):
            shared += int(line.split()[1])
        elif mine and line.startswith("Private_"):
            private += int(line.split()[1])
    (signs / "kilobytes").write_text(f"{shared} {private}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_two_processes_hold_one_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", [LayerLayout.of({"a": ((2**20,), torch.int32)})] * 4)

    def ones(i: int, stored: dict[str, Tensor]) -> None:
        stored["a"].fill_(1)

    found = kept(ones)
    assert found is not None
    assert sum(int(buffer.sum()) for buffer in found.buffers) > 0
    code = "import torch; t.LAYOUTS = [t.LayerLayout.of({'a': ((2**20,), torch.int32)})] * 4\n"
    other = python(code + f"t.map_and_measure(Path({str(tmp_path)!r}))")
    assert other.wait(60) == 0
    shared, private = map(int, (tmp_path / "kilobytes").read_text().split())
    assert shared >= 16 * 2**10
    assert private <= 1024


# Disks


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_a_disk_that_refuses_costs_one_line_and_leaves_nothing(call, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    told: list[str] = []
    assert kept(fill, told) is None
    assert files() == []
    assert len(told) == 1
    assert "No space left on device" in told[0]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[str] = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
        assert kept(fill, told) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files() == []
    assert len(told) == 1
    assert "File too large" in told[0]


def disk(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    """The disk of the caches seems to have so many bytes in all and so many free beside what they hold."""

    def usage(folder: object) -> object:
        return Usage(total, total - free, free - sum(entry.bytes for entry in caches.entries()))

    monkeypatch.setattr(caches.shutil, "disk_usage", usage)


def test_too_little_disk_is_known_before_the_work_begins(monkeypatch):
    size = ArenaFile(Path("x"), KEY, tuple(LAYOUTS)).file_bytes
    disk(monkeypatch, total=10 * size, free=2 * size - 1)
    told: list[str] = []
    assert kept(never, told) is None
    assert len(told) == 1
    assert "a tenth of the disk" in told[0]
    disk(monkeypatch, total=10 * size, free=2 * size)
    assert_right(kept(fill, told))
    assert len(told) == 1


def test_a_cache_that_is_no_folder_costs_one_line():
    (cache_folder() / "arenas").write_text("not a folder")
    told: list[str] = []
    assert kept(never, told) is None
    assert len(told) == 1


def test_an_interrupted_preparation_leaves_nothing():
    def interrupted(i: int, stored: dict[str, Tensor]) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(interrupted)
    assert files() == []


def test_those_used_longest_ago_make_room(monkeypatch):
    size = ArenaFile(Path("x"), KEY, tuple(LAYOUTS)).file_bytes
    disk(monkeypatch, total=10 * size, free=6 * size)  # half of it: three
    keys = [replace(KEY, quantizer=str(i)) for i in range(4)]
    for i, key in enumerate(keys[:3]):
        found = kept(fill, key=key)
        assert found is not None
        os.utime(found.file.path, (1000 + i, 1000 + i))
        del found
    oldest = kept(never, key=keys[0])  # is used again, so the second is the oldest now
    assert oldest is not None
    name = oldest.file.path.name
    del oldest
    kept(fill, key=keys[3])
    left = files()
    assert len(left) == 3
    assert name in left
    assert ArenaFile(Path("x"), keys[1], tuple(LAYOUTS)).path.name not in left


def test_what_a_run_has_mapped_is_not_removed_and_counts(monkeypatch):
    size = ArenaFile(Path("x"), KEY, tuple(LAYOUTS)).file_bytes
    disk(monkeypatch, total=10 * size, free=2 * size)  # half of it: one
    in_use, told = kept(fill), []
    assert kept(never, told, key=replace(KEY, quantizer="other")) is None
    assert len(told) == 1
    assert caches.release() == 0
    assert_right(in_use)
    del in_use
    assert kept(fill, key=replace(KEY, quantizer="other")) is not None
    assert len(files()) == 1


def test_the_control_without_locks_a_mapped_file_is_removed_for_nothing(monkeypatch):
    monkeypatch.setattr(arena, "hold", lambda file: None)
    in_use = kept(fill)
    assert in_use is not None
    assert caches.release() > 0
    assert files() == []
    assert_right(in_use)  # unlinked, it stays readable, and the disk does not get it back


def test_a_deleted_arena_stays_readable_where_it_is_mapped():
    found = kept(fill)
    the_file().unlink()
    assert_right(found)


def test_what_a_crash_left_is_deleted_and_what_a_living_process_writes_is_not():
    folder = caches.arenas_folder()
    folder.mkdir()
    crashed, living = (folder / f"nf4-{name}.arena.partial-77" for name in ("crashed", "living"))
    crashed.touch()
    with living.open("xb") as writing:
        caches.hold(writing)
        caches.require_room(0)
    assert files() == [living.name]


def test_weights_without_a_hash_are_never_kept():
    assert kept(never, key=replace(KEY, weights_sha256="")) is None
    assert files() == []


# Page locks, with a driver that can be made to refuse


class Driver:
    """Stands in for cudaHostRegister: refuses from the n-th call on those flags that it is told to refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused_flags: tuple[int, ...] = (), after: int = 0) -> None:
        self.locked: dict[int, tuple[int, int]] = {}
        self.refused_flags, self.after, self.calls, self.forgotten = refused_flags, after, 0, 0
        monkeypatch.setattr(arena, "_register", self.register)
        monkeypatch.setattr(arena, "_unregister", self.locked.pop)
        monkeypatch.setattr(arena, "_forget_cuda_error", self.forget)

    def register(self, address: int, size: int, flags: int) -> int:
        self.calls += 1
        if flags in self.refused_flags and self.calls > self.after:
            return 801
        self.locked[address] = (size, flags)
        return 0

    def forget(self) -> None:
        self.forgotten += 1


def test_the_mapping_itself_is_page_locked_once_for_each_run_of_layers(monkeypatch):
    driver, found = Driver(monkeypatch), kept(fill)
    assert found is not None
    buffers = found.page_locked([0, 1, 3])
    assert {i: b.data_ptr() for i, b in buffers.items()} == {i: found.buffers[i].data_ptr() for i in (0, 1, 3)}
    first, last = found.buffers[0].data_ptr(), found.buffers[3].data_ptr()
    apart = found.buffers[2].data_ptr() - first
    assert driver.locked == {first: (apart, 8), last: (found.buffers[4].data_ptr() - last, 8)}


def test_each_layer_is_a_storage_that_begins_with_what_is_page_locked(monkeypatch):
    """By the storage's first byte torch decides whether a copy can be captured; the file's is not locked."""
    driver, found = Driver(monkeypatch), kept(fill)
    assert found is not None
    buffers = found.page_locked([1, 2, 4])
    for i, buffer in buffers.items():
        first = buffer.untyped_storage().data_ptr()
        assert first == buffer.data_ptr()
        assert any(start <= first < start + size for start, (size, _) in driver.locked.items())
        assert buffer.numel() == LAYOUTS[i].bytes
    assert_right(found)


def test_page_locks_are_given_back_when_the_last_tensor_is_gone(monkeypatch):
    driver, found = Driver(monkeypatch), kept(fill)
    assert found is not None
    buffers = found.page_locked([0, 1])
    del found
    assert len(driver.locked) == 1
    view = buffers[1].view(torch.int8)
    del buffers
    assert len(driver.locked) == 1
    del view
    assert driver.locked == {}


@pytest.mark.parametrize("after", [0, 1])
def test_where_a_file_cannot_be_page_locked_a_private_copy_can(after, monkeypatch):
    driver, found = Driver(monkeypatch, refused_flags=(arena.HOST_REGISTER_READ_ONLY,), after=after), kept(fill)
    assert found is not None
    buffers = found.page_locked([0, 3, 4])
    assert all(torch.equal(buffers[i], found.buffers[i]) for i in (0, 3, 4))
    assert [(size, flags) for size, flags in driver.locked.values()] == [(sum(LAYOUTS[i].bytes for i in (0, 3, 4)), 0)]
    assert driver.forgotten == 1
    buffers[0].fill_(0)
    assert_right(found)


def test_a_system_that_page_locks_nothing_is_an_environment_problem(monkeypatch):
    Driver(monkeypatch, refused_flags=(arena.HOST_REGISTER_READ_ONLY, 0))
    found = kept(fill)
    assert found is not None
    with pytest.raises(EnvironmentProblem, match=r"refused to page-lock 21 KiB .*CUDA error 801") as problem:
        found.page_locked([0, 1, 2, 3, 4])
    assert "ulimit -l unlimited" in problem.value.next_step
    assert problem.value.exit_code == 3


def test_private_memory_without_layers_needs_no_lock(monkeypatch):
    driver = Driver(monkeypatch)
    assert private_memory({}, pinned=True) == {}
    assert driver.calls == 0


@pytest.mark.gpu
def test_layers_come_to_the_gpu_from_the_locked_mapping_or_its_copy():
    found = kept(fill)
    assert found is not None
    buffers = found.page_locked([0, 1, 3])
    for i, buffer in buffers.items():
        assert torch.equal(buffer.to("cuda", non_blocking=True).cpu(), found.buffers[i])


@pytest.mark.gpu
def test_a_large_file_is_page_locked_in_place(tmp_path):
    """The driver accepts small mappings too, but torch does not see them as page-locked; nothing streams from those."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(64 * MIB))
    with path.open("rb") as opened:
        memory = HostMemory(opened.fileno(), 64 * MIB, prot=mmap.PROT_READ)
    tensor = memory.tensor()
    assert memory.page_lock([tensor], arena.HOST_REGISTER_READ_ONLY) == 0
    assert tensor.is_pinned()
    assert tensor[MIB:].is_pinned()


@pytest.mark.gpu
def test_copies_from_what_is_page_locked_of_a_file_are_captured(tmp_path):
    """Views of the whole are not seen as page-locked: a copy from one would break off a captured micro-step."""
    start, path = 4096, tmp_path / "bytes"
    path.write_bytes(os.urandom(64 * MIB))
    with path.open("rb") as opened:
        memory = HostMemory(opened.fileno(), 64 * MIB, prot=mmap.PROT_READ)
    whole, part = memory.tensor(), memory.part(start, 64 * MIB - start)
    assert memory.page_lock([part], arena.HOST_REGISTER_READ_ONLY) == 0
    assert part.is_pinned()
    assert not whole[start:].is_pinned(), "which the layers' buffers were"
    there, beside, graph = torch.zeros_like(part, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            there.copy_(part, non_blocking=True)
        torch.cuda.current_stream().wait_stream(beside)
    assert not there.any(), "recorded, not made"
    graph.replay()
    assert torch.equal(there.cpu(), part)


@pytest.mark.gpu
def test_a_refusal_of_the_driver_does_not_surface_in_a_later_kernel():
    found = kept(fill)
    assert found is not None
    assert arena._register(found.buffers[0].data_ptr(), 100, 0xFF00) != 0
    arena._forget_cuda_error()
    assert float(torch.ones(4, device="cuda").sum()) == 4


# The model


@pytest.fixture
def _any_size(monkeypatch) -> None:
    monkeypatch.setattr(arena, "SMALLEST_BYTES", 0)


def build(checkpoint: Checkpoint, told: list[str] | None = None, **placement: object) -> CausalLM:
    section = LoraSection(r=4, lora_dropout=0.1)
    settings = {"storage": Storage("nf4"), "compute_dtype": torch.float32, "poison": True, **placement}
    return assemble(
        checkpoint,
        Placement(**settings),  # type: ignore[arg-type]
        lambda anatomy: lora_config(section, anatomy, checkpoint.name, None),
        seed=0,
        tell=[].append if told is None else told.append,
    )


def loss_and_gradients(model: CausalLM) -> list[Tensor]:
    (batch,) = cut_packed(random_sequences([17, 5]), 48, 4, 0)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.01)
    loss, _ = model.sum_nats(batch, dropout_seed=(3, 0))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.adapter.parameters() if p.grad is not None)]


def tensors_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names, original = [], Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    return names


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("weights", ["host", "device", "dequantized", ("host", "device", "dequantized", "host")])
def test_a_second_start_reads_no_layer_and_gives_the_same_bits(precision, weights, llama, monkeypatch):
    placement = {"storage": Storage(precision), "weights": weights, "activations": "recompute"}
    plain = loss_and_gradients(build(llama, **placement))
    assert not (cache_folder() / "arenas").exists()
    monkeypatch.setattr(assemble_module, "is_worth_keeping", lambda *arguments, **keywords: True)
    told: list[str] = []
    first = loss_and_gradients(build(llama, told, **placement))
    with monkeypatch.context() as patch:
        read = tensors_read(patch)
        second = loss_and_gradients(build(llama, told, **placement))
    assert [name for name in read if ".layers." in name] == []
    assert read != [], "the test must see what is read"
    assert told == []
    for other in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["host", "device", "dequantized", ("host", "device", "dequantized", "host")])
def test_on_a_gpu_too_a_second_start_gives_the_same_bits(weights, llama, monkeypatch):
    placement = {"device": torch.device("cuda"), "weights": weights, "compute_dtype": torch.bfloat16}
    models = [build(llama, **placement)]
    monkeypatch.setattr(assemble_module, "is_worth_keeping", lambda *arguments, **keywords: True)
    models += [build(llama, **placement), build(llama, **placement)]
    assert len(files()) == 1
    for i in range(4):
        plain, *others = (model.residency.stored(i) for model in models)
        assert all(torch.equal(plain[name], other[name]) for other in others for name in plain)


@pytest.mark.usefixtures("_any_size")
def test_another_plan_finds_the_same_file(llama, monkeypatch):
    build(llama, weights=("host", "dequantized", "device", "device"))
    read = tensors_read(monkeypatch)
    for weights in ("host", "device", "dequantized"):
        build(llama, weights=weights)
    assert [name for name in read if ".layers." in name] == []
    assert len(files()) == 1


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("change", [{"storage": Storage("nf4", double_quant=False)}, {"compute_dtype": torch.bfloat16}])
def test_another_precision_is_prepared_anew(change, llama):
    build(llama, weights="host")
    build(llama, weights="host", **change)
    assert len(files()) == 2


@pytest.mark.usefixtures("_any_size")
def test_other_weights_under_the_same_name_are_prepared_anew(llama, tmp_path):
    before = build(llama, weights="host").residency.stored(0)
    name, before = next(iter(before)), {name: tensor.clone() for name, tensor in before.items()}
    file = next(iter(llama.files.values()))
    tensors = {key: tensor + 1 for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    after = build(llama, weights="host").residency.stored(0)
    assert not torch.equal(before[name], after[name])
    assert len(files()) == 2


@pytest.mark.usefixtures("_any_size")
def test_a_run_whose_cache_cannot_be_written_trains_all_the_same(llama, monkeypatch):
    plain = loss_and_gradients(build(llama, weights="host"))
    shutil.rmtree(cache_folder() / "arenas")
    (cache_folder() / "arenas").write_text("not a folder")
    told: list[str] = []
    assert torch.equal(loss_and_gradients(build(llama, told, weights="host"))[0], plain[0])
    assert len(told) == 1


@pytest.mark.usefixtures("_any_size")
def test_a_library_user_is_warned_as_python_warns(llama):
    build(llama)
    flip(the_file(), arena_file.LAYER_ALIGNMENT)  # the first byte of the first layer
    with pytest.warns(UserWarning, match="the weights are prepared again"):
        assemble(
            llama,
            Placement(storage=Storage("nf4"), compute_dtype=torch.float32),
            lambda anatomy: lora_config(LoraSection(), anatomy, "x", None),
            seed=0,
        )


def test_small_models_and_copies_of_the_checkpoint_are_not_kept(llama):
    def worth(precision: str, size: int, streamed: bool) -> bool:
        layouts = [LayerLayout.of({"a": ((size,), torch.uint8)})]
        return is_worth_keeping(llama, Storage(precision), layouts, streamed=streamed)

    enough = arena.SMALLEST_BYTES
    assert worth("nf4", enough, streamed=False)
    assert worth("bf16", enough, streamed=True)
    assert not worth("bf16", enough, streamed=False)
    assert not worth("nf4", enough - 256, streamed=True)


@pytest.mark.parametrize("read_once", [True, False])
def test_plain_layers_that_are_read_once_for_a_measurement_are_not_kept(read_once, llama, monkeypatch):
    monkeypatch.setattr(arena, "SMALLEST_BYTES", 0)
    build(llama, weights="host", storage=Storage("bf16"), read_once=read_once)
    assert len(files()) == (0 if read_once else 1)
    build(llama, weights="host", read_once=read_once)
    assert len(files()) == (1 if read_once else 2), "quantizing again would take time"


@pytest.mark.parametrize(("weights", "precision"), [("host", "nf4"), ("device", "fp32")])
def test_too_little_host_memory_is_known_before_anything_is_read(weights, precision, llama, monkeypatch):
    monkeypatch.setattr(arena, "available_ram_bytes", lambda: 20_000)
    read = tensors_read(monkeypatch)
    with pytest.raises(DoesNotFit, match=r"need \d+ KiB of host memory and 20 KiB are available") as problem:
        build(llama, weights=weights, storage=Storage(precision))
    assert problem.value.exit_code == 5
    assert ("quantization.precision: nf4" in problem.value.next_step) is (precision == "fp32")
    assert read == []
    assert not (cache_folder() / "arenas").exists()


def test_memory_that_the_system_denies_does_not_fit(monkeypatch):
    def deny(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(arena.HostMemory, "__new__", lambda cls, *arguments, **keywords: deny(0))
    with pytest.raises(DoesNotFit, match="cannot give 21 KiB"):
        private_memory(dict(enumerate(LAYOUTS)), pinned=False)


@pytest.mark.parametrize("guard", [True, False])
def test_page_locks_are_given_back_before_the_interpreter_is_taken_apart(guard: bool) -> None:
    code = (
        "import atexit, sys\n"
        "import drawplate.model.base.arena as arena\n"
        "arena._register = lambda *_: 0\n"
        "arena._unregister = lambda _: print('unlocked', sys.is_finalizing(), flush=True)\n"
        "arena.never_freed = memory = arena.HostMemory.private(4096)\n"
        "memory.page_lock([memory.tensor()], 0)\n"
    ) + ("" if guard else "atexit.unregister(arena._unlock_all)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == ("unlocked False\n" if guard else "")
