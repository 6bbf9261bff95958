from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench import profile_step
from bench.idle import Activity, Gap, gaps_of, idle_report, micro_steps, table

MARKER = "spin_kernel"


def kernel(start: float, end: float, name: str = "product", stream: int = 7) -> Activity:
    return Activity(name, stream, start, end - start)


def copy(start: float, end: float, direction: str = "HtoD", stream: int = 20) -> Activity:
    return Activity(f"Memcpy {direction} (Pinned -> Device)", stream, start, end - start, is_copy=True)


def marker(start: float) -> Activity:
    return kernel(start, start + 0.01, f"at::cuda::{MARKER}(long)")


def report(*activities: Activity) -> dict[str, Any]:
    return idle_report(activities, MARKER, lambda name: name.partition("_")[0])


def one_gap(*copies: Activity) -> Gap:
    """Nothing computes from 1 to 3."""
    (gap,) = gaps_of([kernel(0, 1), kernel(3, 4)], copies)
    return gap


def test_a_gap_is_time_in_which_no_stream_computes() -> None:
    """A branch of a replayed graph lies on another stream, and outlasts what began after it."""
    busy = report(marker(0), kernel(1, 5, "long", stream=8), kernel(2, 3), kernel(3.5, 4), kernel(6, 7, "last"))
    assert busy["compute_idle_seconds"] == pytest.approx(1)
    assert busy["compute_busy_seconds"] == pytest.approx(5)
    assert [(g["before"], g["after"]) for g in busy["idle"]] == [("long", "last")]


def test_a_copy_fills_no_gap() -> None:
    assert report(marker(0), kernel(0, 1), copy(1, 3), kernel(3, 4))["compute_idle_seconds"] == pytest.approx(2)
    within_device = kernel(1, 3, "Memcpy DtoD (Device -> Device)")
    assert report(marker(0), kernel(0, 1), within_device, kernel(3, 4))["compute_idle_seconds"] == 0


def test_kernels_that_touch_or_overlap_leave_no_gap() -> None:
    assert gaps_of([kernel(0, 1), kernel(1, 2), kernel(1.5, 3)], []) == []


@pytest.mark.parametrize(
    ("copies", "to_device", "to_host", "none"),
    [
        ([], 0, 0, 1),
        ([copy(0.5, 2)], 0.5, 0, 0.5),  # began before the gap
        ([copy(0.5, 9)], 1, 0, 0),  # and outlasts it
        ([copy(1, 2), copy(1.5, 2.5, stream=21)], 0.75, 0, 0.25),  # two at once are not counted twice
        ([copy(1, 2), copy(1.5, 2.5, "DtoH")], 0.5, 0.5, 0.25),  # both ways at once: in both, and once in `none`
        ([copy(0, 1), copy(3, 4)], 0, 0, 1),  # beside it only
        ([copy(-9, 1.5), copy(0.1, 0.2, "DtoH")], 0.25, 0, 0.75),  # one is over, a longer one is not
    ],
)
def test_the_share_of_a_gap_with_copies_in_flight(
    copies: list[Activity], to_device: float, to_host: float, none: float
) -> None:
    shares = report(marker(-10), kernel(0, 1), kernel(3, 4), *copies)["idle"][0]
    assert (shares["share_htod"], shares["share_dtoh"], shares["share_no_copy"]) == pytest.approx(
        (to_device, to_host, none)
    )


def test_a_copy_that_ends_in_a_gap_is_told_from_one_that_runs_on() -> None:
    assert one_gap(copy(0, 2.9)).copy_ended
    assert one_gap(copy(0, 3)).copy_ended
    assert not one_gap(copy(0, 3.1)).copy_ended
    assert not one_gap(copy(0, 1)).copy_ended
    assert not one_gap().copy_ended


def test_figures_are_means_of_the_micro_steps_between_markers() -> None:
    first = [kernel(1, 2, "product_a"), kernel(3, 4, "norm_a"), kernel(4, 5, "product_b"), kernel(9, 10, "norm_b")]
    second = [kernel(13, 14, "product_a"), kernel(16, 17, "norm_a")]
    made = report(kernel(-5, -4, "earlier"), marker(0), *first, marker(11), *second, copy(11.5, 13))
    assert made["micro_steps_profiled"] == 2
    assert made["compute_busy_seconds"] == pytest.approx((4 + 2) / 2)
    assert made["compute_idle_seconds"] == pytest.approx((5 + 2) / 2)
    assert made["compute_idle_seconds_of_each"] == pytest.approx([5, 2])
    (group,) = made["idle"]
    assert (group["before"], group["after"], group["count"]) == ("product", "norm", 1.5)
    assert (group["seconds"], group["longest_seconds"]) == pytest.approx((3.5, 4))
    assert group["mostly"] == ["product_b", "norm_b"]
    (between,) = made["idle_between"]
    assert (between["before"], between["after"], between["count"]) == ("norm", "product", 1)
    assert (between["seconds"], between["share_htod"]) == pytest.approx((3, 0.5))


