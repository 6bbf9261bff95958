"""A GGUF file -> a folder of bf16 safetensors in the cache, converted once by transformers.

A file that was split is put together first, from the parts that lie beside it. A file without all of the model's
tensors is refused: transformers would fill the rest with random numbers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from drawplate.caches import converted_folder, hold_until_exit, require_room
from drawplate.errors import EnvironmentProblem, IntegrityError, StorageError, UsageError, UserError

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
MOST_GROWTH = 4
"""Times its GGUF file that a model in bf16 takes: quantized weights have about 4 bits, seldom fewer."""


def only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds one and no other model, so that naming the folder is enough."""
    files = [path for path in sorted(folder.glob("*.gguf")) if _part_of(path.name) in (None, 1)]
    return files[0].name if len(files) == 1 and not (folder / "config.json").is_file() else None


def converted_gguf(folder: Path, gguf_file: str) -> Path:
    """The cache folder with the GGUF file's model as bf16 safetensors and its tokenizer; made on the first call."""
    source = folder / gguf_file
    if not source.is_file():
        raise UsageError(f"There is no GGUF file {source}.", next_step="Mend model.gguf_file.")
    parts = parts_of(source)
    key = _digest(parts)[:16]
    target = converted_folder() / f"{source.stem}-{key}"
    if (target / "config.json").is_file():
        hold_until_exit(target)
        with suppress(OSError):
            os.utime(target)  # so that the models used longest ago are known
        return target
    with suppress(OSError):  # a run that needs the model may take more of the disk than a cache may
        require_room(MOST_GROWTH * source.stat().st_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    hold_until_exit(partial)
    try:
        if len(parts) > 1:
            whole = partial / "joined.gguf"
            _write_together(parts, whole)
            _write_converted(partial, whole.name, partial)
            whole.unlink()
        else:
            _write_converted(folder, gguf_file, partial)
        partial.rename(target)
    except OSError as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise StorageError(
            f"The converted model could not be written to {target}: {error.strerror or error}.",
            safe="Nothing was left under its final name.",
            next_step="Free some disk space, or set DRAWPLATE_CACHE to another folder.",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_converted(folder: Path, gguf_file: str, target: Path) -> None:
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf_file, "local_files_only": True, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # from 5.20 on, GGUF blocks stay packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        model, loaded = made
        _require_whole(folder / gguf_file, loaded)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    except UserError:
        raise
    except ImportError as error:
        raise EnvironmentProblem(
            f"Reading GGUF needs a package: {error}", next_step="Run `pip install gguf`."
        ) from None
    except Exception as error:  # the tokenizers library raises a bare one
        raise IntegrityError(
            f"{folder / gguf_file} cannot be converted: {str(error).partition(chr(10))[0]}",
            safe="Nothing was left in the cache.",
            next_step="Fetch the file again, or use the model's safetensors.",
        ) from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010 - it would refuse to save what is no longer quantized
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        os.chmod(path, 0o644)
    os.chmod(target, 0o755)


def _part_of(name: str) -> int | None:
    """Which part of a split model a file is, by its name; None for one that is whole."""
    match = PART.search(name)
    return int(match[1]) if match else None


def _digest(parts: list[Path]) -> str:
    """sha256 of the file, or of its parts' hashes."""
    hashes = []
    for part in parts:
        with part.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def parts_of(source: Path) -> list[Path]:
    """The files that a GGUF model is in, by the name of one of them.

    Raises:
        IntegrityError: a part is not beside it.
    """
    match = PART.search(source.name)
    if match is None:
        return [source]
    stem, count = source.name[: match.start()], int(match[2])
    parts = [source.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise IntegrityError(
            f"{source} is a part of {count}, and {absent[0]} is not beside it.",
            safe="Nothing was read, and nothing is kept in the cache.",
            next_step=f"Put all {count} parts into {source.parent}, then start again.",
        )
    return parts


def _write_together(parts: list[Path], target: Path) -> None:
    """One GGUF file of several parts, whose first holds what is said of the model."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    fields = readers[0].fields
    writer = GGUFWriter(target, str(fields["general.architecture"].contents()))
    for name, field in fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        shape = tensor.data.shape
        writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def _require_whole(source: Path, loaded: dict[str, Any]) -> None:
    """Refuse a file that lacks tensors, or holds some that the model does not read.

    Raises:
        IntegrityError: with the first of them.
    """
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds"), ("mismatched_keys", "holds")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in loaded.get(key) or ())
        if names:
            which = "that the model needs" if key == "missing_keys" else "that do not fit the model"
            raise IntegrityError(
                f"{source} {what} {len(names)} tensors {which}, the first {names[0]}.",
                safe="Nothing is kept in the cache.",
                next_step="Fetch the file again, all parts of it if it is split.",
            )
