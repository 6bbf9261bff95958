"""What cannot be carried out layer by layer is refused by name, before anything is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from drawplate.data.batches import cut_packed, cut_padded
from drawplate.errors import IntegrityError, UsageError
from drawplate.model.anatomy import Anatomy, build_anatomy
from drawplate.model.support import Walk, require_streamable, walk
from drawplate.model.weights import Checkpoint
from tests.model.conftest import ARCHITECTURES, COMMON, random_sequences, write_model
from tests.model.test_causal_lm import build, nats, transformers_nats

MORE_ARCHITECTURES = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},  # dropout in its configuration
    "gpt_neox": {"tie_word_embeddings": False},  # its head has another name on disk
    "starcoder2": {"num_key_value_heads": 2},
    "olmo": {"num_key_value_heads": 2},
    "olmo3": {"num_key_value_heads": 2, "sliding_window": 8},
    "cohere2": {"num_key_value_heads": 2, "sliding_window": 8},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "exaone4": {"num_key_value_heads": 2, "sliding_window": 8},
    "nanochat": {"num_key_value_heads": 2},
}


def anatomy_of(name: str, **changes: object) -> Anatomy:
    settings = {**COMMON, **{**ARCHITECTURES, **MORE_ARCHITECTURES}.get(name, {}), **changes}
    return build_anatomy(AutoConfig.for_model(name, **settings))


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_more_architectures_give_the_loss_that_transformers_gives(name, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, name, MORE_ARCHITECTURES[name])
    checkpoint = write_model(tmp_path / name, name)
    sequences = random_sequences([17, 5, 30, 9])
    model = build(checkpoint, weights="host", poison=True)
    want = transformers_nats(checkpoint, sequences)
    for batches in (cut_packed(sequences, 64, 8, 0), cut_padded(sequences, 4, 8, 0)):
        assert nats(model, batches) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["bloom", "codegen", "xglm"])
def test_an_attention_of_its_own_is_refused(name):
    """Its mask would be lost, and a model that sees the next token has a wonderful perplexity."""
    with pytest.raises(UsageError, match="attention in a way of its own"):
        walk(
            anatomy_of(name, rotary_dim=8, n_layer=4, n_head=4, n_embd=32, num_layers=4, attention_heads=4, d_model=32)
        )


def test_experts_are_refused_by_name():
    with pytest.raises(UsageError, match=r"MixtralForCausalLM .* MixtralExperts keeps a mixture of experts"):
        walk(anatomy_of("mixtral", num_key_value_heads=2, num_local_experts=4))


def test_nothing_is_read_of_a_checkpoint_that_lacks_tensors(tmp_path, monkeypatch):
    checkpoint = write_model(tmp_path / "llama", "llama")
    lacking = {name: path for name, path in checkpoint.files.items() if "layers.3.mlp.up_proj" not in name}
    damaged = Checkpoint(checkpoint.folder, checkpoint.name, None, checkpoint.config, lacking)
    monkeypatch.setattr(Checkpoint, "read", lambda *arguments: pytest.fail("a tensor was read"))
    with pytest.raises(IntegrityError, match=r"lacks 1 tensors .* model\.layers\.3\.mlp\.up_proj\.weight"):
        build(damaged)


def test_a_model_inside_one_for_text_and_images_is_found(tmp_path):
    checkpoint = write_model(tmp_path / "llama", "llama")
    inside = {f"language_model.{name}": path for name, path in checkpoint.files.items()}
    other = {f"model.language_model.{n.removeprefix('model.')}": path for n, path in checkpoint.files.items()}
    for files in (inside, other):
        named = Checkpoint(checkpoint.folder, checkpoint.name, None, checkpoint.config, files)
        monkey = {
            name: Checkpoint.read(checkpoint, original) for name, original in zip(files, checkpoint.files, strict=True)
        }
        object.__setattr__(named, "read", monkey.__getitem__)
        sequences = random_sequences([17, 5])
        batches = cut_padded(sequences, 2, 8, 0)
        assert nats(build(named), batches) == nats(build(checkpoint), batches)


class _Sharing(nn.Module):
    """A layer that leaves something for the next in an argument all layers are given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, shared, **kwargs):
        shared["keys"] = hidden
        return self.layer(hidden, *args, **kwargs)


def test_layers_that_share_state_are_trained_on_the_device_only():
    anatomy = anatomy_of("llama")
    for i, layer in enumerate(list(anatomy.layers)):
        anatomy.layers[i] = _Sharing(layer)
    original = anatomy.body.forward
    anatomy.body.forward = lambda **kwargs: original(**kwargs, shared={})
    found = walk(anatomy)
    assert "layer 0 changes shared" in found.obstacle
    for tiers, policies in ((["host"] * 4, ["keep"] * 4), (["device"] * 4, ["recompute"] * 4)):
        with pytest.raises(UsageError, match="LlamaForCausalLM can be trained on the device"):
            require_streamable(anatomy, found, tiers, policies)
    require_streamable(anatomy, found, ["device", "dequantized"] * 2, ["keep"] * 4)


def test_layers_that_share_parameters_are_an_obstacle():
    anatomy = anatomy_of("llama")
    anatomy.layers[2].mlp = anatomy.layers[1].mlp
    assert "layers 1 and 2 share mlp.gate_proj.weight" in walk(anatomy).obstacle


def test_a_plain_model_has_no_obstacle():
    assert walk(anatomy_of("llama")) == Walk((None,) * 4, unused=(("mlp.down_proj",),) * 4)


def test_state_that_would_go_from_one_document_to_the_next_is_known():
    anatomy = anatomy_of("bamba", num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=16, attn_layer_indices=[1])
    assert "layer 0 (BambaDecoderLayer) carries state" in walk(anatomy).unpackable


def test_packed_documents_are_refused_where_they_would_mix(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "stablelm", {"num_key_value_heads": 2})
    checkpoint = write_model(tmp_path / "stablelm", "stablelm")
    sequences = random_sequences([17, 5])
    model = build(checkpoint)
    assert model.unpackable == "layer 0 does not tell its attention where documents begin"
    with pytest.raises(UsageError, match="StableLmForCausalLM cannot take packed documents: layer 0 does not tell"):
        nats(model, cut_packed(sequences, 64, 8, 0))
    want = transformers_nats(checkpoint, sequences)
    assert nats(model, cut_padded(sequences, 2, 8, 0)) == pytest.approx(want, rel=1e-5)
    model.unpackable = ""  # without the guard the result is wrong
    assert nats(model, cut_packed(sequences, 64, 8, 0)) != pytest.approx(want, rel=1e-3)


def test_modules_stay_in_evaluation_mode(tmp_path):
    checkpoint = write_model(tmp_path / "llama", "llama", attention_dropout=0.5)
    model = build(checkpoint)
    assert not any(layer.self_attn.training for layer in model.runner.templates)
    batches = cut_padded(random_sequences([17, 5]), 2, 8, 0)
    assert torch.equal(model.sum_nats(batches[0])[1], model.sum_nats(batches[0])[1])