def test_a_micro_step_that_begins_before_the_last_one_has_ended_waits_for_nothing() -> None:
    made = report(marker(0), kernel(1, 6, stream=8), marker(4), kernel(5, 7), kernel(8, 9))
    assert made["idle_between"] == []
    assert made["compute_idle_seconds"] == pytest.approx(0.5)


def test_without_markers_there_is_no_micro_step() -> None:
    assert micro_steps([kernel(0, 1), copy(1, 2)], MARKER) == []
    assert [len(step) for step in micro_steps([marker(0), kernel(1, 2), marker(3)], MARKER)] == [1]


def test_the_longest_gaps_say_where_in_their_micro_step_they_lie() -> None:
    steps = [marker(0), kernel(1, 2, "a"), kernel(3, 4, "b"), marker(5), kernel(6, 7, "c"), kernel(11, 12, "d")]
    longest, other = report(*steps, copy(6.5, 8))["largest_gaps"]
    assert (longest["micro_step"], longest["before"], longest["after"]) == (1, "c", "d")
    assert (longest["at_seconds"], longest["seconds"], longest["share_htod"]) == pytest.approx((1, 4, 0.25))
    assert longest["copies"] == [["Memcpy HtoD (Pinned -> Device)", 20, -0.5, 1.0]]
    assert (other["micro_step"], other["copies"]) == (0, [])


def test_no_more_than_the_largest_are_named() -> None:
    many = [kernel(2 * n, 2 * n + 1, f"k{n}") for n in range(40)]
    made = report(marker(-1), *many)
    assert (len(made["idle"]), len(made["largest_gaps"])) == (12, 15)
    assert made["compute_idle_seconds"] == pytest.approx(39)


def test_the_report_is_json_and_prints_a_line_for_each_group() -> None:
    made = report(marker(0), kernel(1, 2, "a"), kernel(3, 4, "b"), marker(5), kernel(6, 7, "a"), kernel(9, 10, "b"))
    assert json.loads(json.dumps(made)) == made
    lines = table(made).splitlines()
    assert "computes 2000.00 ms and is idle 1500.00 ms; between two it is idle 2000.00 ms" in lines[0]
    assert [line.rpartition("   ")[2] for line in lines[2:]] == ["a -> b", "micro-steps: b -> a"]


def event(name: str, start_us: float, end_us: float, device: DeviceType, **more: Any) -> FunctionEvent:
    return FunctionEvent(0, name, 0, start_us, end_us, device_type=device, device_resource_id=9, **more)


def test_what_the_profiler_saw_on_the_device_becomes_activities() -> None:
    events = [
        event("cudaLaunchKernel", 0, 5, DeviceType.CPU),
        event("a range of the user's", 0, 90, DeviceType.CUDA, is_user_annotation=True),
        event("_dequantize", 10, 12.5, DeviceType.CUDA),
        event("Memcpy DtoH (Device -> Pinned)", 11, 13, DeviceType.CUDA),
        event("Memset (Device)", 14, 15, DeviceType.CUDA),
    ]
    kernel, to_host, memset = profile_step.activities_of(events)
    assert (kernel.name, kernel.stream, kernel.is_copy) == ("_dequantize", 9, False)
    assert (kernel.start, kernel.seconds) == pytest.approx((10e-6, 2.5e-6))
    assert to_host.is_copy
    assert not memset.is_copy


def test_kernels_are_means_of_a_micro_step_without_the_marker() -> None:
    steps = [
        marker(0),
        *(kernel(n, n + 0.5, "nvjet") for n in range(1, profile_step.LOOPED + 1)),
        copy(0, 4),
        copy(4, 8),
    ]
    made = profile_step._by_kernel(steps)
    assert made["kernels"] == [["Memcpy HtoD (Pinned -> Device)", 0.5, 2.0], ["nvjet", 1.0, 0.5]]
    assert made["seconds_by_kind"] == {"copy": 2.0, "product": 0.5}
    assert (made["gpu_busy_seconds"], made["launches"]) == (2.5, 1.5)


@pytest.mark.gpu
def test_the_marker_is_among_what_the_profiler_sees() -> None:
    """Also that copies and kernels come with the times and streams by which they are told apart."""
    matrix, sent = torch.ones(2048, 2048, device="cuda"), torch.ones(2**24).pin_memory()
    aside = torch.cuda.Stream()

    def step(number: int) -> None:
        torch.mm(matrix, matrix)
        with torch.cuda.stream(aside):
            sent.to("cuda", non_blocking=True)
        torch.mm(matrix, matrix)

    step(0)
    done = profile_step._watched(step)
    assert len(micro_steps(done, profile_step.MARKER)) == profile_step.LOOPED
    copies = [a for a in done if a.is_copy]
    assert len(copies) == profile_step.LOOPED
    assert all(a.seconds > 0 for a in done)
    assert not {a.stream for a in copies} & {a.stream for a in done if not a.is_copy}
