"""Where a base model lies: a folder, or a hub repository that is fetched into the hub's cache once.

What is on this machine is used without asking the network. A download that is cut is taken up where it ended.
"""

from __future__ import annotations

import json
from pathlib import Path

from drawplate.errors import IntegrityError, NeedsNetwork, UserError
from drawplate.hub_answers import said_by, unanswered
from drawplate.recipe import ModelSection, expand

INDEX_NAME = "model.safetensors.index.json"
CONFIGURATION_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
HUB_PATTERNS = ["*.safetensors", *CONFIGURATION_PATTERNS]


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
            next_step="For the demo's model run `python examples/fetch_demo.py`; else mend model.name_or_path.",
        )
    return _fetch(section, patterns)


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
    if (folder / INDEX_NAME).is_file():
        return all((folder / name).is_file() for name in indexed_files(folder))
    return any(folder.glob("*.safetensors"))


def indexed_files(folder: Path) -> list[str]:
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
