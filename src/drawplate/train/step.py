"""One optimizer step's gradient, added up over micro-batches, whatever memory allows.

Each micro-batch's nats are scaled by 1 / (tokens of the whole step) before they are added, so how a step is cut changes
no sum. Between two micro-batches the sum so far is a state like any other: a checkpoint can be written there, and a
step that was cut short goes on with the next micro-batch.

A step that runs out of memory is done again from its beginning with micro-batches half as large; at one sequence, with
the next of the layers' policies (keep or host -> recompute -> offload). What was forced stays for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from drawplate.data.batches import PADDING_SEQUENCE, Batch
from drawplate.errors import DoesNotFit
from drawplate.machine.memory import memory_sample
from drawplate.records import LedgerLine
from drawplate.train.task import Listener, TrainState, TrainTask
from drawplate.units import format_bytes

FINISH_SECONDS = 5.0
LADDER = ("keep", "recompute", "offload")
OUT_OF_MEMORY_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StepStopped(Exception):
    """The run was asked to stop and the step is left between two micro-batches; the state says where."""


@dataclass
class StepOutcome:
    """Gradients of one optimizer step have been added up; nothing is applied yet."""

    nats: torch.Tensor
    counted: int
    tokens: int
    documents: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Nats per counted token; waits for the device."""
        return float(self.nats) / self.counted if self.counted else 0.0

    @property
    def names(self) -> str:
        """The documents in it, the first few of them."""
        return ", ".join(self.documents[:5]) + (" ..." if len(self.documents) > 5 else "")


def gradient_within_memory(task: TrainTask, state: TrainState, listener: Listener) -> StepOutcome:
    """One step's gradient; on running out of memory the step begins again with something smaller.

    Raises:
        DoesNotFit: nothing smaller is left.
        StepStopped: the run was asked to stop; the sum so far is in the parameters' gradients.
    """
    while True:
        batches = _batches(task, state)
        try:
            return _accumulate(task, state, listener, batches)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and libraries below torch raise plain ones
            if not is_out_of_memory(error):
                raise
            reason, failed = str(error).partition("\n")[0], batches[state.micro_batches]
        # Outside the handler, which would keep the failed step's tensors alive.
        wrong_line = _contradicted(task.ledger)
        task.model.forget_graphs()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        state.begin_step_again()
        correction = _something_smaller(task, state, failed)
        if correction is None:
            if task.keeper and state.step:
                task.keeper.save(state)
            raise DoesNotFit(
                f"Step {state.step + 1} runs out of memory with a micro-batch of one sequence. {reason}",
                safe="Steps before it are complete." + (f" {task.keeper.where()}" if task.keeper else ""),
                next_step="Set memory.weights: host, or a shorter data.max_length.",
            )
        state.corrections.append(f"from step {state.step + 1} on: {correction}")
        listener.on_warning(f"Out of memory in step {state.step + 1}: it is done again with {correction}.{wrong_line}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where a library below torch says it."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in OUT_OF_MEMORY_WORDS)


def _batches(task: TrainTask, state: TrainState) -> list[Batch]:
    return (state.cutting or task.cutting)([task.sequences[i] for i in task.order.indices(state.step)])


def _accumulate(task: TrainTask, state: TrainState, listener: Listener, batches: Seq[Batch]) -> StepOutcome:
    if state.micro_batches == 0:
        task.model.adapter.zero_gradients()
    epoch = state.step // task.order.steps_per_epoch
    counted = sum(batch.counted_tokens for batch in batches)
    nats = torch.tensor(state.step_nats, dtype=torch.float64).to(task.model.placement.device)
    began, already = task.clock.now(), state.micro_batches
    for done, batch in enumerate(batches[already:], already + 1):
        if batch.counted_tokens:
            scale = state.loss_scale / counted
            nats += task.model.add_gradients(batch, scale=scale, dropout_seed=(task.section.seed, epoch))
        state.micro_batches = done
        listener.on_micro_batch(state.step + 1, done, len(batches), batch)
        if task.watchdog:
            task.watchdog.beat()
        if done < len(batches):
            left_seconds = (task.clock.now() - began) / (done - already) * (len(batches) - done)
            _pause(task, state, nats, left_seconds)
    documents = tuple(dict.fromkeys(name for batch in batches for name in batch.documents))
    return StepOutcome(nats, counted, sum(batch.tokens for batch in batches), documents)


def _pause(task: TrainTask, state: TrainState, nats: torch.Tensor, left_seconds: float) -> None:
    """Between two micro-batches: save if it is time, stop if somebody asked, unless the step is nearly done anyway."""
    if task.until == (state.step, state.micro_batches):
        raise StepStopped
    if left_seconds <= FINISH_SECONDS or task.keeper is None:
        return
    if task.stop.requested or task.keeper.due(state):
        state.step_nats = float(nats)
        state.pass_time(task.clock.now(), in_step=True)
        task.keeper.save(state)
        state.pass_time(task.clock.now())
        if task.stop.requested:
            raise StepStopped


def _something_smaller(task: TrainTask, state: TrainState, failed: Batch) -> str | None:
    """Correct the state's cutting, or the layers' policies; in words, None where nothing is left."""
    sequences = failed.sequence_ids_BT[failed.sequence_ids_BT != PADDING_SEQUENCE].unique().numel()
    smaller = (state.cutting or task.cutting).halved() if sequences > 1 else None
    if smaller is not None:
        state.cutting = smaller
        return f"micro-batches of {smaller.size}"
    policies = ["keep" if policy == "host" else policy for policy in task.model.runner.policies]
    rung = min(map(LADDER.index, policies)) + 1
    if rung == len(LADDER):
        return None
    state.policies = [LADDER[max(rung, LADDER.index(policy))] for policy in policies]
    task.model.set_policies(state.policies)
    return f"memory.activations: {LADDER[rung]}"


def _contradicted(lines: Seq[LedgerLine]) -> str:
    """Which line of the plan was wrong, as far as one can tell: the largest of the device, if the sum was exceeded."""
    device = [line for line in lines if line.where == "device"]
    if not device:
        return ""
    sample, predicted = memory_sample(), sum(line.bytes for line in device)
    if sample.device_peak_bytes > predicted:
        line = max(device, key=lambda line: line.bytes)
        return (
            f" The plan foresaw {format_bytes(predicted)} on the device and {format_bytes(sample.device_peak_bytes)} "
            f"were used; its largest line is {line.name}, {format_bytes(line.bytes)}."
        )
    return (
        f" The plan needs {format_bytes(predicted)} and {format_bytes(sample.device_allocated_bytes)} are in use here, "
        f"but only {format_bytes(sample.device_free_bytes)} of the device are free: another process may hold the rest."
    )
