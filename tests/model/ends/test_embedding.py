"""An embedding in host memory gives what it gives on the device, scaled ones too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from drawplate.model.ends.embedding import embedded, from_host

PLAIN = nn.Embedding(200, 24)
SCALED = Gemma3TextScaledWordEmbedding(200, 24, None, embed_scale=3.5)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("embedding", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_of_a_table_in_host_memory_are_those_of_the_module(embedding: nn.Embedding, impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    ids_BT = torch.tensor([[199, 0, 7], [7, 1, 199]])
    expected_BTH = embedding(ids_BT).detach()
    assert torch.equal(embedded(embedding, ids_BT), expected_BTH)
    if DEVICE == "cuda":
        embedding.weight.data = embedding.weight.data.pin_memory()
    ours_BTH = from_host(embedding, ids_BT.to(DEVICE), impl)  # type: ignore[arg-type]
    assert ours_BTH.device.type == DEVICE
    assert not ours_BTH.requires_grad
    assert torch.equal(ours_BTH.cpu(), expected_BTH)
