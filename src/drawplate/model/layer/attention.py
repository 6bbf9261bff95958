"""Causal attention over packed and padded micro-batches, under the name "drawplate" in transformers.

A packed micro-batch is one row of documents, each of which sees only itself; a padded one has its padding on the right,
where causality alone keeps real tokens from seeing it. So no mask over the whole batch is ever built:

| case | how |
| --- | --- |
| plain causal | `scaled_dot_product_attention(is_causal=True)` |
| packed or sliding, on a GPU in fp16 or bf16 | torch's variable-length FlashAttention, one call; from Ampere on |
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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from drawplate.errors import UsageError
from drawplate.model.layer import causal_attention
from drawplate.model.layer.causal_attention import (
    Rule,
    borders_of,
    by_segments,
    causal,
    reference,
    varlen,
    varlen_serves,
)

NAME = "drawplate"
REFERENCE_NAME = "drawplate_reference"

_watchers: list[list[dict[str, Any]]] = []
_UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "block_table": "a paged cache's block table",
}


def register() -> None:
    """Make "drawplate" and "drawplate_reference" known to transformers. Any number of times."""
    from transformers import AttentionInterface  # here: transformers takes a second to import

    causal_attention.look_at_gpu()
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
    rule = Rule(
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
        borders = borders_of(query_BHTD, kwargs) if packed else None
        return reference(query_BHTD, key_BKSD, value_BKSD, rule, borders), None
    if varlen_serves(query_BHTD, key_BKSD, value_BKSD, rule, packed):
        return varlen(query_BHTD, key_BKSD, value_BKSD, rule, kwargs if packed else {}), None
    if packed:
        out_BHTD = by_segments(query_BHTD, key_BKSD, value_BKSD, rule, borders_of(query_BHTD, kwargs))
    else:
        out_BHTD = causal(query_BHTD, key_BKSD, value_BKSD, rule)
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
