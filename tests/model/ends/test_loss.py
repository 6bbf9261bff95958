"""The loss without logits against the plain one: values, gradients, precision, memory, and the ring of slots."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drawplate.layout import loss_tile
from drawplate.model.ends.head import Head, ResidentRows, StreamedRows
from drawplate.model.ends.loss import IGNORED, head_cross_entropy
from drawplate.model.ends.loss_tile import LossShape, Tile

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VARIANTS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scaled": {"logit_scale": 0.25},
    "all": {"softcap": 3.0, "logit_scale": 1.7, "bias": True},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles of tokens even in tiny cases, and columns no multiple of anything."""
    monkeypatch.setattr(loss_tile, "TILE_TOKENS", {"cpu": 16, "cuda": 16})


def problem(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_NH, weight_VH, targets_N) with a third of the targets ignored and one in the last row."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(tokens, hidden, generator=generator)
    weight_VH = torch.randn(vocab, hidden, generator=generator) * 0.3
    targets_N = torch.randint(0, vocab, (tokens,), generator=generator)
    targets_N[torch.rand(tokens, generator=generator) < 0.33] = IGNORED
    targets_N[0] = vocab - 1
    return hidden_NH.to(device, dtype), weight_VH.to(device, dtype), targets_N.to(device)


def head_of(weight_VH: Tensor, *, bias: bool = False, stream_rows: int | None = None, **options: float) -> Head:
    rows = ResidentRows(weight_VH)
    if stream_rows is not None:
        rows = StreamedRows(weight_VH.cpu(), weight_VH.device, slot_rows=stream_rows, poison=True)
    bias_V = torch.linspace(-1, 1, len(weight_VH)).to(weight_VH) if bias else None
    return Head(weights=rows, bias=bias_V, workspace_bytes=1, **options)  # 1 byte: the smallest tile there is


def run(hidden_NH: Tensor, head: Head, targets_N: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH = hidden_NH.detach().clone().requires_grad_()
    loss, nats_N = head_cross_entropy(hidden_NH, head, targets_N, **options)
    loss.backward()
    return loss.detach(), nats_N, hidden_NH.grad


def truth(hidden_NH: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own cross-entropy on float64 logits, written out without this module."""
    weight_VH = torch.cat([rows.clone() for _, rows in head.weights.chunks()]).double()
    hidden_NH = hidden_NH.detach().double().requires_grad_()
    logits_NV = F.linear(hidden_NH, weight_VH, None if head.bias is None else head.bias.double()) * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    nats_N = F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORED)
    nats_N.sum().backward()
    return nats_N.sum().detach(), nats_N.detach(), hidden_NH.grad


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream_rows", [None, 100, 257, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_float32_equals_float64_cross_entropy(variant, stream_rows, device, impl):
    hidden_NH, weight_VH, targets_N = problem(37, 19, 777, device=device)
    head = head_of(weight_VH, stream_rows=stream_rows, **VARIANTS[variant])
    for value, expected in zip(
        run(hidden_NH, head, targets_N, impl=impl), truth(hidden_NH, head, targets_N), strict=True
    ):
        assert relative(value, expected) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("certainty", [0.0, 1.5], ids=["unsure", "sure"])
def test_low_precision_errs_no_more_than_the_plain_loss(variant, dtype, device, certainty):
    """But for a quarter: a CPU's bf16 products are rounded once a tile, the plain loss's once."""
    hidden_NH, weight_VH, targets_N = problem(200, 96, 1500, dtype, device)
    # A model that knows its target: differences of nearly equal numbers would show.
    hidden_NH = (hidden_NH + certainty * weight_VH[targets_N.clamp(min=0)]).to(dtype)
    head = head_of(weight_VH, stream_rows=512, **VARIANTS[variant])
    ours = run(hidden_NH, head, targets_N)
    plain = run(hidden_NH, head, targets_N, impl="reference")
    exact = truth(hidden_NH, head, targets_N)
    assert ours[2].dtype == dtype
    assert ours[0].dtype == torch.float32
    for value, reference, expected in zip(ours, plain, exact, strict=True):
        assert relative(value, expected) <= 1.25 * relative(reference, expected) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_err_no_more_than_the_plain_loss(variant, dtype):
    """In Triton's interpreter where there is no GPU; odd sizes, and a softcap's slope."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_NH, weight_VH, targets_N = problem(21, 40, 601, dtype, device)
    head = head_of(weight_VH, stream_rows=333, **VARIANTS[variant])
    plain = run(hidden_NH, head, targets_N, impl="reference")
    exact = truth(hidden_NH, head, targets_N)
    for value, reference, expected in zip(run(hidden_NH, head, targets_N, impl="triton"), plain, exact, strict=True):
        assert relative(value, expected) <= 1.25 * relative(reference, expected) + 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant):
    hidden_NH, weight_VH, targets_N = problem(5, 4, 300, torch.float64)
    head = head_of(weight_VH, stream_rows=70, **VARIANTS[variant])
    hidden_NH.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head_cross_entropy(x, head, targets_N)[0], hidden_NH)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_gives_the_same_nats_without_a_gradient(device):
    hidden_NH, weight_VH, targets_N = problem(50, 16, 700, device=device)
    head = head_of(weight_VH, stream_rows=300, softcap=10.0)
    loss, nats_N, _ = run(hidden_NH, head, targets_N)
    with torch.no_grad():
        evaluated, evaluated_N = head_cross_entropy(hidden_NH.requires_grad_(), head, targets_N)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, loss)
    assert torch.equal(evaluated_N, nats_N)
    assert (evaluated_N[targets_N == IGNORED] == 0).all()
    assert torch.allclose(evaluated_N.sum(), loss)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_counts(device):
    hidden_NH, weight_VH, targets_N = problem(9, 8, 300, device=device)
    targets_N.fill_(IGNORED)
    loss, nats_N, grad_NH = run(hidden_NH, head_of(weight_VH, stream_rows=100), targets_N)
    assert loss == 0
    assert (nats_N == 0).all()
    assert (grad_NH == 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 256, 257])
