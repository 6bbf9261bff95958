"""Where a base model lies: a folder, or a hub repository that is fetched into the hub's cache once.

What is on this machine is used without asking the network. A download that is cut is taken up where it ended.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from drawplate.errors import IntegrityError, NeedsNetwork, UsageError, UserError
from drawplate.hub_answers import said_by, unanswered
from drawplate.recipe import ModelSection, expand

DEMO = "SmolLM2-135M"
TENSORS_NAME = "model.safetensors"
PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
INDEX_NAME = "model.safetensors.index.json"
CONFIGURATION_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
HUB_PATTERNS = ["*.safetensors", *CONFIGURATION_PATTERNS]


def parts_pattern(gguf_file: str) -> str:
    """A pattern for a GGUF file and all its parts: `name-00001-of-00002.gguf` is one of two."""
    return PART.sub(r"\g<1>-*-of-\g<3>.gguf", gguf_file)


def find_folder(section: ModelSection, patterns: list[str] | None = None) -> tuple[Path, str | None]:
    """The model's folder, and its commit where it came from a hub; of a repository only what matches `patterns`.

    Raises:
        NeedsNetwork: there is no such folder, or a repository that is not on this machine cannot be fetched.
    """
    local = expand(section.name_or_path)
    if local.is_dir():
        return local, None
    looks_local = section.name_or_path.startswith((".", "/", "~", "$")) or section.name_or_path.count("/") != 1
    if looks_local:
        raise NeedsNetwork(
            f"There is no model folder {local}.",
            safe="Nothing was loaded or written.",
            next_step="For the demo's model run `python examples/fetch_demo.py`."
            if DEMO in section.name_or_path
            else "Name a folder that exists, or a repository on the hub as owner/name.",
        )
    return _fetch(section, patterns)


def _fetch(section: ModelSection, patterns: list[str] | None = None) -> tuple[Path, str | None]:
    """The folder of a hub repository and its commit: all that is needed, or only what matches `patterns`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, only_some = section.name_or_path, patterns is not None or section.gguf_file is not None
    patterns = [parts_pattern(section.gguf_file)] if section.gguf_file else patterns or HUB_PATTERNS
    command = f"hf download {name}" + (f" --revision {section.revision}" if section.revision else "")
    try:
        for offline in (True, False):
            try:
                folder = snapshot_download(
                    name, revision=section.revision, allow_patterns=patterns, local_files_only=offline, etag_timeout=5
                )
                there = (Path(folder) / "config.json").is_file() or section.gguf_file
                if not offline or complete(Path(folder)) or (only_some and there):
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
        raise unanswered(f"{name} is not on this machine and", error, f"`{command}`") or NeedsNetwork(
            f"{name} is not on this machine and could not be fetched ({said_by(error)}).",
            safe="Nothing was trained or written; what was fetched so far is kept for the next attempt.",
            next_step=f"With a network run `{command}`, then start again.",
        ) from None
    raise AssertionError("unreachable: the second attempt returns or raises")


def complete(folder: Path) -> bool:
    """Whether all weight files are there."""
    if (folder / TENSORS_NAME).is_file():
        return True
    if (folder / INDEX_NAME).is_file():
        return all((folder / name).is_file() for name in index_of(folder).values())
    return any(folder.glob("*.safetensors"))


def index_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded model says; empty where there is no index.

    Raises:
        IntegrityError: it is not an index.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        files = {str(key): str(name) for key, name in json.loads(path.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = {}
    if not files:
        raise IntegrityError(
            f"{path} is damaged.", safe="Nothing was trained or written.", next_step="Fetch the model again."
        )
    return files


def as_folder(section: ModelSection) -> ModelSection:
    """A GGUF file that is named itself, as its folder and its name there.

    Raises:
        UsageError: another file is named where a model's folder is meant.
    """
    path = expand(section.name_or_path)
    if not section.name_or_path or not path.is_file():
        return section
    if path.suffix == ".gguf" and not section.gguf_file:
        return section.model_copy(update={"name_or_path": str(path.parent), "gguf_file": path.name})
    raise UsageError(
        f"{path} is a file, and a model is a folder or a GGUF file.",
        safe="Nothing was loaded or written.",
        next_step=f"Name its folder: {path.parent}.",
    )
