"""Causal attention over packed and padded micro-batches, under the name "drawplate" in transformers.

A packed micro-batch is one row of documents, each of which sees only itself; a padded one has its padding on the right,
where causality alone keeps real tokens from seeing it. So no mask over the whole batch is ever built:

| case | how |
| --- | --- |
| plain causal | `scaled_dot_product_attention(is_causal=True)` |
| packed or sliding, on a GPU in fp16 or bf16 | torch's variable-length FlashAttention, one call |
| packed elsewhere | segment by segment |
| sliding window elsewhere, several new tokens on a cache | query blocks, each against the keys it may see |
| soft-capped scores (Gemma 2) | the same blocks in plain torch, softmax in float32, recomputed in backward |

transformers hands a 2-D attention mask only to implementations that registered a mask function. This one does not:
its mask code waits for the device to look for packing, and there is nothing to build. The price: **left-padded batches
are not noticed here**; whoever has a 2-D mask calls `refuse_left_padding` first. Left out, and refused: attention
dropout, attention sinks, chunked or bidirectional attention, position biases, paged and static caches.

Shapes: B rows, H query heads, K key heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drawplate.errors import UsageError

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # segments are then done one by one
    varlen_attn = None

VARLEN_ARGUMENTS = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)
"""The keyword arguments that this torch's variable-length attention knows; none where it is missing."""

NAME = "drawplate"
REFERENCE_NAME = "drawplate_reference"
BLOCK_QUERIES = 512
"""Queries of one block; scores take `B * H * BLOCK_QUERIES * (BLOCK_QUERIES + window)` elements where they exist."""

_watchers: list[list[dict[str, Any]]] = []
_UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "block_table": "a paged cache's block table",
}


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What one layer's scores are: `softcap * tanh(scaling * q.k / softcap)`, a key at most `window - 1` back."""

    scaling: float
    window: int | None
    softcap: float | None


def register() -> None:
    """Make "drawplate" and "drawplate_reference" known to transformers. Any number of times."""
    from transformers import AttentionInterface  # here: transformers takes a second to import

    AttentionInterface.register(NAME, drawplate_attention)
    AttentionInterface.register(REFERENCE_NAME, functools.partial(drawplate_attention, impl="reference"))


@contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    """The further arguments of each call of attention while the context is open."""
    calls: list[dict[str, Any]] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.remove(calls)


def refuse_left_padding(attention_mask_BT: Tensor) -> None:
    """Check the 2-D mask of a padded batch, 1 for tokens and 0 for padding, which transformers would drop unread.

    Raises:
        ValueError: a row has padding before a token. Looks at the values: on a GPU that is a synchronisation.
    """
    if bool((attention_mask_BT.diff(dim=1) > 0).any()):
        raise ValueError(
            "attention_mask has padding to the left of tokens; 'drawplate' attention needs it on the right: "
            "set tokenizer.padding_side = 'right', or load the model with attn_implementation='sdpa'"
        )


