"""The command that is worth giving after a run, as a shell takes it: to measure what the run left."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from drawplate.records import AdapterFacts, RunRecord
from drawplate.report.comparisons import adapters, deployed_first, purpose


@dataclass(frozen=True, kw_only=True)
class NextCommand:
    """A command worth giving next: what it measures, and its parts, each of which belongs on one line."""

    what: str
    parts: tuple[str, ...]


def next_commands(record: RunRecord, folder: str) -> list[NextCommand]:
    """To measure each adapter on its base model, the verdict's own first; nothing where there is none."""
    return [
        NextCommand(what=purpose(record, adapter), parts=tuple(eval_command(record, folder, adapter)))
        for adapter in deployed_first(record)
    ]


BASE_KEYS = ("gguf_file", "revision", "device_map")


def eval_command(record: RunRecord, folder: str, adapter: AdapterFacts) -> list[str]:
    """To measure an adapter on documents of one's own, on its base as the recipe names and keeps it.

    Of two adapters each fixes the precision that it is for.
    """
    model, path = shlex.quote(record.model.name), shlex.quote(f"{folder.rstrip('/')}/{adapter.folder}")
    parts = ["drawplate eval", f"--model {model}", f"--adapter {path}"]
    own = {"precision": adapter.base_precision}
    kept = own if len(adapters(record)) > 1 else record.recipe.get("quantization", {})
    settings = {f"model.{key}": record.recipe.get("model", {}).get(key) for key in BASE_KEYS}
    settings |= {f"quantization.{key}": value for key, value in kept.items()}
    parts += [
        f"--set {shlex.quote(f'{key}={str(value).lower() if isinstance(value, bool) else value}')}"
        for key, value in settings.items()
        if value not in ("auto", "", None) and (key, value) != ("quantization.bnb_4bit_quant_type", "nf4")
    ]
    return [*parts, "--data YOUR_DOCUMENTS"]
