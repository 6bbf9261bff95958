"""The assembled model against transformers' own, and every residency and policy against its resident twin."""

from __future__ import annotations

import functools
import gc
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from drawplate.data.batches import cut_packed, cut_padded
from drawplate.errors import UsageError
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.layer.functions import RECOMPILE_LIMIT
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.stream import host_activations
from drawplate.model.stream.weight_ring import Residency
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection
from drawplate.records import Sequence
from tests.model.conftest import ARCHITECTURES, random_sequences, write_model

FP32 = {"storage": Storage("fp32"), "compute_dtype": torch.float32}
LAYERS = 4


@pytest.fixture(autouse=True)
def small_blocks_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers this small save nothing that would be worth a copy."""
    monkeypatch.setattr(host_activations, "SENT_FROM_BYTES", 0)


def build(checkpoint: Checkpoint, lora: LoraSection | None = None, seed: int = 0, **placement: object) -> CausalLM:
    section = lora or LoraSection(r=4, lora_dropout=0.1)

    def config(anatomy: object) -> LoraConfig:
        return lora_config(section, anatomy, checkpoint.name, None)  # type: ignore[arg-type]

    return assemble(checkpoint, Placement(**{**FP32, **placement}), config, seed=seed)  # type: ignore[arg-type]


def transformers_nats(checkpoint: Checkpoint, sequences: list[Sequence], model: torch.nn.Module | None = None) -> float:
    """One document at a time, in fp32, with transformers' eager attention and loss."""
    model = model or AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    nats = 0.0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor(sequence.input_ids[None]).long()
            nats += float(model(ids, labels=ids).loss) * (len(sequence) - 1)
    return nats


def nats(model: CausalLM, batches: list) -> float:
    with torch.no_grad():
        return sum(float(model.sum_nats(batch)[0]) for batch in batches)


def train_steps(model: CausalLM, sequences: list[Sequence], steps: int = 5) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and all adapter gradients of some optimizer steps."""
    parameters = model.adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad()
        for batch in cut_packed(sequences, 48, 4, 0):
            loss, _ = model.sum_nats(batch, scale=0.01, dropout_seed=(3, step))
            loss.backward()
            losses.append(float(loss.detach()))
        gradients += [p.grad.clone() for p in parameters]
        optimizer.step()
    return losses, gradients


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_loss_that_transformers_gives(name: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / name, name)
    sequences = random_sequences([17, 5, 30, 9])
    want = transformers_nats(checkpoint, sequences)
    model = build(checkpoint, weights="host", head_rows=16, poison=True)
    for batches in (cut_packed(sequences, 64, 8, 0), cut_padded(sequences, 4, 8, 0), cut_padded(sequences, 1, 1, 0)):
        assert nats(model, batches) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("head_rows", [0, 16])
def test_a_token_that_the_model_does_not_have_is_refused_by_number(llama: Checkpoint, head_rows: int) -> None:
    model = build(llama, head_rows=head_rows)
    rows = model.embedding.weight.shape[0]
    for token in (rows - 1, rows):
        batch = cut_padded(random_sequences([9]), 1, 1, 0)[0]
        batch.input_ids_BT[0, 3] = token
        with nullcontext() if token < rows else pytest.raises(UsageError, match=f"token {rows}.*{rows} rows"):
            model.sum_nats(batch)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "phi"])
@pytest.mark.parametrize("activations", ["keep", "host", "recompute", "offload"])
def test_streaming_changes_no_bit_of_training(name: str, activations: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / name, name)
    sequences = random_sequences([17, 5, 30, 9, 2, 23])
    twin = train_steps(build(checkpoint), sequences)
    streamed = train_steps(build(checkpoint, weights="host", activations=activations, poison=True), sequences)
    assert streamed[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(streamed[1], twin[1], strict=True))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tiers=st.lists(st.sampled_from(["device", "host"]), min_size=LAYERS, max_size=LAYERS),
    policies=st.lists(st.sampled_from(["keep", "host", "recompute", "offload"]), min_size=LAYERS, max_size=LAYERS),
    slots=st.integers(2, 4),
    head_rows=st.sampled_from([0, 8, 40]),
)
def test_any_mix_of_residency_and_policy_is_bit_equal(llama, tiers, policies, slots, head_rows) -> None:
    sequences = random_sequences([17, 5, 30, 9])
    twin = train_steps(build(llama, head_rows=head_rows), sequences)
    mixed = build(
        llama,
        weights=tuple(tiers),
        activations=tuple(policies),
        slots=slots,
        head_rows=head_rows,
        poison=True,
    )
    mine = train_steps(mixed, sequences)
    assert mine[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], twin[1], strict=True))


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "bf16"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_streamed_and_resident_agree_in_every_precision(precision, double_quant, llama, sequences) -> None:
    settings_ = {"storage": Storage(precision, double_quant), "compute_dtype": torch.float32}
    twin = train_steps(build(llama, **settings_), sequences, steps=2)
    streamed = build(llama, weights="host", activations="recompute", poison=True, **settings_)
    mine = train_steps(streamed, sequences, steps=2)
    assert mine[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], twin[1], strict=True))


@pytest.mark.parametrize("activations", ["keep", "host", "recompute", "offload"])
def test_dequantizing_a_whole_layer_at_once_changes_no_bit(activations, llama, sequences) -> None:
    stored = {"storage": Storage("nf4"), "compute_dtype": torch.float32}
    twin = train_steps(build(llama, **stored), sequences, steps=2)
    model = build(llama, weights="host", activations=activations, dequantize="layer", poison=True, **stored)
    mine = train_steps(model, sequences, steps=2)
    assert mine[0] == twin[0]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], twin[1], strict=True))


def test_a_dequantized_layer_gives_the_numbers_of_the_quantized_one(llama, sequences) -> None:
    batches = cut_packed(sequences, 64, 8, 0)
    stored = {"storage": Storage("nf4"), "compute_dtype": torch.float32}
    assert nats(build(llama, weights="dequantized", **stored), batches) == nats(build(llama, **stored), batches)


def test_a_slot_that_is_evicted_while_in_use_is_noticed(llama, sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the poisoned ring: a layer that does not mark its slot as used reads NaN."""
    original = Residency.acquire

    def careless(self, layer, **walk):
        views = original(self, layer, **walk)
        slot = self._slot_of(layer)
        slot.users -= 1
        self._copy_into(slot, (layer + 1) % LAYERS)
        slot.buffer.fill_(0xFF)
        slot.users += 1
        return views

    monkeypatch.setattr(Residency, "acquire", careless)
    monkeypatch.setattr(Residency, "release", lambda self, layer: None)
    model = build(llama, weights="host", slots=4, poison=True)
    assert nats(model, cut_packed(sequences, 64, 8, 0)) != pytest.approx(transformers_nats(llama, sequences), rel=1e-2)


