"""Beside an adapter: which base weights it was trained on, which PEFT's files have no place for.

`base.json`: the base's name, the sha256 of its files and the precision it was kept in; and whether the adapter starts
from what that precision loses, so that it belongs to no other (model/load/lora_init.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drawplate.model.base.weights import Checkpoint

BASE_NAME = "base.json"
EARLIER_NAME = "base_precision.json"
SHOWN = 12
"""Digits of a hash that tell two apart on a screen."""


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The base that an adapter was trained on; empty where nobody knows.

    Attributes:
        name: what it was called.
        sha256: of its weight files (`Checkpoint.sha256`).
        precision: that its linear weights were kept in.
        bound: the adapter belongs to weights in that precision alone.
    """

    name: str = ""
    sha256: str = ""
    precision: str = ""
    bound: bool = False

    @property
    def needed_precision(self) -> str | None:
        """The precision that the base must have; None where any will do."""
        return self.precision if self.bound and self.precision else None


def write_base(folder: Path, base: AdapterBase) -> None:
    """Keep it beside the adapter in that folder."""
    (folder / BASE_NAME).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")


def base_of(folder: Path) -> AdapterBase:
    """What is known beside an adapter; of Drawplate's earlier versions that is the precision alone."""
    values = _read(folder / BASE_NAME)
    if values:
        texts = {key: str(values.get(key) or "") for key in ("name", "sha256", "precision")}
        return AdapterBase(**texts, bound=values.get("bound") is True)
    precision = str(_read(folder / EARLIER_NAME).get("base_precision") or "")
    return AdapterBase(precision=precision, bound=bool(precision))


def other_base(
    adapter: str, base: AdapterBase, named: str | None, checkpoint: Checkpoint, also: Collection[str]
) -> str:
    """What to tell where an adapter is put on other weights than it was trained on; empty where nobody can say so.

    Args:
        adapter: what it is called.
        base: what is known beside it.
        named: the base that its adapter_config.json names.
        checkpoint: the weights it is put on.
        also: other names of those.
    """
    if base.sha256:
        own = checkpoint.sha256()
        if base.sha256 == own:
            return ""
        was, now = f"{base.name} (sha256 {base.sha256[:SHOWN]})", f"{checkpoint.name} (sha256 {own[:SHOWN]})"
    else:
        if not named or _is_same(named, {checkpoint.name, checkpoint.loadable_name, *also}, checkpoint.folder):
            return ""
        was, now = named, checkpoint.name
    return f"The adapter {adapter} was trained on {was} and is used on {now}: with other weights its effect is another."


def other_precision(adapter: str, base: AdapterBase, precision: str) -> str:
    """What to tell where the weights are kept in another precision than the adapter was trained on; else empty."""
    if not base.precision or base.bound or base.precision == precision:
        return ""
    return (
        f"The adapter {adapter} was trained on weights in {base.precision} and is measured on weights in {precision}."
    )


def _is_same(named: str, names: Collection[str], folder: Path) -> bool:
    """Whether it is one of the names, that folder, or the folder's copy of a hub repository by its last name."""
    path = Path(named)
    of_hub = not path.is_absolute() and not path.exists() and named.count("/") == 1
    return named in names or path.resolve() == folder.resolve() or (of_hub and path.name == folder.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
