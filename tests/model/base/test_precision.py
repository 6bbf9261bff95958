"""Stored weights: their bytes, and bitsandbytes' own numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Int8Params
from torch import Tensor, nn

from drawplate.errors import EnvironmentProblem, UsageError
from drawplate.kernels.fp8_rows import fp8_rows
from drawplate.model.base.precision import Storage
from drawplate.model.load.assemble import require_fp8_units
from drawplate.model.placement import Placement
from drawplate.planner.shape import stored_bits
from tests.tiny import a_weight

FOUR_BITS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
SHAPES = [(64, 64), (96, 160), (7, 33), (512, 1024)]
PRECISIONS = [
    *FOUR_BITS,
    ("int8", True),
    ("fp8", True),
    ("fp8_both", True),
    ("bf16", True),
    ("fp16", True),
    ("fp32", True),
]


def bytes_of(stored: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(("precision", "double_quant"), FOUR_BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bit_tensors_are_those_of_bitsandbytes_bit_for_bit(
    precision: str, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, storage = a_weight(shape, dtype), Storage(precision, double_quant)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=precision, compress_statistics=double_quant, quant_storage=torch.uint8
    )
    stored = storage.encode(weight)
    assert torch.equal(stored["packed"], packed)
    assert torch.equal(stored["absmax"], state.absmax)
    if double_quant:
        assert torch.equal(stored["absmax_scale"], state.state2.absmax)
        assert torch.equal(stored["absmax_offset"], state.offset)
    decoded = storage.decode([stored[name] for name in storage.specs(*shape)], shape, dtype)
    assert torch.equal(decoded, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("precision", "double_quant"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_gives_what_the_specification_says(precision: str, double_quant: bool, shape: tuple[int, int]) -> None:
    storage = Storage(precision, double_quant)
    stored = storage.encode(a_weight(shape))
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == storage.specs(*shape)


@pytest.mark.parametrize(("precision", "double_quant"), PRECISIONS)
def test_stored_bytes_are_those_of_the_formula(precision: str, double_quant: bool) -> None:
    count = 1024 * 2048
    stored = bytes_of(Storage(precision, double_quant).encode(a_weight((1024, 2048))))
    formula = {
        ("nf4", True): count / 2 + count / 64 + 4 * count / 64 / 256 + 4,
        ("nf4", False): count / 2 + 4 * count / 64,
        ("fp4", True): count / 2 + count / 64 + 4 * count / 64 / 256 + 4,
        ("fp4", False): count / 2 + 4 * count / 64,
        ("int8", True): count + 4 * 1024,
        ("fp8", True): count + 4 * 1024,
        ("fp8_both", True): 2 * count + 4 * 1024,
        ("bf16", True): 2 * count,
        ("fp16", True): 2 * count,
        ("fp32", True): 4 * count,
    }[precision, double_quant]
    assert stored == formula
    if precision != "fp8_both":  # no precision of a recipe
        assert stored == pytest.approx(count * stored_bits(precision, double_quant) / 8, rel=3e-3), "the ledger agrees"


def test_double_quantization_saves_the_bits_it_promises() -> None:
    plain, double = (bytes_of(Storage("nf4", d).encode(a_weight((1024, 2048)))) for d in (False, True))
    assert 8 * (plain - double) / (1024 * 2048) == pytest.approx(0.373, abs=1e-3)


def test_int8_is_the_storage_of_bitsandbytes() -> None:
    weight = a_weight((96, 160), torch.float16)
    theirs = Int8Params(weight, requires_grad=False)
    values, scales, _ = bnb.int8_vectorwise_quant(theirs.data)
    stored = Storage("int8").encode(weight)
    assert torch.allclose(stored["row_scale"] * 127, scales.float(), rtol=1e-3)
    assert int((stored["int8"].int() - values.int()).abs().max()) <= 1, "one step at most, where fp16 rounds a half"


@pytest.mark.parametrize(
    ("precision", "largest_error"),
    [
        ("nf4", 0.16),
        ("fp4", 0.18),
        ("int8", 0.005),
        ("fp8", 0.037),
        ("fp8_both", 0.037),
        ("bf16", 0.004),
        ("fp32", 0.0),
    ],
)
def test_what_comes_back_is_near_what_went_in(precision: str, largest_error: float) -> None:
    weight, storage = a_weight((128, 256)), Storage(precision)
    stored = storage.encode(weight)
    back = storage.decode([stored[name] for name in storage.specs(128, 256)], (128, 256), torch.float32)
    assert float(((back - weight).abs() / weight.abs().amax(1, keepdim=True)).max()) <= largest_error


def test_a_row_of_zeros_stays_zeros() -> None:
    for precision, double_quant in PRECISIONS:
        storage, weight = Storage(precision, double_quant), torch.zeros(8, 64)
        stored = storage.encode(weight)
        back = storage.decode([stored[name] for name in storage.specs(8, 64)], (8, 64), torch.float32)
        assert back.abs().max() < 1e-6, precision


def test_fp8_rows_of_any_size_fill_the_range_of_e4m3() -> None:
    x = torch.tensor([[1e-20, -2e-20], [3e4, 30.0], [0.0, 0.0], [float("nan"), 1.0]])
    rounded, scale = fp8_rows(x)
    assert rounded[:2].float().abs().amax(1).tolist() == [448.0, 448.0]
    assert torch.allclose(rounded[:3].float() * scale[:3], x[:3], rtol=2**-4)
    assert (rounded[3].float() * scale[3]).isnan().all(), "not hidden"


@pytest.mark.parametrize(
    ("capability", "features", "dtype", "refusal"),
    [
        ((8, 9), 64, torch.bfloat16, None),
        ((9, 0), 64, torch.float32, None),
        ((8, 6), 64, torch.bfloat16, (EnvironmentProblem, "no fp8 units")),
        ((9, 0), 40, torch.bfloat16, (UsageError, "sizes that 16 divides")),
        ((9, 0), 64, torch.float16, (UsageError, "float16")),
    ],
)
def test_fp8_is_refused_where_a_gpu_cannot_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], features: int, dtype: torch.dtype, refusal: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    placement = Placement(device=torch.device("cuda", 0), storage=Storage("fp8"), compute_dtype=dtype)
    anatomy: Any = SimpleNamespace(layers=[nn.Sequential(nn.Linear(features, 32))])
    if refusal is None:
        require_fp8_units(placement, anatomy)
        return
    with pytest.raises(refusal[0], match=refusal[1]):
        require_fp8_units(placement, anatomy)
