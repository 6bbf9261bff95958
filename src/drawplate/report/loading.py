"""The lines of Python that load an adapter with transformers and PEFT, given in the folder that holds it.

tests/run/test_deployed.py runs them. Names from outside appear as string literals alone.
"""

from __future__ import annotations

from drawplate.records import AdapterFacts, RunRecord
from drawplate.report.visible import visible

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_FOUR_BITS = ("nf4", "fp4")
_SAFETENSORS = "base_in_safetensors"


def packages(record: RunRecord, adapter: AdapterFacts) -> list[str]:
    """What has to be installed beside transformers."""
    return [
        "peft",
        *(["gguf"] if record.model.gguf_file else []),
        *(["bitsandbytes"] if _four_bits(record, adapter) or record.model.stored_precision else []),
    ]


def loading_code(record: RunRecord, adapter: AdapterFacts, base: str, *, hub: bool) -> str:
    """The lines; `base` is a repository's name, or where the reader's own folder is to be put in."""
    four_bits, gguf_file = _four_bits(record, adapter), record.model.gguf_file
    kind = _kind(record)
    imported = ", ".join(sorted([kind, "AutoTokenizer", *(["BitsAndBytesConfig"] if four_bits else [])]))
    arguments = ["base_model"]
    if record.model.revision:
        arguments.append(f"revision={visible(record.model.revision)!r}")
    if dtype := _DTYPES.get(record.evaluation.unquantized_precision or record.model.precision):
        arguments.append(f'dtype="{dtype}"')
    lines = [
        *(["import transformers"] if gguf_file else []),
        "from peft import PeftModel",
        f"from transformers import {imported}",
        "",
        f"base_model = {visible(base)!r}" + ("" if hub else "  # the base model's folder"),
        'adapter = "."  # this folder',
        *(_from_gguf(gguf_file, kind, arguments) if gguf_file else []),
        *(_in_four_bits(record, kind, arguments) if four_bits else []),
    ]
    if not gguf_file and not four_bits:
        lines.append(_loaded(kind, arguments))
    return "\n".join(
        [
            *lines,
            "model = PeftModel.from_pretrained(base, adapter)",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        ]
    )


def _four_bits(record: RunRecord, adapter: AdapterFacts) -> bool:
    """The adapter holds for weights that transformers has to quantize, and for no others."""
    return adapter.base_precision in _FOUR_BITS and not adapter.deployed and not record.model.stored_precision


def _kind(record: RunRecord) -> str:
    """The class to load: of a model for text and images the one that the checkpoint names, as the adapter is for it."""
    named = record.model.architecture
    return named if named.isidentifier() and named.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"


def _loaded(kind: str, arguments: list[str]) -> str:
    return f"base = {kind}.from_pretrained({', '.join(arguments)})"


def _from_gguf(gguf_file: str, kind: str, arguments: list[str]) -> list[str]:
    return [
        f"gguf = {{'gguf_file': {visible(gguf_file)!r}}}",
        'if hasattr(transformers, "GgufConfig"):  # from transformers 5.20 on the weights stay packed otherwise',
        '    gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)',
        _loaded(kind, [*arguments, "**gguf"]),
    ]


def _in_four_bits(record: RunRecord, kind: str, arguments: list[str]) -> list[str]:
    asked = record.recipe.get("quantization", {}).get("bnb_4bit_use_double_quant", "auto")
    compute_dtype = record.plan.compute_dtype if record.plan else "bfloat16"
    data_type = f'bnb_4bit_quant_type="{record.model.precision}", bnb_4bit_use_double_quant={asked is not False}'
    config = "quantization_config=four_bits"
    lines = [
        "four_bits = BitsAndBytesConfig(",
        f'    load_in_4bit=True, {data_type}, bnb_4bit_compute_dtype="{compute_dtype}"',
        ")",
    ]
    if not record.model.gguf_file:
        return [*lines, _loaded(kind, [*arguments, config])]
    saved = [f'"{_SAFETENSORS}"', *(a for a in arguments if a.startswith("dtype")), config]
    return [
        f'base.save_pretrained("{_SAFETENSORS}")  # transformers quantizes no GGUF file to 4 bits',
        *lines,
        _loaded(kind, saved),
    ]
