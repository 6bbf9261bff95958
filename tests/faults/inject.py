"""Faults, set up in a process before the command it is to spoil. Each is a function of plain values."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import drawplate.ending as ending
import drawplate.train.guards as guards
from drawplate.model.causal_lm import CausalLM
from drawplate.run.journal import Journal
from drawplate.run.saving import Saving

CALLS = ("write", "fsync", "rename")


def _while_saving(tick: Callable[[str], None]) -> None:
    """Call `tick` before every write, fsync and rename that a checkpoint makes."""
    saving = [False]
    save = Saving.save

    def watched(self: Saving, state: Any) -> None:
        saving[0] = True
        try:
            save(self, state)
        finally:
            saving[0] = False

    Saving.save = watched  # type: ignore[method-assign]
    for name in CALLS:
        real = getattr(os, name)

        def call(*arguments: Any, _name: str = name, _real: Any = real) -> Any:
            if saving[0]:
                tick(_name)
            return _real(*arguments)

        setattr(os, name, call)


def count_calls(into: str) -> None:
    """Note every call that a checkpoint makes, a line each."""

    def tick(name: str) -> None:
        with Path(into).open("a") as file:
            file.write(f"{name}\n")

    _while_saving(tick)


def kill_at_call(number: int) -> None:
    """SIGKILL before the call of that number, counted from 0."""
    calls = itertools.count()

    def tick(_: str) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _while_saving(tick)


def kill_in(what: str, number: int) -> None:
    """SIGKILL in the training's forward, backward or optimizer of that number, counted from 1."""
    calls = itertools.count(1)

    def tick(*_: Any) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "optimizer":
        register_optimizer_step_post_hook(tick)
        return
    sum_nats = CausalLM.sum_nats

    def spoiled(self: CausalLM, batch: Any, **options: Any) -> Any:
        if options and what == "forward":
            tick()
        loss, nats = sum_nats(self, batch, **options)
        if options and what == "backward":
            loss.register_hook(tick)
        return loss, nats

    CausalLM.sum_nats = spoiled  # type: ignore[method-assign]


def signals_at(step: int, names: list[str]) -> None:
    """Send signals to this process in the first micro-batch of a step."""
    on_micro_batch = Journal.on_micro_batch

    def spoiled(self: Journal, at: int, done: int, *rest: Any) -> None:
        on_micro_batch(self, at, done, *rest)
        if at == step and done == 1:
            for name in names:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.01)

    Journal.on_micro_batch = spoiled  # type: ignore[method-assign]


def no_short_steps() -> None:
    """Every step counts as long, so that a stop does not wait for its end."""
    import drawplate.train.step

    drawplate.train.step.FINISH_SECONDS = -1.0


def hang_at(step: int, seconds: float, least_seconds: float) -> None:
    """A step does not end; the watchdog is made impatient."""
    guards.TICK_SECONDS, guards.LEAST_HANG_SECONDS = 0.05, least_seconds
    on_micro_batch = Journal.on_micro_batch

    def spoiled(self: Journal, at: int, *rest: Any) -> None:
        if at == step:
            time.sleep(seconds)
        on_micro_batch(self, at, *rest)

    Journal.on_micro_batch = spoiled  # type: ignore[method-assign]


def no_watchdog() -> None:
    """Nobody watches."""
    guards.Watchdog._watch = lambda self: None  # type: ignore[method-assign]


def plain_clock() -> None:
    """Suspended seconds count like any others."""
    guards.Clock.now = lambda self: time.monotonic()  # type: ignore[method-assign]


