"""A frozen layer: gradients to everything but the weight, which is read through the hooks and never kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from drawplate.kernels.fp8_rows import fp8_rows
from drawplate.model.base.precision import FP8_KINDS, Storage
from drawplate.model.layer.frozen_linear import FrozenLinear, Group, _FrozenLinear, _LoraLinears
from tests.tiny import a_weight

UNROUNDED = [
    ("nf4", True),
    ("nf4", False),
    ("fp4", True),
    ("fp4", False),
    ("int8", True),
    ("bf16", True),
    ("fp16", True),
    ("fp32", True),
]
"""Those whose products take x as it is."""


class Layer:
    """A FrozenLinear and real tensors for all its placeholders."""

    def __init__(self, storage: Storage, *, rank: int = 4, dropout: float = 0.0, bias: bool = True) -> None:
        with torch.device("meta"):
            linear = nn.Linear(64, 96, bias=bias)
        self.module = FrozenLinear(linear, storage, rank=rank, scaling=2.0, dropout=dropout)
        generator = torch.Generator().manual_seed(1)
        self.stored = storage.encode(a_weight((96, 64)))
        self.weight = storage.decode([self.stored[n] for n in self.module.stored_names], (96, 64), torch.float32)
        self.bias = torch.randn(96, generator=generator) if bias else None
        self.lora_A = torch.randn(4, 64, generator=generator).requires_grad_() if rank else None
        self.lora_B = torch.randn(96, 4, generator=generator).requires_grad_() if rank else None
        self.key = torch.arange(6, dtype=torch.int32).view(2, 3) if dropout else torch.empty(0, dtype=torch.int32)

    def tensors(self) -> dict[str, Tensor]:
        """Placeholders that are not given are empty: no key, no weight that somebody else has dequantized."""
        empty = {name: torch.empty(0, dtype=t.dtype) for name, t in self.module.named_buffers() if t.numel() == 0}
        named = {"bias": self.bias, "lora_A": self.lora_A, "lora_B": self.lora_B}
        given = {**self.stored, **{name: t for name, t in named.items() if t is not None}}
        return {**empty, **given, **({"dropout_key": self.key} if self.lora_A is not None else {})}

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.module, self.tensors(), (x,), strict=True)

    def specification(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        y = x @ self.weight.t().to(x.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + 2.0 * ((x * mask) @ self.lora_A.t()) @ self.lora_B.t()
        return y if self.bias is None else y + self.bias


def an_input() -> Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(9)).requires_grad_()


def gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(11))
    return list(torch.autograd.grad((y * weights).sum(), wanted))


@pytest.mark.parametrize(("precision", "double_quant"), UNROUNDED)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_plain_formula(
    precision: str, double_quant: bool, rank: int, bias: bool
) -> None:
    layer, x = Layer(Storage(precision, double_quant), rank=rank, bias=bias), an_input()
    wanted = [t for t in (x, layer.lora_A, layer.lora_B) if t is not None]
    assert torch.allclose(layer(x), layer.specification(x), atol=1e-5)
    for ours, theirs in zip(gradients(layer(x), wanted), gradients(layer.specification(x), wanted), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8_rounds_the_products_other_operand_and_nothing_of_the_adapter(kind: str, rank: int) -> None:
    layer, x = Layer(Storage(kind), rank=rank), an_input()
    plain = layer.specification(x)
    x_ = x.detach()
    rounded, scale = fp8_rows(x_.reshape(-1, 64))
    x8 = (rounded.float() * scale).view_as(x_)
    assert 0.01 < float((x8 - x_).norm() / x_.norm()) < 0.04
    assert torch.allclose(layer(x) - plain, (x8 - x_) @ layer.weight.t(), atol=1e-4)
    wanted = [t for t in (x, layer.lora_A, layer.lora_B) if t is not None]
    ours, theirs = gradients(layer(x), wanted), gradients(plain, wanted)
    assert 0 < float((ours[0] - theirs[0]).norm() / theirs[0].norm()) < 0.04
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_a_stored_transpose_changes_no_number() -> None:
    x = an_input()
    made, stored = (Layer(Storage(kind)) for kind in FP8_KINDS)
    assert torch.equal(made(x), stored(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(made(x), [x]), gradients(stored(x), [x]), strict=True))
    stored.stored["fp8_transposed"] = torch.zeros(64, 96).to(torch.float8_e4m3fn)
    assert not gradients(stored(x), [x])[0].abs().sum() > gradients(made(x), [x])[0].abs().sum(), "it is what is used"


def test_dropout_masks_the_adapters_input_alone_forward_and_back() -> None:
    from drawplate.kernels.dropped_product import dropout_mask

    layer, x = Layer(Storage("nf4"), dropout=0.4), an_input()
    mask = dropout_mask(layer.key, 64, 0.4, torch.float32)
    assert 0.2 < float((mask == 0).float().mean()) < 0.6
    wanted = [x, layer.lora_A, layer.lora_B]
    assert torch.allclose(layer(x), layer.specification(x, mask), atol=1e-5)
    pairs = zip(gradients(layer(x), wanted), gradients(layer.specification(x, mask), wanted), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in pairs)


def test_the_weight_gets_no_gradient_and_no_dequantized_copy_is_saved() -> None:
    layer, x = Layer(Storage("nf4")), an_input()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert not any(tensor.numel() == 96 * 64 for tensor in saved), "the weight dequantized"
    assert {t.data_ptr() for t in layer.stored.values()} <= {t.data_ptr() for t in saved}, (
        "the packed one, by reference"
    )
    y.sum().backward()
    assert all(tensor.grad is None for tensor in layer.stored.values())


@pytest.mark.parametrize("rank", [0, 4])
def test_backward_reads_the_stored_weight_through_the_hooks_and_keeps_none_itself(rank: int) -> None:
    """bitsandbytes#2034: a weight kept on ctx outside save_for_backward is stale once its buffer is recycled."""
    layer, x = Layer(Storage("nf4"), rank=rank), an_input()
    want = gradients(layer(x), [x])[0]
    ours = layer.stored
    layer.stored = {name: tensor.clone() for name, tensor in ours.items()}
    moved = {t.data_ptr(): name for name, t in layer.stored.items()}

    def pack(tensor: Tensor) -> Any:
        return moved.get(tensor.data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: ours[kept] if isinstance(kept, str) else kept):
        y = layer(x)
    for tensor in layer.stored.values():
        tensor.view(torch.uint8).fill_(255) if tensor.dim() else tensor.fill_(float("nan"))
    assert torch.equal(gradients(y, [x])[0], want)


