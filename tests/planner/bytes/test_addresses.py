"""A run of addresses on paper: best fit, growing into what is unmapped, and giving back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drawplate.planner.bytes.addresses import Addresses

GRANULE = 20


def taken(*sizes: int) -> Addresses:
    addresses = Addresses(GRANULE)
    for size in sizes:
        addresses.take(size)
    return addresses


def test_the_smallest_block_that_is_large_enough_is_taken_and_the_lowest_among_equals() -> None:
    addresses = taken(10, 1, 5, 1, 5, 1, 7)
    for start in (0, 11, 17):
        addresses.give(start)
    assert addresses.take(5) == 11
    assert addresses.take(5) == 17
    assert addresses.take(5) == 0, "the larger one, when nothing smaller is left"


def test_the_block_at_the_end_counts_as_large_as_it_can_become() -> None:
    addresses = taken(12, 1)
    addresses.give(0)
    assert addresses.reserved == GRANULE
    assert addresses.take(6) == 0, "7 bytes are free at the end, which would fit more closely"


def test_a_free_block_before_a_hole_goes_after_larger_ones_that_cannot_grow() -> None:
    addresses = taken(3, 40, 1, 10, 1)  # 0, 3, 43, 44, 54
    addresses.give(3)
    addresses.give_back()
    assert addresses.reserved == 40, "a whole granule, 20 to 40, is unmapped; 3 to 20 and 40 to 43 stay"
    addresses.give(44)
    assert addresses.take(9) == 44, "10 bytes of mapped room go before 17 that a hole follows"
    assert addresses.take(11) == 3


def test_what_is_too_large_for_every_block_takes_the_lowest_run_with_room_and_maps_its_holes() -> None:
    addresses = taken(5, 60, 1)
    addresses.give(5)
    addresses.give_back()
    assert addresses.reserved == 40
    assert addresses.take(50) == 5
    assert addresses.reserved == 80, "mapped again as far as it is needed"
    assert addresses.take(70) == 66, "no run has the room: the end grows"


def test_a_hole_that_is_too_small_is_passed_over() -> None:
    addresses = taken(20, 40, 1)
    addresses.give(20)
    addresses.give_back()
    assert addresses.take(45) == 61
    assert addresses.take(40) == 20


@given(st.lists(st.tuples(st.integers(1, 90), st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_blocks_never_meet_and_what_is_reserved_covers_them(steps: list[tuple[int, bool, bool]]) -> None:
    addresses, held = Addresses(GRANULE), dict[int, int]()
    for size, release, give_back in steps:
        start = addresses.take(size)
        assert all(start + size <= other or other + length <= start for other, length in held.items())
        held[start] = size
        if release:
            addresses.give(oldest := next(iter(held)))
            del held[oldest]
        if give_back:
            addresses.give_back()
            parts = {part for s, n in held.items() for part in range(s // GRANULE, (s + n - 1) // GRANULE + 1)}
            assert addresses.reserved == GRANULE * len(parts), "granules with a block in them, and no other"
        assert sum(held.values()) <= addresses.reserved
    for start in held:
        addresses.give(start)
    addresses.give_back()
    assert addresses.reserved == 0
    assert addresses.take(GRANULE) == 0, "all joined into one"
