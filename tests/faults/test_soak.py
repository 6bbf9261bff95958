"""A short soak: faults at random, the adapter of a clean run. The long one is bench/soak.py."""

from __future__ import annotations

from pathlib import Path

from bench.soak import soak
from tests.faults.conftest import Server


def test_faults_at_random_leave_the_adapter_of_a_clean_run(server: Server, tmp_path: Path) -> None:
    result = soak(server, tmp_path, 40, chance=0.15)
    assert result["equal"]
    assert len(result["ends"]["exact"]) > 1, "something happened"
    assert result["finished_steps"] == 40