def test_a_training_walk_copies_each_layer_twice_less_what_is_still_there(llama, sequences) -> None:
    model = build(llama, weights="host", activations="recompute", slots=2)
    batch = cut_packed(sequences, 128, 8, 0)[0]
    for _ in range(3):
        before = model.residency.copies
        model.sum_nats(batch, scale=0.01)[0].backward()
        copies = model.residency.copies - before
    assert copies == 2 * LAYERS - 4, "two slots save two copies at either turn"


def test_recomputation_and_offload_save_only_layer_inputs(llama, sequences) -> None:
    def saved_bytes(**placement: object) -> int:
        model = build(llama, **placement)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss, _ = model.sum_nats(cut_packed(sequences, 128, 8, 0)[0])
        del loss
        return sum(seen.values())

    assert saved_bytes(activations="recompute") < 0.25 * saved_bytes(activations="keep")
    assert saved_bytes(activations="offload") <= saved_bytes(activations="recompute")


def test_the_gradient_does_not_depend_on_how_a_step_is_cut(llama) -> None:
    sequences = random_sequences([11, 30, 7, 19, 3, 25, 14, 9, 28, 5, 16, 21, 8, 12])
    counted = sum(len(s) - 1 for s in sequences)

    def gradient(batches: list) -> torch.Tensor:
        model = build(llama)
        for batch in batches:
            model.sum_nats(batch, scale=1 / counted, dropout_seed=(3, 0))[0].backward()
        return torch.cat([p.grad.flatten() for p in model.adapter.parameters()])

    whole = gradient(cut_padded(sequences, 14, 16, 0))
    for n in (1, 2, 7):
        assert float((gradient(cut_padded(sequences, n, 16, 0)) - whole).norm() / whole.norm()) < 1e-6
    assert float((gradient(cut_packed(sequences, 64, 16, 0)) - whole).norm() / whole.norm()) < 2e-6
    model = build(llama)
    for batch in cut_padded(sequences, 2, 16, 0):
        model.sum_nats(batch, scale=1 / (7 * batch.counted_tokens), dropout_seed=(3, 0))[0].backward()
    wrong = torch.cat([p.grad.flatten() for p in model.adapter.parameters()])
    assert float((wrong - whole).norm() / whole.norm()) > 1e-3, "the test can tell a mean of means"


def test_building_another_skeleton_changes_nothing(llama, sequences) -> None:
    model = build(llama)
    batches = cut_packed(sequences, 128, 8, 0)
    before = nats(model, batches)
    build_anatomy(llama.config, attention="eager")
    build_anatomy(llama.config, attention="sdpa")
    assert nats(model, batches) == before == pytest.approx(transformers_nats(llama, sequences), rel=1e-5)


def test_dropout_is_on_in_training_and_off_in_evaluation(llama, sequences) -> None:
    model = build(llama, LoraSection(r=4, lora_dropout=0.5))
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.normal_(0, 0.1)
    batch = cut_packed(sequences, 128, 8, 0)[0]
    with torch.no_grad():
        plain, again = float(model.sum_nats(batch)[0]), float(model.sum_nats(batch)[0])
        dropped = float(model.sum_nats(batch, dropout_seed=(1, 0))[0])
        other_seed = float(model.sum_nats(batch, dropout_seed=(2, 0))[0])
    assert plain == again
    assert len({plain, dropped, other_seed}) == 3


def test_nothing_of_the_base_model_is_trained_or_moves(llama, sequences) -> None:
    model = build(llama)
    before = {i: {k: v.clone() for k, v in model.residency.stored(i).items()} for i in range(LAYERS)}
    train_steps(model, sequences, steps=2)
    assert all(torch.equal(v, model.residency.stored(i)[k]) for i in before for k, v in before[i].items())
    assert all(not p.requires_grad for p in model.anatomy.skeleton.parameters() if not p.is_meta)


def test_a_mixed_placement_does_not_exhaust_the_compilers_versions(llama: Checkpoint) -> None:
    """torch's own limit of 8 once made layers run uncompiled: gradients or not, whole or not, and a few shapes."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        build(llama, compiled=True)
        assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT > 8


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_nothing_holds_a_model_that_was_trained(
    llama, sequences, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    """torch 2.11's compiler keeps nodes of backward; a run that loads a second model has to have the first's memory."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = build(llama, activations=activations, compiled=True)
    train_steps(model, sequences, steps=2)
    parts = [weakref.ref(part) for part in (model, model.runner, model.residency, model.head, model.embedding)]
    del model
    torch._dynamo.reset()
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
