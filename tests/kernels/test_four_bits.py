"""The dequantizing kernel gives bitsandbytes' numbers bit for bit."""

from __future__ import annotations

import pytest
import torch

from drawplate.kernels.four_bits import dequantize
from drawplate.model.base.precision import Storage

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (130, 192), (300, 257)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_is_bitsandbytes_bit_for_bit(quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    storage = Storage(quant_type)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    encoded = storage.encode(weight)
    stored = [encoded[name] for name in storage.specs(*shape)]
    ours, theirs = (dequantize(stored, quant_type, shape, dtype, impl) for impl in ("triton", "torch"))
    assert torch.equal(ours, theirs)
