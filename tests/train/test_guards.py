"""Clocks that leave suspensions out, and a watchdog that counts ticks."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest

import drawplate.train.guards as guards
from drawplate.train.guards import Clock, StopRequested, StopSignals, Watchdog


def test_a_suspension_is_left_out_and_a_busy_pause_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(guards, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock()
    clock.tick()
    before = clock.now()
    now[0] += 10  # nothing said that the process was suspended
    clock.tick()
    assert clock.now() - before == 10
    now[0] += 50
    clock.on_continue()
    assert clock.now() - before == 10, "asked before the next tick"
    now[0] += 30
    clock.tick()
    now[0] += 0.2
    clock.on_continue()
    assert clock.now() - before == pytest.approx(10.2), "asked after it"
    assert clock.suspended_seconds == 80


def test_the_watchdog_barks_after_many_times_the_usual_and_only_while_work_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(guards, "LEAST_HANG_SECONDS", 0.2)
    barks: list[float] = []
    with Watchdog(Clock(), lambda waited, usual: barks.append(waited)) as watchdog:
        watchdog.begin()
        for _ in range(guards.BEATS_BEFORE_WATCHING):
            watchdog.beat()
        watchdog.rest()
        time.sleep(0.5)
        assert not barks, "an evaluation may take as long as it likes"
        watchdog.begin()
        deadline = time.monotonic() + 20
        while not barks and time.monotonic() < deadline:
            time.sleep(0.01)
    assert barks


def test_signals_are_a_wish_first_and_an_interrupt_then() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(Clock()) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.requested, stop.graceful = "", True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        with pytest.raises(StopRequested):
            stop.raise_if_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
