"""Rows of a table in host memory arrive where the ids are, each in its place."""

from __future__ import annotations

import pytest
import torch

from drawplate.kernels.host_rows import host_rows

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(7, 1), (50, 96), (33, 4100)])
def test_they_are_the_tables_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    table_VH = torch.randn(rows, width, generator=generator).to(dtype)
    table_VH = table_VH.pin_memory() if DEVICE == "cuda" else table_VH
    ids_N = torch.randint(0, rows, (41,), generator=generator)
    ids_N[:3] = torch.tensor([rows - 1, 0, rows - 1])
    for impl in ("triton", "torch"):
        ours = host_rows(table_VH, ids_N.to(DEVICE), impl)
        assert ours.device.type == DEVICE
        assert torch.equal(ours.cpu(), table_VH[ids_N])


def test_a_table_that_it_cannot_read_is_refused() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        host_rows(torch.zeros(4, 8).t(), ids)
    with pytest.raises(ValueError, match="host memory"):
        host_rows(torch.zeros(4, 8, device="meta"), ids)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_graph_reads_the_rows_of_new_ids() -> None:
    from drawplate.model.base.arena import private_bytes

    table_VH = private_bytes(1000 * 256 * 2, pinned=True).view(torch.bfloat16).view(1000, 256)
    table_VH.copy_(torch.randn(1000, 256))
    ids_N = torch.arange(64, device="cuda")
    host_rows(table_VH, ids_N)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows_NH = host_rows(table_VH, ids_N)
    for first in (0, 500):
        ids_N.copy_(torch.arange(first, first + 64))
        graph.replay()
        assert torch.equal(rows_NH.cpu(), table_VH[first : first + 64])
