from __future__ import annotations

import threading

from bench.peers.cases import MAIN
from bench.peers.needs import GIB, SPARE_BYTES, Room, needed
from bench.peers.suite import BF16, UNSLOTH, budgeted, small_part, whole_part

H100_BYTES = 85_017_493_504


def test_needs_are_what_was_measured_on_an_h100_and_a_little_more() -> None:
    measured_gib = {("3b", "7x512"): 13.73, ("3b", "7x2048"): 33.46, ("8b", "2x2048"): 29.05, ("8b", "7x512"): 27.42}
    for (shape, case), gib in measured_gib.items():
        assert gib < needed(shape, BF16, case) / GIB < 1.1 * gib
    assert needed("3b", budgeted("3b")[0], "7x2048") == 6 * GIB
    assert needed("another", BF16, "7x2048") == 0


def test_a_timed_process_finds_room_beside_all_others_of_its_group() -> None:
    for group in [*whole_part(), *small_part("3b"), *small_part("8b")]:
        alive = [job for job in group if job.timed]
        idle = sum(needed(job.shape, job.setting) for job in alive)
        for job in alive:
            most = max((needed(job.shape, job.setting, case) for case in job.timed), default=0)
            assert idle - needed(job.shape, job.setting) + most < H100_BYTES, job


def test_who_wants_more_than_is_left_waits_for_others() -> None:
    room, entered, order = Room(10 + SPARE_BYTES), threading.Event(), []

    def second() -> None:
        with room.work("b", 6, 1):
            order.append("b works")
        entered.set()

    with room.work("a", 8, 2):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.05)
        order.append("a is done")
    assert entered.wait(5)
    thread.join()
    assert order == ["a is done", "b works"]


def test_nobody_waits_where_nobody_works_or_there_is_no_card() -> None:
    room = Room(10 + SPARE_BYTES)
    with room.work("a", 8, 8):
        pass
    with room.work("b", 8, 8):  # too much, but waiting would not help
        pass
    room.leave("a")
    with Room(None).work("a", 10**15, 0):
        assert UNSLOTH in MAIN
