"""The product with a stored weight: opaque to a compiler, and on fp8 units, it gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from drawplate.model.base.precision import FP8_KINDS, Storage
from drawplate.model.layer.frozen_product import adapted_products, frozen_product
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


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_a_small_adapter_is_not_lost_in_the_rounding_of_the_product(precision: str) -> None:
    """Its output is a hundredth of a step of bf16's grid on which the products lie."""
    made = torch.Generator().manual_seed(0)
    storage, x_NI = Storage(precision), torch.randn(512, 64, generator=made).bfloat16()
    encoded = storage.encode(torch.randn(96, 64, generator=made).bfloat16())
    stored = [encoded[name] for name in storage.specs(96, 64)]
    t_GNR = torch.ones(1, 512, 4).bfloat16()
    B_OR = torch.full((96, 4), 1e-4).bfloat16()
    plain = frozen_product(x_NI, stored, storage, (96, 64), False)
    (adapted,) = adapted_products(x_NI, [stored], storage, t_GNR, [B_OR])
    after = plain + t_GNR[0] @ B_OR.t()
    gained, added_after = (float((y.double() - plain.double()).mean()) for y in (adapted, after))
    assert gained == pytest.approx(4e-4, rel=0.25)
    assert added_after < 1e-4, "the control: added to what is rounded already, most of it is lost"


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8", "fp8"])
def test_the_compilers_opaque_adapted_products_are_the_same(precision: str) -> None:
    storage, x = Storage(precision), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    stored = []
    for features in (96, 32):
        encoded = storage.encode(a_weight((features, 64), torch.bfloat16))
        stored.append([encoded[name] for name in storage.specs(features, 64)])
    t_GNR, lora_Bs = torch.randn(2, 6, 4).bfloat16(), [torch.randn(o, 4).bfloat16() for o in (96, 32)]
    opaque = torch.ops.drawplate.adapted_products(
        x, [part for parts in stored for part in parts], precision, storage.double_quant, t_GNR, lora_Bs
    )
    for y, want in zip(opaque, adapted_products(x, stored, storage, t_GNR, lora_Bs), strict=True):
        assert torch.equal(y, want)
    for y, parts, t_NR, B_OR in zip(opaque, stored, t_GNR, lora_Bs, strict=True):
        apart = frozen_product(x, parts, storage, (len(B_OR), 64), False).float()
        assert torch.allclose(y.float(), apart + (t_NR.float() @ B_OR.float().t()).view_as(y), rtol=2e-2, atol=5e-2)
