"""A layer's footprint without data is what the real layer holds, and can be had for every architecture."""

from __future__ import annotations

from itertools import product

import pytest
from transformers import AutoConfig

from drawplate.footprints import Mode, Trace
from drawplate.model.adapter import lora_config
from drawplate.model.anatomy import Anatomy, build_anatomy
from drawplate.model.footprint import layer_shapes, outer_footprints
from drawplate.recipe import LoraSection
from tests.model.conftest import ARCHITECTURES, COMMON


def anatomy_of(name: str) -> Anatomy:
    return build_anatomy(AutoConfig.for_model(name.partition("-")[0], **{**COMMON, **ARCHITECTURES[name]}))


def held(trace: Trace, tokens: int, blocks: dict[str, int] | None = None) -> tuple[int, dict[str, int]]:
    """(peak, blocks at the end); a block may only go once and only if it came."""
    blocks = dict(blocks or {})
    peak = sum(blocks.values())
    for name, line in trace:
        if line is None:
            del blocks[name]
            continue
        assert name not in blocks
        blocks[name] = line.bytes(tokens)
        peak = max(peak, sum(blocks.values()))
    return peak, blocks


MODES = [
    Mode("cuda", "bfloat16", True, "", False, True, False),
    Mode("cuda", "bfloat16", True, "nf4", True, False, True),
    Mode("cuda", "bfloat16", False, "int8", False, True, True),
    Mode("cpu", "float32", False, "", False, True, True),
]


@pytest.mark.parametrize(("name", "mode"), list(product(["llama", "qwen3", "gemma2", "phi", "olmo2"], MODES)))
def test_every_architecture_has_a_footprint(name: str, mode: Mode) -> None:
    anatomy = anatomy_of(name)
    section = LoraSection(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    kinds, of_layer = layer_shapes(anatomy, lora_config(section, anatomy, "x", None))
    assert len(of_layer) == len(anatomy.layers)
    assert set(of_layer) == set(range(len(kinds)))
    output = 512 * anatomy.config.hidden_size * (4 if mode.device == "cpu" else 2)
    for part in (kinds[0].footprints[mode], outer_footprints(anatomy)[1][mode]):
        _, left = held(part.inference, 512)
        assert left == {"out": output}
        _, saved = held(part.forward, 512)
        assert saved["out"] == output
        _, left = held(part.backward, 512, saved)
        assert left["grad_in"] == output
    names = {name for name, _ in kinds[0].footprints[mode].backward}
    assert {f"grad:{i}" for i in range(len(kinds[0].trained))} <= names


def test_packed_weights_add_their_dequantized_copy_while_they_are_needed() -> None:
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    peaks = {
        mode: held(kinds[0].footprints[mode].inference, 1)[0]
        for mode in (Mode("cuda", "bfloat16", True, stored, whole, False, False) for stored, whole in STORED)
    }
    plain, by_weight, whole = peaks.values()
    weights = sum(2 * x.out_features * x.in_features for x in kinds[0].linears)
    assert plain < by_weight < whole
    assert weights <= whole - plain < 1.2 * weights


STORED = [("", False), ("nf4", False), ("nf4", True)]
