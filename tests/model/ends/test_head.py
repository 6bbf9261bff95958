"""A streamed head between micro-steps: copies that were queued are forgotten, and made again when they are needed."""

from __future__ import annotations

import torch

from drawplate.model.ends.head import ResidentRows, StreamedRows


def rows(streamed: StreamedRows) -> torch.Tensor:
    return torch.cat([weight_VH.clone() for _, weight_VH in streamed.chunks()])


def test_a_pass_after_settling_copies_every_chunk_itself() -> None:
    """Of a captured pass nothing may have been copied before it began."""
    table = torch.arange(11 * 4, dtype=torch.float32).view(11, 4)
    streamed = StreamedRows(table, torch.device("cpu"), slot_rows=3, poison=True)
    streamed.prefetch()
    for slot in streamed._slots:
        slot.fill_(float("nan"))  # as if the copies of the time before had not been made
    streamed.settle()
    assert torch.equal(rows(streamed), table)
    streamed.settle()
    assert torch.equal(rows(streamed), table)


def test_settling_changes_nothing_of_a_resident_head() -> None:
    table = torch.randn(5, 4)
    resident = ResidentRows(table)
    resident.settle()
    assert torch.equal(next(resident.chunks())[1], table)
