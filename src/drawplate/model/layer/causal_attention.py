"""Causal attention over one batch: plain, sliding, soft-capped, packed; and the specification of all of them.

Which of these a call takes is attention.py's business; here each is computed as the table there says. No mask over a
whole batch is ever built, but by `reference`.

Shapes: B rows, H query heads, K key heads, T queries, S keys, D head size, N = B x T; G = H / K.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # segments are then done one by one
    varlen_attn = None

VARLEN_ARGUMENTS = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)
"""The keyword arguments that this torch's variable-length attention knows; none where it is missing."""
BLOCK_QUERIES = 512
"""Queries of one block; scores take `B * H * BLOCK_QUERIES * (BLOCK_QUERIES + window)` elements where they exist."""
FLASH_CAPABILITY = (8, 0)
flash_runs = True
"""Whether torch's variable-length kernel runs on this machine's GPU, as `look_at_gpu` found it."""


def look_at_gpu() -> None:
    """Before anything is traced, because a compiler cannot ask a device: GPUs before Ampere have no FlashAttention."""
    global flash_runs
    flash_runs = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= FLASH_CAPABILITY


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one layer's scores are: `softcap * tanh(scaling * q.k / softcap)`, a key at most `window - 1` back."""

    scaling: float
    window: int | None
    softcap: float | None


def reference(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule, borders: tuple[int, ...] | None
) -> Tensor:
    """The specification: every score, one explicit mask -> (B, T, H, D)."""
    heads, queries, keys = query_BHTD.shape[1], query_BHTD.shape[2], key_BKSD.shape[2]
    keys_S = torch.arange(keys, device=query_BHTD.device)
    mask_TS = _visible(keys_S[keys - queries :], keys_S, rule.window)
    if borders is not None:
        document_S = torch.bucketize(keys_S, torch.tensor(borders[1:], device=keys_S.device), right=True)
        mask_TS = mask_TS & (document_S[:, None] == document_S[None, :])
    out_BHTD = _softcapped(query_BHTD, _repeat(key_BKSD, heads), _repeat(value_BKSD, heads), rule, mask_TS)
    return out_BHTD.transpose(1, 2).contiguous()


def causal(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule) -> Tensor:
    """One row's worth of causal attention, with or without a cache -> (B, H, T, D)."""
    queries, keys = query_BHTD.shape[2], key_BKSD.shape[2]
    window = rule.window if rule.window is not None and rule.window < keys else None
    if rule.softcap is None and queries == 1:  # the newest token sees all of its window
        seen = slice(keys - (window or keys), None)
        return _sdpa(query_BHTD, key_BKSD[:, :, seen], value_BKSD[:, :, seen], rule)
    if rule.softcap is None and window is None and queries == keys:
        return _sdpa(query_BHTD, key_BKSD, value_BKSD, rule, is_causal=True)
    blocks = []
    for start, seen, mask_TS in _query_blocks(queries, keys, window, query_BHTD.device):
        block = (query_BHTD[:, :, start : start + BLOCK_QUERIES], key_BKSD[:, :, seen], value_BKSD[:, :, seen])
        if rule.softcap is None:
            blocks.append(_sdpa(*block, rule, mask_TS=mask_TS))
        elif torch.is_grad_enabled():  # keeping every block's scores would be keeping T x S of them
            arguments = (*block, rule, mask_TS)
            blocks.append(checkpoint(_softcapped, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_softcapped(*block, rule, mask_TS))
    return torch.cat(blocks, dim=2)


def by_segments(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule, borders: tuple[int, ...]
) -> Tensor:
    """Each segment by itself. Split, not sliced: autograd then gathers all segments' gradients in one go."""
    lengths = [stop - start for start, stop in pairwise(borders) if stop > start]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query_BHTD, key_BKSD, value_BKSD))
    return torch.cat([causal(q, k, v, rule) for q, k, v in zip(queries, keys, values, strict=True)], dim=2)


