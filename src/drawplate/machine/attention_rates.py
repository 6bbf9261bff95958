"""How fast a device attends: causal attention there and back, over documents in rows of their own and packed into one.

On an H100 torch's kernels for packed rows reach half the rate of those for padded ones, and short documents a third of
the rate of long ones, because more is read and written for each product; so all four are timed
(bench/results/profile-packed-large-h100.json). FLOPs are 3.5 times those of forward, the masked half not counted.

Left out: sliding windows, soft caps, heads of another size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SHAPE = {"cuda": (4, 32, 2048, 128), "cpu": (1, 8, 256, 64)}
"""Documents, heads, tokens, size of a head."""
SHORT_DOCUMENT, KEY_HEADS = 512, 8
"""Timed besides on a GPU: as many tokens in documents so short, and as many heads of keys."""


@dataclass(frozen=True)
class AttentionRates:
    """FLOP/s of a device in a dtype. `seconds` times a call."""

    seconds: Callable[[Callable[[], object]], float]
    device: torch.device
    dtype: torch.dtype

    def of_long_documents(self) -> float:
        """In rows of their own, with as many heads for keys as for queries."""
        documents, heads, tokens, _ = SHAPE[self.device.type]
        return self._rate(documents, tokens, heads, _by_rows)

    def by_length(self, *, packed: bool) -> tuple[tuple[float, float], ...]:
        """(tokens of a document, FLOP/s) of short and long documents; nothing where the device has no kernel for it."""
        documents, _, long, _ = SHAPE[self.device.type]
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return ()
        attend = _packed if packed else _by_rows
        with suppress(ImportError, RuntimeError, TypeError):
            return tuple(
                (float(n), self._rate(documents * long // n, n, KEY_HEADS, attend)) for n in (SHORT_DOCUMENT, long)
            )
        return ()

    def _rate(self, documents: int, tokens: int, key_heads: int, attend: Callable[..., None]) -> float:
        _, heads, _, size = SHAPE[self.device.type]
        inputs = [
            torch.randn(documents, tokens, h, size, device=self.device, dtype=self.dtype, requires_grad=True)
            for h in (heads, key_heads, key_heads)
        ]
        return 3.5 * 2 * documents * heads * tokens**2 * size / self.seconds(lambda: attend(*inputs))


def _by_rows(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> None:
    """As a padded micro-batch is attended to."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    torch.autograd.grad(out, [q_BTHD, k_BTKD, v_BTKD], out.detach())


def _packed(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> None:
    """As a packed one is (model/layer/causal_attention.py)."""
    from torch.nn.attention.varlen import varlen_attn

    documents, length = q_BTHD.shape[:2]
    borders = torch.arange(0, documents * length + 1, length, dtype=torch.int32, device=q_BTHD.device)
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 groups queries without being asked
        options["enable_gqa"] = True
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    out: Any = varlen_attn(q, k, v, borders, borders, length, length, **options)
    torch.autograd.grad(out, [q_BTHD, k_BTKD, v_BTKD], out.detach())
