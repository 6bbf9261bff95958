"""The loop: sums over an optimizer step however it is cut, schedules, and what happens when a step goes wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drawplate.train.loop as loop
from drawplate.data.batches import Cutting, cut_padded
from drawplate.errors import DoesNotFit, NumericError, StoppedSafely
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.recipe import LoraSection, TrainSection
from drawplate.records import Evaluation, Sequence, StepRecord
from drawplate.train.guards import StopSignals
from drawplate.train.loop import train
from drawplate.train.task import Schedule, TrainState, TrainTask
from tests.model.conftest import random_sequences
from tests.tiny import Notes, tiny_model, write_base

PACKED = Cutting(packing=True, tokens=64, pad_to_multiple_of=8)
CONSTANT = Schedule(steps=4, peak_rate=1e-2, kind="constant", warmup_ratio=0.0)
DROPPING = LoraSection(r=4, lora_alpha=8, lora_dropout=0.3)


def padded(sequences: int, pad_to_multiple_of: int = 8) -> Cutting:
    return Cutting(packing=False, tokens=64, sequences=sequences, pad_to_multiple_of=pad_to_multiple_of)


def task_of(model: CausalLM, **changes: Any) -> TrainTask:
    values = {
        "sequences": random_sequences([17, 5, 30, 9, 12, 23, 8]),
        "cutting": PACKED,
        "effective_batch": 4,
        "schedule": CONSTANT,
        "section": TrainSection(),
    }
    return TrainTask(model=model, **{**values, **changes})


def run(task: TrainTask, state: TrainState | None = None) -> tuple[Notes, TrainState]:
    notes = Notes()
    return notes, train(task, notes, state or TrainState())


def losses(notes: Notes) -> list[float]:
    return [record.loss for record in notes.steps]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the guard against numbers that are not finite."""
    monkeypatch.setattr(loop, "math", SimpleNamespace(isfinite=lambda _: True, cos=math.cos, pi=math.pi))


# --- what a step adds up -----------------------------------------------------------------------------------------


