"""The adapter in host memory trains as the one on the device does, bit for bit."""

from __future__ import annotations

import pytest
import torch

from drawplate.data.batches import cut_packed
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.host_adapter import HostAdapter
from tests.model.conftest import random_sequences
from tests.model.test_causal_lm import build, train_steps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", ["keep", "host", "recompute", "offload"])
@pytest.mark.parametrize("weights", ["device", "host"])
def test_gradients_and_steps_are_those_of_an_adapter_on_the_device(weights, activations, device, llama, sequences):
    placement = {"weights": weights, "activations": activations, "device": torch.device(device), "poison": True}
    near, far = (build(llama, adapter=home, **placement) for home in ("device", "host"))
    assert {p.device.type for p in far.adapter.parameters()} == {"cpu"}
    losses, gradients = train_steps(near, sequences, steps=1)
    far_losses, far_gradients = train_steps(far, sequences, steps=1)
    assert far_losses == losses
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gradients, far_gradients, strict=True))
    if device == "cpu":  # AdamW's own arithmetic differs between devices
        assert train_steps(far, sequences, steps=4)[0] == train_steps(near, sequences, steps=4)[0]


def backward(model: CausalLM) -> torch.Tensor:
    for parameter in model.adapter.parameters():
        parameter.grad = None
    for batch in cut_packed(random_sequences([17, 5, 30]), 48, 4, 0):
        loss, _ = model.sum_nats(batch, scale=0.01)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.adapter.parameters()])


def test_gradients_are_complete_when_backward_returns(llama):
    model = build(llama, adapter="host", activations="recompute")
    wanted = backward(model)
    assert model.adapter.host is not None
    assert all(landing.layer is None for landing in model.adapter.host._landings)
    assert wanted.abs().sum() > 0


def test_without_settling_the_last_gradients_would_be_missing(llama, monkeypatch):
    """Negative control: the landings hold the last layers' gradients until they are added up."""
    wanted = backward(build(llama, adapter="host", activations="recompute"))
    monkeypatch.setattr(HostAdapter, "settle", lambda self: None)
    model = build(llama, adapter="host", activations="recompute")
    with pytest.raises(AttributeError):  # the first layers' gradients never arrived
        assert not torch.equal(backward(model), wanted)


def test_a_backward_that_fails_leaves_nothing_to_the_next(llama, monkeypatch):
    model = build(llama, adapter="host", activations="recompute")
    wanted = backward(model)
    calls = []
    original = HostAdapter.send_home

    def fail_once(self: HostAdapter, layer: int, gradients: object) -> None:
        original(self, layer, gradients)  # type: ignore[arg-type]
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(HostAdapter, "send_home", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        backward(model)
    assert torch.equal(backward(model), wanted)


def test_an_adapter_on_the_host_is_saved_and_loaded_like_any_other(llama, tmp_path):
    model = build(llama, adapter="host")
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.5)
    model.adapter.save(tmp_path / "adapter")
    other = build(llama, adapter="host", seed=5)
    other.adapter.load_state(model.adapter.state(), "memory")
    assert torch.equal(backward(other), backward(model))