@pytest.mark.parametrize(("precision", "double_quant"), [("int8", True), ("nf4", False), ("nf4", True)])
def test_the_compiler_sees_the_same_arguments_with_and_without_gradients(precision: str, double_quant: bool) -> None:
    """Without gradients it guesses from their number whether a context is among them."""
    stored = list(Storage(precision, double_quant).encode(torch.randn(64, 128)).values())
    x_BTI, A_RI, B_OR = torch.randn(2, 5, 128), torch.randn(8, 128, requires_grad=True), torch.randn(64, 8)
    key = torch.empty(0, dtype=torch.int32)

    @torch.compile(backend="eager", fullgraph=True)
    def both(x_BTI: torch.Tensor, *stored: torch.Tensor) -> torch.Tensor:
        facts = (precision, double_quant)
        (adapted,) = _LoraLinears.apply(x_BTI, True, 1.0, 0.0, *facts, 1, A_RI, B_OR, key, *stored)
        return adapted + _FrozenLinear.apply(x_BTI, True, 64, 128, *facts, *stored)

    with_gradients = both(x_BTI, *stored)
    with torch.no_grad():
        assert torch.equal(both(x_BTI, *stored), with_gradients)


class Siblings(nn.Module):
    """Three frozen linear layers over one x, of which `order` says who is called when."""

    def __init__(self, order: tuple[str, ...], *, dropout: float, storage: Storage, other_x: bool = False) -> None:
        super().__init__()
        self.order, self.other_x = order, other_x
        for name, out in (("q", 32), ("k", 16), ("v", 16)):
            with torch.device("meta"):
                linear = nn.Linear(64, out, bias=name == "v")
            setattr(self, name, FrozenLinear(linear, storage, rank=4, scaling=2.0, dropout=dropout))

    def forward(self, x: Tensor) -> Tensor:
        given = {name: x * 1.0 if self.other_x and name == "v" else x for name in self.order}
        outputs = {name: getattr(self, name)(given[name]) for name in self.order}
        return torch.cat([outputs[name].sin() for name in sorted(outputs)], -1)


def sibling_tensors(module: Siblings, storage: Storage, *, dropped: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for i, (name, linear) in enumerate(module.named_children()):
        shape = (linear.out_features, linear.in_features)
        made = {
            **storage.encode(a_weight(shape)),
            "lora_A": torch.randn(4, 64, generator=generator).mul_(0.02).requires_grad_(),
            "lora_B": torch.randn(shape[0], 4, generator=generator).requires_grad_(),
            "dropout_key": torch.arange(6, dtype=torch.int32).view(2, 3) + 100 * i if dropped else torch.empty(0),
            **({"bias": torch.ones(shape[0])} if linear.bias is not None else {}),
            **({} if storage.native else {"whole": torch.empty(0)}),
        }
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    return tensors


@pytest.mark.parametrize(
    ("order", "other_x", "dropped", "precision"),
    [
        ("qkv", False, True, "bf16"),
        ("qkv", False, False, "fp8"),
        ("vqk", False, True, "nf4"),
        ("qkv", True, True, "bf16"),
        ("vqk", True, False, "bf16"),
    ],
)
def test_a_group_computes_what_its_modules_would(order: str, other_x: bool, dropped: bool, precision: str) -> None:
    storage = Storage(precision)
    module = Siblings(tuple(order), dropout=0.4, storage=storage, other_x=other_x)
    tensors, x = sibling_tensors(module, storage, dropped=dropped), an_input().detach().bfloat16().requires_grad_()
    wanted = [x, *(t for t in tensors.values() if t.requires_grad)]

    def run(compiled: bool = False) -> list[Tensor]:
        call = lambda t, x_: functional_call(module, t, (x_,))  # noqa: E731
        y = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(tensors, x)
        return [y.detach(), *gradients(y, wanted)]

    alone = run()
    group = Group([module.q, module.k, module.v])
    for ours in (run(), run(), run(compiled=True)):
        for a, b in zip(ours, alone, strict=True):
            assert float((a - b).abs().max()) <= 0.02 * float(b.abs().max()) + 1e-6
    assert group._x is None or other_x, "nothing is held when all have been called"
    with torch.no_grad():
        assert torch.allclose(functional_call(module, tensors, (x,)), alone[0], rtol=0.02, atol=0.02)


def test_a_group_whose_products_are_mixed_up_would_be_noticed() -> None:
    """The negative control of the test above."""
    storage = Storage("bf16")
    module = Siblings(("q", "k", "v"), dropout=0.0, storage=storage)
    tensors, x = sibling_tensors(module, storage, dropped=False), an_input().detach().bfloat16()
    alone = functional_call(module, tensors, (x,))
    Group([module.q, module.v, module.k])
    module.v.place_in_group, module.k.place_in_group = 2, 1
    mixed = functional_call(module, tensors, (x,))
    assert float((mixed - alone).detach().abs().max()) > 0.1
