"""The frozen layers' bytes in host memory: prepared once, kept on disk, shared by all processes of the host.

    files' hashes, precision, versions -> ArenaKey -> file in the cache -- verified --> mapped, read-only and shared
                                                          ^ missing or damaged: quantize, one process at a time

The page cache is the one copy that all processes map, and loading is a read. The file holds every layer in the plan's
precision, wherever the layer will live, so that another plan finds the same file. A copy of the layers in the cache is
an optimization only: where it cannot be made, a warning says so and the run goes on from the checkpoint.

On a GPU, host layers must be page-locked for their copies to run beside the computation. The mapping itself is locked,
read-only, where driver and kernel agree to that; where not, a private locked copy takes its place, which costs each
process its own memory. No arena is rounded up to a power of two, as torch's pinned allocator would.

Left out, because making the file would cost more than it saves: models below `SMALLEST_BYTES`, layers that are
neither quantized at loading nor streamed, for which the checkpoint itself is as quick to read, and layers that are read
once for a measurement, unless they are quantized.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from drawplate.errors import DoesNotFit, EnvironmentProblem
from drawplate.machine.caches import arenas_folder, hold, require_room
from drawplate.machine.cgroups import available_ram_bytes
from drawplate.machine.device import is_lost
from drawplate.machine.memory import count_mapped
from drawplate.model.base.arena_file import ArenaFile, ArenaKey, Damaged, Fill, Progress
from drawplate.model.base.layer_layout import LayerLayout
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint
from drawplate.units import MIB, format_bytes

SMALLEST_BYTES = 16 * MIB
HOST_REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

Tell = Callable[[str], None]


class HostMemory(mmap.mmap):
    """A mapping whose page locks are given back before it is unmapped. Tensors made from it keep it alive."""

    _locked: tuple[int, ...] = ()

    @classmethod
    def private(cls, size: int) -> HostMemory:
        """Zeroed memory of this process alone.

        Raises:
            DoesNotFit: the system has no such room.
        """
        try:
            return cls(-1, max(size, 1), **_PRIVATE)
        except OSError:
            raise DoesNotFit(
                f"The host cannot give {format_bytes(size)} of memory.",
                safe="Nothing was trained or written.",
                next_step="Choose a smaller precision (quantization.precision: nf4) or a machine with more memory.",
            ) from None

    def tensor(self) -> Tensor:
        """The bytes, uint8. Writing to those of a file is a segmentation fault: they are everybody's."""
        return self.part(0, len(self))

    def part(self, start: int, size: int) -> Tensor:
        """Some of the bytes, in a storage of its own.

        torch captures a copy from host memory only where its storage's first byte is page-locked: of a view of a whole
        file, whose header is not, it refuses."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it cannot know of read-only memory
            return torch.frombuffer(self, dtype=torch.uint8, offset=start, count=size)

    def page_lock(self, parts: Iterable[Tensor], flags: int) -> int:
        """Page-lock parts of this memory, all or none; CUDA's status, 0 where it worked."""
        for part in parts:
            status = _register(part.data_ptr(), part.numel(), flags)
            if status != 0:
                self.unlock()
                return status
            self._locked += (part.data_ptr(),)
        _page_locked.add(self)
        return 0

    def unlock(self) -> None:
        """Give back all page locks."""
        for address in self._locked:
            _unregister(address)
        self._locked = ()
        count_mapped(self, 0)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing():  # bound early: by then modules are gone
            self.unlock()


_page_locked: weakref.WeakSet[HostMemory] = weakref.WeakSet()


def _unlock_all(owner: int) -> None:
    """At the end of the process, while CUDA still answers.

    What lives until the interpreter is taken apart (models lie in cycles) would be unmapped under its page locks, and
    CUDA be taken down with memory registered that is no longer there.
    """
    if os.getpid() == owner and not is_lost():
        for memory in tuple(_page_locked):
            memory.unlock()


atexit.register(_unlock_all, os.getpid())


