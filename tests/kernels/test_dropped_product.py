"""Products with a dropped input: kernels and twins against float64 with the same mask, odd shapes included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drawplate.kernels.dropped_product import down, dropout_mask, grad_A, up

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (70, 150, 8), (33, 257, 20), (130, 64, 64)]
DROPOUT = 0.3


def tensors(
    shape: tuple[int, int, int], dtype: torch.dtype, modules: int = 1
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(x_NI, and of each module grad_t_NR, A_RI in float32, key_N)"""
    tokens, features, rank = shape
    generator = torch.Generator().manual_seed(tokens)
    x_NI = torch.randn(tokens, features, generator=generator).to(DEVICE, dtype)
    ts = [torch.randn(tokens, rank, generator=generator).to(DEVICE, dtype) for _ in range(modules)]
    lora_As = [torch.randn(rank, features, generator=generator).to(DEVICE) for _ in range(modules)]
    keys = [
        torch.randint(-(2**31), 2**31, (tokens,), generator=generator).to(DEVICE, torch.int32) for _ in range(modules)
    ]
    return x_NI, ts, lora_As, keys


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / (expected.norm() + 1e-30))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],  # Triton's interpreter: no bf16
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_kernels_err_no_more_than_their_twins(modules: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_NI, ts, lora_As, keys = tensors(shape, dtype, modules)
    masks = [dropout_mask(key_N, shape[1], DROPOUT, torch.float64) for key_N in keys]
    dropped, exact = [x_NI.double() * mask for mask in masks], [A.to(dtype).double() for A in lora_As]
    grads = [t.double() for t in ts]
    cases = {
        "down": (
            lambda impl: down(x_NI, keys, lora_As, DROPOUT, impl),
            torch.stack([x @ A.t() for x, A in zip(dropped, exact, strict=True)]),
        ),
        "grad_A": (
            lambda impl: torch.stack(grad_A(ts, x_NI, keys, DROPOUT, impl)),
            torch.stack([t.t() @ x for t, x in zip(grads, dropped, strict=True)]),
        ),
        "up": (
            lambda impl: up(ts, lora_As, keys, DROPOUT, impl),
            sum(t @ A * mask for t, A, mask in zip(grads, exact, masks, strict=True)),
        ),
    }
    for name, (call, expected) in cases.items():
        kernel, twin = call("triton"), call("torch")
        assert kernel.shape == expected.shape, name
        assert relative(kernel, expected) <= 1.1 * relative(twin, expected) + 1e-6, name


def test_the_interpreters_mask_is_torchs_bit_for_bit() -> None:
    _, _, _, (key_N,) = tensors((130, 300, 1), torch.float32)
    ones_NR, ones_RI = torch.ones(130, 1, device=DEVICE), torch.ones(1, 300, device=DEVICE)
    for dropout in (0.01, 0.1, 0.5, 0.99):
        made = up([ones_NR], [ones_RI], [key_N], dropout, "triton")
        assert torch.equal(made > 0, dropout_mask(key_N, 300, dropout, torch.float32) > 0)


def test_compiled_code_keeps_x_and_no_mask_or_dropped_copy() -> None:
    from drawplate.kernels.dropped_product import dropped_down

    x_NI, _, lora_As, keys = tensors((70, 150, 8), torch.float32, 2)
    compiled = torch.compile(lambda x: dropped_down(x.sin(), keys, lora_As, DROPOUT), backend="aot_eager")
    assert torch.equal(compiled(x_NI), down(x_NI.sin(), keys, lora_As, DROPOUT))
