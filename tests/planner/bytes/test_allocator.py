"""The allocator on paper: rounding, pools, best fit, joining and growing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drawplate.machine.heap import MAPPED_FROM_BYTES
from drawplate.planner.bytes.allocator import CachingAllocator, ProcessMemory
from drawplate.units import MIB


def test_small_and_large_blocks_come_from_pools_that_grow_in_steps() -> None:
    memory = CachingAllocator()
    assert memory.take("tiny", 1) == 512
    assert memory.reserved == 2 * MIB
    memory.take("large", MIB + 1)
    assert memory.reserved == 22 * MIB
    memory.take("larger", 30 * MIB)
    assert memory.reserved == 42 * MIB, "what is left at the end of a segment is used before it grows"


def test_a_gap_is_used_again_and_neighbours_join() -> None:
    memory = CachingAllocator()
    for name in "abcd":
        memory.take(name, 10 * MIB)
    memory.give("b")
    memory.give("c")
    before = memory.reserved
    memory.take("both", 20 * MIB)
    assert memory.reserved == before


def test_a_gap_that_is_too_small_makes_the_segment_grow() -> None:
    memory = CachingAllocator()
    for name in "abcd":
        memory.take(name, 10 * MIB)
    memory.give("b")
    memory.take("too large", 12 * MIB)
    assert memory.reserved == 60 * MIB
    assert memory.allocated == 42 * MIB


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), min_size=1, max_size=60))
def test_what_is_reserved_covers_what_is_held_and_comes_back_whole(steps: list[tuple[int, bool]]) -> None:
    memory, held = CachingAllocator(), []
    for i, (size, release) in enumerate(steps):
        memory.take(i, size)
        held.append(i)
        if release:
            memory.give(held.pop(0))
        assert memory.allocated <= memory.reserved
    for name in held:
        memory.give(name)
    assert memory.allocated == 0
    reserved = memory.reserved
    largest = max(pool.reserved for pool in memory.pools.values())
    memory.take("all", largest if memory.pools["large"].reserved == largest else 1)
    assert memory.reserved == reserved, "released blocks have joined into one"


def test_a_capture_gives_back_what_holds_no_block_and_takes_pools_of_its_own() -> None:
    memory = CachingAllocator()
    memory.take("stays", 3 * MIB)
    memory.take("goes", 50 * MIB)
    memory.give("goes")
    assert memory.reserved == 60 * MIB
    memory.begin_capture()
    assert memory.reserved == 20 * MIB, "the part that holds a block"
    memory.take("captured", 30 * MIB)
    assert memory.reserved == 60 * MIB
    memory.give("captured")
    memory.end_capture()
    assert memory.reserved == 60 * MIB, "a graph keeps what it has"
    memory.forget_capture()
    assert memory.reserved == 20 * MIB
    assert memory.highest_reserved == 60 * MIB


def test_what_outlives_a_capture_is_held_beside_those_after_it() -> None:
    memory = CachingAllocator()
    memory.begin_capture()
    memory.take("workspace", 30 * MIB)
    memory.take("captured", 30 * MIB)
    memory.end_capture()
    memory.give("captured")
    memory.forget_capture()
    assert memory.reserved == 40 * MIB
    memory.begin_capture()
    memory.take("captured", 30 * MIB)
    assert memory.reserved == 80 * MIB
    memory.end_capture()
    memory.give("captured")
    memory.give("workspace")
    memory.forget_capture()
    assert memory.reserved == 0


def test_what_a_process_lets_go_of_stays_with_it_unless_it_is_large() -> None:
    memory = ProcessMemory()
    small = MAPPED_FROM_BYTES // 2
    memory.take("small", small)
    memory.take("large", 40 * MIB)
    memory.give("small")
    memory.give("large")
    assert memory.allocated == 0
    assert small <= memory.reserved <= 2 * small
    memory.take("again", small // 2)
    assert memory.reserved <= 2 * small
    assert memory.highest_reserved >= 40 * MIB + small
