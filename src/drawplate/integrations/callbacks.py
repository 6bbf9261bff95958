"""Callbacks for `transformers.Trainer`, for those who keep their own loop.

Left out: what a run of Drawplate itself does; it samples memory into metrics.jsonl without a callback.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drawplate.errors import UsageError
from drawplate.machine.memory import memory_sample
from drawplate.records import MemoryPoint


class MemoryUsageCallback(TrainerCallback):
    """Puts process and device memory into the Trainer's log history every `log_frequency` optimizer steps.

    An entry has `step`, `epoch` and, in bytes, `memory_process`, `memory_process_peak`, `memory_device_allocated`,
    `memory_device_reserved`, `memory_device_peak` and `memory_device_free` (of the whole device); the device's are 0
    without CUDA. After each evaluation one more is taken, because evaluation is where peaks hide, and one at the end.

    Args:
        log_frequency: optimizer steps between entries, at least 1.

    Attributes:
        samples: every sample taken, as `MemoryPoint`s with the phase train, evaluate or end.

    Raises:
        UsageError: `log_frequency` is below 1.
    """

    def __init__(self, log_frequency: int = 10) -> None:
        if log_frequency < 1:
            raise UsageError(f"log_frequency is {log_frequency}.", next_step="Give a number of steps, 1 or more.")
        self.log_frequency = log_frequency
        self.samples: list[MemoryPoint] = []
        self._began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the samples."""
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sample after every `log_frequency`-th optimizer step."""
        if state.global_step % self.log_frequency == 0:
            self._sample(state, "train")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sample after an evaluation."""
        self._sample(state, "evaluate")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample once more, so that a run shorter than `log_frequency` has an entry too."""
        self._sample(state, "end")

    def _sample(self, state: TrainerState, phase: str) -> None:
        sample = memory_sample()
        seconds = time.monotonic() - self._began
        self.samples.append(MemoryPoint(step=state.global_step, phase=phase, seconds=seconds, sample=sample))
        state.log_history.append(
            {
                "step": state.global_step,
                "epoch": state.epoch or 0.0,
                "memory_process": sample.process_bytes,
                "memory_process_peak": sample.process_peak_bytes,
                "memory_device_allocated": sample.device_allocated_bytes,
                "memory_device_reserved": sample.device_reserved_bytes,
                "memory_device_peak": sample.device_peak_bytes,
                "memory_device_free": sample.device_free_bytes,
            }
        )
