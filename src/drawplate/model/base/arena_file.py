"""The file that keeps prepared weights: its format, how it is written and read back (machine/caches.py: when it goes).

    | magic, header's length, header's xxh3 | header: JSON | padding | layer 0 | padding | layer 1 | ...

The header names the weights (`ArenaKey`), and for each layer its tensors' places and the xxh3-64 of its bytes. Layers
begin at multiples of 64 KiB, the largest page of the machines that torch runs on, so that each can be mapped and
page-locked by itself. A file is used only where its header is, byte for byte, the one that would be written now, its
size is right and every layer's checksum agrees; so a file that is stale, cut short or flipped in one bit is never used.
xxh3 finds accidents, not forgeries: who may write into the user's cache folder may change the weights.

Verifying is how the file gets into memory: it is read with several threads at the speed of the disk, or of memory when
the page cache has it already. It is read and not touched through the mapping, because a disk that cannot read a page
then gives an error and not a SIGBUS.

What the format leaves out: compression (NF4 does not compress) and partial reading (a run needs every layer).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from drawplate.durable import flush_to_disk
from drawplate.layout.stored_linear import LAYER_ALIGNMENT
from drawplate.machine.caches import hold
from drawplate.model.base.layer_layout import LayerLayout
from drawplate.units import MIB

try:
    import fcntl
except ImportError:  # not a POSIX system: `lock` raises, so nothing is cached there
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # to be raised when the format, or what quantizing gives, changes
READ_BYTES = MIB
MOST_THREADS = 8
_MAGIC = b"DP-ARENA"
_PREAMBLE = struct.Struct("<8sQQ")
_NO_CHECKSUM = "0" * 16

Fill = Callable[[int, dict[str, Tensor]], None]
Progress = Callable[[int, int], None]


class Damaged(Exception):
    """The file is not what it should be; the text says in which way."""


@dataclass(frozen=True, kw_only=True)
class ArenaKey:
    """What prepared weights depend on, beside the layers' layouts.

    Attributes:
        weights_sha256: of the checkpoint.
        precision: of the linear weights.
        double_quant: whether their block scales are quantized.
        compute_dtype: of everything frozen that is not a linear weight.
        quantizer: library, version and kind of device, which differ from each other in single bits.
        format: of the file and of our own part in quantizing.
    """

    weights_sha256: str
    precision: str
    double_quant: bool
    compute_dtype: str
    quantizer: str
    format: int = FORMAT


@dataclass(frozen=True)
class ArenaFile:
    """Prepared weights under their final name, which may not exist yet.

    Attributes:
        folder: of all arenas.
        key: what the weights depend on.
        layouts: one per layer, without regard to where a layer will live.
    """

    folder: Path
    key: ArenaKey
    layouts: tuple[LayerLayout, ...]

    @property
    def path(self) -> Path:
        """The final name: precision and a digest of key and layouts."""
        digest = hashlib.sha256(self._header([_NO_CHECKSUM] * len(self.layouts))).hexdigest()[:24]
        return self.folder / f"{self.key.precision}-{digest}.arena"

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First byte in the file and number of bytes of each layer."""
        header = _PREAMBLE.size + len(self._header([_NO_CHECKSUM] * len(self.layouts)))
        ends = accumulate((_aligned(layout.bytes) for layout in self.layouts), initial=_aligned(header))
        return [(start, layout.bytes) for start, layout in zip(ends, self.layouts, strict=False)]

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        start, size = self.spans[-1]
        return _aligned(start + size)

    def _header(self, checksums: Sequence[str]) -> bytes:
        layers = [
            {
                "bytes": layout.bytes,
                "xxh3_64": checksum,
                "tensors": {n: [p.offset, p.bytes, p.shape, str(p.dtype)] for n, p in layout.places.items()},
            }
            for layout, checksum in zip(self.layouts, checksums, strict=True)
        ]
        return json.dumps({"key": asdict(self.key), "layers": layers}).encode()

    def verify(self, file: BinaryIO, progress: Progress | None = None) -> None:
        """Read the whole open file and compare it with what it should be.

        Args:
            file: opened for reading, at its beginning.
            progress: called with (layers read, layers).

        Raises:
            Damaged: it differs.
            OSError: the disk cannot read it.
        """
        checksums = self._read_checksums(file)
        size = os.fstat(file.fileno()).st_size
        if size != self.file_bytes:
            raise Damaged(f"it has {size} bytes where {self.file_bytes} belong")
        with ThreadPoolExecutor(min(MOST_THREADS, len(self.layouts), os.cpu_count() or 1)) as pool:
            found = pool.map(lambda span: _checksum_of(file.fileno(), *span), self.spans)
            for i, (wanted, got) in enumerate(zip(checksums, found, strict=True)):
                if wanted != got:
                    raise Damaged(f"the bytes of layer {i} have changed")
                if progress:
                    progress(i + 1, len(self.layouts))

    def _read_checksums(self, file: BinaryIO) -> list[str]:
        preamble = file.read(_PREAMBLE.size)
        if len(preamble) < _PREAMBLE.size or not preamble.startswith(_MAGIC):
            raise Damaged("it does not begin as it should")
        _, length, digest = _PREAMBLE.unpack(preamble)
        header = file.read(min(length, self.file_bytes))
        if len(header) != length or xxhash.xxh3_64_intdigest(header) != digest:
            raise Damaged("its header has changed")
        try:
            checksums = [str(layer["xxh3_64"]) for layer in json.loads(header)["layers"]]
            as_it_should_be = self._header(checksums)
        except (ValueError, KeyError, TypeError):
            raise Damaged("its header has another form") from None
        if header != as_it_should_be:
            raise Damaged("it was made from other weights or by another version")
        return checksums

    def write(self, fill: Fill, progress: Progress | None = None) -> None:
        """Prepare every layer and put the file under its final name, whole or not at all. Call it under `lock`.

        Args:
            fill: writes the tensors of a layer, in host memory, zero before.
            progress: called with (layers prepared, layers).

        Raises:
            OSError: the disk is full or refuses.
        """
        for left in self.folder.glob(f"{self.path.name}.partial-*"):
            left.unlink()
        partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            with partial.open("xb") as file:
                hold(file)
                if hasattr(os, "posix_fallocate"):  # a full disk says so before the work begins
                    os.posix_fallocate(file.fileno(), 0, self.file_bytes)
                self._write_to(file, fill, progress)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            flush_to_disk(self.folder)
        finally:
            partial.unlink(missing_ok=True)

    def _write_to(self, file: BinaryIO, fill: Fill, progress: Progress | None) -> None:
        checksums = []
        staging = torch.zeros(max(layout.bytes for layout in self.layouts), dtype=torch.uint8)
        for i, ((start, size), layout) in enumerate(zip(self.spans, self.layouts, strict=True)):
            staging.zero_()
            fill(i, layout.views(staging))
            layer = staging.numpy()[:size]
            checksums.append(xxhash.xxh3_64_hexdigest(layer.data))
            file.seek(start)
            file.write(layer.data)
            if progress:
                progress(i + 1, len(self.layouts))
        header = self._header(checksums)
        file.seek(0)
        file.write(_PREAMBLE.pack(_MAGIC, len(header), xxhash.xxh3_64_intdigest(header)) + header)

    @contextmanager
    def lock(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Alone in preparing this file among all processes of the host; the kernel releases a dead process's lock.

        Lock files are empty and stay, because deleting one while another process waits for it would let two in.

        Raises:
            OSError: the folder cannot be written, or its file system has no locks.
        """
        if fcntl is None:
            raise OSError("this system has no file locks")
        with self.path.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("Waiting for another process, which is preparing the same weights.")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _aligned(count: int) -> int:
    return -(-count // LAYER_ALIGNMENT) * LAYER_ALIGNMENT


def _checksum_of(descriptor: int, start: int, size: int) -> str:
    """xxh3-64 of a span, without moving the file's position; "" where the file ends too early."""
    hasher, buffer = xxhash.xxh3_64(), bytearray(min(READ_BYTES, size))
    done = 0
    while done < size:
        window = memoryview(buffer)[: min(len(buffer), size - done)]
        count = os.preadv(descriptor, [window], start + done)
        if count == 0:
            return ""
        hasher.update(window[:count])
        done += count
    return hasher.hexdigest()
