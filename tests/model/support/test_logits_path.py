"""What lies between the body and the logits is known before loading, or the architecture is refused by name."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from drawplate.data.batches import cut_padded
from drawplate.errors import UsageError
from drawplate.model.base.weights import Checkpoint
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.model.load.self_check import self_check
from drawplate.model.support import walk as support
from drawplate.model.support.logits_path import require_known_logits
from tests.model.conftest import ARCHITECTURES, COMMON, random_sequences, write_model
from tests.model.support.test_walk import MORE_ARCHITECTURES
from tests.model.test_causal_lm import build, nats, transformers_nats

OWN: dict[str, dict[str, object]] = {
    "recurrent_gemma": {"num_key_value_heads": 2, "lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 2.0},
    "minicpm3": {  # divides what its head is given
        "num_key_value_heads": 4,
        "dim_model_base": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "modernbert-decoder": {},
}


def anatomy_of(name: str, **changes: object) -> Anatomy:
    settings = {**ARCHITECTURES, **MORE_ARCHITECTURES, **OWN}.get(name, {})
    return build_anatomy(AutoConfig.for_model(name.removesuffix("-untied"), **{**COMMON, **settings, **changes}))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE_ARCHITECTURES, "recurrent_gemma", "minicpm3"])
def test_what_is_supported_has_known_logits(name: str) -> None:
    require_known_logits(anatomy_of(name))


def test_a_layer_between_body_and_head_is_refused() -> None:
    anatomy = anatomy_of("modernbert-decoder")
    with pytest.raises(UsageError, match=r"model type modernbert-decoder\) .* a layer with weights lies between"):
        support.walk(anatomy)


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [("granite", "logit_scale", 1.0), ("cohere", "logit_scale", 0.5), ("gemma2", "softcap", None)],
)
def test_logits_that_are_read_wrongly_are_refused(
    name: str, part: str, wrong: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Anatomy, part, wrong)
    with pytest.raises(UsageError, match="something between its body and its logits"):
        require_known_logits(anatomy_of(name))


def test_of_a_body_that_is_not_called_as_one_nothing_is_said() -> None:
    anatomy = anatomy_of("llama")
    layers = anatomy.layers
    anatomy.skeleton.forward = lambda **_: layers[0](None)  # OPT's own goes past its body's forward, into the layers
    require_known_logits(anatomy)


def test_the_module_is_left_as_it_was() -> None:
    anatomy = anatomy_of("llama")
    require_known_logits(anatomy)
    assert not any("forward" in module.__dict__ for module in anatomy.skeleton.modules())


def _checkpoint(name: str, folder, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setitem(ARCHITECTURES, name, OWN[name])
    return write_model(folder / name, name)


@pytest.mark.parametrize("name", ["recurrent_gemma", "minicpm3"])
def test_their_loss_is_the_one_that_transformers_gives(name: str, tmp_path, monkeypatch) -> None:
    checkpoint, sequences = _checkpoint(name, tmp_path, monkeypatch), random_sequences([17, 5, 30])
    model = build(checkpoint, weights="host", poison=True)
    want = transformers_nats(checkpoint, sequences)
    assert nats(model, cut_padded(sequences, 2, 8, 0)) == pytest.approx(want, rel=1e-5)


def test_control_what_is_refused_would_have_another_loss(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(support, "require_known_logits", lambda anatomy: None)
    checkpoint = _checkpoint("modernbert-decoder", tmp_path, monkeypatch)
    found = self_check(build(checkpoint), random_sequences([25]), packed=False)
    assert found.gradient_difference > 0.5
