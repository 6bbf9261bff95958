"""Rows of a table in host memory, by ids on the device: the embedding, where it is not worth the device's memory.

On a GPU the kernel reads page-locked memory over the bus, so that the host has no part in it: nothing is waited for,
and a captured micro-step reads the rows of its own tokens. It costs what the bus takes for tokens x H elements.

Without Triton the rows are looked up by the host, which waits for the ids; that cannot be captured.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton


def host_rows(table_VH: Tensor, ids_N: Tensor, impl: Impl = "auto") -> Tensor:
    """`table_VH[ids_N]`, shape (N, H), where the ids are.

    Args:
        table_VH: contiguous, in host memory; page-locked where the ids are on a GPU.
        ids_N: int64, within the table: the kernel does not check.

    Raises:
        ValueError: the table is not a contiguous matrix in host memory.
    """
    if table_VH.dim() != 2 or not table_VH.is_contiguous() or table_VH.device.type != "cpu":
        raise ValueError(f"needs a contiguous matrix in host memory, got {table_VH.shape} on {table_VH.device}")
    if uses_triton(ids_N.device, impl):
        return _kernels().host_rows(table_VH, ids_N)
    rows_NH = torch.empty(len(ids_N), table_VH.shape[1], dtype=table_VH.dtype, pin_memory=ids_N.is_cuda)
    torch.index_select(table_VH, 0, ids_N.cpu(), out=rows_NH)
    return rows_NH.to(ids_N.device, non_blocking=True)


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import host_rows_triton

    return host_rows_triton
