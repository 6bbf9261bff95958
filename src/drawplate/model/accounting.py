"""Every tensor of a base model is accounted for before anything is read: none is missing, and none is left over.

A tensor that the files hold and the model does not read is a sign that another model is meant: biases or a layer that
config.json does not mention, scales beside codes, a head of its own. What is known to change nothing is let through:
what transformers itself ignores for the class, tables that code computes, and the other parts of a model for text and
images. The reverse (tensors that nobody holds) is `CheckpointNames.require_all`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from drawplate.errors import IntegrityError, UsageError
from drawplate.model.anatomy import Anatomy
from drawplate.model.checkpoint_names import CheckpointNames
from drawplate.model.weights import Checkpoint

COMPUTED = re.compile(r"(rotary_emb\.(\w+_)?inv_freq|\.(attn|attention)\.(bias|masked_bias)|\.position_ids)$")
"""Tables that older versions of transformers saved, and that its code computes: rotary frequencies, causal masks."""

BITSANDBYTES = re.compile(
    r"\.(weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\S+)|SCB|weight_format)$"
)
"""What bitsandbytes keeps beside a weight that it has quantized."""

SHOWN = 3


def require_accounted(names: CheckpointNames, anatomy: Anatomy, wanted: Iterable[str]) -> None:
    """Refuse a checkpoint that holds tensors which the model does not read, or numbers that are no weights.

    Args:
        names: of the checkpoint, in which nothing that is wanted is missing.
        anatomy: of the model.
        wanted: every tensor that is read, by transformers' name of it.

    Raises:
        IntegrityError: tensors are left over; the first are named.
        UsageError: a weight is stored as codes of a quantization that Drawplate does not read.
    """
    found = {name: names.name_of(name) for name in wanted}
    read = {own for own in found.values() if own is not None}
    require_weights(names.checkpoint, read)
    left = [name for name in names.checkpoint.files if name not in read and not _known(name, names, anatomy, read)]
    if left:
        shown = ", ".join(sorted(left)[:SHOWN])
        raise IntegrityError(
            f"{names.checkpoint.name} holds {len(left)} tensors that {names.architecture} does not read: {shown}"
            f"{' ...' if len(left) > SHOWN else '.'} With them it is another model than the one that would be trained.",
            safe="Nothing was loaded or written.",
            next_step="Compare config.json with the files (number of layers, biases, tied embeddings). If they do not "
            "belong together, fetch the model again.",
        )


def require_weights(checkpoint: Checkpoint, read: Iterable[str]) -> None:
    """Refuse tensors whose numbers mean nothing without scales beside them.

    Raises:
        UsageError: one of `read` is stored in 8 bits or fewer, and not by bitsandbytes.
    """
    known = set() if checkpoint.quantized_precision is None else {torch.uint8, torch.int8}
    for name in read:
        dtype = checkpoint.dtype_of(name)
        if dtype.itemsize < 2 and dtype != torch.bool and dtype not in known:
            raise UsageError(
                f"{checkpoint.name} is quantized: {name} is stored as {str(dtype).removeprefix('torch.')} codes.",
                safe="Nothing was loaded or written.",
                next_step="Use the model's unquantized weights; Drawplate quantizes them while it loads.",
            )


def _known(name: str, names: CheckpointNames, anatomy: Anatomy, read: set[str]) -> bool:
    """Whether a tensor that is not read is known to change nothing."""
    if COMPUTED.search(name) or _of_quantized(name, names.checkpoint, read) or _is_tied_head(name, names, anatomy):
        return True
    ignored = getattr(anatomy.skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in ignored):
        return True
    return names.checkpoint.is_wrapper and not name.startswith(_layers_prefixes(anatomy, read))


def _of_quantized(name: str, checkpoint: Checkpoint, read: set[str]) -> bool:
    match = BITSANDBYTES.search(name)
    return bool(match and checkpoint.quantized_precision and f"{name[: match.start()]}.weight" in read)


def _is_tied_head(name: str, names: CheckpointNames, anatomy: Anatomy) -> bool:
    """Many files hold a tied head although it is the embedding; weights.py has seen to one that is not."""
    return anatomy.tied and name == names.name_of(f"{anatomy.head_path}.weight")


def _layers_prefixes(anatomy: Anatomy, read: set[str]) -> tuple[str, ...]:
    """How the names of the decoder layers begin in the files; what begins otherwise is another part of the wrapper."""
    last = anatomy.layers_path.rpartition(".")[2]
    return tuple({f"{name.partition(f'{last}.0.')[0]}{last}." for name in read if f"{last}.0." in name})