def test_tiny_and_uneven_vocabularies(vocab):
    hidden_NH, weight_VH, targets_N = problem(7, 3, vocab)
    head = head_of(weight_VH, stream_rows=2)
    loss, _, grad_NH = run(hidden_NH, head, targets_N)
    expected, _, expected_NH = truth(hidden_NH, head, targets_N)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)
    assert torch.allclose(grad_NH.double(), expected_NH, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_large_logits_do_not_overflow(dtype, device):
    hidden_NH, weight_VH, targets_N = problem(20, 16, 600, dtype, device)
    head = head_of((weight_VH * 2000).to(dtype), stream_rows=100)
    loss, _, grad_NH = run(hidden_NH, head, targets_N)
    expected, _, expected_NH = truth(hidden_NH, head, targets_N)
    assert relative(loss, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative(grad_NH, expected_NH) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_gradients_are_scaled_before_they_are_rounded(device):
    hidden_NH, weight_VH, targets_N = problem(40, 16, 300, torch.float16, device)
    head = head_of(weight_VH)
    exact = truth(hidden_NH, head, targets_N)
    scale = torch.tensor(2.0**-20, device=device)
    underflown = run(hidden_NH, head, targets_N, scale=2.0**-28)[2]
    assert relative(underflown, exact[2] * 2.0**-28) > 0.5
    both = run(hidden_NH, head, targets_N, scale=scale * 2.0**24)
    assert relative(both[0], exact[0] * 16) < 1e-3
    assert relative(both[1], exact[1]) < 1e-3
    assert relative(both[2], exact[2] * 16) < 2e-3


def test_backward_multiplies_by_the_incoming_gradient_and_repeats():
    hidden_NH, weight_VH, targets_N = problem(12, 8, 300)
    head = head_of(weight_VH)
    expected = run(hidden_NH, head, targets_N)[2]
    hidden_NH.requires_grad_()
    loss, _ = head_cross_entropy(hidden_NH, head, targets_N)
    (loss * 3).backward(retain_graph=True)
    (loss * 2).backward()
    assert torch.allclose(hidden_NH.grad, expected * 5)


def test_the_cut_into_batches_changes_nothing():
    hidden_NH, weight_VH, targets_N = problem(48, 24, 900)
    head = head_of(weight_VH, stream_rows=333)
    whole = run(hidden_NH, head, targets_N)
    parts = [run(x, head, y) for x, y in zip(hidden_NH.split(11), targets_N.split(11), strict=True)]
    assert torch.allclose(sum(part[0] for part in parts), whole[0], rtol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), whole[1], rtol=1e-6, atol=1e-7)
    assert torch.allclose(torch.cat([part[2] for part in parts]), whole[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_saves_the_count_may_be_larger_and_too_small_a_one_is_loud(device, variant):
    hidden_NH, weight_VH, targets_N = problem(30, 8, 300, device=device)
    head = head_of(weight_VH, **VARIANTS[variant])
    counted = int((targets_N != IGNORED).sum())
    expected = run(hidden_NH, head, targets_N)
    for value, wanted in zip(run(hidden_NH, head, targets_N, counted=counted), expected, strict=True):
        assert torch.equal(value, wanted)
    for more in (counted + 1, 30):
        for value, wanted in zip(run(hidden_NH, head, targets_N, counted=more), expected, strict=True):
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)
    assert math.isnan(run(hidden_NH, head, targets_N, counted=counted - 1)[0])


def test_a_target_outside_the_vocabulary_is_not_silent():
    hidden_NH, weight_VH, targets_N = problem(6, 8, 300)
    targets_N[2] = 300
    assert math.isnan(run(hidden_NH, head_of(weight_VH), targets_N)[0])


def test_shapes_that_do_not_belong_together_are_refused():
    hidden_NH, weight_VH, targets_N = problem(6, 8, 300)
    with pytest.raises(ValueError, match="flatten batch and time"):
        head_cross_entropy(hidden_NH[None], head_of(weight_VH), targets_N)
    with pytest.raises(ValueError, match="flatten batch and time"):
        head_cross_entropy(hidden_NH, head_of(weight_VH), targets_N[:5])


def test_a_head_in_another_dtype_is_used_in_the_hidden_states():
    hidden_NH, weight_VH, targets_N = problem(10, 8, 400)
    low = head_of(weight_VH.bfloat16(), stream_rows=99)
    assert relative(run(hidden_NH, low, targets_N)[2], truth(hidden_NH, low, targets_N)[2]) < 1e-5


def test_autocast_does_not_reach_inside():
    hidden_NH, weight_VH, targets_N = problem(10, 8, 400)
    expected = run(hidden_NH, head_of(weight_VH), targets_N)[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(hidden_NH, head_of(weight_VH), targets_N)[2], expected)


class TestStreamedRows:
    def test_every_row_once_in_order_pass_after_pass(self):
        weight_VH = torch.randn(103, 4)
        rows = StreamedRows(weight_VH, torch.device("cpu"), slot_rows=25, poison=True)
        for _ in range(3):
            rows.prefetch()
            seen = [(first, chunk.clone()) for first, chunk in rows.chunks()]
            assert [first for first, _ in seen] == [0, 25, 50, 75, 100]
            assert torch.equal(torch.cat([chunk for _, chunk in seen]), weight_VH)

    def test_a_view_kept_too_long_turns_to_nan(self):
        rows = StreamedRows(torch.randn(100, 4), torch.device("cpu"), slot_rows=25, poison=True)
        kept = [chunk for _, chunk in rows.chunks()]
        assert all(chunk.isnan().all() for chunk in kept)

    def test_a_pass_broken_off_does_not_harm_the_next(self):
        weight_VH = torch.randn(100, 4)
        rows = StreamedRows(weight_VH, torch.device("cpu"), slot_rows=30, poison=True)
        for _ in rows.chunks():
            break
        assert torch.equal(torch.cat([chunk.clone() for _, chunk in rows.chunks()]), weight_VH)

    def test_slots_hold_no_more_than_the_head(self):
        assert StreamedRows(torch.zeros(10, 4), torch.device("cpu"), slot_rows=99).device_bytes == 2 * 10 * 4 * 4

    @pytest.mark.gpu
    def test_copies_overlap_and_arrive_on_a_gpu(self):
        weight_VH = torch.randn(20_000, 256).bfloat16().pin_memory()
        rows = StreamedRows(weight_VH, torch.device("cuda"), slot_rows=999, poison=True)
        hidden_NH, _, targets_N = problem(300, 256, 20_000, torch.bfloat16, "cuda")
        resident = run(hidden_NH, Head(weights=ResidentRows(weight_VH.cuda())), targets_N)
        for _ in range(5):
            streamed = run(hidden_NH, Head(weights=rows), targets_N)
            assert relative(streamed[0], resident[0]) < 1e-5
            assert relative(streamed[2], resident[2]) < 5e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("targets_on", ["cuda", "cpu"])
def test_a_gpu_is_not_waited_for_and_the_workspace_is_as_planned(monkeypatch, targets_on):
    monkeypatch.undo()
    hidden_NH, weight_VH, targets_N = problem(4096, 512, 32_000, torch.bfloat16, "cuda")
    head = Head(weights=ResidentRows(weight_VH), workspace_bytes=64 * 2**20)
    counted = int((targets_N != IGNORED).sum())
    hidden_NH.requires_grad_()
    targets_N = targets_N.to(targets_on)
    head_cross_entropy(hidden_NH, head, targets_N, counted=counted)  # cuBLAS takes its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss, _ = head_cross_entropy(hidden_NH, head, targets_N, counted=counted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    planned = loss_workspace_bytes(LossShape.of(hidden_NH, head), 4096, counted=counted)
    assert 0.9 * planned < peak < 1.05 * planned
    loss.backward()


def loss_workspace_bytes(shape: LossShape, tokens: int, *, counted: int | None = None) -> int:
    """Peak bytes that `head_cross_entropy` allocates while it runs; the head itself and its slots are not among them.

    One tile of logits and 11 numbers of 4 to 8 bytes for each token that counts. If some do not count, a copy of the
    hidden states of those that do (C * H elements). In training also their float32 accumulator and their targets'
    rows (C * H elements each), and where products cannot add to float32 (a CPU in bf16) one block's product (B * H
    elements). Afterwards only the gradient stays until backward, which makes another N * H.
    Blind to the allocator's rounding and to the workspace of cuBLAS and oneDNN.

    Args:
        shape: the numbers, from a head (`LossShape.of`) or from a configuration.
        tokens: of the micro-batch.
        counted: those whose target is not ignored; None for all.
    """
    counted = tokens if counted is None else counted
    size, tile = shape.dtype.itemsize, Tile.of(shape, counted)
    total = tile.bytes + counted * 11 * 4
    if counted < tokens:
        total += counted * shape.hidden * size
    if shape.training:
        total += counted * shape.hidden * (tile.sum_dtype.itemsize + size)
    return total


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The scratch memory of torch's reductions and of oneDNN grows with the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_formula_covers_what_is_allocated(monkeypatch, training, dtype):
    """Counted by torch's own profiler: the peak of live bytes, without the logits ever among them."""
    monkeypatch.undo()
    hidden_NH, weight_VH, targets_N = problem(600, 64, 20_000, dtype)
    head = Head(weights=ResidentRows(weight_VH), workspace_bytes=2**20)
    hidden_NH.requires_grad_(training)
    with torch.profiler.profile(profile_memory=True) as profile:
        head_cross_entropy(hidden_NH, head, targets_N)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    counted = int((targets_N != IGNORED).sum())
    planned = loss_workspace_bytes(LossShape.of(hidden_NH, head, training=training), 600, counted=counted)
    assert peak < 600 * 20_000 * dtype.itemsize / 4
    scratch = 200_000  # of one product, which the formula leaves out; logits would take 24 MB or more
    assert 0.8 * planned < peak <= 1.02 * planned + scratch
