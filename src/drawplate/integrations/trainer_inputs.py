"""What a Trainer's collator makes -> a `Batch`: padding on the right, or documents packed into rows.

transformers' convention holds: `labels[t]` is the token AT position t, -100 where the loss does not count it, and is
compared with the prediction made at t - 1. Documents of a row are told apart by `position_ids` that do not go on from
their neighbour's, which is what TRL's and transformers' padding-free collators make, or by `cu_seq_lens_q`. What counts
is what the labels say, also across the border of two documents: those collators put -100 at the start of each.

Everything is brought to the host first, because documents, embeddings and dropout keys are looked up there: one
synchronisation with a GPU for each micro-batch. Left out: padding on the left, masks of more than two dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drawplate.data.batches import NOT_COUNTED, PADDING_SEQUENCE, Batch
from drawplate.model.layer.attention import refuse_left_padding


def batch_of(
    input_ids_BT: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Batch:
    """A micro-batch in host memory; several rows of which any holds several documents become one row, end to end.

    Args:
        input_ids_BT: token ids.
        attention_mask: (B, T), 1 for tokens, 0 for padding to their right.
        position_ids: (B, T) or (1, T).
        labels: (B, T), not shifted.
        shift_labels: (B, T), the token after each position; instead of labels.
        cu_seqlens: borders of a single row's documents from 0 to T, where there are no position ids.

    Raises:
        ValueError: shapes that do not belong together, padding on the left, or a mask that is not of zeros and ones.
    """
    if input_ids_BT.dim() != 2:
        raise ValueError(f"input_ids must have the shape (rows, tokens), not {tuple(input_ids_BT.shape)}")
    ids_BT = _on_host(input_ids_BT)
    real_BT = _real(attention_mask, ids_BT)
    starts_BT, positions_BT = _documents(ids_BT, real_BT, position_ids, cu_seqlens)
    targets_BT = _targets(ids_BT, labels, shift_labels)
    sequences_BT = (starts_BT.flatten().cumsum(0) - 1).view_as(ids_BT).masked_fill(~real_BT, PADDING_SEQUENCE)
    packed = bool(starts_BT[:, 1:].any())
    rows, borders = ids_BT.shape, None
    if packed:
        rows = torch.Size((1, ids_BT.numel()))
        ends = torch.tensor([ids_BT.numel()])
        borders = torch.cat([starts_BT.flatten().nonzero()[:, 0], ends]).to(torch.int32)
    return Batch(
        input_ids_BT=ids_BT.reshape(rows),
        targets_BT=targets_BT.reshape(rows),
        position_ids_BT=positions_BT.reshape(rows),
        sequence_ids_BT=sequences_BT.reshape(rows),
        cu_seqlens=borders,
        max_seqlen=ids_BT.shape[1] if borders is None else int(borders.diff().max()),
        tokens=int(real_BT.sum()),
        counted_tokens=int((targets_BT != NOT_COUNTED).sum()),
        documents=(),
    )


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.int64)


def _real(attention_mask: Tensor | None, ids_BT: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT = _on_host(attention_mask)
    if mask_BT.shape != ids_BT.shape or bool(((mask_BT != 0) & (mask_BT != 1)).any()):
        raise ValueError(
            f"attention_mask must be zeros and ones of the shape {tuple(ids_BT.shape)} of input_ids, not "
            f"{tuple(mask_BT.shape)} with values up to {int(mask_BT.max())}: mark documents of a packed row by "
            "position_ids that start again at 0"
        )
    refuse_left_padding(mask_BT)
    return mask_BT.bool()


def _documents(
    ids_BT: Tensor, real_BT: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> (is it the first token of a document, positions); padding goes on with the document before it."""
    starts_BT = torch.zeros_like(real_BT)
    starts_BT[:, 0] = True
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape not in (ids_BT.shape, (1, ids_BT.shape[1])):
            raise ValueError(f"position_ids {tuple(position_ids.shape)} do not fit input_ids {tuple(ids_BT.shape)}")
        positions_BT = _on_host(position_ids).expand_as(ids_BT)
        starts_BT[:, 1:] = (positions_BT.diff(dim=1) != 1) & real_BT[:, 1:]
        return starts_BT, positions_BT
    if cu_seqlens is not None:
        if len(ids_BT) != 1:
            raise ValueError("cu_seq_lens_q describes the documents of a single row: pass position_ids instead")
        borders = _on_host(cu_seqlens)
        starts_BT[0, borders[borders < ids_BT.shape[1]]] = True
    place_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return starts_BT, place_BT - place_BT.where(starts_BT, torch.zeros_like(place_BT)).cummax(dim=1).values


def _targets(ids_BT: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    targets_BT = torch.full_like(ids_BT, NOT_COUNTED)
    if shift_labels is not None:
        targets_BT.copy_(_on_host(shift_labels))
    elif labels is not None:
        if labels.shape != ids_BT.shape:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit input_ids {tuple(ids_BT.shape)}")
        targets_BT[:, :-1] = _on_host(labels)[:, 1:]
    return targets_BT
