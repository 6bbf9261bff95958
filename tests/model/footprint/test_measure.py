"""A layer's footprint without data is what the real layer holds, and can be had for every architecture."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import fx
from transformers import AutoConfig

from drawplate.layout.footprint import INPUT, TRIAL, WEIGHT, Mode, Trace
from drawplate.model.footprint import body as body_footprint
from drawplate.model.footprint import recorder, trial
from drawplate.model.footprint.compiled_kernels import kernels_of
from drawplate.model.footprint.compiled_nodes import same_places
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
        _, left = held(part.backward, 512, {**saved, "grad_out": output})
        assert left["grad_in"] == output
    names = {name for name, _ in kinds[0].footprints[mode].backward}
    assert {f"grad:{i}" for i in range(len(kinds[0].trained))} <= names


@pytest.mark.parametrize("mode", [mode._replace(compiled=False) for mode in MODES[2:]])
def test_layers_that_read_what_earlier_ones_left_have_a_footprint(mode: Mode) -> None:
    """Gemma 4 E2B: the last layers take keys and values of earlier ones, and each layer has rows of a table."""
    anatomy = build_anatomy(AutoConfig.for_model("gemma4_text", **COMMON, **GEMMA_4))
    kinds, of_layer = layer_shapes(anatomy, lora_config(LORA, anatomy, "x", None))
    assert of_layer[2] not in of_layer[:2]
    for index in (of_layer[2], of_layer[3]):
        _, saved = held(kinds[index].footprints[mode].forward, 512)
        assert saved["out"] == 512 * anatomy.config.hidden_size * (4 if mode.device == "cpu" else 2)
    opening = outer_footprints(anatomy)[0][mode]
    _, left = held(opening.inference, 512)
    rows = 512 * len(anatomy.layers) * GEMMA_4["hidden_size_per_layer_input"] * (4 if mode.device == "cpu" else 2)
    assert list(left.values()).count(rows) >= 2, "rows of the table, and what the body makes of them"


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_layer_that_is_given_an_object_is_compiled_on_paper(mode: Mode) -> None:
    """Every Gemma 4: a dict of a class of its own, which stays empty where no keys are shared."""
    alone = {**GEMMA_4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    anatomy = build_anatomy(AutoConfig.for_model("gemma4_text", **COMMON, **alone))
    kinds, _ = layer_shapes(anatomy, lora_config(LORA, anatomy, "x", None))
    _, saved = held(kinds[0].footprints[mode].forward, 512)
    assert saved["out"] == 512 * anatomy.config.hidden_size * 2


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
        assert held(kind.footprints[Mode("cpu", "float32", False, "", False, False, False)].forward, 32)[0] > 0


def test_what_bitsandbytes_keeps_between_calls_is_made_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    assert kinds[0].footprints[Mode("cpu", "float32", False, "nf4", False, False, False)].forward


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
    assert weights <= whole - plain < 1.25 * weights


def test_an_adapters_output_has_no_block_beside_the_product_that_is_summed_onto_it() -> None:
    anatomy = anatomy_of("llama")
    section = LoraSection(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    kinds, _ = layer_shapes(anatomy, lora_config(section, anatomy, "x", None))
    footprint = kinds[0].footprints[Mode("cuda", "bfloat16", True, "", False, True, False)]
    wide = 2 * anatomy.config.intermediate_size
    held_now, most, copies = set[str](), 0, []
    for name, line in footprint.forward:
        if name.startswith(TRIAL):
            copies.append(line.per_token if line else 0)
            continue
        if line is None:
            held_now.discard(name)
        elif line.per_token == wide:
            held_now.add(name)
        most = max(most, len(held_now))
    assert most == 3, "gate, up, and what goes into the last product"
    assert copies.count(wide) == 0, "no kernel writes over gate or up"


def test_what_a_compiled_layer_saves_is_in_the_order_in_which_it_was_made_attentions_output_too() -> None:
    """As torch 2.11 sent it to host memory on an H100; the graph here returns an alias of attention's output last."""
    kinds, _ = layer_shapes(anatomy := anatomy_of("llama"), lora_config(LORA, anatomy, "x", None))
    footprint = kinds[0].footprints[Mode("cuda", "bfloat16", True, "nf4", False, True, False)]
    assert footprint.saved[0] == INPUT
    hidden = 2 * anatomy.config.hidden_size
    wide = [name for name, line in footprint.forward if line and line.per_token >= hidden / 2]
    saved = [name for name in footprint.saved if name in wide]
    assert len(saved) >= 7, "queries, keys, values, attention's output, the next norm's input, gate and up"
    assert saved == sorted(saved, key=wide.index)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_saved_is_what_is_left_of_a_forward(compiled: bool) -> None:
    kinds, _ = layer_shapes(anatomy := anatomy_of("llama"), lora_config(LORA, anatomy, "x", None))
    footprint = kinds[0].footprints[Mode("cuda", "bfloat16", compiled, "nf4", False, True, False)]
    assert {*footprint.saved} - {INPUT, "out"} == held(footprint.forward, 512)[1].keys() - {"out"}
    assert (INPUT in footprint.saved) == footprint.keeps_input


