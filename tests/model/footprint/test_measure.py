"""A layer's footprint without data is what the real layer holds, and can be had for every architecture."""

from __future__ import annotations

from itertools import product

import pytest
from transformers import AutoConfig

from drawplate.layout.footprint import INPUT, Footprint, Mode, Trace
from drawplate.model.footprint import body as body_footprint
from drawplate.model.footprint import recorder, trial
from drawplate.model.footprint.measure import layer_shapes, outer_footprints
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.model.support.targets import lora_config
from drawplate.model.support.walk import walk
from drawplate.recipe import LoraSection
from tests.model.conftest import ARCHITECTURES, COMMON
from tests.model.support.test_walk import GEMMA_4


def anatomy_of(name: str) -> Anatomy:
    return build_anatomy(AutoConfig.for_model(name.partition("-")[0], **{**COMMON, **ARCHITECTURES[name]}))


LORA = LoraSection(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


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
    Mode("cuda", "bfloat16", False, "int8", False, True, True),
    Mode("cpu", "float32", False, "", False, True, True),
]


def footprints_of(kinds: object, mode: Mode, use: str = "kept") -> tuple[Footprint, Footprint]:
    """(without gradients, in training) of the first kind of layer."""
    footprints = kinds[0].footprints  # type: ignore[index]
    return footprints[mode], footprints[mode._replace(use=use)]


@pytest.mark.parametrize(("name", "mode"), list(product(["llama", "qwen3", "gemma2", "phi", "olmo2"], MODES)))
def test_every_architecture_has_a_footprint(name: str, mode: Mode) -> None:
    anatomy = anatomy_of(name)
    section = LoraSection(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    kinds, of_layer = layer_shapes(anatomy, lora_config(section, anatomy, "x", None))
    assert len(of_layer) == len(anatomy.layers)
    assert set(of_layer) == set(range(len(kinds)))
    output = 512 * anatomy.config.hidden_size * (4 if mode.device == "cpu" else 2)
    closing = outer_footprints(anatomy)[1][mode]
    for inferred, trained in (footprints_of(kinds, mode), (closing, closing)):
        _, left = held(inferred.inference, 512)
        assert left == {"out": output}
        _, saved = held(trained.forward, 512)
        assert saved["out"] == output
        _, left = held(trained.backward, 512, {**saved, "grad_out": output})
        assert left["grad_in"] == output
    for use in ("kept", "again"):
        names = {name for name, _ in footprints_of(kinds, mode, use)[1].backward}
        assert {f"grad:{i}" for i in range(len(kinds[0].trained))} <= names


@pytest.mark.parametrize("mode", [mode._replace(compiled=False) for mode in MODES[1:]])
def test_layers_that_read_what_earlier_ones_left_have_a_footprint(mode: Mode) -> None:
    """Gemma 4 E2B: the last layers take keys and values of earlier ones, and each layer has rows of a table."""
    anatomy = build_anatomy(AutoConfig.for_model("gemma4_text", **COMMON, **GEMMA_4))
    kinds, of_layer = layer_shapes(anatomy, lora_config(LORA, anatomy, "x", None))
    assert of_layer[2] not in of_layer[:2]
    for index in (of_layer[2], of_layer[3]):
        _, saved = held(kinds[index].footprints[mode._replace(use="kept")].forward, 512)
        assert saved["out"] == 512 * anatomy.config.hidden_size * (4 if mode.device == "cpu" else 2)
    opening = outer_footprints(anatomy)[0][mode]
    _, left = held(opening.inference, 512)
    rows = 512 * len(anatomy.layers) * GEMMA_4["hidden_size_per_layer_input"] * (4 if mode.device == "cpu" else 2)
    assert list(left.values()).count(rows) >= 2, "rows of the table, and what the body makes of them"


UNUSUAL = {
    "bamba": {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "num_key_value_heads": 4},
    "mamba": {},
}
"""Layers that return more than hidden states, keep a state beside their parameters, have an adapter without effect."""


@pytest.mark.parametrize("name", UNUSUAL)
def test_so_has_every_kind_of_layer_that_the_walk_lets_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (body_footprint, trial, recorder):
        monkeypatch.setattr(module, "TRACED_TOKENS", 32)  # without their kernels, recurrent layers go token by token
    anatomy = build_anatomy(AutoConfig.for_model(name, **{**COMMON, "num_hidden_layers": 2, **UNUSUAL[name]}))
    section = LoraSection(r=4, lora_alpha=8, target_modules=["dt_proj" if name == "mamba" else "down_proj"])
    if name != "mamba":
        assert walk(anatomy).unpackable, "as before a plan: whatever a layer keeps is there"
    kinds, of_layer = layer_shapes(anatomy, lora_config(section, anatomy, "x", None))
    assert len(of_layer) == 2
    for kind in kinds:
        assert held(kind.footprints[Mode("cpu", "float32", False, "", False, False, False, "kept")].forward, 32)[0] > 0


def test_what_bitsandbytes_keeps_between_calls_is_made_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    assert kinds[0].footprints[Mode("cpu", "float32", False, "nf4", False, False, False)].inference


def test_packed_weights_add_their_dequantized_copy_while_they_are_needed() -> None:
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    peaks = {
        mode: held(kinds[0].footprints[mode].inference, 1)[0]
        for mode in (Mode("cuda", "bfloat16", False, stored, whole, False, False) for stored, whole in STORED)
    }
    plain, by_weight, whole = peaks.values()
    weights = sum(2 * x.out_features * x.in_features for x in kinds[0].linears)
    assert plain < by_weight < whole
    assert weights <= whole - plain < 1.25 * weights


@pytest.mark.parametrize("use", ["kept", "again"])
def test_what_is_saved_is_what_is_left_of_a_forward(use: str) -> None:
    kinds, _ = layer_shapes(anatomy := anatomy_of("llama"), lora_config(LORA, anatomy, "x", None))
    _, footprint = footprints_of(kinds, Mode("cuda", "bfloat16", False, "nf4", False, True, False), use)
    assert {*footprint.saved} - {INPUT, "out"} == held(footprint.forward, 512)[1].keys() - {"out"}
    assert (INPUT in footprint.saved) == footprint.keeps_input


def test_a_layer_that_is_computed_again_leaves_out_what_its_backward_does_not_need() -> None:
    kinds, _ = layer_shapes(anatomy := anatomy_of("llama"), lora_config(LORA, anatomy, "x", None))
    mode = Mode("cuda", "bfloat16", False, "nf4", False, False, False)
    (unused,) = [linear for linear in kinds[0].linears if not linear.again]
    size = 2 * unused.out_features * unused.in_features
    traces = [footprints_of(kinds, mode, use)[1].forward for use in ("kept", "again")]
    dequantized = [sum(line is not None and line.fixed == size for _, line in trace) for trace in traces]
    assert dequantized == [3, 2], "gate, up, and a Llama's last product"


def test_which_models_have_packed_documents_attended_to_one_by_one() -> None:
    assert [anatomy_of(name).one_by_one for name in ("llama", "qwen3", "gemma2", "phi")] == [False, False, True, False]


STORED = [("", False), ("nf4", False), ("nf4", True)]


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", False), ("float32", True)])
def test_an_uncompiled_layer_keeps_its_input_only_where_a_norm_needs_no_copy_of_it(dtype: str, kept: bool) -> None:
    """A norm computes in float32, and autograd keeps what it computes with."""
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    assert kinds[0].footprints[Mode("cuda", dtype, False, "", False, False, False, "kept")].keeps_input == kept
