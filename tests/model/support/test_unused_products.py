from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from drawplate.data.batches import cut_padded
from drawplate.model.layer import frozen_linear as frozen
from drawplate.model.support.unused_products import unused_products
from drawplate.model.support.walk import walk
from drawplate.recipe import LoraSection
from tests.model.conftest import random_sequences
from tests.model.support.test_walk import anatomy_of
from tests.model.test_causal_lm import build


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("llama", ("mlp.down_proj",)),
        ("qwen2", ("mlp.down_proj",)),
        ("phi", ("mlp.fc2", "self_attn.dense")),  # attention and feed-forward beside each other
        ("gemma2", ()),  # a norm follows, which keeps what it is given
    ],
)
def test_what_only_goes_into_the_layers_sum_is_not_needed(name: str, unused: tuple[str, ...]) -> None:
    assert [tuple(sorted(paths)) for paths in walk(anatomy_of(name)).unused] == [unused] * 4


class _Layer(nn.Module):
    def __init__(self, end: str) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(8, 8), nn.Linear(8, 8), end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.relu(self.first(x)))
        match self.end:
            case "sum":
                return x + 0.5 * y.view(-1, 8).view_as(y)
            case "product":
                return x + x * y
            case "clamped":
                return x + y.clamp(-1, 1)
            case "twice":
                return x + y + self.last(x)
            case "dropped":
                return x
        raise AssertionError(self.end)


@pytest.mark.parametrize(
    ("end", "unused"), [("sum", ("last",)), ("product", ()), ("clamped", ()), ("twice", ()), ("dropped", ())]
)
def test_what_something_keeps_is_needed(end: str, unused: tuple[str, ...]) -> None:
    layer = _Layer(end).to("meta").requires_grad_(False)
    assert unused_products(layer, torch.empty(2, 3, 8, device="meta"), (), {}) == unused


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_recomputation_does_not_multiply_what_is_not_needed(
    targets: list[str], activations: str, llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    product, products = frozen.frozen_product, frozen.adapted_products

    def one(x: torch.Tensor, stored, storage, shape, transposed: bool) -> torch.Tensor:
        made.extend([] if transposed else [shape])
        return product(x, stored, storage, shape, transposed)

    def some(x: torch.Tensor, stored, storage, t_GNR, lora_Bs) -> list[torch.Tensor]:
        made.extend((len(lora_B_OR), x.shape[-1]) for lora_B_OR in lora_Bs)
        return products(x, stored, storage, t_GNR, lora_Bs)

    monkeypatch.setattr(frozen, "frozen_product", one)
    monkeypatch.setattr(frozen, "adapted_products", some)
    model = build(llama, LoraSection(r=2, target_modules=targets), activations=activations)
    (batch,) = cut_padded(random_sequences([9]), 1, 8, 0)
    model.sum_nats(batch)[0].backward()
    layers = len(model.anatomy.layers)
    down = model.anatomy.layers[0].mlp.down_proj
    again = activations == "recompute"
    assert made.count((down.out_features, down.in_features)) == layers, "once, in the first forward"
    assert len(made) == layers * (7 + 6 * again)


def test_an_adapter_on_what_is_not_needed_is_trained_all_the_same(llama, tmp_path: Path) -> None:
    section = LoraSection(r=2, target_modules=["down_proj"], lora_dropout=0.3)
    (batch,) = cut_padded(random_sequences([9]), 1, 8, 0)
    gradients = []
    for activations in ("keep", "recompute"):
        model = build(llama, section, activations=activations)
        model.sum_nats(batch, dropout_seed=(0, 0))[0].backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.any() for g in gradients[1])
