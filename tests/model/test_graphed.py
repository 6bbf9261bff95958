"""Captured micro-steps against launched ones: the same gradients, the same memory, and no more of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.shapes import random_checkpoint
from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.errors import EnvironmentProblem
from drawplate.model.adapter import lora_config
from drawplate.model.assemble import assemble
from drawplate.model.causal_lm import CausalLM, Placement
from drawplate.model.device_batch import DeviceBatch
from drawplate.model.graphed import GraphedSteps
from drawplate.model.storage import Storage
from drawplate.model.weights import Checkpoint
from drawplate.recipe import LoraSection
from tests.model.conftest import random_sequences

CUBLAS_WORKSPACE_BYTES = 256 * 2**20
"""cuBLAS and cuBLASLt keep 32 MiB each for every stream; capture has one of its own. Rounded up for the allocator."""


def build(checkpoint: object, **placement: object) -> CausalLM:
    torch.manual_seed(11)
    section = LoraSection(r=8, lora_dropout=0.1)
    model = assemble(
        checkpoint,  # type: ignore[arg-type]
        Placement(**placement),  # type: ignore[arg-type]
        lambda anatomy: lora_config(section, anatomy, "random", None),
        seed=0,
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def steps(model: CausalLM, batches: list[Batch], count: int) -> list[torch.Tensor]:
    """Nats and gradients of some optimizer steps, each a flat tensor; the adapter changes in between."""
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-4)
    out = []
    for step in range(count):
        model.adapter.zero_gradients()
        nats = sum(model.add_gradients(b, scale=1e-3 * (step + 1), dropout_seed=(3, step)).clone() for b in batches)
        gradients = [p.grad.flatten().double() for p in model.adapter.parameters()]
        out.append(torch.cat([nats[None], *gradients]).cpu())
        optimizer.step()
    return out


def test_added_gradients_are_those_of_the_summed_loss(llama: Checkpoint, sequences: list) -> None:
    cpu = {"storage": Storage("fp32"), "compute_dtype": torch.float32}
    model, twin = build(llama, **cpu), build(llama, **cpu)
    batches = cut_packed(sequences, 64, 16, 0)
    model.adapter.zero_gradients()
    for batch in batches:
        nats = model.add_gradients(batch, scale=0.5, dropout_seed=(0, 1))
        loss, nats_N = twin.sum_nats(batch, scale=0.5, dropout_seed=(0, 1))
        loss.backward()
        assert torch.allclose(nats, nats_N.double().sum())
    for ours, theirs in zip(model.adapter.parameters(), twin.adapter.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    before = model.adapter.parameters()[0].grad.data_ptr()
    model.adapter.zero_gradients()
    assert model.adapter.parameters()[0].grad.data_ptr() == before, "a graph adds to where it was captured"
    assert not any(p.grad.any() for p in model.adapter.parameters())


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_micro_step_on_leaves_of_its_own_adds_the_same_gradients(
    llama: Checkpoint, sequences: list, activations: str
) -> None:
    cpu = {"storage": Storage("fp32"), "compute_dtype": torch.float32, "activations": activations}
    model, twin = build(llama, **cpu), build(llama, **cpu)
    graphed = GraphedSteps(model._nats, model.adapter, nothing)
    model.adapter.zero_gradients()
    twin.adapter.zero_gradients()
    for batch in cut_packed(sequences, 64, 16, 0):
        graphed._add_gradients(model.placed(batch, (0, 1)), torch.tensor(0.5))
        twin.add_gradients(batch, scale=0.5, dropout_seed=(0, 1))
    for ours, theirs in zip(model.adapter.parameters(), twin.adapter.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.any()
    assert model.adapter.of_layer(0) is model.adapter.layers[0], "the leaves are gone"


def test_adapters_of_modules_that_are_never_called_get_no_gradient(llama: Checkpoint, sequences: list) -> None:
    model = build(llama, storage=Storage("fp32"), compute_dtype=torch.float32)
    model.adapter.zero_gradients()

    def step(batch: DeviceBatch, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        used = next(iter(model.adapter.of_layer(0).values()))
        return used.sum() * scale, torch.zeros(1)

    batch = model.placed(cut_packed(sequences, 64, 16, 0)[0], None)
    GraphedSteps(step, model.adapter, nothing)._add_gradients(batch, torch.tensor(2.0))
    first, *others = model.adapter.parameters()
    assert (first.grad == 2).all()
    assert not any(p.grad.any() for p in others)


def nothing() -> None:
    """There are no streams to bring together."""


class BrokenOff:
    """As torch.cuda.graph: the end of a capture that was broken off complains of that."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        raise RuntimeError("capturing stream has unjoined work")


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("waits for the device"),
        EnvironmentProblem("no page locks", safe="", next_step=""),
        KeyboardInterrupt("asked to stop"),
    ],
)
def test_a_capture_that_was_broken_off_says_why(
    llama: Checkpoint, sequences: list, cause: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(llama, storage=Storage("fp32"), compute_dtype=torch.float32)
    model.adapter.zero_gradients()
    batch, calls = model.placed(cut_packed(sequences, 64, 16, 0)[0], None), []

    def step(batch: DeviceBatch, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise cause
        return model._nats(batch, scale)

    graphed = GraphedSteps(step, model.adapter, nothing)
    for name, fake in (("graph", BrokenOff), ("CUDAGraph", object), ("graph_pool_handle", object)):
        monkeypatch.setattr(torch.cuda, name, fake)
    nats = graphed.run(batch, 1.0)
    if str(cause) != "waits for the device":
        with pytest.raises(type(cause), match=str(cause).partition("\n")[0]):
            graphed.run(batch, 1.0)
        return
    with pytest.warns(UserWarning, match="waits for the device"):
        assert torch.equal(graphed.run(batch, 1.0), nats), "launched instead"
    assert graphed.refused == "waits for the device"


def launched(model: CausalLM) -> CausalLM:
    """Micro-steps of the same shapes, never captured."""
    steps_ = model.graphed
    assert steps_ is not None
    steps_.run = lambda batch, scale: steps_._add_gradients(  # type: ignore[method-assign]
        batch.roomier(), torch.full((), scale, device="cuda")
    )
    return model


@pytest.fixture
def deterministic_attention() -> Iterator[None]:
    """Flash attention's backward adds in any order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
@pytest.mark.parametrize("activations", ["keep", "recompute", ("host", "host", "keep")])
def test_replays_give_the_bits_of_launches(compiled: bool, precision: str, activations: str | tuple) -> None:
    checkpoint = random_checkpoint("1b", layers=3)
    lengths = [256, 200, 256, 256, 120, 250, 90, 256]
    batches = cut_padded(random_sequences(lengths), 2, 256, 0)
    where = {"device": torch.device("cuda", 0), "storage": Storage(precision), "compiled": compiled}
    plain, graphed = (build(checkpoint, activations=activations, graphs=True, **where) for _ in range(2))
    launched(plain)
    for ours, theirs in zip(steps(graphed, batches, 3), steps(plain, batches, 3), strict=True):
        assert torch.equal(ours, theirs)
    assert graphed.graphed is not None
    assert graphed.graphed.replays >= 2 * len(batches), "all but the first of each shape"
    assert (graphed.runner.activations.host_bytes > 0) == ("host" in activations)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_attention")
def test_replays_read_their_own_tokens_rows_of_an_embedding_in_host_memory() -> None:
    checkpoint = random_checkpoint("8b", layers=1)
    batches = cut_padded(random_sequences([256, 200, 256, 256, 120, 250]), 2, 256, 0)
    where = {"device": torch.device("cuda", 0), "graphs": True}
    here, there = (build(checkpoint, embedding=embedding, **where) for embedding in ("device", "host"))
    assert there.embedding.weight.device.type == "cpu"
    assert there.embedding.weight.is_pinned()
    for ours, theirs in zip(steps(there, batches, 3), steps(here, batches, 3), strict=True):
        assert torch.equal(ours, theirs)
    assert there.graphed is not None
    assert there.graphed.replays >= 2 * len(batches)


@pytest.mark.gpu
def test_packed_rows_of_many_widths_replay_within_the_spread_of_launches() -> None:
    checkpoint = random_checkpoint("1b", layers=3)
    lengths = torch.randint(20, 500, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = cut_packed(random_sequences(lengths), 1024, 16, 0)
    where = {"device": torch.device("cuda", 0), "compiled": True}
    graphed, plain, again = (build(checkpoint, graphs=True, **where) for _ in range(3))
    runs = [steps(model, batches, 2) for model in (graphed, launched(plain), launched(again))]
    for ours, theirs, again in zip(*runs, strict=True):
        spread = float((again - theirs).norm() / theirs.norm())
        assert float((ours - theirs).norm() / theirs.norm()) <= 3 * spread + 1e-4


@pytest.mark.gpu
def test_graphs_take_the_memory_of_a_step_and_give_it_back(record_property: Callable[[str, object], None]) -> None:
    checkpoint = random_checkpoint("1b", layers=6)
    large, small = (cut_padded(random_sequences([n] * 2), 2, 16, 0)[0] for n in (1024, 512))

    def peaks(graphs: bool) -> list[int]:
        torch.cuda.empty_cache()
        model, out = build(checkpoint, device=torch.device("cuda", 0), graphs=graphs), []
        for batches in ([small] * 3, [large] * 3, [small, large, small, large]):
            torch.cuda.reset_peak_memory_stats()
            steps(model, batches, 2)
            out.append(torch.cuda.max_memory_reserved())
        model.forget_graphs()
        model.adapter.drop_gradients()
        torch.cuda.empty_cache()
        return [*out, torch.cuda.memory_reserved()]

    launched, captured = peaks(False), peaks(True)
    beyond = [graphs - none for graphs, none in zip(captured, launched, strict=True)]
    record_property("reserved_launched_bytes", launched)
    record_property("reserved_beyond_that_when_captured_bytes", beyond)
    for more, none in zip(beyond[1:], launched[1:], strict=True):
        assert more <= 0.05 * none + CUBLAS_WORKSPACE_BYTES, f"{beyond} beyond {launched}"
