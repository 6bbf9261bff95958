"""adapter_config.json -> PEFT's LoraConfig, where Drawplate computes what PEFT would; else an error names the key.

Every key of the file is one of three: honoured here; known to change nothing in what an adapter computes; or refused
unless it says "off" (null, false, empty), which a later PEFT's keys are too. An adapter whose start changed the base
model (PiSSA and its kin) belongs to a changed base, which the files do not hold.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

from drawplate.errors import IntegrityError, UsageError, reason_of

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
HONOURED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
KEPT = (*HONOURED, "task_type", "base_model_name_or_path", "revision", "inference_mode")
WITHOUT_EFFECT = (
    *("peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "init_lora_weights",
        "runtime_config",
        "megatron_core",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
)
"""Names and facts; what only a start or a feature reads that has a key of its own; what PEFT ignores for nn.Linear."""
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model as it is; what they start from is in the tensors."""
MEANINGS = {
    "use_dora": "a direction and a length for each column (DoRA)",
    "modules_to_save": "whole modules that were trained too",
    "alora_invocation_tokens": "an adapter that only some tokens switch on (activated LoRA)",
    "trainable_token_indices": "rows of the embedding that were trained too",
    "target_parameters": "adapters on parameters that are no linear layer's weight",
    "layer_replication": "layers that are repeated",
    "lora_bias": "a bias beside B",
    "use_qalora": "inputs that are averaged in groups (QA-LoRA)",
}


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of an adapter's folder.

    Raises:
        UsageError: there is none, or a key asks for something that Drawplate does not compute.
        IntegrityError: the file is damaged, or of another kind of adapter.
    """
    values = _values_of(folder)
    if values.get("peft_type") != "LORA":
        raise IntegrityError(
            f"{folder} holds a {values.get('peft_type')} adapter, not LoRA.", next_step="Use a LoRA adapter."
        )
    _require_numbers(folder, values)
    _require_known_start(folder, values.get("init_lora_weights", True))
    for key, value in sorted(values.items()):
        if key not in (*HONOURED, *WITHOUT_EFFECT) and not _is_off(value):
            raise _refused(folder, key, value)
    if not values.get("target_modules"):
        raise _refused(folder, "target_modules", values.get("target_modules"))
    try:
        return LoraConfig(**{key: values[key] for key in KEPT if key in values})
    except (TypeError, ValueError, ImportError) as error:
        raise _damaged(folder, f"PEFT does not take its values ({reason_of(error)})") from None


def ranks_of(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of the layer of that full name: those of the first pattern that matches it, else the usual."""
    rank, alpha = (
        next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), usual)
        for pattern, usual in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    return int(rank), float(alpha)


def scaling_of(config: LoraConfig, name: str = "") -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation (Kalajdzievski 2023), of the layer of that name."""
    rank, alpha = ranks_of(config, name)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _values_of(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        below = sorted(found.parent for found in folder.glob(f"*/{CONFIG_NAME}"))
        beside = " One of its folders does." if len(below) == 1 else f" {len(below)} of its folders do."
        raise UsageError(
            f"{folder} holds no adapter." + (beside if below else ""),
            safe="Nothing was loaded or written.",
            next_step=f"Name {' or '.join(map(str, below[:3]))}."
            if below
            else f"Name a folder with {CONFIG_NAME} in it.",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _damaged(folder, f"it is no JSON ({reason_of(error)})") from None
    if not isinstance(values, dict):
        raise _damaged(folder, f"it holds a {type(values).__name__} where an object with keys was expected")
    return values


def _damaged(folder: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{folder / CONFIG_NAME} cannot be read: {why}.",
        safe="Nothing was loaded or written.",
        next_step="Save or fetch the adapter again.",
    )


def _require_numbers(folder: Path, values: dict[str, Any]) -> None:
    """Rank and alpha, for all and by pattern, are what one can divide by."""
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise _damaged(folder, "rank_pattern and alpha_pattern map names to numbers")
    for key, rank in {"r": values.get("r", 8), **{f"rank_pattern {k}": v for k, v in ranks.items()}}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise _damaged(folder, f"{key} is {rank!r}, and a rank is a whole number above 0")
    numbers = {"lora_alpha": values.get("lora_alpha", 8), **{f"alpha_pattern {k}": v for k, v in alphas.items()}}
    for key, alpha in numbers.items():
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise _damaged(folder, f"{key} is {alpha!r}, and not a number")
    patterns = [values.get(key) for key in ("target_modules", "exclude_modules")]
    for pattern in (*ranks, *alphas, *(p for p in patterns if isinstance(p, str))):
        try:
            re.compile(pattern)
        except re.error as error:
            raise _damaged(folder, f"{pattern!r} is no regular expression ({error})") from None


def _require_known_start(folder: Path, start: Any) -> None:
    if start in STARTS:
        return
    raise UsageError(
        f"The adapter {folder} started from init_lora_weights: {start}, which changes the base model's own weights;"
        " those that it belongs to are in none of its files.",
        safe="Nothing was loaded or written.",
        next_step="Convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...), or"
        " merge it and measure the merged model.",
    )


def _refused(folder: Path, key: str, value: Any) -> UsageError:
    shown = json.dumps(value, default=str)
    meaning = MEANINGS.get(
        key, "" if key in LoraConfig.__dataclass_fields__ else "a key that this version does not know"
    )
    return UsageError(
        f"The adapter {folder} asks for {key}: {shown[:60]}{'...' if len(shown) > 60 else ''}"
        + (f", {meaning}" if meaning else "")
        + "; Drawplate does not compute that, and without it the numbers would be another adapter's.",
        safe="Nothing was loaded or written.",
        next_step="Merge it with PEFT (merge_and_unload, save_pretrained) and measure the merged model.",
    )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})
