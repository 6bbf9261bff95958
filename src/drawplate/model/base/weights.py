"""A folder, a hub repository or a GGUF file -> tensors by name, one at a time, and nothing executed.

Only safetensors are opened, lazily, so that the full-precision model is never in memory whole. A GGUF file is
converted to safetensors once, by transformers, in the cache. Pickles and configurations that ask for code
(`auto_map`) are refused by name. Checkpoints already quantized by bitsandbytes give their stored tensors as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drawplate.durable import write_whole
from drawplate.errors import IntegrityError, UsageError
from drawplate.layout.stored_linear import BLOCK, SCALE_BLOCK
from drawplate.model.base.gguf import converted_gguf, only_gguf
from drawplate.model.base.hub import CONFIGURATION_PATTERNS, as_folder, complete, find_folder
from drawplate.model.base.precision import Storage
from drawplate.model.base.weight_files import refuse_other_quantizations, tensor_files
from drawplate.recipe import ModelSection, cache_folder

ADAPTER_CONFIG_NAME = "adapter_config.json"
HEADS = ("lm_head.weight", "embed_out.weight")
TABLES = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk: config.json, tokenizer files and safetensors in one folder.

    Attributes:
        folder: where it is.
        name: what the user called it.
        revision: commit of a hub repository, if it came from one.
        config: the parsed configuration.
        files: tensor name -> safetensors file.
        remarks: what a person should be told about how it was opened.
    """

    folder: Path
    name: str
    revision: str | None
    config: PretrainedConfig
    files: dict[str, Path]
    remarks: tuple[str, ...] = ()

    @property
    def loadable_name(self) -> str:
        """What other programs load this base by: a hub repository's name, else the folder of the safetensors."""
        return self.name if self.revision is not None and self.folder.name == self.revision else str(self.folder)

    def read(self, name: str) -> Tensor:
        """One tensor in host memory, as stored.

        Raises:
            IntegrityError: the file is damaged or holds no tensor of that name.
        """
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (KeyError, SafetensorError, OSError) as error:
            raise IntegrityError(
                f"{self.folder}: tensor {name} cannot be read ({error}).",
                safe="Nothing was trained or written.",
                next_step="Fetch the model again; one of its files is damaged or missing.",
            ) from None

    def dimensions(self, name: str) -> int:
        """How many a tensor has, by its file's header."""
        with _opened_slices(self, name) as tensor:
            return len(tensor.get_shape())

    def stored_linear(self, name: str, storage: Storage) -> dict[str, Tensor] | None:
        """The stored tensors of a linear weight that bitsandbytes quantized before, in `storage`'s names.

        None where the checkpoint holds the plain weight.

        Raises:
            UsageError: it is quantized, but not as `storage` asks.
        """
        weight = f"{name}.weight"
        if f"{name}.SCB" in self.files and storage.precision == "int8":
            return {"int8": self.read(weight), "row_scale": self.read(f"{name}.SCB").float() / 127}
        state = next((key for key in self.files if key.startswith(f"{weight}.quant_state.bitsandbytes__")), None)
        if state is None and f"{name}.SCB" not in self.files:
            return None
        found = "int8" if state is None else state.rpartition("__")[2]
        nested = f"{weight}.nested_absmax" in self.files
        if found != storage.precision or nested != storage.double_quant:
            raise UsageError(
                f"{self.name} is already quantized to {found} {'with' if nested else 'without'} double quantization.",
                next_step=f"Set quantization.precision: {found} and bnb_4bit_use_double_quant: {str(nested).lower()}.",
            )
        facts = json.loads(bytes(self.read(state).tolist()))  # type: ignore[arg-type]
        blocks = [facts.get("blocksize", BLOCK), *([facts.get("nested_blocksize", SCALE_BLOCK)] if nested else [])]
        if blocks != [BLOCK, SCALE_BLOCK][: len(blocks)]:
            raise UsageError(
                f"{self.name} is quantized in blocks of {blocks[0]}, and Drawplate reads blocks of {BLOCK}.",
                next_step="Start from the unquantized model; Drawplate quantizes it while it loads.",
            )
        stored = {"packed": self.read(weight), "absmax": self.read(f"{weight}.absmax")}
        if nested:
            stored["absmax_scale"] = self.read(f"{weight}.nested_absmax")
            stored["absmax_offset"] = torch.tensor(facts["nested_offset"], dtype=torch.float32)
        return stored

    @property
    def quantized_precision(self) -> str | None:
        """nf4, fp4 or int8 where the checkpoint is already quantized by bitsandbytes."""
        for key in self.files:
            if ".quant_state.bitsandbytes__" in key:
                return key.rpartition("__")[2]
            if key.endswith(".SCB"):
                return "int8"
        return None

    @property
    def quantized_doubly(self) -> bool | None:
        """Whether a 4-bit checkpoint's scales are quantized too; None where it is not in 4 bits."""
        if self.quantized_precision not in ("nf4", "fp4"):
            return None
        return any(key.endswith(".nested_absmax") for key in self.files)

    def sha256(self) -> str:
        """Hash of all weight files' hashes; each file's is remembered by size and modification time."""
        known_path = cache_folder() / "hashes.json"
        known = _read_json(known_path)
        digest, keys = hashlib.sha256(), {path: _version_of(path) for path in sorted(set(self.files.values()))}
        unknown = [path for path, key in keys.items() if key not in known]
        if unknown:
            with ThreadPoolExecutor(min(len(unknown), os.cpu_count() or 1)) as pool:
                known |= zip((keys[path] for path in unknown), pool.map(_file_sha256, unknown), strict=True)
            _write_json(known_path, known)
        for path, key in keys.items():
            digest.update(f"{path.name} {known[key]}\n".encode())
        return digest.hexdigest()


