"""The transposing kernel moves every byte to its place."""

from __future__ import annotations

import pytest
import torch

from drawplate.kernels.transposed import transposed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (130, 77), (257, 384)])
def test_it_is_the_transpose(shape: tuple[int, int]) -> None:
    x = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8).to(DEVICE)
    for kind in (torch.uint8, torch.float8_e4m3fn):
        ours, theirs = (transposed(x.view(kind), impl) for impl in ("triton", "torch"))
        assert ours.shape == (shape[1], shape[0])
        assert ours.dtype == kind
        assert ours.is_contiguous()
        assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))
        assert torch.equal(ours.view(torch.uint8), x.t())


def test_what_it_cannot_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="one-byte"):
        transposed(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="contiguous"):
        transposed(torch.zeros(4, 8, dtype=torch.uint8)[:, :4])