class _Gradients(Notes):
    """Copies the gradients of each step."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self.gradients = model, []

    def on_step(self, record: StepRecord, progress: float) -> None:
        super().on_step(record, progress)
        self.gradients.append(gradient_of(self.model))


def gradient_of(model: CausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in model.adapter.parameters()])


@pytest.mark.parametrize("cutting", [padded(1), padded(2), padded(3, 16), PACKED], ids=["1", "2", "3", "packed"])
def test_every_step_of_an_epoch_has_the_gradient_of_its_documents(base: Path, cutting: Cutting) -> None:
    """Seven sequences in steps of three: the last, shorter group counts its own tokens and no more."""
    model = tiny_model(base)
    still = replace(CONSTANT, peak_rate=0.0)
    task = task_of(model, effective_batch=3, cutting=cutting, section=TrainSection(max_grad_norm=1e9), schedule=still)
    notes = _Gradients(model)
    train(task, notes, TrainState())
    for step, got in enumerate(notes.gradients):
        group = [task.sequences[i] for i in task.order.indices(step)]
        assert len(group) == (1 if step == 2 else 3)
        counts = [len(s) - 1 for s in group]
        want = gradient_of_scaled(model, group, [1 / sum(counts)] * len(group))
        mean_of_means = gradient_of_scaled(model, group, [1 / (len(group) * count) for count in counts])
        assert float((got - want).norm() / want.norm()) < 2e-6
        if len(group) > 1:
            assert float((got - mean_of_means).norm() / want.norm()) > 1e-3, "the test can tell a mean of means"


def gradient_of_scaled(model: CausalLM, group: list[Sequence], scales: list[float]) -> torch.Tensor:
    for parameter in model.adapter.parameters():
        parameter.grad = None
    for sequence, scale in zip(group, scales, strict=True):
        model.sum_nats(cut_padded([sequence], 1, 1, 0)[0], scale=scale)[0].backward()
    return gradient_of(model)


def test_padding_to_a_multiple_changes_no_loss(base: Path) -> None:
    reference, _ = run(task_of(tiny_model(base), cutting=padded(2, 1)))
    for multiple in (2, 16, 64):
        notes, _ = run(task_of(tiny_model(base), cutting=padded(2, multiple)))
        assert losses(notes) == pytest.approx(losses(reference), rel=1e-5)
        assert {batch.input_ids_BT.shape[1] % multiple for _, batch in notes.batches} == {0}
        assert [r.tokens for r in notes.steps] == [r.tokens for r in reference.steps], "padding is not counted"


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_gradient_checkpointing_changes_no_bit_with_dropout_on(base: Path, activations: str) -> None:
    kept, recomputed = tiny_model(base, DROPPING), tiny_model(base, DROPPING, activations=activations)
    assert losses(run(task_of(kept))[0]) == losses(run(task_of(recomputed))[0])
    assert same(kept.adapter.state(), recomputed.adapter.state())


def test_a_mask_drawn_anew_in_backward_would_be_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(key: torch.Tensor, features: int, dropout: float, dtype: torch.dtype) -> torch.Tensor:
        return (torch.rand(*key.shape, features) >= dropout).to(dtype) / (1 - dropout)

    monkeypatch.setattr("drawplate.kernels.dropped_product.dropout_mask", drawn)
    states = []
    for activations in ("keep", "recompute"):
        torch.manual_seed(0)
        model = tiny_model(base, DROPPING, activations=activations)
        run(task_of(model))
        states.append(model.adapter.state())
    assert not same(*states)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not(base: Path) -> None:
    def trained(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tiny_model(base, DROPPING, seed=seed)
        notes, _ = run(task_of(model, section=TrainSection(seed=seed)))
        return losses(notes), model.adapter.state()

    first, again, other = trained(1), trained(1), trained(2)
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert first[0] != other[0]


def test_training_lowers_the_loss_and_adamw_8bit_does_too(base: Path) -> None:
    for optim in ("adamw_torch", "adamw_8bit"):
        schedule = replace(CONSTANT, steps=30)
        _, state = run(task_of(tiny_model(base), schedule=schedule, section=TrainSection(optim=optim)))
        assert state.last_loss < 0.95 * state.first_loss, optim


# --- precision ---------------------------------------------------------------------------------------------------


def test_bf16_and_fp16_follow_fp32(base: Path) -> None:
    reference = losses(run(task_of(tiny_model(base)))[0])
    for dtype in (torch.bfloat16, torch.float16):
        fp16 = dtype == torch.float16
        state = TrainState(loss_scale=loop.INITIAL_LOSS_SCALE if fp16 else 1.0)
        notes, _ = run(task_of(tiny_model(base, compute_dtype=dtype), fp16=fp16), state)
        assert losses(notes) == pytest.approx(reference, rel=2e-2)
        assert losses(notes) != reference, "really computed in another precision"


def test_a_loss_scale_is_taken_out_of_the_gradient_again(base: Path) -> None:
    plain, scaled = tiny_model(base), tiny_model(base)
    run(task_of(plain))
    run(task_of(scaled, fp16=True), TrainState(loss_scale=2.0**12))
    assert same(plain.adapter.state(), scaled.adapter.state())


def spoil_gradient_of(model: CausalLM, step: int, value: float) -> Notes:
    """From the given step's first backward on, for that step only, one gradient holds `value`."""
    notes = Notes()
    parameter = model.adapter.parameters()[1]
    parameter.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([0]), value) if len_of(notes) == step else grad
    )
    return notes


def len_of(notes: Notes) -> int:
    return notes.steps.newest.step + 1 if notes.steps.newest else 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_fp16_overflow_is_skipped_and_reported_and_training_goes_on(base: Path, value: float) -> None:
    model = tiny_model(base, compute_dtype=torch.float16)
    notes = spoil_gradient_of(model, 2, value)
    states: list[dict[str, torch.Tensor]] = []
    original = notes.on_step
    notes.on_step = lambda record, progress: (states.append(model.adapter.state()), original(record, progress))  # type: ignore[method-assign]
    state = train(task_of(model, fp16=True), notes, TrainState(loss_scale=1024.0))
    assert [record.skipped for record in notes.steps] == [False, True, False, False]
    assert same(states[0], states[1]), "the overflowing step changed nothing"
    assert not same(states[1], states[2])
    assert state.loss_scale == 512.0
    assert state.skipped_steps == 1
    assert state.step == 4
    assert notes.warnings == ["Step 2 overflowed fp16 and was skipped; loss scale is now 512."]


def test_without_the_overflow_guard_the_adapter_is_ruined(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base, compute_dtype=torch.float16)
    notes = spoil_gradient_of(model, 4, math.nan)
    blind(monkeypatch)
    train(task_of(model, fp16=True), notes, TrainState(loss_scale=1024.0))
    assert any(not tensor.isfinite().all() for tensor in model.adapter.state().values())


