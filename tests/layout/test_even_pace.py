"""The pace at which blocks leave for host memory and come back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drawplate.layout.even_pace import BlockAt, EvenPace

MIXES = st.lists(st.sampled_from(["keep", "host", "again"]), min_size=2, max_size=40)
SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=8)


def walked(policies: list[str], sizes: list[int]) -> tuple[list[list[BlockAt]], dict[int, list[BlockAt]]]:
    """What begins to leave at the end of each layer's forward, and to come back when backward begins with it."""
    where = {word: [i for i, policy in enumerate(policies) if policy == word] for word in ("host", "keep")}
    pace, out, back = EvenPace(len(policies), where["host"], where["keep"]), [], {}
    for layer, policy in enumerate(policies):
        if policy == "host":
            pace.sends(layer, sizes)
        out.append(pace.leaving(layer))
    for layer in reversed(range(len(policies))):
        own = [BlockAt(layer, n) for n in range(len(sizes))] if policies[layer] == "host" else []
        back[layer] = [*pace.returning(layer), *filter(pace.needed, own)]
    return out, back


@given(MIXES, SIZES)
@settings(deadline=None)
def test_every_block_leaves_once_and_comes_back_once(policies: list[str], sizes: list[int]) -> None:
    out, back = walked(policies, sizes)
    blocks = [BlockAt(i, n) for i, policy in enumerate(policies) if policy == "host" for n in range(len(sizes))]
    assert [block for some in out for block in some] == blocks, "in the order in which they were made"
    assert sorted(block for some in back.values() for block in some) == blocks
    for layer, some in enumerate(out):
        assert all(block.layer <= layer for block in some), "not before its layer has run"
    for layer, some in back.items():
        assert all(block.layer <= layer for block in some), "not after its layer's backward"


@given(MIXES, SIZES)
@settings(deadline=None)
def test_nothing_comes_back_before_another_layer_has_made_room(policies: list[str], sizes: list[int]) -> None:
    _, back = walked(policies, sizes)
    returned: set[int] = set()
    for layer in reversed(range(len(policies))):
        returned |= {block.layer for block in back[layer]}
        through = sum(policy in ("keep", "host") for policy in policies[layer + 1 :])
        assert len(returned - {layer}) <= through


def test_the_shares_of_a_long_walk_are_even() -> None:
    sizes = [10] * 8
    out, back = walked(["host"] * 8 + ["again"] * 10 + ["keep"] * 14, sizes)
    moved = [10 * len(some) for some in (*out, *back.values())]
    assert max(moved) <= 30, "640 bytes over 30 layers, in blocks of 10"
    assert sum(map(len, out[:8])) < 20, "the first do not leave all at once"
