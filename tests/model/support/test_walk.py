"""What cannot be carried out layer by layer is refused by name, before anything is read."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from drawplate.data.batches import cut_packed, cut_padded
from drawplate.errors import IntegrityError, UsageError
from drawplate.model.base.weights import Checkpoint
from drawplate.model.layer.anatomy import Anatomy, build_anatomy
from drawplate.model.support.walk import Walk, require_streamable, walk
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


SINCE_5_24 = Version(transformers.__version__) >= Version("5.24")
if SINCE_5_24:  # before, its attention was its own
    MORE_ARCHITECTURES["codegen"] = {"rotary_dim": 8, "n_layer": 4, "n_head": 4, "n_embd": 32}


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


@pytest.mark.parametrize("name", ["bloom", "xglm", *([] if SINCE_5_24 else ["codegen"])])
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
    """A layer that leaves its input for the next, in a way that is given."""

    def __init__(self, layer: nn.Module, leave: Callable[..., None]) -> None:
        super().__init__()
        self.layer, self.leave = layer, leave

    def forward(self, hidden, *args, shared=None, **kwargs):
        self.leave(hidden, shared)
        return self.layer(hidden, *args, **kwargs)


@dataclass
class _Box:
    keys: object = None


class _Slot:
    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys = None


def sharing(leave: Callable[..., None], shared: Callable[[], object] | None = None) -> Walk:
    """What a walk finds of a Llama whose layers share state."""
    anatomy = anatomy_of("llama")
    for i, layer in enumerate(list(anatomy.layers)):
        anatomy.layers[i] = _Sharing(layer, leave)
    if shared is not None:
        original = anatomy.body.forward
        anatomy.body.forward = lambda **kwargs: original(**kwargs, shared=shared())
    return walk(anatomy)


def keep(hidden: Tensor, shared: Any) -> None:
    shared["keys"] = hidden


def keep_attribute(hidden: Tensor, shared: Any) -> None:
    shared.keys = hidden


SIDE_DOORS: dict[str, tuple[Callable[..., None], Callable[[], object]]] = {
    "a dict": (keep, dict),
    "a UserDict": (keep, UserDict),
    "a dict within": (lambda hidden, shared: keep(hidden, shared["layers"][0]), lambda: UserDict(layers=[{}])),
    "a list": (lambda hidden, shared: shared.append(hidden), list),
    "a dataclass": (keep_attribute, _Box),
    "an object": (keep_attribute, SimpleNamespace),
    "an object with slots": (keep_attribute, _Slot),
    "a cache": (
        lambda hidden, shared: shared.update(hidden[:, None], hidden[:, None], 0),
        DynamicCache,
    ),
    "a tensor changed in place": (
        lambda hidden, shared: shared.add_(hidden.detach().sum()),
        lambda: torch.zeros((), device="meta"),
    ),
    "a tensor within, changed in place": (
        lambda hidden, shared: shared["sum"].add_(hidden.detach().sum()),
        lambda: {"sum": torch.zeros((), device="meta")},
    ),
}


@pytest.mark.parametrize("kind", SIDE_DOORS)
def test_layers_that_change_what_all_are_given_are_on_no_account_recomputed(kind):
    assert sharing(*SIDE_DOORS[kind]).obstacle.startswith("layer 0 changes shared")


def test_layers_that_change_their_own_input_are_not_recomputed():
    assert sharing(lambda hidden, _: hidden.mul_(2)).obstacle == "layer 0 changes its hidden states"


def test_layers_that_change_an_object_which_others_hold_are_not_recomputed():
    box = _Box()
    assert "layer 0 changes leave.box" in sharing(_Leave(box)).obstacle
    assert sharing(_Leave(_Box(), writes=False)).obstacle == ""
    found = sharing(lambda hidden, _: setattr(_Sharing, "keys", hidden)).obstacle
    del _Sharing.keys
    assert found == "layer 0 changes _Sharing"


class _Leave:
    def __init__(self, box: _Box, *, writes: bool = True) -> None:
        self.box, self.writes = box, writes

    def __call__(self, hidden: Tensor, _: object) -> None:
        if self.writes:
            self.box.keys = hidden


def test_what_a_layer_keeps_for_itself_alone_is_no_obstacle():
    anatomy = anatomy_of("llama")
    for layer in anatomy.layers:
        layer.self_attn.register_forward_hook(lambda module, given, out: setattr(module, "last", out[0]))
    assert walk(anatomy).obstacle == ""


class _Plain(nn.Module):
    def forward(self, hidden: Tensor, **further: object) -> tuple[Tensor, Tensor]:
        return hidden * 1, hidden.mean(-1)


def handing_on(arguments: Callable[[list[tuple[Tensor, Tensor]]], dict[str, object]]) -> Walk:
    """What a walk finds of a body that gives each layer `arguments` of what the layers before it returned."""
    anatomy = anatomy_of("llama")
    for i in range(len(anatomy.layers)):
        anatomy.layers[i] = _Plain()

    def forward(*, inputs_embeds: Tensor, **_: object) -> None:
        made = [(inputs_embeds, inputs_embeds)]
        for layer in anatomy.layers:
            made.append(layer(made[-1][0], **arguments(made[1:])))

    anatomy.body.forward = forward
    return walk(anatomy)


def test_a_tensor_that_an_earlier_layer_made_is_a_side_door():
    assert handing_on(lambda made: {}) == handing_on(lambda made: {"past": []})
    assert handing_on(lambda made: {}).obstacle == ""
    found = handing_on(lambda made: {"past": _Box(made[0][0] * 2 if made else None)})
    assert found.obstacle == "layer 1 is given past.keys, which an earlier layer has made"


def test_what_a_later_layer_needs_beside_hidden_states_is_not_dropped():
    """Our layers return None for what comes after the hidden states."""
    assert handing_on(lambda made: {}).extras == (1,) * 4  # nobody asks for it
    with pytest.raises(UsageError, match=r"layer 1 is given routed\[0\], which an earlier layer returns beside"):
        handing_on(lambda made: {"routed": [further for _, further in made]})


def test_layers_that_share_state_are_trained_on_the_device_only():
    found = sharing(*SIDE_DOORS["a UserDict"])
    anatomy = anatomy_of("llama")
    for tiers, policies in ((["host"] * 4, ["keep"] * 4), (["device"] * 4, ["recompute"] * 4)):
        with pytest.raises(UsageError, match="LlamaForCausalLM can be trained on the device"):
            require_streamable(anatomy, found, tiers, policies)
    require_streamable(anatomy, found, ["device", "dequantized"] * 2, ["keep"] * 4)


def test_layers_that_share_parameters_are_an_obstacle():
    anatomy = anatomy_of("llama")
    anatomy.layers[2].mlp = anatomy.layers[1].mlp
    assert "layers 1 and 2 share mlp.gate_proj.weight" in walk(anatomy).obstacle


def test_a_convolution_beside_attention_mixes_documents():
    anatomy = anatomy_of("llama")
    anatomy.layers[2].self_attn.mixed = nn.Conv1d(4, 4, 2)
    assert "layer 2 mixes neighbouring positions in a convolution" in walk(anatomy).unpackable


GEMMA_4 = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 97,
}


def test_keys_and_values_that_layers_share_are_found():
    """Gemma 4 E2B and E4B; their body looks embeddings up in its table, so that the walk must give it ids."""
    found = walk(anatomy_of("gemma4_text", **GEMMA_4))
    assert found.obstacle == "layer 0 changes shared_kv_states"
    alone = {**GEMMA_4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    # From 5.24 on the last layers of each kind leave theirs for a drafting model, though no layer reads them.
    assert walk(anatomy_of("gemma4_text", **alone)).obstacle == (
        "layer 2 changes shared_kv_states" if SINCE_5_24 else ""
    )


def looking(condition: Callable[[Tensor | None, Tensor | None], Tensor]) -> Walk:
    """What a walk finds of a Llama whose body looks at a value on its way."""
    anatomy = anatomy_of("llama")
    original = anatomy.body.forward

    def forward(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: object) -> object:
        if bool(condition(input_ids, inputs_embeds)):
            raise RuntimeError("nothing to do with values")
        return original(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    anatomy.body.forward = forward
    found = walk(anatomy)
    assert all(tensor.is_meta for tensor in (*anatomy.body.parameters(), *anatomy.body.buffers()))
    return found


def test_a_body_that_looks_at_values_is_walked_all_the_same():
    plain = Walk((None,) * 4, unused=((),) * 4)
    by_ids = looking(lambda ids, embedded: torch.tensor(False) if embedded is None else embedded.sum() > 0)
    assert (by_ids.obstacle, by_ids.unpackable) == ("", "")
    with_values = looking(lambda ids, embedded: (ids if embedded is None else embedded).sum() > 1000)
    assert with_values.extras == plain.extras
    assert (with_values.obstacle, with_values.unpackable) == ("", "")


def test_of_a_body_that_cannot_be_walked_nothing_good_is_assumed():
    found = looking(lambda ids, embedded: torch.zeros(1, device="meta") > 0)
    assert found.obstacle.startswith("its body looks at values before they are there")
    assert found.unpackable == found.obstacle


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