def no_signals() -> None:
    """Signals keep their usual meaning, also where the tests themselves were started deaf to a closed terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    guards.StopSignals.__enter__ = lambda self: self  # type: ignore[method-assign]


def on_step(step: int, what: str) -> None:
    """After that optimizer step libraries write to standard error in every way (`talk`), or an exception is raised."""
    after = Journal.on_step

    def watched(self: Journal, record: Any, progress: float) -> None:
        after(self, record, progress)
        if record.step != step:
            return
        if what != "talk":
            raise {"memory": MemoryError, "fault": KeyError}[what]("planted\nin two lines")
        warnings.warn("of Python", stacklevel=1)
        logging.getLogger("torch._inductor").warning("of a logger")
        os.write(2, b"of C\n")

    Journal.on_step = watched  # type: ignore[method-assign]


def libraries_on_the_screen() -> None:
    """Standard error stays what it is."""
    ending.library_output = lambda: nullcontext()  # type: ignore[assignment]


def write_in_place() -> None:
    """A checkpoint is written under its final name, file by file, and nobody verifies it."""
    import drawplate.checkpoint.write as checkpoint

    def publish(target: Path, fill: Callable[[Path], None]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for old in target.iterdir():
            old.unlink()
        fill(target)

    checkpoint._publish = publish
    believe_everything()


def believe_everything() -> None:
    """No checkpoint is verified."""
    import drawplate.checkpoint.write as checkpoint

    checkpoint.problem_of = lambda folder, from_disk=False: None


def forget(what: str) -> None:
    """Leave something out when a checkpoint is restored: the data position, the schedule, or one Adam moment."""
    import drawplate.run.saving as saving

    real = saving.restore

    def spoiled(folder: Path, model: Any, optimizer: Any) -> Any:
        state = real(folder, model, optimizer)
        if what == "moment":
            next(iter(optimizer.state.values()))["exp_avg_sq"].zero_()
        elif what == "position":
            state.step = max(0, state.step - 1)
        else:
            import drawplate.train.task as train_task

            rate = train_task.Schedule.rate
            train_task.Schedule.rate = lambda self, step, seconds: rate(self, step - state.step, seconds)
        return state

    saving.restore = spoiled


def limit_file_size(size: int) -> None:
    """No file may grow beyond this: the kernel itself refuses (RLIMIT_FSIZE)."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class SmallDisk:
    """os.write refuses as a full disk does, once the files of a folder have so many bytes; removing some helps.

    Args:
        monkeypatch: undoes it.
        folder: the run's.
        quota: bytes that the disk has.
    """

    def __init__(self, monkeypatch: Any, folder: Path, quota: int) -> None:
        self.folder, self.quota, self.refused = folder, quota, 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def write(self, descriptor: int, data: Any) -> int:
        """As os.write."""
        try:
            ours = os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(self.folder))
        except OSError:
            ours = False
        if ours and self.used + len(data) > self.quota:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, data)


def nan_at(monkeypatch: Any, steps: Callable[[int], bool], where: str = "loss") -> None:
    """The loss, or one gradient alone, of the steps that a function names is not a number."""
    sum_nats, current = CausalLM.sum_nats, [0]
    take_step = __import__("drawplate.train.loop", fromlist=["x"])._take_step

    def taking(task: Any, optimizer: Any, state: Any, listener: Any) -> None:
        current[0] = state.step + 1
        take_step(task, optimizer, state, listener)

    def spoiled(self: CausalLM, batch: Any, **options: Any) -> Any:
        loss, nats = sum_nats(self, batch, **options)
        if options and steps(current[0]):
            return (loss * math.nan, nats * math.nan if where == "loss" else nats)
        return loss, nats

    monkeypatch.setattr("drawplate.train.loop._take_step", taking)
    monkeypatch.setattr(CausalLM, "sum_nats", spoiled)


def random_faults(seed: int, kinds: list[str], chance: float) -> None:
    """At each training pass, with a chance, sigterm, sigkill, disk, nan or oom; `tracker` is down all the time.

    A line `fault: KIND` is printed for each.
    """
    import drawplate.run.saving as saving
    import drawplate.run.tune as story
    from drawplate.errors import DiskFull
    from drawplate.run.trackers import Trackers

    rng, full = random.Random(seed), [False]
    sudden = [kind for kind in kinds if kind != "tracker"]
    add_gradients, write = CausalLM.add_gradients, saving.write_checkpoint

    def spoiled(self: CausalLM, batch: Any, *, scale: float, dropout_seed: Any) -> Any:
        kind = rng.choice(sudden) if rng.random() < chance else ""
        if kind:
            os.write(1, f"fault: {kind}\n".encode())
        if kind in ("sigterm", "sigkill"):
            os.kill(os.getpid(), signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
        full[0] = full[0] or kind == "disk"
        if kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        wrong = math.nan if kind == "nan" else 1.0
        return add_gradients(self, batch, scale=scale * wrong, dropout_seed=dropout_seed) * wrong

    def refusing(checkpoints: Path, position: Any, files: Any) -> Path:
        if full[0]:
            full[0] = False
            raise DiskFull(f"{checkpoints} could not be written: No space left on device.", next_step="")
        return write(checkpoints, position, files)

    def dead(recipe: Any, warn: Callable[[str], None]) -> Trackers:
        def fail() -> Any:
            raise ConnectionError("network is unreachable")

        return Trackers({"wandb": fail}, {}, warn)

    CausalLM.add_gradients = spoiled  # type: ignore[method-assign]
    saving.write_checkpoint = refusing
    if "tracker" in kinds:
        story.open_trackers = dead