def borders_of(query_BHTD: Tensor, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The segments' borders on the host, checked; from `cu_seq_lens_q` (a synchronisation on a GPU) if need be."""
    borders = kwargs.get("segments")
    if borders is None:
        borders = tuple(kwargs["cu_seq_lens_q"].tolist())
    tokens = query_BHTD.shape[2]
    if borders[0] != 0 or borders[-1] != tokens or any(stop < start for start, stop in pairwise(borders)):
        raise ValueError(f"segment borders {borders} must rise from 0 to the row's length, {tokens}")
    return borders


def varlen_serves(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule, packed: bool) -> bool:
    """Can and should torch's variable-length kernel do this? (Plain causal rows are as fast without.)"""
    return (
        flash_runs
        and query_BHTD.device.type in ("cuda", "meta")
        and query_BHTD.dtype in (torch.float16, torch.bfloat16)
        and (packed or (rule.window is not None and query_BHTD.shape[2] == key_BKSD.shape[2]))
        and rule.softcap is None
        and query_BHTD.shape[-1] == value_BKSD.shape[-1]
        and query_BHTD.shape[-1] <= 256
        and query_BHTD.shape[-1] % 8 == 0
        and {"scale", "window_size"} <= VARLEN_ARGUMENTS
    )


def varlen(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule, packing: dict[str, Any]) -> Tensor:
    """torch's variable-length FlashAttention -> (B, T, H, D). The rows of a padded batch are segments too."""
    rows, heads, tokens, _ = query_BHTD.shape
    options: dict[str, Any] = {
        "scale": rule.scaling,
        "window_size": (-1 if rule.window is None else rule.window - 1, 0),
    }
    if "enable_gqa" in VARLEN_ARGUMENTS:  # torch 2.11 groups queries without being asked
        options["enable_gqa"] = key_BKSD.shape[1] != heads
    if packing.get("cu_seq_lens_q") is not None:
        borders, longest = packing["cu_seq_lens_q"], packing.get("max_length_q") or tokens
    elif packing:
        borders, longest = torch.tensor(packing["segments"], dtype=torch.int32), tokens
        borders = borders.to(query_BHTD.device, non_blocking=True)
    else:
        borders, longest = (
            torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=query_BHTD.device),
            tokens,
        )
    # (B, T, H, D) as the projections left it: for a packed row this is a view.
    query_NHD, key_NKD, value_NKD = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTD, key_BKSD, value_BKSD))
    out_NHD: Tensor = varlen_attn(query_NHD, key_NKD, value_NKD, borders, borders, longest, longest, **options)
    return out_NHD.view(rows, tokens, heads, -1)


def _query_blocks(
    queries: int, keys: int, window: int | None, device: torch.device
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield `(first query, the keys that any query of its block sees, which query sees which of them)`."""
    past = keys - queries
    for start in range(0, queries, BLOCK_QUERIES):
        stop = past + min(start + BLOCK_QUERIES, queries)
        first_key = 0 if window is None else max(0, past + start - window + 1)
        positions_T = torch.arange(past + start, stop, device=device)
        keys_S = torch.arange(first_key, stop, device=device)
        yield start, slice(first_key, stop), _visible(positions_T, keys_S, window)


def _visible(positions_T: Tensor, keys_S: Tensor, window: int | None) -> Tensor:
    """Which keys each position sees, (T, S): none ahead, none `window` or more back."""
    back_TS = positions_T[:, None] - keys_S[None, :]
    return back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)


def _sdpa(
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    rule: Rule,
    *,
    mask_TS: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """torch's attention; keys are repeated only where its kernels do not group queries themselves.

    On a CPU half precision goes through float32: torch's bf16 backward there took twice as long on documents of 60 to
    400 tokens.
    """
    heads, dtype = query_BHTD.shape[1], query_BHTD.dtype
    if query_BHTD.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        wide = (query_BHTD.float(), key_BKSD.float(), value_BKSD.float())
        return _sdpa(*wide, rule, mask_TS=mask_TS, is_causal=is_causal).to(dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    if query_BHTD.device.type == "meta" and half and mask_TS is None and is_causal:
        # What a GPU would choose: without one, torch would plan for its slowest way.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out_BHTD: Tensor = flash(query_BHTD, key_BKSD, value_BKSD, 0.0, is_causal, scale=rule.scaling)[0]
        return out_BHTD
    grouped = query_BHTD.device.type == "cpu" or (half and mask_TS is None and query_BHTD.shape[-1] <= 256)
    if not grouped:
        key_BKSD, value_BKSD = _repeat(key_BKSD, heads), _repeat(value_BKSD, heads)
    return F.scaled_dot_product_attention(
        query_BHTD,
        key_BKSD,
        value_BKSD,
        attn_mask=mask_TS,
        is_causal=is_causal,
        scale=rule.scaling,
        enable_gqa=key_BKSD.shape[1] != heads,
    )


def _softcapped(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: Rule, mask_TS: Tensor) -> Tensor:
    """Attention in plain torch: scores and softmax in float32, the mask's False left out."""
    rows, heads, queries, _ = query_BHTD.shape
    groups = heads // key_BKSD.shape[1]
    query_BKGTD = query_BHTD.unflatten(1, (-1, groups))
    scores_BKGTS = query_BKGTD @ key_BKSD[:, :, None].transpose(-1, -2)
    scores_BKGTS = scores_BKGTS.to(torch.promote_types(query_BHTD.dtype, torch.float32)) * rule.scaling
    if rule.softcap is not None:
        scores_BKGTS = rule.softcap * torch.tanh(scores_BKGTS / rule.softcap)
    weights_BKGTS = scores_BKGTS.masked_fill(~mask_TS, -torch.inf).softmax(-1).to(value_BKSD.dtype)
    out_BHTD: Tensor = (weights_BKGTS @ value_BKSD[:, :, None]).reshape(rows, heads, queries, -1)
    return out_BHTD


def _repeat(x_BKSD: Tensor, heads: int) -> Tensor:
    """Each key head as often as there are query heads to it."""
    groups = heads // x_BKSD.shape[1]
    return x_BKSD if groups == 1 else x_BKSD.repeat_interleave(groups, dim=1)
