"""The gated feed-forward block in fp8: what its three linear layers would compute, and where it is put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from drawplate.model.frozen import FrozenLinear
from drawplate.model.frozen_layer import freeze_linears
from drawplate.model.gated_block import GatedBlock
from drawplate.model.storage import FP8_KINDS, Storage
from tests.tiny import a_weight

HIDDEN, INTERMEDIATE = 64, 96


def a_layer(kind: str = "llama", precision: str = "fp8", targets: tuple[str, ...] = (), **changes: Any) -> nn.Module:
    """A decoder layer on the meta device, frozen."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        **changes,
    )
    with torch.device("meta"):
        layer: nn.Module = AutoModelForCausalLM.from_config(config).model.layers[0]
    freeze_linears(layer, "layers.0", Storage(precision), LoraConfig(r=4), {f"layers.0.mlp.{t}" for t in targets})
    return layer


def gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), wanted))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", FP8_KINDS)
def test_it_computes_what_its_linear_layers_would(precision: str, compiled: bool) -> None:
    block = a_layer(precision=precision).mlp
    assert isinstance(block, GatedBlock)
    linears: dict[str, FrozenLinear] = dict(block.named_children())
    stored = {
        f"{name}.{key}": tensor
        for name, m in linears.items()
        for key, tensor in m.storage.encode(3 * a_weight((m.out_features, m.in_features))).items()
    }
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def plain(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        def through(name: str, x: Tensor) -> Tensor:
            own = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(name)}
            return functional_call(linears[name], own, (x,))

        return through("down_proj", nn.functional.silu(through("gate_proj", x)) * through("up_proj", x))

    def joined(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, tensors, (x,))

    run = torch.compile(joined, backend="aot_eager", fullgraph=True) if compiled else joined
    y, expected = run(stored, x), plain(stored, x)
    assert relative(y, expected) < 5e-3
    assert relative(*(gradients(out, [x])[0] for out in (y, expected))) < 5e-3
    with torch.no_grad():
        assert torch.allclose(joined(stored, x), y, rtol=1e-3, atol=1e-4)
    stored["up_proj.row_scale"] = stored["up_proj.row_scale"] * 1.1
    assert relative(joined(stored, x), expected) > 0.05, "the negative control"


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({}, True),
        ({"kind": "qwen2"}, True),
        ({"precision": "bf16"}, False),
        ({"precision": "nf4"}, False),
        ({"targets": ("down_proj",)}, False),
        ({"hidden_act": "gelu"}, False),
        ({"mlp_bias": True}, False),
    ],
)
def test_only_a_plain_block_without_adapters_is_joined(changes: dict[str, Any], joined: bool) -> None:
    layer = a_layer(**changes)
    assert isinstance(layer.mlp, GatedBlock) == joined
    assert {name for name, _ in layer.mlp.named_children()} >= {"gate_proj", "up_proj", "down_proj"}


class Halved(nn.Module):
    """A block that does one thing more than the ones that are known."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(m.in_features, m.out_features, bias=False, device="meta") for m in block.children()
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y / 2


def test_a_block_that_does_anything_else_is_left_alone() -> None:
    layer = a_layer()
    layer.mlp = Halved(layer.mlp)
    freeze_linears(layer, "layers.0", Storage("fp8"), LoraConfig(r=4), set())
    assert isinstance(layer.mlp, Halved)
