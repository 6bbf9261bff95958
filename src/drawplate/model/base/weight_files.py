"""Which safetensors file of a model folder holds which tensor, by transformers' rule, and whether they hold weights.

model.safetensors is read where there is one, else what the index lists, else every file. What other programs quantized
(fp8, GPTQ, AWQ, compressed-tensors, MXFP4 ...) is codes with scales beside them: read as weights they are another
model, so they are refused by the format's name. bitsandbytes' formats are read as they are (weights.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from drawplate.errors import IntegrityError, UsageError, reason_of
from drawplate.model.base.hub import INDEX_NAME, TENSORS_NAME, index_of

ADAPTER_TENSORS = "adapter_model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LFS_START = b"version https://git-lfs"
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
READ_METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
STATE_MARK = ".quant_state.bitsandbytes__"
COMPANIONS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "fp8, a scale a block",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "codes with scales, as compressed-tensors and fp8 have them",
    "_blocks": "MXFP4",
}
"""What the end of a tensor's name says of the weight beside it."""


def tensor_files(folder: Path, name: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Tensor name -> the file that it is read from, and what to tell about files that are left out.

    Raises:
        IntegrityError: a file is damaged, outside of the folder or only a pickle; or two may be meant.
        UsageError: there are no weights, or another program's codes.
    """
    index = {} if (folder / TENSORS_NAME).is_file() else index_of(folder)
    paths = _paths(folder, index)
    if not paths:
        raise _no_weights(folder, name)
    files: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    twice: set[str] = set()
    for path in paths:
        _require_inside(path, folder, name)
        for key, dtype in _dtypes_of(path).items():
            if key in files:
                _require_decided(key, files[key], path, index)
                twice.add(key)
            if key not in files or index.get(key) == path.name:
                files[key], dtypes[key] = path, dtype
    _refuse_codes(name, dtypes)
    return files, _left_out(folder, paths, twice)


def refuse_other_quantizations(name: str, values: dict[str, Any]) -> None:
    """Refuse a configuration that says another program than bitsandbytes quantized the weights.

    Raises:
        UsageError: it does; the format is named.
    """
    text = values.get("text_config")
    for holder in (values, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            facts = holder.get(key)
            if isinstance(facts, dict) and str(facts.get("quant_method", READ_METHODS[0])) not in READ_METHODS:
                raise _quantized(name, " ".join(str(facts[k]) for k in ("quant_method", "format") if facts.get(k)))


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs puts in a large file's place until it is pulled."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_START)) == LFS_START
    except OSError:
        return False


def damaged(path: Path, error: Exception) -> IntegrityError:
    """The error of a weight file that cannot be read, with its real cause."""
    if is_lfs_pointer(path):
        return IntegrityError(
            f"{path} is a pointer of Git LFS; the file itself was never fetched.",
            safe="Nothing was trained or written.",
            next_step=f"Run `git lfs pull` in {path.parent}.",
        )
    return IntegrityError(
        f"{path} is missing or damaged ({reason_of(error)}).",
        safe="Nothing was trained or written.",
        next_step="Fetch the model again.",
    )


def _paths(folder: Path, index: dict[str, str]) -> list[Path]:
    if (folder / TENSORS_NAME).is_file():
        return [folder / TENSORS_NAME]
    if (folder / INDEX_NAME).is_file():
        return [folder / file for file in sorted(set(index.values()))]
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != ADAPTER_TENSORS]


def _dtypes_of(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def _no_weights(folder: Path, name: str) -> UsageError | IntegrityError:
    pickles = [path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)]
    if pickles:
        return IntegrityError(
            f"{name} has its weights only as pickles ({pickles[0]}), which can run code when opened.",
            safe="None of them was opened.",
            next_step="Choose a repository or revision with .safetensors files.",
        )
    return UsageError(f"{folder} holds no weights (.safetensors).", next_step="Fetch the model again.")


def _require_inside(path: Path, folder: Path, name: str) -> None:
    if path.parent.resolve() != folder.resolve():  # the file itself may be a link, as in the hub's cache
        raise IntegrityError(
            f"The index of {name} names {path.name} outside of the model's folder.",
            safe="It was not opened.",
            next_step="Fetch the model again.",
        )


def _require_decided(key: str, first: Path, second: Path, index: dict[str, str]) -> None:
    """Two files hold a tensor: the index must say which is meant."""
    if index.get(key) in (first.name, second.name):
        return
    raise IntegrityError(
        f"Both {first} and {second.name} hold the tensor {key}, and nothing says which of them is meant.",
        safe="Nothing was loaded or written.",
        next_step=f"Move the file that is not meant out of the folder, or call the other one {TENSORS_NAME}.",
    )


def _refuse_codes(name: str, dtypes: dict[str, str]) -> None:
    """Refuse weights that are another program's codes, whatever the configuration says.

    Raises:
        UsageError: the format as far as names and types give it away.
    """
    for end, format_ in COMPANIONS.items():
        if beside := [key for key in dtypes if key.endswith(end)]:
            raise _quantized(name, f"{format_}: {beside[0]}")
    fours = {key.partition(STATE_MARK)[0] for key in dtypes if STATE_MARK in key}
    for key, dtype in dtypes.items():
        eight = f"{key.removesuffix('weight')}SCB" in dtypes
        if key.endswith(".weight") and dtype not in PLAIN_DTYPES and key not in fours and not eight:
            raise _quantized(name, f"{key} is stored as {dtype}")


def _quantized(name: str, format_: str) -> UsageError:
    return UsageError(
        f"{name} is quantized in a format that Drawplate does not read ({format_}).",
        safe="Nothing was loaded or written.",
        next_step="Start from the unquantized model, which Drawplate quantizes while it loads, or from one that"
        " bitsandbytes quantized.",
    )


def _left_out(folder: Path, paths: list[Path], twice: set[str]) -> tuple[str, ...]:
    others = [
        path.name for path in sorted(folder.glob("*.safetensors")) if path not in paths and path.name != ADAPTER_TENSORS
    ]
    read = paths[0].name if len(paths) == 1 else f"what {INDEX_NAME} lists"
    said = []
    if others:
        said.append(f"Of the weight files in {folder}, {read} is read; left out: {', '.join(others)}.")
    if twice:
        said.append(
            f"{len(twice)} tensors are in two files of {folder}; each is read from the one that its index names."
        )
    return tuple(said)
