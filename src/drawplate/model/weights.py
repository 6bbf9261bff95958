"""A folder, a hub repository or a GGUF file -> tensors by name, one at a time, and nothing executed.

Only safetensors are opened, lazily, so that the full-precision model is never in memory whole. A GGUF file is
converted to safetensors once, by transformers, in the cache. Pickles and configurations that ask for code
(`auto_map`) are refused by name. Checkpoints already quantized by bitsandbytes give their stored tensors as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from drawplate.errors import EnvironmentProblem, IntegrityError, NeedsNetwork, StorageError, UsageError, UserError
from drawplate.model.frozen import BLOCK, SCALE_BLOCK, Storage
from drawplate.recipe import ModelSection, cache_folder, expand

INDEX_NAME = "model.safetensors.index.json"
CONFIGURATION_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk: config.json, tokenizer files and safetensors in one folder.

    Attributes:
        folder: where it is.
        name: what the user called it.
        revision: commit of a hub repository, if it came from one.
        config: the parsed configuration.
        files: tensor name -> safetensors file.
    """

    folder: Path
    name: str
    revision: str | None
    config: PretrainedConfig
    files: dict[str, Path]

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
    folder, revision = _find_folder(section, CONFIGURATION_PATTERNS)
    if section.gguf_file or _only_gguf(folder):
        return open_checkpoint(section)
    config = read_config(folder, section.name_or_path)
    files = _tensor_files(folder, section.name_or_path) if _complete(folder) else {}
    return Checkpoint(folder, section.name_or_path, revision, config, files)


def open_checkpoint(section: ModelSection) -> Checkpoint:
    """The base model a recipe names, fetched if it is a hub repository, converted if it is a GGUF file.

    Raises:
        NeedsNetwork: a hub repository that is not on this machine and cannot be fetched.
        UsageError: no such folder, or a folder without a model.
        IntegrityError: weights only as pickles, or a configuration that asks for code.
    """
    folder, revision = _find_folder(section)
    gguf_file = section.gguf_file or _only_gguf(folder)
    if gguf_file:
        folder = _converted_gguf(folder, gguf_file)
    config = read_config(folder, section.name_or_path)
    return Checkpoint(folder, section.name_or_path, revision, config, _tensor_files(folder, section.name_or_path))


def read_config(folder: Path, name: str) -> PretrainedConfig:
    """config.json of a model folder, refused where it asks for code.

    Raises:
        UsageError: there is none, or transformers does not know its architecture.
        IntegrityError: it names code to execute (`auto_map`).
    """
    path = folder / "config.json"
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
    if "auto_map" in values or "/" in str(values.get("_attn_implementation", "")):
        raise IntegrityError(
            f"The configuration of {name} asks to run code that comes with the model; Drawplate never does.",
            safe="Nothing of it was executed.",
            next_step="Choose a model whose architecture is part of transformers.",
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"transformers cannot read the configuration of {name}: {error}",
            next_step="Update transformers, or choose an architecture it knows.",
        ) from None


def _find_folder(section: ModelSection, patterns: list[str] | None = None) -> tuple[Path, str | None]:
    local = expand(section.name_or_path)
    if local.is_dir():
        return local, None
    looks_local = section.name_or_path.startswith((".", "/", "~", "$")) or section.name_or_path.count("/") != 1
    if looks_local:
        raise NeedsNetwork(
            f"There is no model folder {local}.",
            safe="Nothing was loaded or written.",
            next_step="For the demo's model run `python examples/fetch_demo.py`; else mend model.name_or_path.",
        )
    return _fetch(section, patterns)


