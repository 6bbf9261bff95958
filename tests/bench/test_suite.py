from __future__ import annotations

import argparse

import pytest

from bench.compare import groups_of
from bench.peers import suite
from bench.peers.cases import MISSION, REFERENCE, Job
from bench.peers.suite import LONG, PACKED, PADDED, SMALL


def timed(groups: list[list[Job]]) -> list[tuple[str, str, float | None, str]]:
    return [
        (j.shape, j.setting.label, j.setting.budget_gib, case) for group in groups for j in group for case in j.timed
    ]


def test_the_parts_time_every_case_of_the_goals_once() -> None:
    runs = timed([group for part in suite.PARTS for group in suite.groups_of(part)])
    assert len(runs) == len(set(runs))
    for shape, budget in (("3b", None), ("8b", None), ("3b", 6), ("8b", 8)):
        for case in (*SMALL, LONG):
            labels = [label for s, label, b, c in runs if (s, b, c) == (shape, budget, case)]
            own = [label for label in labels if label.startswith("drawplate")]
            assert len(own) == 2
            assert sum("fp8" in label for label in own) == 1
            assert any(label.startswith("unsloth") for label in labels)
    assert ("3b", MISSION.label, None, "7x512") in runs
    packing = [(label, case) for _, label, _, case in runs if case in (PACKED, PADDED)]
    assert len(packing) == 4


@pytest.mark.parametrize("part", suite.PARTS)
def test_whatever_is_timed_stands_behind_the_gate(part: str) -> None:
    """Each setting takes the gate's steps, and the reference and the yardstick prove every case before it is timed."""
    done: set[tuple[str, str, str]] = set()
    for group in suite.groups_of(part):
        for job in group:
            done |= {(job.shape, job.setting.label, case) for case in job.cases}
            done |= {(job.shape, job.setting.label, "curve")} if job.curve else set()
        for job in group:
            for case in job.timed:
                assert (job.shape, job.setting.label, case) in done
                assert (job.shape, REFERENCE.label, case) in done
                assert (job.shape, MISSION.label, case) in done or case == PACKED
            assert all((job.shape, s.label, "curve") in done for s in (job.setting, REFERENCE, MISSION))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="longest"):
        suite.groups_of("longest")


def test_a_planned_setting_has_a_process_for_each_case_of_the_command_line() -> None:
    asked = argparse.Namespace(
        suite="", model="3b", cases="7x512,2x2048", systems="drawplate", budgets="6", only="planned, d", gate_case=None
    )
    groups = groups_of(argparse.Namespace(**vars(asked), together=2))
    jobs = [job for group in groups for job in group]
    assert [job.setting for job in groups[0]] == [REFERENCE, MISSION]
    assert [job.timed for job in jobs] == [(), (), ("7x512",), ("2x2048",)]
    assert [job.curve for job in jobs[2:]] == [True, False]