class Arena:
    """Every frozen layer in host memory, read-only, backed by a verified file.

    Attributes:
        file: what it was mapped from.
        buffers: one uint8 tensor per layer.
    """

    def __init__(self, file: ArenaFile, memory: HostMemory) -> None:
        self.file, self._memory = file, memory
        self._bytes = memory.tensor()
        self.buffers = [memory.part(start, size) for start, size in file.spans]

    def views(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors."""
        return self.file.layouts[layer].views(self.buffers[layer])

    def in_place(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """The bytes of some layers as they are mapped, for a CPU that computes from them."""
        count_mapped(self._memory, sum(self.buffers[i].numel() for i in layers))
        return {i: self.buffers[i] for i in layers}

    def page_locked(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """The bytes of some layers, page-locked: in place, so that processes share them, or else in a private copy.

        Raises:
            DoesNotFit: there is no room for the copy.
            EnvironmentProblem: nothing can be page-locked.
        """
        spans = self.file.spans
        ends = [*(start for start, _ in spans[1:]), self.file.file_bytes]
        runs = [(spans[first][0], ends[last]) for first, last in _runs(layers)]
        if self._memory.page_lock([self._bytes[start:end] for start, end in runs], HOST_REGISTER_READ_ONLY) == 0:
            count_mapped(self._memory, sum(end - start for start, end in runs))
            return {i: self.buffers[i] for i in layers}
        _forget_cuda_error()
        copies = private_memory({i: self.file.layouts[i] for i in layers}, pinned=True)
        for i, copy in copies.items():
            copy.copy_(self.buffers[i])
        return copies


def arena_key(checkpoint: Checkpoint, storage: Storage, compute_dtype: torch.dtype, device: torch.device) -> ArenaKey:
    """What the prepared weights of a checkpoint depend on. Hashes the checkpoint, unless that is remembered."""
    return ArenaKey(
        weights_sha256=checkpoint.sha256(),
        precision=storage.precision,
        double_quant=storage.double_quant,
        compute_dtype=str(compute_dtype),
        quantizer=f"bitsandbytes {importlib.metadata.version('bitsandbytes')} on {device.type}",
    )


def is_worth_keeping(
    checkpoint: Checkpoint, storage: Storage, layouts: Sequence[LayerLayout], *, streamed: bool
) -> bool:
    """Whether a file of the prepared weights would save time, or memory among processes."""
    prepared = storage.quantized and checkpoint.quantized_precision is None
    return (prepared or streamed) and sum(layout.bytes for layout in layouts) >= SMALLEST_BYTES


def kept_arena(
    key: ArenaKey, layouts: Sequence[LayerLayout], fill: Fill, *, progress: Progress | None, tell: Tell
) -> Arena | None:
    """All layers from the cache, where they are put first if they are not there.

    Args:
        key: what they depend on; weights without a hash are never kept.
        layouts: one per layer, in the plan's precision.
        fill: writes the tensors of a layer into zeroed host memory.
        progress: called with (layers loaded, layers).
        tell: takes a warning.

    Returns:
        None where they can be neither read nor kept; `tell` has been told why.
    """
    if not key.weights_sha256:
        return None
    file = ArenaFile(arenas_folder(), key, tuple(layouts))
    try:
        found = _read(file, progress)
        if found is not None:
            return found
        file.folder.mkdir(parents=True, exist_ok=True)
        with file.lock(tell):
            return _read(file, progress, tell) or _prepare(file, fill, progress)
    except OSError as error:
        tell(
            f"The prepared weights could not be kept in {file.folder}: {error.strerror or error}. This run goes on "
            "without; the next prepares them again."
        )
        return None


def _read(file: ArenaFile, progress: Progress | None, tell: Tell | None = None) -> Arena | None:
    """The arena of a file, None where there is none that can be trusted."""
    try:
        with file.path.open("rb") as opened:
            hold(opened)
            file.verify(opened, progress)
            memory = HostMemory(opened.fileno(), file.file_bytes, prot=mmap.PROT_READ)
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as problem:
        if tell is not None:
            tell(f"{file.path} is not used ({problem}); the weights are prepared again.")
        return None
    with suppress(OSError):
        os.utime(file.path)  # so that the arenas used longest ago are known
    return Arena(file, memory)


def _prepare(file: ArenaFile, fill: Fill, progress: Progress | None) -> Arena:
    require_room(file.file_bytes)
    file.write(fill, progress)
    with file.path.open("rb") as opened:  # just written: not read back
        hold(opened)
        return Arena(file, HostMemory(opened.fileno(), file.file_bytes, prot=mmap.PROT_READ))


def private_memory(layouts: Mapping[int, LayerLayout], *, pinned: bool) -> dict[int, Tensor]:
    """Memory of this process alone for some layers, in one piece. Raises as `private_bytes`."""
    arena, buffers, offset = private_bytes(sum(layout.bytes for layout in layouts.values()), pinned=pinned), {}, 0
    for i, layout in layouts.items():
        buffers[i] = arena[offset : offset + layout.bytes]
        offset += layout.bytes
    return buffers


def private_bytes(size: int, *, pinned: bool, without: str = "memory.weights: device") -> Tensor:
    """Zeroed memory of this process alone, uint8; page-locked in its own size, where torch would round up to a power
    of two. `without` is the setting of a recipe that needs none.

    Raises:
        DoesNotFit: the system has no such room.
        EnvironmentProblem: it refuses to page-lock it.
    """
    memory = HostMemory.private(size)
    piece = memory.tensor()[:size]
    status = memory.page_lock([piece], 0) if pinned and size else 0
    if status != 0:
        raise EnvironmentProblem(
            f"The system refused to page-lock {format_bytes(size)} of host memory (CUDA error {status}).",
            safe="Nothing was trained or written.",
            next_step="Raise the limit (ulimit -l unlimited; in a container --ulimit memlock=-1), or free memory, or "
            f"set {without}.",
        )
    return piece


def require_host_memory(needed_bytes: int, mend: str) -> None:
    """Before anything is loaded.

    Args:
        needed_bytes: what the frozen layers will take of the host.
        mend: the change to the recipe that would help.

    Raises:
        DoesNotFit: the host has less.
    """
    available = available_ram_bytes()
    if needed_bytes > available:
        raise DoesNotFit(
            f"The frozen layers need {format_bytes(needed_bytes)} of host memory and {format_bytes(available)} are "
            "available.",
            safe="Nothing was loaded or written.",
            next_step=mend,
        )


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 5, 6] -> [(0, 2), (5, 6)]."""
    ordered = sorted(layers)
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    cuts = [0, *breaks, len(ordered)]
    return [(ordered[start], ordered[end - 1]) for start, end in pairwise(cuts) if end > start]


def _register(address: int, size: int, flags: int) -> int:
    return int(_cudart().cudaHostRegister(address, size, flags))


def _unregister(address: int) -> None:
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _forget_cuda_error() -> None:
    """CUDA keeps a refusal until somebody asks, and torch asks after its next kernel: let that be this one."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
