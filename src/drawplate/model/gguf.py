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

from drawplate.caches import converted_folder, hold_until_exit, require_room
from drawplate.errors import EnvironmentProblem, IntegrityError, StorageError, UsageError

MOST_GROWTH = 4
"""Times its GGUF file that a model in bf16 takes: quantized weights have about 4 bits, seldom fewer."""


def only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds one and no other model, so that naming the folder is enough."""
    files = sorted(folder.glob("*.gguf"))
    return files[0].name if len(files) == 1 and not (folder / "config.json").is_file() else None


def converted_gguf(folder: Path, gguf_file: str) -> Path:
    """The cache folder with the GGUF file's model as bf16 safetensors and its tokenizer; made on the first call."""
    source = folder / gguf_file
    if not source.is_file():
        raise UsageError(f"There is no GGUF file {source}.", next_step="Mend model.gguf_file.")
    with source.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
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
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    except ImportError as error:
        raise EnvironmentProblem(
            f"Reading GGUF needs a package: {error}", next_step="Run `pip install gguf`."
        ) from None
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
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