def drawplate_attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    impl: Literal["fast", "reference"] = "fast",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' decoder layers call it.

    With fewer queries than keys (generation on a cache) the queries are the last positions. A packed row (B = 1) comes
    with `cu_seq_lens_q`, `cu_seq_lens_k` (int32 borders, from 0 to T), `max_length_q`, `max_length_k`, as transformers'
    FlashAttentionKwargs name them, and with `segments`, the same borders as a tuple of ints, so that where segments are
    done one by one no device is asked for them.

    Args:
        module: the attention module; its `config` and `is_causal` are looked at.
        query_BHTD: queries, rotated. Keys and values alike, with H a multiple of K.
        key_BKSD: keys.
        value_BKSD: values; their head size may differ from the keys'.
        attention_mask: None. Anything else is refused.
        scaling: of the scores; `D ** -0.5` by default.
        dropout: 0.
        sliding_window: how many keys a query sees, itself included.
        softcap: `attn_logit_softcapping` of Gemma 2.
        impl: "reference" builds the whole mask and all scores: the specification.
        **kwargs: see above; what else transformers passes along is ignored unless it would change the result.

    Returns:
        `(out_BTHD, None)`.

    Raises:
        UsageError: the model's attention has a feature that is not implemented here.
        ValueError: borders that do not fit the queries.
    """
    for calls in _watchers:
        calls.append(kwargs)
    _refuse_unsupported(module, attention_mask, dropout, sliding_window, kwargs)
    rule = _Rule(
        scaling=query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window if sliding_window is not None and sliding_window < key_BKSD.shape[2] else None,
        softcap=softcap,
    )
    packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("segments") is not None
    if packed and (query_BHTD.shape[0] != 1 or query_BHTD.shape[2] != key_BKSD.shape[2]):
        raise ValueError(
            f"a packed batch is one row without a cache, not {query_BHTD.shape[0]} rows of {query_BHTD.shape[2]} "
            f"queries and {key_BKSD.shape[2]} keys"
        )
    if impl == "reference":
        borders = _borders(query_BHTD, kwargs) if packed else None
        return _reference(query_BHTD, key_BKSD, value_BKSD, rule, borders), None
    if _varlen_serves(query_BHTD, key_BKSD, value_BKSD, rule, packed):
        return _varlen(query_BHTD, key_BKSD, value_BKSD, rule, kwargs if packed else {}), None
    if packed:
        out_BHTD = _by_segments(query_BHTD, key_BKSD, value_BKSD, rule, _borders(query_BHTD, kwargs))
    else:
        out_BHTD = _causal(query_BHTD, key_BKSD, value_BKSD, rule)
    return out_BHTD.transpose(1, 2).contiguous(), None


def _refuse_unsupported(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, window: int | None, kwargs: dict[str, Any]
) -> None:
    """Everything that would silently give another result than the model's own attention."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None) or ()
    index = getattr(module, "layer_idx", None)
    layer_type = layer_types[index] if isinstance(index, int) and index < len(layer_types) else ""
    is_causal = kwargs.get("is_causal")
    problems = {
        "an attention mask": attention_mask is not None,
        "attention dropout": dropout > 0,
        "bidirectional attention": not (getattr(module, "is_causal", True) if is_causal is None else is_causal),
        "chunked attention": layer_type == "chunked_attention",
        "a sliding window that its layer does not pass on": layer_type == "sliding_attention"
        and window is None
        and getattr(config, "sliding_window", None) is not None,
        "attention weights as an output": bool(kwargs.get("output_attentions")),
    }
    problems |= {what: kwargs.get(name) is not None for name, what in _UNSUPPORTED_ARGUMENTS.items()}
    for what, found in problems.items():
        if found:
            raise UsageError(
                f"{type(module).__name__} uses {what}, which 'drawplate' attention does not implement",
                next_step="load this model with attn_implementation='eager' or 'sdpa' and padded batches",
            )


def _causal(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule) -> Tensor:
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
    rule: _Rule,
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


def _softcapped(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule, mask_TS: Tensor) -> Tensor:
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


def _by_segments(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule, borders: tuple[int, ...]
) -> Tensor:
    """Each segment by itself. Split, not sliced: autograd then gathers all segments' gradients in one go."""
    lengths = [stop - start for start, stop in pairwise(borders) if stop > start]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query_BHTD, key_BKSD, value_BKSD))
    return torch.cat([_causal(q, k, v, rule) for q, k, v in zip(queries, keys, values, strict=True)], dim=2)


def _borders(query_BHTD: Tensor, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The segments' borders on the host, checked; from `cu_seq_lens_q` (a synchronisation on a GPU) if need be."""
    borders = kwargs.get("segments")
    if borders is None:
        borders = tuple(kwargs["cu_seq_lens_q"].tolist())
    tokens = query_BHTD.shape[2]
    if borders[0] != 0 or borders[-1] != tokens or any(stop < start for start, stop in pairwise(borders)):
        raise ValueError(f"segment borders {borders} must rise from 0 to the row's length, {tokens}")
    return borders


def _varlen_serves(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule, packed: bool) -> bool:
    """Can and should torch's variable-length kernel do this? (Plain causal rows are as fast without.)"""
    return (
        query_BHTD.device.type in ("cuda", "meta")
        and query_BHTD.dtype in (torch.float16, torch.bfloat16)
        and (packed or (rule.window is not None and query_BHTD.shape[2] == key_BKSD.shape[2]))
        and rule.softcap is None
        and query_BHTD.shape[-1] == value_BKSD.shape[-1]
        and query_BHTD.shape[-1] <= 256
        and query_BHTD.shape[-1] % 8 == 0
        and {"scale", "window_size"} <= VARLEN_ARGUMENTS
    )


def _varlen(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule, packing: dict[str, Any]) -> Tensor:
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


def _repeat(x_BKSD: Tensor, heads: int) -> Tensor:
    """Each key head as often as there are query heads to it."""
    groups = heads // x_BKSD.shape[1]
    return x_BKSD if groups == 1 else x_BKSD.repeat_interleave(groups, dim=1)


def _reference(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, rule: _Rule, borders: tuple[int, ...] | None
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
