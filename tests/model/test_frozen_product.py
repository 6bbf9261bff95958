"""The product with a stored weight: opaque to a compiler, and on fp8 units, it gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from drawplate.model.frozen_product import frozen_product
from drawplate.model.storage import FP8_KINDS, Storage
from tests.tiny import a_weight


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 48, 300])
@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8_units_multiply_what_the_cpu_multiplies(kind: str, tokens: int) -> None:
    storage = Storage(kind)
    encoded = storage.encode(a_weight((512, 1024)))
    stored = [encoded[name] for name in storage.specs(512, 1024)]
    for transposed, size in ((False, 1024), (True, 512)):
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(5)).bfloat16()
        here = frozen_product(x, stored, storage, (512, 1024), transposed)
        there = frozen_product(x.cuda(), [t.cuda() for t in stored], storage, (512, 1024), transposed).cpu()
        assert float((here.float() - there.float()).norm() / here.float().norm()) < 4e-3, "bf16's own rounding"


@pytest.mark.parametrize(("precision", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_the_compilers_opaque_product_is_the_same(precision: str, double_quant: bool) -> None:
    storage, x = Storage(precision, double_quant), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(9))
    encoded = storage.encode(a_weight((96, 64)))
    stored = [encoded[name] for name in storage.specs(96, 64)]
    opaque = torch.ops.drawplate.frozen_product
    assert torch.equal(
        opaque(x, stored, precision, double_quant, [96, 64], False), frozen_product(x, stored, storage, (96, 64), False)
    )
    y = x @ torch.ones(64, 96)
    assert torch.equal(
        opaque(y, stored, precision, double_quant, [96, 64], True), frozen_product(y, stored, storage, (96, 64), True)
    )
