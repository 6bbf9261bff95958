"""A GGUF file -> a folder of bf16 safetensors in the cache, converted once by transformers."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from drawplate.errors import EnvironmentProblem, IntegrityError, StorageError, UsageError, UserError, reason_of
from drawplate.machine.caches import converted_folder, hold_until_exit, require_room
from drawplate.model.base.hub import PART

CONVERSION = b"2"
"""Changes where what a file is converted to changes: before 2, what a file lacked was made up."""
NOTHING_KEPT = "Nothing was loaded, and nothing was left in the cache."
MOST_GROWTH = 4
"""Times its GGUF file that a model in bf16 takes: quantized weights have about 4 bits, seldom fewer."""


def only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds one and no other model, so that naming the folder is enough.

    Of a model in parts it is the first part.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files or (folder / "config.json").is_file():
        return None
    return files[0].name if len(files) == 1 or set(files) <= set(parts_of(files[0])) else None


def parts_of(source: Path) -> list[Path]:
    """The file, or all parts that its name says it is one of (`m-00001-of-00002.gguf`).

    Raises:
        IntegrityError: some are not there; they are named.
    """
    found = PART.match(source.name)
    if not found:
        return [source]
    stem, _, count = found.groups()
    parts = [source.with_name(f"{stem}-{i + 1:05d}-of-{count}.gguf") for i in range(int(count))]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise IntegrityError(
            f"{source} is one of {int(count)} parts of a model, and {', '.join(missing[:3])} is not beside it.",
            safe=NOTHING_KEPT,
            next_step=f"Fetch the missing parts into {source.parent}.",
        )
    return parts


def converted_gguf(folder: Path, gguf_file: str) -> Path:
    """The cache folder with the GGUF file's model as bf16 safetensors and its tokenizer; made on the first call."""
    source = folder / gguf_file
    if not source.is_file():
        raise UsageError(f"There is no GGUF file {source}.", next_step="Mend model.gguf_file.")
    parts = parts_of(source)
    digest = hashlib.sha256(CONVERSION)
    for part in parts:
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    key = digest.hexdigest()[:16]
    target = converted_folder() / f"{source.stem}-{key}"
    if (target / "config.json").is_file():
        hold_until_exit(target)
        with suppress(OSError):
            os.utime(target)  # so that the models used longest ago are known
        return target
    with suppress(OSError):  # a run that needs the model may take more of the disk than a cache may
        require_room(MOST_GROWTH * sum(part.stat().st_size for part in parts))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    hold_until_exit(partial)
    try:
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
    """The model of a file and the parts beside it, read whole or not at all."""
    source = folder / gguf_file
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.joined-") as joined:
            whole = _whole(source, Path(joined))
            model = _read_model(whole)
            tokenizer = _read_tokenizer(whole)
    except ImportError as error:
        raise EnvironmentProblem(
            f"Reading GGUF needs a package: {error}", next_step="Run `pip install gguf`."
        ) from None
    except (UserError, OSError):
        raise
    except Exception as error:  # of numpy, gguf or transformers: a file that is not what it says it is
        raise _unreadable(source, error) from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010 - it would refuse to save what is no longer quantized
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        os.chmod(path, 0o644)
    os.chmod(target, 0o755)


def _read_model(path: Path) -> Any:
    """By transformers, with every tensor of the architecture in it: it would make up what the file lacks.

    Raises:
        IntegrityError: the file lacks tensors.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # from 5.20 on, GGUF blocks stay packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, found = load(path.parent, output_loading_info=True, **options)
    wrong = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if wrong:
        raise IntegrityError(
            f"{path} lacks {len(wrong)} tensors that {type(model).__name__} runs with, the first {wrong[0]}.",
            safe=NOTHING_KEPT,
            next_step="Fetch the file again, or use the model's safetensors.",
        )
    return model


def _read_tokenizer(path: Path) -> Any:
    """Raises IntegrityError where the vocabulary does not hold together; the tokenizers library raises anything."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:
        raise IntegrityError(
            f"The vocabulary of {path} cannot be read: {reason_of(error)}.",
            safe=NOTHING_KEPT,
            next_step="Fetch the file again, or use the model's safetensors.",
        ) from None


def _unreadable(source: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"{source} cannot be converted: {reason_of(error)}.",
        safe=NOTHING_KEPT,
        next_step="Fetch the file again, or use the model's safetensors.",
    )


def _whole(source: Path, folder: Path) -> Path:
    """The file, or one file in `folder` with the tensors of all its parts.

    Raises:
        IntegrityError: its metadata say that it has more parts than there are.
    """
    import gguf

    parts = parts_of(source)
    try:
        readers = [gguf.GGUFReader(part) for part in parts]
    except (ValueError, IndexError, KeyError) as error:
        raise _unreadable(source, error) from None
    count = readers[0].fields.get("split.count")
    if count is not None and int(count.contents()) != len(parts):
        raise IntegrityError(
            f"{source} is one of {int(count.contents())} parts of a model by its metadata, and not by its name.",
            safe=NOTHING_KEPT,
            next_step="Give the parts their names back: NAME-00001-of-0000N.gguf, side by side.",
        )
    if len(parts) == 1:
        return source
    joined = folder / source.name
    writer = gguf.GGUFWriter(str(joined), arch=str(readers[0].fields["general.architecture"].contents()))
    for name, field in readers[0].fields.items():
        if name == "general.architecture" or name.startswith(("GGUF.", "split.")):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        shape, kind = tensor.data.shape, tensor.tensor_type
        writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, tensor.data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return joined