def test_adapted_products_dequantize_one_weight_after_another() -> None:
    kinds, _ = layer_shapes(anatomy := anatomy_of("llama"), lora_config(LORA, anatomy, "x", None))
    forward = kinds[0].footprints[Mode("cuda", "bfloat16", True, "nf4", False, True, False)].forward
    sizes = [2 * linear.out_features * linear.in_features for linear in kinds[0].linears]
    weights = [(name, line.fixed) for name, line in forward if line and line.fixed in sizes]
    assert sorted(size for _, size in weights) == sorted(sizes)
    places = [i for i, (name, _) in enumerate(forward) if name == weights[0][0]]
    assert places[1] == places[0] + 1, "gone before there is room for the next product"
    assert [name.startswith(WEIGHT) for name, _ in weights].count(True) == 5, "those that come before their products"


def test_rotated_queries_are_not_written_over_what_they_are_made_of() -> None:
    graph = fx.Graph()
    places = torch.empty(4, 8, device="meta")
    x, y = graph.placeholder("x"), graph.placeholder("y")
    straight = graph.call_function(torch.ops.aten.add.Tensor, (x, y))
    turned = graph.call_function(torch.ops.aten.permute.default, (straight, [1, 0]))
    again = graph.call_function(torch.ops.aten.neg.default, (turned,))
    half = graph.call_function(torch.ops.aten.slice.Tensor, (straight, 1, 4, 8))
    rotated = graph.call_function(torch.ops.aten.cat.default, ([half, half], 1))
    for node, value in ((x, places), (y, places), (straight, places), (rotated, places)):
        node.meta["val"] = value
    turned.meta["val"], half.meta["val"] = places.t(), places[:, 4:]
    again.meta["val"] = torch.empty(8, 4, device="meta")
    assert same_places(x, straight, {x, y})
    assert not same_places(x, again, {x, y}), "in another order"
    assert not same_places(x, rotated, {x, y}), "an element of another place"
    again.meta["val"] = torch.empty(4, 8, device="meta").t()
    assert same_places(x, again, {x, y}), "the same order after all"


def test_which_models_have_packed_documents_attended_to_one_by_one() -> None:
    assert [anatomy_of(name).one_by_one for name in ("llama", "qwen3", "gemma2", "phi")] == [False, False, True, False]


STORED = [("", False), ("nf4", False), ("nf4", True)]


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", False), ("float32", True)])
def test_an_uncompiled_layer_keeps_its_input_only_where_a_norm_needs_no_copy_of_it(dtype: str, kept: bool) -> None:
    """A norm computes in float32, and autograd keeps what it computes with."""
    anatomy = anatomy_of("llama")
    kinds, _ = layer_shapes(anatomy, lora_config(LoraSection(r=4, lora_alpha=8), anatomy, "x", None))
    assert kinds[0].footprints[Mode("cuda", dtype, False, "", False, False, False)].keeps_input == kept


@pytest.mark.parametrize("waits", [False, True])
def test_launches_that_read_the_same_go_together_whatever_lies_between(waits: bool) -> None:
    """As torch 2.11 compiles a recomputed layer's backward on an H100: gate times up is made with their gradients,
    although an adapter's gradient that reads it comes before those in the graph."""
    graph, value = fx.Graph(), torch.empty(8, 8, device="meta")
    mul, mm = torch.ops.aten.mul.Tensor, torch.ops.aten.mm.default
    gate, other = graph.placeholder("gate"), graph.placeholder("other")
    early = graph.call_function(mul, (gate, gate))
    reader = graph.call_function(mm, (early, other))
    beside = graph.call_function(mm, (other, other))
    late = graph.call_function(mul, (gate, reader if waits else beside))
    ends = [graph.call_function(mm, (late, other)), reader, beside]
    for node in graph.nodes:
        node.meta["val"] = value
    kernels = kernels_of(list(graph.nodes), set(ends))
    together = [set(kernel.writes) for kernel in kernels if kernel.generated]
    assert together == ([{early}, {late}] if waits else [{early, late}])
    for i, kernel in enumerate(kernels):
        assert not kernel.reads & {node for later in kernels[i:] for node in later.writes}
