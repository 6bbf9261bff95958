"""A gradient that is wrong while the loss is right is seen before training; a check without room is left out aloud."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drawplate.errors import NumericError
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.layer.runner import _RecomputedLayer
from drawplate.model.load import assemble as assembling
from drawplate.model.load import self_check as module
from drawplate.model.load import twin
from drawplate.model.load.self_check import check_bytes, self_check, warnings_of
from drawplate.model.load.twin import Twin
from drawplate.model.support.side_doors import Watched
from drawplate.records import SelfCheck
from tests.faults.rows import shows
from tests.model.conftest import random_sequences, write_model
from tests.tiny import tiny_model

TEXTS = random_sequences([25, 11])


def check(model: CausalLM, **room: int) -> SelfCheck:
    return self_check(model, TEXTS, packed=True, **room)


def refused(model: CausalLM, match: str) -> SelfCheck:
    found = check(model)
    with pytest.raises(NumericError, match=match) as caught:
        warnings_of(model, found)
    shows(49, str(caught.value), 0)
    shows(49, str(caught.value), 1)
    return found


def shared_state(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A model whose layers hand one another a sum by a side door that the walk overlooks."""
    write_model(folder, "llama")
    own = assembling.build_anatomy

    def build(config: Any) -> Any:
        anatomy = own(config)
        _share(anatomy)
        return anatomy

    def build_twin(config: Any, **attention: str) -> Any:
        anatomy = twins(config, **attention)
        _share(anatomy)
        return anatomy

    twins = twin.build_anatomy
    monkeypatch.setattr(assembling, "build_anatomy", build)
    monkeypatch.setattr(twin, "build_anatomy", build_twin)
    monkeypatch.setattr(Watched, "changed", lambda self: "")
    monkeypatch.setattr(Watched, "tensors", lambda self: iter(()))
    return folder


def _share(anatomy: Any) -> None:
    """Each layer adds to its input what the layer before it has left, and leaves its own."""
    body = anatomy.body.forward
    anatomy.body.forward = lambda *args, **kwargs: body(*args, **kwargs, shared=UserDict())
    kind = type(anatomy.layers[0])
    sharing = type(kind.__name__, (kind,), {"forward": _sharing(kind.forward)})
    for layer in anatomy.layers:
        layer.__class__ = sharing


def _sharing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def shared_forward(self: Any, hidden_states: Tensor, *args: Any, shared: Any, **kwargs: Any) -> Tensor:
        out = forward(self, hidden_states, *args, **kwargs)
        out = out + shared.get("left", 0.0)
        shared["left"] = 0.5 * out
        return out

    return shared_forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_49_a_gradient_that_a_side_door_loses_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = shared_state(monkeypatch, tmp_path / "llama")
    kept = tiny_model(base, compute_dtype=dtype)
    assert warnings_of(kept, check(kept)) == [], "without recomputing it is right"
    recomputed = tiny_model(base, compute_dtype=dtype, activations="recompute")
    found = refused(recomputed, "the adapter's gradient differs")
    assert found.loss_difference < 1e-2, "the loss says nothing"
    assert found.gradient_difference > 0.1
    monkeypatch.setattr(Twin, "gradients", lambda *_: _out_of_memory())
    assert refused(recomputed, "activations kept").kept_difference > 0.1


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_row_49_a_wrong_scale_is_seen(base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(base, compute_dtype=dtype)
        for template in model.runner.templates:
            for linear in (m for m in template.modules() if isinstance(m, FrozenLinear)):
                linear.scaling *= 2
        found = refused(model, "differs from transformers' own")
        assert found.loss_difference < 2e-2
        assert found.gradient_difference > 0.5


def drop_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 gives its first A none."""
    own = _RecomputedLayer.backward

    def dropping(ctx: Any, grad_out: Tensor) -> Any:
        layer, first = ctx.call.layer, 3
        gradients = list(own(ctx, grad_out))
        if layer == 1:
            gradients[first] = None
        return tuple(gradients)

    monkeypatch.setattr(_RecomputedLayer, "backward", staticmethod(dropping))


def test_row_49_a_trained_tensor_without_a_gradient_is_seen(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base, activations="recompute", compute_dtype=torch.bfloat16)
    drop_a_gradient(monkeypatch)
    found = refused(model, "1 trained tensors get no gradient")
    assert len(found.missing) == 1
    assert "layers.1." in found.missing[0]


def test_row_49_control_with_the_adapter_as_it_starts_nobody_would_see_that(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where B is zero, A has no gradient anyway."""
    model = tiny_model(base, activations="recompute")
    drop_a_gradient(monkeypatch)
    monkeypatch.setattr(module, "_random_adapter", lambda _: nullcontext())
    assert warnings_of(model, check(model)) == []


def test_row_49_a_model_that_is_right_passes_and_the_record_says_by_how_much(base: Path) -> None:
    model = tiny_model(base, activations="recompute", weights="host")
    found = check(model)
    assert found.gradient_difference < 1e-4
    assert warnings_of(model, found) == []


def test_row_47_a_check_that_has_no_room_is_made_smaller_or_left_out_with_a_word(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(base, compute_dtype=torch.bfloat16, activations="recompute")
    needed = check_bytes(model, TEXTS)
    smaller = check(model, room_bytes=needed - 1)
    assert 0 < smaller.tokens < 36
    assert smaller.gradient_difference < 0.1
    nothing = check(model, room_bytes=1000)
    assert (nothing.loss_difference, nothing.gradient_difference) == (None, None)
    shows(47, warnings_of(model, nothing)[0])
    monkeypatch.setattr(Twin, "gradients", lambda *_: _out_of_memory())
    in_part = check(model)
    assert in_part.kept_difference == 0.0
    shows(47, warnings_of(model, in_part)[0])
    monkeypatch.setattr(model, "sum_nats", lambda *_: _out_of_memory())
    shows(47, warnings_of(model, check(model))[0])
    monkeypatch.undo()
    assert check(model).left_out == ""