def open_configuration(section: ModelSection) -> Checkpoint:
    """The base model's configuration and tokenizer: of a hub repository no weights are fetched, and none need be there.

    A GGUF file is opened as `open_checkpoint` does, because its configuration lies in it. Raises as that does.
    """
    there = as_folder(section)
    folder, revision = find_folder(there, CONFIGURATION_PATTERNS)
    if there.gguf_file or only_gguf(folder):
        return open_checkpoint(section)
    return _opened(folder, section.name_or_path, revision, config_only=not complete(folder))


def open_checkpoint(section: ModelSection) -> Checkpoint:
    """The base model a recipe names, fetched if it is a hub repository, converted if it is a GGUF file.

    Raises:
        NeedsNetwork: a hub repository that is not on this machine and cannot be fetched.
        UsageError: no such folder, or a folder without a model.
        IntegrityError: weights only as pickles, or a configuration that asks for code.
    """
    there = as_folder(section)
    folder, revision = find_folder(there)
    gguf_file = there.gguf_file or only_gguf(folder)
    if gguf_file:
        folder = converted_gguf(folder, gguf_file)
    return _opened(folder, section.name_or_path, revision)


def read_config(folder: Path, name: str) -> PretrainedConfig:
    """config.json of a model folder, refused where only code that comes with it could run it.

    An architecture that transformers has is read as transformers has it, whatever code lies beside it (Phi-3's folders
    name some for versions of transformers from before it had the architecture).

    Raises:
        UsageError: there is none, or transformers does not know its architecture.
        IntegrityError: it needs code that comes with the model (`auto_map`).
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UsageError(
            f"{folder} holds an adapter, not a model.",
            safe="Nothing was loaded or written.",
            next_step="Name its base model as the model, and this folder with --adapter.",
        )
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no config.json, so it is not a model.",
            next_step="Name a model folder, a hub repository, or add model.gguf_file for a GGUF file.",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", next_step="Fetch the model again.") from None
    if not isinstance(values, dict):
        raise IntegrityError(f"{path} is no model configuration.", next_step="Fetch the model again.")
    refuse_other_quantizations(name, values)
    names_code = "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING
    if names_code or "/" in str(values.get("_attn_implementation", "")):
        raise IntegrityError(
            f"The configuration of {name} asks to run code that comes with the model; Drawplate never does.",
            safe="Nothing of it was executed.",
            next_step="Choose a model whose architecture is part of transformers.",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vars(config).pop("auto_map", None)  # of an architecture that transformers has: nothing may ask for it later
        return config
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"transformers cannot read the configuration of {name}: {error}",
            next_step="Update transformers, or choose an architecture it knows.",
        ) from None


def _opened(folder: Path, name: str, revision: str | None, *, config_only: bool = False) -> Checkpoint:
    config = read_config(folder, name)
    if config_only:
        return Checkpoint(folder, name, revision, config, {})
    files, remarks = tensor_files(folder, name)
    checkpoint = Checkpoint(folder, name, revision, config, files, remarks)
    if _has_own_head(checkpoint):
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = False
        said = f"The configuration of {name} ties the head to the embedding, and its files hold another head, which is"
        return replace(checkpoint, remarks=(*remarks, f"{said} used, as transformers does."))
    return checkpoint


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a head that the configuration ties is in the files and not equal to the embedding."""
    if not getattr(checkpoint.config.get_text_config(), "tie_word_embeddings", False):
        return False
    heads = [name for name in checkpoint.files if name.endswith(HEADS)]
    tables = [name for name in checkpoint.files if name.endswith(TABLES)]
    if len(heads) != 1 or len(tables) != 1:
        return False
    with _opened_slices(checkpoint, heads[0]) as head, _opened_slices(checkpoint, tables[0]) as table:
        if head.get_shape() != table.get_shape():
            return True
        rows = head.get_shape()[0]
        parts = [(i, min(i + COMPARED_ROWS, rows)) for i in range(0, rows, COMPARED_ROWS)]
        return any(not torch.equal(head[first:end], table[first:end]) for first, end in parts)


@contextmanager
def _opened_slices(checkpoint: Checkpoint, name: str) -> Iterator[Any]:
    with safe_open(checkpoint.files[name], framework="pt") as file:
        yield file.get_slice(name)


def _version_of(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_json(path: Path, values: dict[str, str]) -> None:
    with suppress(OSError):  # only a cache: without it the hash is computed again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values))