def _only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds one and no other model, so that naming the folder is enough."""
    files = sorted(folder.glob("*.gguf"))
    return files[0].name if len(files) == 1 and not (folder / "config.json").is_file() else None


def _fetch(section: ModelSection, patterns: list[str] | None = None) -> tuple[Path, str | None]:
    """The folder of a hub repository and its commit: all that is needed, or only what matches `patterns`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, only_some = section.name_or_path, patterns is not None or section.gguf_file is not None
    patterns = [section.gguf_file] if section.gguf_file else patterns or HUB_PATTERNS
    command = f"hf download {name}" + (f" --revision {section.revision}" if section.revision else "")
    try:
        for offline in (True, False):
            try:
                folder = snapshot_download(
                    name, revision=section.revision, allow_patterns=patterns, local_files_only=offline, etag_timeout=5
                )
                there = (Path(folder) / "config.json").is_file() or section.gguf_file
                if not offline or _complete(Path(folder)) or (only_some and there):
                    return Path(folder), Path(folder).name
            except LocalEntryNotFoundError:
                if not offline:
                    raise
    except GatedRepoError:
        raise NeedsNetwork(
            f"{name} is gated: its owner grants access to each account.",
            next_step=f"Accept its licence on its page, then run `hf auth login` and `{command}`.",
        ) from None
    except RepositoryNotFoundError:
        raise NeedsNetwork(
            f"There is no model {name}, neither as a folder nor as a public repository.",
            next_step="Check the spelling of model.name_or_path, or run `hf auth login` if it is private.",
        ) from None
    except UserError:
        raise
    except Exception as error:  # the HTTP library's own, which another version of the client takes from another package
        raise NeedsNetwork(
            f"{name} is not on this machine and could not be fetched ({type(error).__name__}).",
            safe="Nothing was trained or written; what was fetched so far is kept for the next attempt.",
            next_step=f"With a network run `{command}`, then start again.",
        ) from None
    raise AssertionError("unreachable: the second attempt returns or raises")


def _complete(folder: Path) -> bool:
    if (folder / INDEX_NAME).is_file():
        return all((folder / name).is_file() for name in _indexed_files(folder))
    return any(folder.glob("*.safetensors"))


def _indexed_files(folder: Path) -> list[str]:
    """Names of the files that the index of a sharded model lists.

    Raises:
        IntegrityError: it is not an index.
    """
    try:
        return sorted(
            {str(name) for name in json.loads((folder / INDEX_NAME).read_text("utf-8"))["weight_map"].values()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(
            f"{folder / INDEX_NAME} is damaged.",
            safe="Nothing was trained or written.",
            next_step="Fetch the model again.",
        ) from None


def _tensor_files(folder: Path, name: str) -> dict[str, Path]:
    if (folder / INDEX_NAME).is_file():
        paths = [folder / file for file in _indexed_files(folder)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = [path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)]
        if pickles:
            raise IntegrityError(
                f"{name} has its weights only as pickles ({pickles[0]}), which can run code when opened.",
                safe="None of them was opened.",
                next_step="Choose a repository or revision with .safetensors files.",
            )
        raise UsageError(f"{folder} holds no weights (.safetensors).", next_step="Fetch the model again.")
    files: dict[str, Path] = {}
    for path in paths:
        if path.parent.resolve() != folder.resolve():  # the file itself may be a link, as in the hub's cache
            raise IntegrityError(
                f"The index of {name} names {path.name} outside of the model's folder.",
                safe="It was not opened.",
                next_step="Fetch the model again.",
            )
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(
                f"{path} is missing or damaged ({error}).",
                safe="Nothing was trained or written.",
                next_step="Fetch the model again.",
            ) from None
    return files


def _converted_gguf(folder: Path, gguf_file: str) -> Path:
    """The cache folder with the GGUF file's model as bf16 safetensors and its tokenizer; made on the first call."""
    source = folder / gguf_file
    if not source.is_file():
        raise UsageError(f"There is no GGUF file {source}.", next_step="Mend model.gguf_file.")
    with source.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "converted" / f"{source.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(values, file)
        os.replace(file.name, path)
    except OSError:
        return  # only a cache: without it the hash is computed again