def test_a_real_overflow_finds_a_scale_that_fits(base: Path) -> None:
    model = tiny_model(base, compute_dtype=torch.float16)
    schedule = replace(CONSTANT, steps=40)
    notes, state = run(task_of(model, fp16=True, schedule=schedule), TrainState(loss_scale=2.0**28))
    assert 0 < state.skipped_steps < 30
    assert not notes.steps.newest.skipped
    assert state.loss_scale == 2.0 ** (28 - state.skipped_steps)
    assert state.last_loss < state.first_loss


def test_the_scale_grows_again_after_enough_good_steps(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SCALE_GROWTH_STEPS", 3)
    _, state = run(task_of(tiny_model(base), fp16=True), TrainState(loss_scale=8.0))
    assert state.loss_scale == 16.0


# --- not a number ------------------------------------------------------------------------------------------------


def poison(model: CausalLM, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of every micro-batch with the document in it is NaN."""
    original = model.sum_nats

    def sum_nats(batch: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, nats = original(batch, **options)
        return (loss * math.nan, nats * math.nan) if document in batch.documents else (loss, nats)

    monkeypatch.setattr(model, "sum_nats", sum_nats)


def test_a_loss_that_is_not_a_number_takes_no_step_and_names_the_documents(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(base)
    task = task_of(model, effective_batch=1, schedule=replace(CONSTANT, steps=7))
    turn = [int(task.order.indices(i)[0]) for i in range(7)].index(3)
    clean = tiny_model(base)
    run(replace(task, model=clean, schedule=replace(CONSTANT, steps=turn)))
    poison(model, "doc-3", monkeypatch)
    state, notes = TrainState(), _Stopping(turn + 1)
    with pytest.raises(InterruptedError):
        train(task, notes, state)
    assert notes.warnings == [
        f"The loss of step {turn + 1} is not a number. Documents in it: doc-3. The step is skipped."
    ]
    assert math.isnan(notes.steps.newest.loss), "and never smoothed"
    assert (state.step, state.skipped_steps) == (turn + 1, 1)
    assert state.last_loss is None or math.isfinite(state.last_loss)
    assert same(model.adapter.state(), clean.adapter.state()), "the adapter is that of the step before"


class _Stopping(Notes):
    """Ends the loop after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.last = step

    def on_step(self, record: StepRecord, progress: float) -> None:
        super().on_step(record, progress)
        if record.step == self.last:
            raise InterruptedError


def test_a_second_loss_that_is_not_a_number_ends_a_run_that_cannot_go_back(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(base)
    poison(model, "doc-3", monkeypatch)
    state = TrainState()
    with pytest.raises(NumericError, match=r"loss of step \d+ is not a number. Documents in it: .*doc-3") as error:
        train(task_of(model, effective_batch=7), Notes(), state)
    assert error.value.exit_code == 6
    assert state.step == 1
    assert "step 1" in error.value.safe


def test_a_strike_is_forgotten_after_enough_good_steps(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STRIKE_FORGOTTEN_STEPS", 3)
    model = tiny_model(base)
    poison(model, "doc-3", monkeypatch)
    task = task_of(model, effective_batch=1, schedule=replace(CONSTANT, steps=21))
    _, state = run(task)
    assert state.skipped_steps == 3, "once in each of three epochs"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_a_number_takes_no_step(base: Path, value: float) -> None:
    model = tiny_model(base)
    notes = spoil_gradient_of(model, 1, value)
    before = model.adapter.state()
    train(task_of(model, schedule=replace(CONSTANT, steps=1)), notes, TrainState())
    assert same(model.adapter.state(), before)
    assert notes.warnings[0].startswith("The gradient of step 1 is not a number. Documents in it: doc-")
    assert [record.skipped for record in notes.steps] == [True]


def test_without_the_guard_the_adapter_is_not_a_number_either(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base)
    poison(model, "doc-3", monkeypatch)
    blind(monkeypatch)
    run(task_of(model))
    assert any(tensor.isnan().any() for tensor in model.adapter.state().values())


# --- out of memory -----------------------------------------------------------------------------------------------


INSIDE_THE_SECOND_LAYER = 10  # a decoder layer has 7 linear layers


def fail_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of more positions than this run out of memory inside the second layer."""
    original, calls = FrozenLinear.forward, itertools.count(1)

    def forward(self: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() > tokens and next(calls) % INSIDE_THE_SECOND_LAYER == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, x)

    monkeypatch.setattr(FrozenLinear, "forward", forward)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More layers than the ring has slots, so that a slot left in use by a failed step is one too few."""
    return write_base(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


@pytest.mark.parametrize("cutting", [PACKED, padded(4)], ids=["packed", "padded"])
@pytest.mark.parametrize("placement", [{}, {"weights": "host", "poison": True}], ids=["resident", "streamed"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_step_out_of_memory_is_done_again_in_smaller_pieces(
    deep: Path, cutting: Cutting, placement: dict, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = {**placement, "activations": activations}
    whole = tiny_model(deep, DROPPING, **placement)
    reference, _ = run(task_of(whole, cutting=cutting))
    model = tiny_model(deep, DROPPING, **placement)
    fail_above(40, monkeypatch)
    notes, _ = run(task_of(model, cutting=cutting))
    assert losses(notes) == pytest.approx(losses(reference), rel=1e-5)
    assert len(notes.warnings) == 1 if cutting.packing else 1 <= len(notes.warnings) <= 2
    smaller = "32 tokens" if cutting.packing else "2 sequences"
    assert notes.warnings[0].endswith(f": it is done again with micro-batches of {smaller}.")
    for name, tensor in model.adapter.state().items():
        assert torch.allclose(tensor, whole.adapter.state()[name], atol=2e-4), name


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_out_of_memory_in_layer_after_layer_leaves_no_slot_in_use(
    deep: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(deep, weights="host", poison=True, activations=activations)
    original, calls = FrozenLinear.forward, itertools.count(1)

    def forward(self: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() > 40 and next(calls) in (10, 10 + 18, 10 + 18 + 27):  # layers 1, 2 and 3
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, x)

    monkeypatch.setattr(FrozenLinear, "forward", forward)
    notes, state = run(task_of(model, cutting=padded(8), effective_batch=7))
    assert len(notes.warnings) == 3
    assert state.step == 4


def test_out_of_memory_at_the_smallest_micro_batch_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(base)
    before = model.adapter.state()
    fail_above(0, monkeypatch)
    with pytest.raises(DoesNotFit, match=r"Step 1 runs out of memory .* Tried to allocate 2.00 GiB") as error:
        run(task_of(model, cutting=padded(4)))
    assert error.value.exit_code == 5
    assert "memory.weights: host" in error.value.next_step
    assert same(model.adapter.state(), before)


# --- how long, how fast ------------------------------------------------------------------------------------------


@given(
    steps=st.integers(1, 500),
    kind=st.sampled_from(["linear", "cosine", "constant", "constant_with_warmup"]),
    warmup=st.floats(0, 0.9),
)
def test_the_rate_rises_to_its_peak_then_never_rises_again(steps: int, kind: str, warmup: float) -> None:
    schedule = Schedule(steps=steps, peak_rate=3e-4, kind=kind, warmup_ratio=warmup)
    rates = [schedule.rate(step, 0.0) for step in range(steps)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-9) for rate in rates), "no step is wasted on a rate of zero"
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(0, math.ceil(warmup * steps))
    if kind == "constant":
        assert set(rates) == {3e-4}
    if kind in ("linear", "cosine") and steps * (1 - warmup) >= 100:
        assert rates[-1] < 0.02 * 3e-4
    if steps * (1 - warmup) >= 100:
        assert max(rates) > 0.95 * 3e-4


@given(seconds=st.floats(0, 1e4), step=st.integers(0, 99), limit=st.floats(1, 1e4))
def test_progress_never_falls_and_stays_within_bounds(seconds: float, step: int, limit: float) -> None:
    schedule = Schedule(steps=100, peak_rate=1.0, kind="linear", warmup_ratio=0.1, max_seconds=limit)
    assert 0 <= schedule.progress(step, seconds) <= schedule.progress(step + 1, seconds * 1.01) <= 1
    assert 0 <= schedule.rate(step, seconds) <= 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The loop's own clock, which only moves when it is told to."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("drawplate.train.guards.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class _Slow(Notes):
    """Each micro-batch takes a second."""

    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__()
        self.clock = clock

    def on_micro_batch(self, step: int, done: int, total: int, batch: Any) -> None:
        self.clock.now += 1


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_time_limit_ends_the_run_with_the_rate_near_zero(base: Path, clock: SimpleNamespace, kind: str) -> None:
    schedule = Schedule(steps=10_000, peak_rate=1e-3, kind=kind, warmup_ratio=0.1, max_seconds=40.0)
    notes = _Slow(clock)
    state = train(
        task_of(tiny_model(base), schedule=schedule, effective_batch=1, cutting=padded(1)), notes, TrainState()
    )
    assert 38 <= state.seconds <= 40
    assert state.step in (39, 40)
    assert state.stopped_because == "train.max_minutes: 0.666667 minutes were used"
    rates = [record.learning_rate for record in notes.steps]
    assert rates[-1] < 0.06 * 1e-3
    assert max(rates) > 0.95 * 1e-3


def test_seconds_in_steps_leave_the_evaluations_out(base: Path, clock: SimpleNamespace) -> None:
    def evaluate() -> Evaluation:
        clock.now += 100
        return Evaluation(nats=1.0, tokens=1, bytes=1)

    task = task_of(tiny_model(base), effective_batch=1, cutting=padded(1), evaluate=evaluate, eval_steps=2)
    state = train(task, _Slow(clock), TrainState())
    assert state.step_seconds == 4
    assert state.seconds >= 104


def test_without_a_limit_every_step_is_taken(base: Path) -> None:
    _, state = run(task_of(tiny_model(base)))
    assert (state.step, state.stopped_because) == (4, "")


# --- held-out loss in between ------------------------------------------------------------------------------------


def scripted(values: list[float]) -> Callable[[], Evaluation]:
    remaining = iter(values)
    return lambda: Evaluation(nats=next(remaining), tokens=1, bytes=1)


class _States(Notes):
    """Copies the adapter at every evaluation."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self.states = model, {}

    def on_evaluation(self, step: int, result: Evaluation) -> None:
        super().on_evaluation(step, result)
        self.states[step] = self.model.adapter.state()


def test_early_stopping_waits_for_its_patience_and_keeps_the_best_adapter(base: Path) -> None:
    model = tiny_model(base)
    task = task_of(
        model,
        schedule=replace(CONSTANT, steps=100),
        evaluate=scripted([5, 4, 4.5, 3.9, 4.1, 3.95, 0]),
        eval_steps=2,
        patience=2,
    )
    notes = _States(model)
    state = train(task, notes, TrainState())
    assert list(notes.states) == [2, 4, 6, 8, 10, 12]
    assert state.stopped_because == "held-out loss did not improve in 2 evaluations"
    assert (state.best_step, state.best_loss) == (8, 3.9)
    assert same(state.best_adapter, notes.states[8])
    assert not same(state.best_adapter, model.adapter.state())


def test_early_stopping_is_off_unless_asked(base: Path) -> None:
    task = task_of(tiny_model(base), evaluate=scripted([1, 2, 3, 4]), eval_steps=1)
    _, state = run(task)
    assert state.step == 4
    assert state.best_step == 1


class _Keeper:
    """Is asked after every step, and remembers what it was asked to save."""

    def __init__(self, every: int) -> None:
        self.every, self.saved = every, []

    def due(self, state: TrainState) -> bool:
        return state.step % self.every == 0

    def save(self, state: TrainState) -> None:
        self.saved.append((state.step, state.micro_batches))

    def rewind(self, state: TrainState) -> bool:
        return False

    def stopped(self, why: str) -> StoppedSafely:
        return StoppedSafely(why, next_step="")

    def where(self) -> str:
        return ""


def test_checkpoints_are_written_where_they_are_due(base: Path) -> None:
    keeper = _Keeper(3)
    run(task_of(tiny_model(base), schedule=replace(CONSTANT, steps=8), keeper=keeper))
    assert keeper.saved == [(0, 0), (3, 0), (6, 0)]


def test_a_stop_ends_a_short_step_and_leaves_a_long_one_in_between(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for finish_seconds, position in ((5.0, (2, 0)), (-1.0, (1, 1))):
        monkeypatch.setattr("drawplate.train.step.FINISH_SECONDS", finish_seconds)
        keeper, stop = _Keeper(100), StopSignals()
        stop.graceful = True
        notes = _Signalling(stop, step=2)
        task = task_of(tiny_model(base), keeper=keeper, stop=stop, cutting=padded(1))
        with pytest.raises(StoppedSafely, match="SIGTERM"):
            train(task, notes, TrainState())
        assert keeper.saved[-1] == position


class _Signalling(Notes):
    """Asks for a stop in the first micro-batch of a step."""

    def __init__(self, stop: StopSignals, step: int) -> None:
        super().__init__()
        self.stop, self.step = stop, step

    def on_micro_batch(self, step: int, done: int, total: int, batch: Any) -> None:
        if step == self.step:
            self.stop.requested = "SIGTERM"


def test_a_halved_cutting_ends_at_the_smallest() -> None:
    sizes, cutting = [], Cutting(packing=True, tokens=100, pad_to_multiple_of=16)
    while cutting is not None:
        sizes.append(cutting.tokens)
        cutting = cutting.halved()
    assert sizes == [100, 50, 25]
    assert padded(3).halved().sequences == 1
    assert padded(1).halved() is None
